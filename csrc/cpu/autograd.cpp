// The autograd nodes of the operators in C++, for calls that nothing transforms: in Python the same
// node costs a quarter of a millisecond when caches are cold, as long as the kernels at small shapes.
//
// Each node does what its twin in autograd.py does: small arguments, masks among them, are converted and broadcast
// where autograd does not watch, the operators are called through the dispatcher (so profilers and modes see them), and a second
// derivative is an error.
#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include "autograd.h"

namespace restore_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "cpu").typed<Signature>();
}

at::ScalarType accumulate_type(const Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor in_type(const Tensor& x, at::ScalarType type) { return x.scalar_type() == type ? x : x.to(type); }

// x broadcast to `sizes`, of which the result has the first `dims`; of the others x has one element. A view that nobody
// watches is not told to anybody: with cold caches the dispatcher takes longer than the kernel that reads it.
Tensor broadcast(const Tensor& x, at::IntArrayRef sizes, size_t dims) {
  const bool is_watched = c10::impl::TorchDispatchModeTLS::any_modes_set() || x.key_set().has(c10::DispatchKey::Python);
  if (is_watched) return x.expand(sizes).view(sizes.slice(0, dims));
  c10::SmallVector<int64_t, 4> strides(dims, 0);
  for (int64_t i = 1, n = static_cast<int64_t>(sizes.size()); i <= x.dim(); ++i)
    if (n - i < static_cast<int64_t>(dims) && x.size(-i) != 1) strides[n - i] = x.stride(-i);
  auto view = x.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true);
  view->set_sizes_and_strides(sizes.slice(0, dims), strides);
  return Tensor(std::move(view));
}

// A temperature broadcastable to (B, H, 1, 1) as (B, H).
Tensor per_head(const Tensor& temperature, const Tensor& q) {
  return broadcast(in_type(temperature, accumulate_type(q)), {q.size(0), q.size(1), 1, 1}, 2);
}

Tensor per_branch(const Tensor& weights, const Tensor& q, size_t branches) {
  return broadcast(in_type(weights, accumulate_type(q)), {q.size(0), q.size(1), static_cast<int64_t>(branches)}, 3);
}

// A mask broadcastable to (B, H, C, N) as (B, H, C or 1, N).
OptionalTensor per_pixel(const Tensor& mask, const Tensor& q) {
  if (!mask.defined()) return std::nullopt;
  const int64_t rows = mask.dim() > 1 ? mask.size(-2) : 1;
  return broadcast(in_type(mask, accumulate_type(q)), {q.size(0), q.size(1), rows, q.size(3)}, 4);
}

// The gradient of x from that of x broadcast to `sizes`.
Tensor sum_to(const Tensor& grad, at::IntArrayRef sizes, const Tensor& x) {
  if (grad.numel() == x.numel()) return in_type(grad.sizes() == x.sizes() ? grad : grad.view(x.sizes()), x.scalar_type());
  return in_type(at::sum_to(grad.view(sizes), x.sizes()), x.scalar_type());
}

Tensor temperature_gradient(const Tensor& grad, const Tensor& temperature) {
  return sum_to(grad, {grad.size(0), grad.size(1), 1, 1}, temperature);
}

OptionalTensor optional(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }
Tensor defined_if(const OptionalTensor& x) { return x.value_or(Tensor()); }

// Where the gradients are to be differentiated again, doing so raises.
variable_list once(const char* name, variable_list grads) {
  if (!at::GradMode::is_enabled()) return grads;
  const std::string message = std::string(name) + " has no second derivative on backend 'cpu'; backend='eager' has one";
  auto error = std::make_shared<torch::autograd::DelayedError>(message, static_cast<int64_t>(grads.size()));
  for (Tensor& grad : grads)
    if (grad.defined()) grad = grad.detach().requires_grad_();
  return (*error)(std::move(grads));
}

struct ChannelTopK : torch::autograd::Function<ChannelTopK> {
  using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                     const Tensor&, const OptionalTensor&, at::IntArrayRef, bool);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      const Tensor&, const Tensor&, at::IntArrayRef, bool);

  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                        const Tensor& weights, const OptionalTensor& out_proj, const std::vector<int64_t>& topk,
                        bool normalize) {
    static const auto op = find<Forward>("restore_kernels::topk_attention_channel");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, similarity, norms] = op.call(q, k, v, per_head(temperature, q), per_branch(weights, q, topk.size()),
                                            out_proj, topk, normalize);
    ctx->save_for_backward({q, k, v, temperature, weights, defined_if(out_proj), similarity, norms});
    ctx->saved_data["topk"] = topk;
    ctx->saved_data["normalize"] = normalize;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::topk_attention_channel_backward");
    const auto x = ctx->get_saved_variables();
    const auto topk = ctx->saved_data["topk"].toIntVector();
    auto [q, k, v, temperature, weights, out_proj] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(grad_out[0], x[0], x[1], x[2], per_head(x[3], x[0]), per_branch(x[4], x[0], topk.size()),
                     optional(x[5]), x[6], x[7], topk, ctx->saved_data["normalize"].toBool());
    }();
    const Tensor projection = x[5].defined() ? in_type(out_proj, x[5].scalar_type()) : Tensor();
    return once("topk_attention", {q, k, v, temperature_gradient(temperature, x[3]),
                                   sum_to(weights, weights.sizes(), x[4]), projection, Tensor(), Tensor()});
  }
};

struct TokenTopK : torch::autograd::Function<TokenTopK> {
  using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                             const Tensor&, at::IntArrayRef, bool);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, at::IntArrayRef, bool);

  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature,
                        const Tensor& weights, const std::vector<int64_t>& topk, bool normalize) {
    static const auto op = find<Forward>("restore_kernels::topk_attention_token");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, threshold, last_tie, log_sum_exp] =
        op.call(q, k, v, per_head(temperature, q), per_branch(weights, q, topk.size()), topk, normalize);
    ctx->save_for_backward({q, k, v, temperature, weights, threshold, last_tie, log_sum_exp});
    ctx->saved_data["topk"] = topk;
    ctx->saved_data["normalize"] = normalize;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::topk_attention_token_backward");
    const auto x = ctx->get_saved_variables();
    const auto topk = ctx->saved_data["topk"].toIntVector();
    auto [q, k, v, temperature, weights] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(grad_out[0], x[0], x[1], x[2], per_head(x[3], x[0]), per_branch(x[4], x[0], topk.size()), x[5],
                     x[6], x[7], topk, ctx->saved_data["normalize"].toBool());
    }();
    return once("topk_attention", {q, k, v, temperature_gradient(temperature, x[3]),
                                   sum_to(weights, weights.sizes(), x[4]), Tensor(), Tensor()});
  }
};

struct ChannelMasked : torch::autograd::Function<ChannelMasked> {
  using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                                     const Tensor&, const OptionalTensor&, bool);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
      const OptionalTensor&, const Tensor&, const Tensor&, bool);

  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                        const Tensor& temperature, const OptionalTensor& out_proj, bool normalize) {
    static const auto op = find<Forward>("restore_kernels::masked_attention_channel");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, similarity, norms] = op.call(q, k, v, per_pixel(defined_if(mask), q), per_head(temperature, q), out_proj, normalize);
    ctx->save_for_backward({q, k, v, defined_if(mask), temperature, defined_if(out_proj), similarity, norms});
    ctx->saved_data["normalize"] = normalize;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::masked_attention_channel_backward");
    const auto x = ctx->get_saved_variables();
    auto [q, k, v, mask, temperature, out_proj] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(grad_out[0], x[0], x[1], x[2], per_pixel(x[3], x[0]), per_head(x[4], x[0]), optional(x[5]), x[6], x[7],
                     ctx->saved_data["normalize"].toBool());
    }();
    const Tensor projection = x[5].defined() ? in_type(out_proj, x[5].scalar_type()) : Tensor();
    const Tensor of_mask = x[3].defined() ? sum_to(mask, mask.sizes(), x[3]) : Tensor();
    return once("masked_attention", {q, k, v, of_mask, temperature_gradient(temperature, x[4]),
                                     projection, Tensor()});
  }
};

struct TokenMasked : torch::autograd::Function<TokenMasked> {
  using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                                     const Tensor&, bool);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                      const Tensor&, const OptionalTensor&, const Tensor&,
                                                                      const Tensor&, const Tensor&, bool);

  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& mask, const Tensor& temperature, bool normalize) {
    static const auto op = find<Forward>("restore_kernels::masked_attention_token");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, log_sum_exp, wide_out] = op.call(q, k, v, mask, per_head(temperature, q), normalize);
    const bool was_rounded = out.scalar_type() != log_sum_exp.scalar_type();
    ctx->save_for_backward({q, k, v, defined_if(mask), temperature, was_rounded ? wide_out : out, log_sum_exp});
    ctx->saved_data["normalize"] = normalize;
    return {out};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::masked_attention_token_backward");
    const auto x = ctx->get_saved_variables();
    auto [q, k, v, mask, temperature] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(grad_out[0], x[0], x[1], x[2], optional(x[3]), per_head(x[4], x[0]), x[5], x[6],
                     ctx->saved_data["normalize"].toBool());
    }();
    return once("masked_attention", {q, k, v, x[3].defined() ? mask : Tensor(), temperature_gradient(temperature, x[4]),
                                     Tensor()});
  }
};

struct ChannelGate : torch::autograd::Function<ChannelGate> {
  using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                                             const OptionalTensor&, const OptionalTensor&);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                      const Tensor&, const Tensor&, const Tensor&,
                                                                      const Tensor&);

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& down, const Tensor& up,
                        const OptionalTensor& down_bias, const OptionalTensor& up_bias, const OptionalTensor& residual) {
    static const auto op = find<Forward>("restore_kernels::channel_gate");
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto type = accumulate_type(x);
    const auto wide = [&](const OptionalTensor& bias) { return bias ? OptionalTensor(bias->to(type)) : std::nullopt; };
    auto [out, mean, hidden, gate] = op.call(x, down.to(type), up.to(type), wide(down_bias), wide(up_bias), residual);
    ctx->save_for_backward({x, down, up, defined_if(down_bias), defined_if(up_bias), mean, hidden, gate});
    ctx->saved_data["has_residual"] = residual.has_value();
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::channel_gate_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &down = saved[1], &up = saved[2], &mean = saved[5];
    auto [of_x, of_down, of_up, of_down_bias, of_up_bias] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      const auto type = mean.scalar_type();
      return op.call(grad_out[0], saved[0], down.to(type), up.to(type), mean, saved[6], saved[7]);
    }();
    const auto like = [](const Tensor& grad, const Tensor& x) { return x.defined() ? grad.to(x.scalar_type()) : Tensor(); };
    auto grads = once("channel_gate", {of_x, like(of_down, down), like(of_up, up), like(of_down_bias, saved[3]),
                                       like(of_up_bias, saved[4])});
    grads.push_back(ctx->saved_data["has_residual"].toBool() ? grad_out[0] : Tensor());
    return grads;
  }
};

struct BilinearResize : torch::autograd::Function<BilinearResize> {
  using Forward = Tensor(const Tensor&, const OptionalTensor&, bool, int64_t, int64_t);
  using Backward = Tensor(const Tensor&, bool, int64_t, int64_t);

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& residual, bool doubles, int64_t height,
                        int64_t width) {
    static const auto op = find<Forward>("restore_kernels::bilinear_resize");
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["doubles"] = doubles;
    ctx->saved_data["height"] = x.size(2);
    ctx->saved_data["width"] = x.size(3);
    ctx->saved_data["has_residual"] = residual.has_value();
    return op.call(x, residual, doubles, height, width);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::bilinear_resize_backward");
    Tensor grad_x;
    if (ctx->needs_input_grad(0)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      grad_x = op.call(grad_out[0], ctx->saved_data["doubles"].toBool(), ctx->saved_data["height"].toInt(),
                       ctx->saved_data["width"].toInt());
    }
    auto grads = once("bilinear_resize", {grad_x});
    grads.push_back(ctx->saved_data["has_residual"].toBool() ? grad_out[0] : Tensor());
    grads.resize(5);
    return grads;
  }
};

struct ChannelNorm : torch::autograd::Function<ChannelNorm> {
  using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, double);
  using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                      const Tensor&, bool);

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        double eps) {
    static const auto op = find<Forward>("restore_kernels::channel_norm");
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto type = accumulate_type(x);
    auto [out, mean, rstd] = op.call(x, weight.to(type), bias ? OptionalTensor(bias->to(type)) : std::nullopt, eps);
    ctx->save_for_backward({x, weight, defined_if(bias), mean, rstd});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::channel_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &weight = saved[1], &bias = saved[2], &mean = saved[3];
    auto [of_x, of_weight, of_bias] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(grad_out[0], saved[0], weight.to(mean.scalar_type()), mean, saved[4], bias.defined());
    }();
    return once("channel_norm", {of_x, of_weight.to(weight.scalar_type()),
                                 bias.defined() ? of_bias.to(bias.scalar_type()) : Tensor(), Tensor()});
  }
};

struct DenseConv : torch::autograd::Function<DenseConv> {
  using Forward = Tensor(const Tensor&, const Tensor&, const OptionalTensor&);
  using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const c10::List<bool>&);

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    static const auto op = find<Forward>("restore_kernels::dense_conv");
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["has_bias"] = bias.has_value();
    return op.call(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::dense_conv_backward");
    const auto saved = ctx->get_saved_variables();
    const bool of_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
    const c10::List<bool> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), of_bias};
    auto [grad_x, grad_weight, grad_bias] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(grad_out[0], saved[0], saved[1], wanted);
    }();
    const auto if_wanted = [](bool is_wanted, const Tensor& grad) { return is_wanted ? grad : Tensor(); };
    return once("dense_conv2d", {if_wanted(wanted[0], grad_x), if_wanted(wanted[1], grad_weight),
                                 if_wanted(wanted[2], grad_bias)});
  }
};

struct DepthwiseConv : torch::autograd::Function<DepthwiseConv> {
  using Activation = std::optional<std::string_view>;
  using Forward = Tensor(at::TensorList, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         int64_t, Activation);
  using Backward = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, at::TensorList, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, int64_t, Activation, const c10::List<bool>&);

  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& slope,
                        const OptionalTensor& gate, int64_t dilation, const std::optional<std::string>& activation,
                        at::TensorList x) {
    static const auto op = find<Forward>("restore_kernels::depthwise_conv");
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor out = op.call(x, weight, bias, slope, gate, dilation, activation);
    const bool keeps_out = activation == "relu" && !gate;
    variable_list saved{weight, defined_if(bias), defined_if(slope), defined_if(gate), keeps_out ? out : Tensor()};
    saved.insert(saved.end(), x.begin(), x.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["activation"] = activation;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::depthwise_conv_backward");
    const auto saved = ctx->get_saved_variables();
    const auto weight = saved[0], bias = saved[1], slope = saved[2], gate = saved[3];
    const at::TensorList x(saved.data() + 5, saved.size() - 5);
    const auto activation = ctx->saved_data["activation"].toOptional<std::string>();
    // Tensors count that were given, in the order of forward.
    size_t edge = 0;
    const auto next = [&](const Tensor& given) { return given.defined() && ctx->needs_input_grad(edge++); };
    const bool of_weight = next(weight), of_bias = next(bias), of_slope = next(slope), of_gate = next(gate);
    c10::List<bool> wanted;
    for (const Tensor& image : x) wanted.push_back(next(image));
    wanted.push_back(of_weight || of_bias || of_slope);
    wanted.push_back(of_gate);
    auto [grad_x, grad_weight, grad_bias, grad_slope, grad_gate] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(grad_out[0], x, weight, optional(bias), optional(slope), optional(gate), optional(saved[4]),
                     ctx->saved_data["dilation"].toInt(), activation, wanted);
    }();
    const auto if_wanted = [](bool is_wanted, const Tensor& grad) { return is_wanted ? grad : Tensor(); };
    variable_list grads{if_wanted(of_weight, grad_weight), if_wanted(of_bias, grad_bias), if_wanted(of_slope, grad_slope),
                        if_wanted(of_gate, grad_gate), Tensor(), Tensor()};
    for (size_t i = 0; i < x.size(); ++i) grads.push_back(if_wanted(wanted[i], grad_x[i]));
    return once("depthwise_conv2d", std::move(grads));
  }
};

struct PointwiseConv : torch::autograd::Function<PointwiseConv> {
  using Forward = Tensor(at::TensorList, const Tensor&, const OptionalTensor&);
  using Backward = std::tuple<std::vector<Tensor>, Tensor, Tensor>(const Tensor&, at::TensorList, const Tensor&,
                                                                   const c10::List<bool>&);

  static Tensor forward(AutogradContext* ctx, at::TensorList x, const Tensor& weight, const OptionalTensor& bias) {
    static const auto op = find<Forward>("restore_kernels::pointwise_conv");
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved(x.begin(), x.end());
    saved.push_back(weight);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_bias"] = bias.has_value();
    return op.call(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    static const auto op = find<Backward>("restore_kernels::pointwise_conv_backward");
    auto x = ctx->get_saved_variables();
    const Tensor weight = std::move(x.back());
    x.pop_back();
    c10::List<bool> wanted;
    for (size_t i = 0; i <= x.size(); ++i) wanted.push_back(ctx->needs_input_grad(i));
    wanted.push_back(ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(x.size() + 1));
    auto [grads, of_weight, of_bias] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.call(grad_out[0], x, weight, wanted);
    }();
    grads.push_back(of_weight);
    grads.push_back(of_bias);
    for (size_t i = 0; i < grads.size(); ++i)
      if (!wanted[i]) grads[i] = Tensor();
    return once("pointwise_conv2d", std::move(grads));
  }
};

}  // namespace

Tensor channel_topk(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
                    const OptionalTensor& out_proj, const std::vector<int64_t>& topk, bool normalize) {
  return ChannelTopK::apply(q, k, v, temperature, weights, out_proj, topk, normalize);
}
Tensor token_topk(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& temperature, const Tensor& weights,
                  const std::vector<int64_t>& topk, bool normalize) {
  return TokenTopK::apply(q, k, v, temperature, weights, topk, normalize);
}
Tensor channel_masked(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                      const Tensor& temperature, const OptionalTensor& out_proj, bool normalize) {
  return ChannelMasked::apply(q, k, v, mask, temperature, out_proj, normalize);
}
Tensor token_masked(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                    const Tensor& temperature, bool normalize) {
  return TokenMasked::apply(q, k, v, mask, temperature, normalize)[0];
}
Tensor bilinear_resize(const Tensor& x, const OptionalTensor& residual, bool doubles, int64_t height, int64_t width) {
  return BilinearResize::apply(x, residual, doubles, height, width);
}
Tensor channel_gate(const Tensor& x, const Tensor& down, const Tensor& up, const OptionalTensor& down_bias,
                    const OptionalTensor& up_bias, const OptionalTensor& residual) {
  return ChannelGate::apply(x, down, up, down_bias, up_bias, residual);
}
Tensor channel_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps) {
  return ChannelNorm::apply(x, weight, bias, eps);
}
Tensor dense_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return DenseConv::apply(x, weight, bias);
}
Tensor depthwise_conv(const std::vector<Tensor>& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& slope, const OptionalTensor& gate, int64_t dilation,
                      const std::optional<std::string>& activation) {
  return DepthwiseConv::apply(weight, bias, slope, gate, dilation, activation, at::TensorList(x));
}
Tensor pointwise_conv(const std::vector<Tensor>& x, const Tensor& weight, const OptionalTensor& bias) {
  return PointwiseConv::apply(at::TensorList(x), weight, bias);
}

}  // namespace restore_kernels
