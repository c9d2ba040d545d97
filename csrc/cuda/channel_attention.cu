// Attention between channels: top-k branches, or one dense branch whose keys and values a mask gates.
//
// Forward    1 Gram matrix q k'ᵀ and norms, partial sums over chunks of the pixels    channel_gram.cuh
//            2 similarity, norms, P; with a projection W also M = W P                 channel_rows.cuh, _matrix
//            3 out = P v', or M v'                                                    channel_apply.cuh
// Backward   1 dM = do v'ᵀ, partial sums                                              channel_gram.cuh
//            2 dP (= Wᵀ dM), through the branches to X, y and the small gradients     channel_rows.cuh, _matrix
//            3 dv = g Mᵀ do, then dq = X k' - y_q q and dk = g (Xᵀ q - y_k k')        channel_apply.cuh
//
// Forward moves q, k, v in and out once, backward do twice, v, q, k in and dq, dk, dv out once.
// Scratch: partial sums, about as many as blocks run at once, and C x C matrices.
#include <algorithm>
#include <array>

#include "channel_apply.cuh"
#include "channel_gram.cuh"
#include "channel_matrix.cuh"
#include "channel_rows.cuh"
#include "channel_short.cuh"
#include "launch.h"
#include "tensors.h"

namespace restore_kernels::channel {
namespace {

using OptionalTensor = std::optional<Tensor>;

int64_t ceil_divide(int64_t x, int64_t by) { return (x + by - 1) / by; }

// --- tensors as kernels see them -------------------------------------------------------------------

// Of (B, H, C, N), or (B, C, N): one head, whatever its number.
template <typename T>
Rows<T> rows_of(const Tensor& x) {
  T* data = static_cast<T*>(x.data_ptr());
  if (x.dim() == 3) return {{data, {x.stride(0), 0, x.stride(1), x.stride(2)}}, x.size(1)};
  return {{data, {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}}, x.size(2)};
}
Rows<const float> gate_rows(const OptionalTensor& mask, int64_t channels) {
  if (!mask) return {};
  const int64_t row_stride = mask->size(2) > 1 ? mask->stride(2) : 0;
  return {{static_cast<const float*>(mask->data_ptr()), {mask->stride(0), mask->stride(1), row_stride, mask->stride(3)}},
          channels};
}

Format format_of(ScalarType dtype) {
  return dtype == ScalarType::Float      ? Format::kFloat32
         : dtype == ScalarType::BFloat16 ? Format::kBFloat16
                                         : Format::kFloat16;
}
Matrices matrices(const Tensor& x) {  // (B, H, rows, columns)
  return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, format_of(x.scalar_type())};
}
Matrices transposed(Matrices x) {
  std::swap(x.stride[2], x.stride[3]);
  return x;
}
// W (C_out, H C) as (B, H, C_out, C), the same in all of the batch.
Matrices by_head(const Tensor& out_proj, int64_t channels) {
  return {out_proj.data_ptr(),
          {0, channels * out_proj.stride(1), out_proj.stride(0), out_proj.stride(1)},
          format_of(out_proj.scalar_type())};
}
// Uninitialised, rows at multiples of 16 bytes, for channel_apply_kernel.
Tensor new_matrix(const Tensor& like, ScalarType dtype, int64_t batch, int64_t groups, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {batch, groups, rows, ceil_divide(columns, 8) * 8}, dtype);
}

// --- stages ----------------------------------------------------------------------------------------

// What holds for all stages of a call.
struct Call {
  int64_t batch, heads, channels, pixels;
  OptionalTensor mask, out_proj;
  bool wide;  // matrices that multiply rows are float32: their products may not be rounded to 16 bits

  Call(const Tensor& q, const OptionalTensor& mask, const OptionalTensor& out_proj)
      : batch(q.size(0)), heads(q.size(1)), channels(q.size(2)), pixels(q.size(3)), mask(mask), out_proj(out_proj),
        wide(mask || is_short() || q.scalar_type() == ScalarType::Float) {}

  bool is_short() const { return pixels < kShort; }
  Rows<const float> gate() const { return gate_rows(mask, channels); }
  ScalarType matrix_dtype(const Tensor& x) const { return wide ? ScalarType::Float : x.scalar_type(); }
};

Branches branches_of(const Call& call, const Tensor& temperature, const OptionalTensor& weights,
                     const std::vector<int64_t>& topk, bool normalize) {
  if (topk.size() > kMostBranches || call.channels > kMostChannels)
    throw std::runtime_error("channel attention takes at most " + std::to_string(kMostBranches) + " branches and " +
                             std::to_string(kMostChannels) + " channels a head");
  Branches branches{};
  branches.temperature = static_cast<const float*>(temperature.data_ptr());
  for (int i = 0; i < 2; ++i) branches.temperature_stride[i] = temperature.stride(i);
  if (weights) {
    branches.weights = static_cast<const float*>(weights->data_ptr());
    for (int i = 0; i < 3; ++i) branches.weights_stride[i] = weights->stride(i);
  }
  branches.heads = call.heads;
  branches.channels = static_cast<int>(call.channels);
  branches.count = static_cast<int>(topk.size());
  branches.normalize = normalize;
  std::copy(topk.begin(), topk.end(), branches.topk);
  return branches;
}

// Kernels of rows, with as many columns a lane as C needs.
template <typename Problem>
void launch_rows(void (*narrow)(Problem), void (*wide)(Problem), const Call& call, const Problem& problem) {
  launch(call.channels <= 64 ? narrow : wide, call.batch * call.heads * call.channels, kThreads, 0, problem);
}

// a (gate b)ᵀ over the pixels of every group: (B * groups, chunks, size).
template <typename T>
Tensor gram(const Call& call, const Tensor& a, const Tensor& b, int64_t groups) {
  Gram<T> p{rows_of<const T>(a), rows_of<const T>(b), call.gate(), groups, 0, 0, call.pixels, 0, 1, nullptr, false};
  const auto rows = [&](const Tensor& x) { return static_cast<int>(x.dim() == 3 ? x.size(1) : x.size(1) * x.size(2) / groups); };
  p.a_rows = rows(a);
  p.b_rows = rows(b);
  const int64_t matrices = call.batch * groups;
  if (call.is_short()) {
    const Tensor partials = empty_float32(a, {matrices, 1, p.size()});
    p.partials = static_cast<float*>(partials.data_ptr());
    launch(channel_short_gram_kernel<T>, ceil_divide(partials.numel(), kThreads), kThreads, 0, p, partials.numel());
    return partials;
  }
  // One wave of blocks, but chunks of no less than two tiles: what is written of one is read again.
  const int64_t tiles = ceil_divide(call.pixels, kTilePixels<T>);
  const int64_t products = ceil_divide(p.a_rows, kTile) * ceil_divide(p.b_rows, kTile);
  const int64_t blocks = matrices * products;  // of every chunk
  constexpr bool narrow = sizeof(T) == 2;
  const int at_once = narrow && !call.mask ? kGramBlocks<false> : kGramBlocks<true>;
  const int64_t wanted = std::max<int64_t>(1, at_once * processors() / std::max<int64_t>(1, blocks));
  p.chunk = std::max<int64_t>(2, ceil_divide(tiles, wanted)) * kTilePixels<T>;
  p.chunks = ceil_divide(call.pixels, p.chunk);
  const Tensor partials = empty_float32(a, {matrices, p.chunks, p.size()});
  p.partials = static_cast<float*>(partials.data_ptr());
  p.copies = rows_align(p.a.x) && rows_align(p.b.x);
  void (*kernel)(Gram<T>) = channel_gram_kernel<T, true>;
  if constexpr (narrow) {
    if (!call.mask) kernel = channel_gram_kernel<T, false>;
  }
  launch(kernel, blocks * p.chunks, kThreads, 0, p);
  return partials;
}

// The sum over the second dimension.
Tensor sum_parts(const Tensor& parts, int64_t matrices, int64_t count, int64_t size, const Tensor& sums) {
  launch(channel_gram_sum_kernel, ceil_divide(matrices * size, kThreads), kThreads, 0,
         static_cast<const float*>(parts.data_ptr()), static_cast<float*>(sums.data_ptr()), matrices, count, size);
  return sums;
}

// out (B, H, rows, columns) = a b, or the sum of it over the batch.
void multiply(const Matrices& a, const Matrices& b, const Matrices& out, int64_t batch, int64_t terms, int64_t heads,
              int64_t rows, int64_t columns, int64_t inner) {
  const MatrixProduct p{a, b, out, heads, terms, static_cast<int>(rows), static_cast<int>(columns),
                        static_cast<int>(inner)};
  const int64_t tiles = ceil_divide(rows, kMatrixBlock) * ceil_divide(columns, kMatrixBlock);
  launch(channel_matrix_product_kernel, batch * heads * tiles, kThreads, 0, p);
}

// What a side of channel_apply_kernel reads and writes.
struct Stream {
  Tensor matrix;                // (B, groups, rows, inner)
  std::optional<Tensor> radial; // (B, groups, rows)
  Tensor x, out;
  std::optional<Tensor> own;
  bool gate_x = false, gate_out = false;
  GateGradient gate_gradient = {};

  template <typename T, typename M>
  Side<T, M> side(const Call& call) const {
    return {static_cast<const M*>(matrix.data_ptr()),
            radial ? static_cast<const float*>(radial->data_ptr()) : nullptr,
            rows_of<const T>(x),
            rows_of<T>(out),
            gate_x ? call.gate() : Rows<const float>{},
            gate_out ? call.gate() : Rows<const float>{},
            own ? rows_of<const T>(*own) : Rows<const T>{},
            gate_gradient};
  }
};

template <typename T, typename M, int SIDES>
void launch_apply(const Call& call, const std::array<Stream, SIDES>& streams, int64_t groups, int rows, int inner) {
  Apply<T, M, SIDES> p{{}, groups, rows, inner, streams[0].matrix.stride(2), call.pixels, 1, 1, true};
  for (int s = 0; s < SIDES; ++s) {
    p.side[s] = streams[s].template side<T, M>(call);
    p.copies &= rows_align(p.side[s].x.x) && rows_align(p.side[s].out.x);
  }
  // About one wave: four blocks a processor, three of those with the most registers.
  const int64_t tiles = ceil_divide(call.pixels, kTilePixels<T>), matrices = call.batch * groups;
  const int64_t row_tiles = ceil_divide(rows, kTile);
  p.run = std::max<int64_t>(1, ceil_divide(tiles * matrices * row_tiles, 4 * processors()));
  p.run = std::min(p.run, tiles);
  p.runs = ceil_divide(tiles, p.run);
  static_assert(apply_shared_bytes<M, 1>(kStages) <= kSharedEverywhere && apply_shared_bytes<M, 2>(1) <= kSharedEverywhere);
  static_assert(apply_shared_bytes<M, 2>(kStages) <= kSharedOfMany);  // more channels than a tile has
  launch(channel_apply_kernel<T, M, SIDES>, matrices * p.runs * row_tiles, kThreads, apply_shared_bytes<M, SIDES>(apply_slots(inner)), p);
}

template <typename T, int SIDES>
void apply(const Call& call, const std::array<Stream, SIDES>& streams, int64_t groups, int64_t rows, int64_t inner) {
  const int r = static_cast<int>(rows), i = static_cast<int>(inner);
  if (call.is_short()) {
    for (const Stream& stream : streams) {
      const Apply<T, float, 1> p{{stream.template side<T, float>(call)}, groups, r, i, stream.matrix.stride(2), call.pixels, 1, 1, false};
      const int64_t elements = call.batch * groups * rows * call.pixels;
      launch(channel_short_apply_kernel<T>, ceil_divide(elements, kThreads), kThreads, 0, p, elements);
    }
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (streams[0].matrix.scalar_type() != ScalarType::Float)
      return launch_apply<T, T, SIDES>(call, streams, groups, r, i);
  }
  launch_apply<T, float, SIDES>(call, streams, groups, r, i);
}

// --- passes ----------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const OptionalTensor& mask, const Tensor& temperature,
                                           const OptionalTensor& weights, const OptionalTensor& out_proj,
                                           const std::vector<int64_t>& topk, bool normalize) {
  const OnDevice guard(q.get_device_index());
  const Call call(q, mask, out_proj);
  const auto [B, H, C] = std::array{call.batch, call.heads, call.channels};
  const Tensor similarity = empty_float32(q, {B, H, C, C}), norms = empty_float32(q, {B, H, 2, C});
  const ScalarType dtype = call.matrix_dtype(q);
  const Tensor mixture = new_matrix(q, out_proj ? ScalarType::Float : dtype, B, H, C, C);
  const int64_t outputs = out_proj ? out_proj->size(0) : 0;
  const Tensor out = out_proj ? empty_like_rows(v, 0, outputs) : empty_like_rows(v, H, C);
  with_dtype(q, [&]<typename T>() {
    const Tensor partials = gram<T>(call, q, k, H);
    const Mixture p{branches_of(call, temperature, weights, topk, normalize), static_cast<const float*>(partials.data_ptr()),
                    partials.size(1), static_cast<float*>(similarity.data_ptr()), static_cast<float*>(norms.data_ptr()),
                    matrices(mixture)};
    launch_rows(channel_mixture_kernel<2>, channel_mixture_kernel<8>, call, p);
    Stream stream{mixture, {}, v, out, {}, mask.has_value()};
    if (!out_proj) return apply<T, 1>(call, {stream}, H, C, C);
    stream.matrix = new_matrix(q, dtype, B, 1, outputs, H * C);
    Matrices merged = matrices(stream.matrix);  // of each head, side by side
    merged.stride[1] = C;
    multiply(by_head(*out_proj, C), matrices(mixture), merged, B, 1, H, outputs, C, C);
    apply<T, 1>(call, {stream}, 1, outputs, H * C);
  });
  return {out, similarity, norms};
}

// Of q, k, v, mask, temperature, weights, out_proj; (0,) for what is None.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                   const OptionalTensor& mask, const Tensor& temperature, const OptionalTensor& weights,
                   const OptionalTensor& out_proj, const Tensor& similarity, const Tensor& norms,
                   const std::vector<int64_t>& topk, bool normalize) {
  const OnDevice guard(q.get_device_index());
  const Call call(q, mask, out_proj);
  const auto [B, H, C] = std::array{call.batch, call.heads, call.channels};
  const int64_t N = call.pixels, J = static_cast<int64_t>(topk.size()), outputs = out_proj ? out_proj->size(0) : 0;
  const Tensor grad_q = empty_like_rows(q, H, C), grad_k = empty_like_rows(k, H, C), grad_v = empty_like_rows(v, H, C);
  const Tensor grad_temperature = empty_float32(q, {B, H}), grad_weights = empty_float32(q, {B, H, J});
  const Tensor grad_out_proj = empty_float32(q, out_proj ? std::vector{outputs, H * C} : std::vector<int64_t>{0});

  // The gate's gradient: its rows, or for one row a head the parts that add up to it.
  const bool shared = mask && mask->size(2) < C;
  const int64_t parts = call.is_short() ? C : ceil_divide(C, kTile);  // of dk and of dv each
  const Tensor grad_mask = empty_float32(q, !mask ? std::vector<int64_t>{0} : std::vector{B, H, mask->size(2), N});
  const Tensor gate_terms = shared ? empty_float32(q, {B, H, 2 * parts, N}) : grad_mask;
  float* terms_data = static_cast<float*>(gate_terms.data_ptr());
  const int64_t all_parts = shared ? 2 * parts : 0;

  const ScalarType dtype = call.matrix_dtype(q);
  // float16 has not the range of gradients over norms.
  const ScalarType gradient = dtype == ScalarType::Half ? ScalarType::Float : dtype;
  const Tensor mixture = new_matrix(q, out_proj ? ScalarType::Float : dtype, B, H, C, C);  // Pᵀ, with W: P
  const Tensor coefficients = new_matrix(q, gradient, B, H, C, C), transpose = new_matrix(q, gradient, B, H, C, C);
  const Tensor radial_q = empty_float32(q, {B, H, C}), radial_k = empty_float32(q, {B, H, C});
  const Tensor terms = empty_float32(q, {B * H, C, C + J + 1});

  with_dtype(q, [&]<typename T>() {
    Tensor partials = gram<T>(call, grad_out, v, out_proj ? 1 : H);
    Matrices grad_merged{};  // dM of every head: (B, H, C_out, C)
    if (out_proj) {
      const int64_t size = partials.size(2);
      partials = sum_parts(partials, B, partials.size(1), size, empty_float32(q, {B, size}));
      grad_merged = {partials.data_ptr(), {size, C, H * C, 1}, Format::kFloat32};
    }
    Tensor grad_mixture = partials;
    if (out_proj) {
      grad_mixture = empty_float32(q, {B * H, 1, C * C});
      const Matrices product{grad_mixture.data_ptr(), {H * C * C, C * C, C, 1}, Format::kFloat32};
      multiply(transposed(by_head(*out_proj, C)), grad_merged, product, B, 1, H, C, C, outputs);
    }

    const RowBackward p{branches_of(call, temperature, weights, topk, normalize),
                        static_cast<const float*>(grad_mixture.data_ptr()),
                        grad_mixture.size(1),
                        grad_mixture.size(2),
                        static_cast<const float*>(similarity.data_ptr()),
                        static_cast<const float*>(norms.data_ptr()),
                        out_proj ? matrices(mixture) : transposed(matrices(mixture)),
                        matrices(coefficients),
                        matrices(transpose),
                        static_cast<float*>(radial_q.data_ptr()),
                        static_cast<float*>(terms.data_ptr())};
    launch_rows(channel_row_backward_kernel<2>, channel_row_backward_kernel<8>, call, p);
    const ColumnSums sums{p.terms, p.norms, static_cast<int>(C), static_cast<int>(J), normalize,
                          static_cast<float*>(radial_k.data_ptr()), static_cast<float*>(grad_temperature.data_ptr()),
                          static_cast<float*>(grad_weights.data_ptr())};
    launch(channel_column_sums_kernel, B * H, kThreads, 0, sums);

    Stream values{mixture, {}, grad_out, grad_v, v, false, mask.has_value(), {terms_data, all_parts, 0, false}};
    if (out_proj) {
      const Matrices grad_projection = by_head(grad_out_proj, C);
      multiply(grad_merged, transposed(matrices(mixture)), grad_projection, B > 0, B, H, outputs, C, C);
      values.matrix = new_matrix(q, dtype, B, H, C, outputs);  // Mᵀ of every head
      multiply(by_head(*out_proj, C), matrices(mixture), transposed(matrices(values.matrix)), B, 1, H, outputs, C, C);
    }
    apply<T, 1>(call, {values}, H, C, out_proj ? outputs : C);

    const auto radial = [&](const Tensor& x) { return normalize ? std::optional(x) : std::nullopt; };
    const Stream queries{coefficients, radial(radial_q), k, grad_q, q, mask.has_value()};
    const Stream keys{transpose, radial(radial_k), q, grad_k, k, false, mask.has_value(),
                      {terms_data, all_parts, static_cast<int>(parts), true}};
    apply<T, 2>(call, {queries, keys}, H, C, C);
    if (shared) sum_parts(gate_terms, B * H, 2 * parts, N, grad_mask);
  });
  if (out_proj && B == 0) {
    Tensor zeros = grad_out_proj;
    torch::stable::zero_(zeros);
  }
  return {grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_weights, grad_out_proj};
}

// --- operators -------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> topk(Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor weights,
                                        OptionalTensor out_proj, std::vector<int64_t> topk, bool normalize) {
  return forward(q, k, v, {}, temperature, weights, out_proj, topk, normalize);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_backward(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor weights, OptionalTensor out_proj,
    Tensor similarity, Tensor norms, std::vector<int64_t> topk, bool normalize) {
  auto [grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_weights, grad_out_proj] =
      backward(grad_out, q, k, v, {}, temperature, weights, out_proj, similarity, norms, topk, normalize);
  return {grad_q, grad_k, grad_v, grad_temperature, grad_weights, grad_out_proj};
}

// Masked attention is one dense branch.

std::tuple<Tensor, Tensor, Tensor> masked(Tensor q, Tensor k, Tensor v, OptionalTensor mask, Tensor temperature,
                                          OptionalTensor out_proj, bool normalize) {
  return forward(q, k, v, mask, temperature, {}, out_proj, {q.size(2)}, normalize);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> masked_backward(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, OptionalTensor mask, Tensor temperature, OptionalTensor out_proj,
    Tensor similarity, Tensor norms, bool normalize) {
  auto [grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_weights, grad_out_proj] = backward(
      grad_out, q, k, v, mask, temperature, {}, out_proj, similarity, norms, {q.size(2)}, normalize);
  return {grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_out_proj};
}

}  // namespace
}  // namespace restore_kernels::channel

REGISTER(library) {
  namespace channel = restore_kernels::channel;
  library.impl("topk_attention_channel.cuda", TORCH_BOX(channel::topk));
  library.impl("topk_attention_channel_backward.cuda", TORCH_BOX(channel::topk_backward));
  library.impl("masked_attention_channel.cuda", TORCH_BOX(channel::masked));
  library.impl("masked_attention_channel_backward.cuda", TORCH_BOX(channel::masked_backward));
}
