// Calls of plain tensors on the CPU that clearly fit: checked and run here, since what Python does before a kernel
// starts takes longer than the kernel at small shapes, and a network makes hundreds of calls a step.
//
// Nothing is refused here. A call that is not clearly right (another device, a subclass, a shape that does
// not fit) is left to api.py, which runs it or says what is wrong with it. So the checks are those of api.py, turned
// round: what passes here passes there.
#include "calls.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <string_view>
#include <vector>

#include "autograd.h"

namespace restore_kernels {
namespace {

namespace py = pybind11;

constexpr size_t kMostImages = 8;

bool is_floating(const Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

// A tensor or parameter itself, no subclass: in memory, of a supported dtype; else null.
const Tensor* plain(handle x) {
  if (!THPVariable_CheckExact(x.ptr())) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(x.ptr());
  const bool fits = tensor.is_cpu() && tensor.layout() == at::kStrided && is_floating(tensor);
  return fits ? &tensor : nullptr;
}

// What a matrix product works with: a plain tensor, in the dtype that autocast has for those; else undefined.
Tensor operand(handle x) {
  const Tensor* tensor = plain(x);
  if (!tensor) return {};
  if (!at::autocast::is_autocast_enabled(at::kCPU) || tensor->scalar_type() == at::kDouble) return *tensor;
  const auto type = at::autocast::get_autocast_dtype(at::kCPU);
  if (tensor->scalar_type() == type) return *tensor;
  const py::gil_scoped_release release;
  return tensor->to(type);
}

bool like(const Tensor& x, const Tensor& other, at::IntArrayRef sizes) {
  return x.scalar_type() == other.scalar_type() && x.sizes() == sizes;
}

// None, or an operand of these sizes and of other's dtype; whether x is one of the two.
bool optional_like(handle x, const Tensor& other, at::IntArrayRef sizes, OptionalTensor& result) {
  if (x.is_none()) return true;
  const Tensor tensor = operand(x);
  if (!tensor.defined() || !like(tensor, other, sizes)) return false;
  result = tensor;
  return true;
}

bool only_batch_is_empty(const Tensor& x) {
  for (int64_t i = 1; i < x.dim(); ++i)
    if (x.size(i) == 0) return false;
  return true;
}

bool broadcasts(const Tensor& x, at::IntArrayRef sizes) {
  const auto dims = static_cast<int64_t>(sizes.size());
  for (int64_t i = 1; i <= x.dim(); ++i)
    if (i > dims || (x.size(-i) != 1 && x.size(-i) != sizes[dims - i])) return false;
  return true;
}

// An image, or several that differ in their channels alone; empty if they are not clearly that.
std::vector<Tensor> images_of(handle x) {
  std::vector<Tensor> images;
  const auto add = [&](handle each) {
    const Tensor image = operand(each);
    if (!image.defined() || image.dim() != 4 || !only_batch_is_empty(image)) return false;
    if (!images.empty()) {
      const Tensor& first = images[0];
      if (!like(image, first, {first.size(0), image.size(1), first.size(2), first.size(3)})) return false;
    }
    images.push_back(image);
    return true;
  };
  const bool several = PyList_CheckExact(x.ptr()) || PyTuple_CheckExact(x.ptr());
  if (several) {
    const auto sequence = py::reinterpret_borrow<py::sequence>(x);
    if (sequence.size() > kMostImages) return {};
    for (const auto& each : sequence)
      if (!add(each)) return {};
  } else if (!add(x)) {
    return {};
  }
  return images;
}

int64_t channels_of(const std::vector<Tensor>& images) {
  int64_t channels = 0;
  for (const Tensor& image : images) channels += image.size(1);
  return channels;
}

std::optional<std::string_view> text(handle x) {
  if (!PyUnicode_CheckExact(x.ptr())) return std::nullopt;
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(x.ptr(), &size);
  return std::string_view(data, static_cast<size_t>(size));
}

// What attention between channels takes beside its operands.
struct ChannelAttention {
  Tensor q, k, v, temperature;
  OptionalTensor out_proj;
  bool normalize = false;

  // False if the call is not clearly right, or in another layout.
  bool parse(handle q_, handle k_, handle v_, handle temperature_, handle normalize_, handle layout, handle projection) {
    q = operand(q_), k = operand(k_), v = operand(v_);
    if (!q.defined() || !k.defined() || !v.defined() || q.dim() != 4 || !only_batch_is_empty(q)) return false;
    if (!like(k, q, q.sizes()) || !like(v, q, q.sizes())) return false;
    if (text(layout) != "channel" || !PyBool_Check(normalize_.ptr())) return false;
    normalize = normalize_.ptr() == Py_True;
    const int64_t heads = q.size(1), channels = q.size(2);
    if (!projection.is_none()) {
      const Tensor weight = operand(projection);
      if (!weight.defined() || weight.dim() != 2 || weight.size(0) == 0) return false;
      if (!like(weight, q, {weight.size(0), heads * channels})) return false;
      out_proj = weight;
    }
    if (const Tensor* given = plain(temperature_)) {
      if (!broadcasts(*given, {q.size(0), heads, 1, 1})) return false;
      temperature = *given;
      return true;
    }
    if (!temperature_.is_none()) return false;
    temperature = at::full({1, 1}, normalize ? 1.0 : 1 / std::sqrt(static_cast<double>(q.size(3))), working_options());
    return true;
  }

  at::TensorOptions working_options() const {
    return at::TensorOptions(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  }
};

// The entries that the branches keep, all `row` of them for None; empty if they are not clearly right.
std::vector<int64_t> counts_of(handle topk, int64_t row) {
  std::vector<int64_t> counts;
  if (!PyList_CheckExact(topk.ptr()) && !PyTuple_CheckExact(topk.ptr())) return {};
  for (const auto& entry : py::reinterpret_borrow<py::sequence>(topk)) {
    if (!entry.is_none() && !PyLong_CheckExact(entry.ptr())) return {};
    int overflow = 0;
    const int64_t kept = entry.is_none() ? row : PyLong_AsLongLongAndOverflow(entry.ptr(), &overflow);
    if (overflow || kept < 1 || kept > row) return {};
    counts.push_back(kept);
  }
  return counts;
}

}  // namespace

Result channel_gate_call(handle x, handle down, handle up, handle down_bias, handle up_bias, handle residual) {
  const Tensor *image = plain(x), *squeeze = plain(down), *excite = plain(up), *added = plain(residual);
  if (!image || !squeeze || !excite || (!added && !residual.is_none())) return std::nullopt;
  if (image->dim() != 4 || !only_batch_is_empty(*image) || squeeze->dim() != 4 || squeeze->size(0) == 0) return std::nullopt;
  const int64_t channels = image->size(1), hidden = squeeze->size(0);
  const auto is = [](const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    return tensor.sizes() == at::IntArrayRef(sizes);
  };
  if (!is(*squeeze, {hidden, channels, 1, 1}) || !is(*excite, {channels, hidden, 1, 1})) return std::nullopt;
  if (added && !like(*added, *image, image->sizes())) return std::nullopt;
  OptionalTensor biases[2];
  const handle given[] = {down_bias, up_bias};
  for (int i = 0; i < 2; ++i) {
    if (given[i].is_none()) continue;
    const Tensor* bias = plain(given[i]);
    if (!bias || !is(*bias, {i == 0 ? hidden : channels})) return std::nullopt;
    biases[i] = *bias;
  }
  const py::gil_scoped_release release;
  return channel_gate(*image, *squeeze, *excite, biases[0], biases[1], added ? OptionalTensor(*added) : std::nullopt);
}

Result channel_norm_call(handle x, handle weight, handle bias, handle eps) {
  const Tensor *image = plain(x), *scale = plain(weight), *shift = bias.is_none() ? nullptr : plain(bias);
  if (!image || !scale || (!shift && !bias.is_none()) || !PyFloat_CheckExact(eps.ptr())) return std::nullopt;
  if (image->dim() != 4 || !only_batch_is_empty(*image) || scale->sizes() != image->sizes().slice(1, 1)) return std::nullopt;
  if (shift && shift->sizes() != scale->sizes()) return std::nullopt;
  const double added = PyFloat_AS_DOUBLE(eps.ptr());
  if (!(added > 0 && std::isfinite(added))) return std::nullopt;
  const py::gil_scoped_release release;
  return channel_norm(*image, *scale, shift ? OptionalTensor(*shift) : std::nullopt, added);
}

Result depthwise_conv2d_call(handle x, handle weight, handle bias, handle dilation, handle activation, handle slope,
                             handle gate) {
  const auto images = images_of(x);
  const Tensor kernel = operand(weight);
  if (images.empty() || !kernel.defined() || kernel.dim() != 4 || !PyLong_CheckExact(dilation.ptr())) return std::nullopt;
  const Tensor& first = images[0];
  const int64_t outputs = kernel.size(0), inputs = kernel.size(1), size = kernel.size(2);
  const bool known = (inputs == 1 || inputs == 2) && (size == 1 || size == 3 || size == 5 || size == 7);
  if (!known || channels_of(images) != outputs * inputs) return std::nullopt;
  if (!like(kernel, first, {outputs, inputs, size, size})) return std::nullopt;
  const long taps = PyLong_AsLong(dilation.ptr());
  if (taps != 1 && taps != 2) {
    PyErr_Clear();  // of a number that is no long
    return std::nullopt;
  }
  std::optional<std::string> function;
  if (!activation.is_none()) {
    const auto name = text(activation);
    if (name != "relu" && name != "gelu" && name != "prelu") return std::nullopt;
    function = *name;
  }
  OptionalTensor biases, slopes, gates;
  if (!optional_like(bias, first, {outputs}, biases)) return std::nullopt;
  if (!optional_like(gate, first, {first.size(0), outputs, first.size(2), first.size(3)}, gates)) return std::nullopt;
  if (!optional_like(slope, first, {1}, slopes) && !optional_like(slope, first, {outputs}, slopes)) return std::nullopt;
  if (slopes.has_value() != (function == "prelu")) return std::nullopt;
  const py::gil_scoped_release release;
  return depthwise_conv(images, kernel, biases, slopes, gates, taps, function);
}

Result pointwise_conv2d_call(handle x, handle weight, handle bias) {
  const auto images = images_of(x);
  const Tensor matrix = operand(weight);
  if (images.empty() || !matrix.defined() || (matrix.dim() != 4 && matrix.dim() != 5)) return std::nullopt;
  const int64_t outputs = matrix.size(-4), channels = channels_of(images), batch = images[0].size(0);
  const bool fits = matrix.dim() == 4 ? like(matrix, images[0], {outputs, channels, 1, 1})
                                       : like(matrix, images[0], {batch, outputs, channels, 1, 1});
  OptionalTensor biases;
  if (!fits || outputs == 0 || !optional_like(bias, images[0], {outputs}, biases)) return std::nullopt;
  const py::gil_scoped_release release;
  return pointwise_conv(images, matrix, biases);
}

Result topk_attention_call(handle q, handle k, handle v, handle topk, handle weights, handle temperature, handle normalize,
                           handle layout, handle out_proj) {
  ChannelAttention call;
  if (!call.parse(q, k, v, temperature, normalize, layout, out_proj)) return std::nullopt;
  const auto counts = counts_of(topk, call.q.size(2));
  if (counts.empty()) return std::nullopt;
  const auto branches = static_cast<int64_t>(counts.size());
  const Tensor* given = weights.is_none() ? nullptr : plain(weights);
  if (!given && !weights.is_none()) return std::nullopt;
  if (given && !broadcasts(*given, {call.q.size(0), call.q.size(1), branches})) return std::nullopt;
  const Tensor mixed = given ? *given : at::full({1}, 1.0 / static_cast<double>(branches), call.working_options());
  const py::gil_scoped_release release;
  return channel_topk(call.q, call.k, call.v, call.temperature, mixed, call.out_proj, counts, call.normalize);
}

Result masked_attention_call(handle q, handle k, handle v, handle mask, handle temperature, handle normalize, handle layout,
                             handle out_proj) {
  ChannelAttention call;
  if (!call.parse(q, k, v, temperature, normalize, layout, out_proj)) return std::nullopt;
  const Tensor* given = mask.is_none() ? nullptr : plain(mask);
  if (!given && !mask.is_none()) return std::nullopt;
  if (given && !broadcasts(*given, call.q.sizes())) return std::nullopt;
  const py::gil_scoped_release release;
  return channel_masked(call.q, call.k, call.v, given ? OptionalTensor(*given) : std::nullopt, call.temperature, call.out_proj,
                        call.normalize);
}

}  // namespace restore_kernels
