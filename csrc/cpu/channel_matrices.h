// The small matrices of attention between channels: what happens between the products over pixels.
//
// Per head: similarities (C x C) -> mixture P of the branches' softmaxes -> folded matrix M, which is P
// or, with an output projection W, W blockdiag(P); and the way back. Nothing here depends on N.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "tile_gemm.h"
#include "tile_io.h"
#include "token_rows.h"
#include "topk_rows.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace channel {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What every pass needs to know of a call.
template <typename T>
struct Problem {
  int64_t batch, heads, channels, pixels, branches;
  std::vector<int64_t> topk;
  const Tensor& temperature;
  const OptionalTensor weights;  // none of a single branch whose weight is 1
  const OptionalTensor out_proj, mask;
  bool normalize;

  Problem(const Tensor& q, const OptionalTensor& mask, const Tensor& temperature, const OptionalTensor& weights,
          const OptionalTensor& out_proj, c10::ArrayRef<int64_t> topk, bool normalize)
      : batch(q.size(0)), heads(q.size(1)), channels(q.size(2)), pixels(q.size(3)),
        branches(static_cast<int64_t>(topk.size())), topk(topk.vec()), temperature(temperature), weights(weights),
        out_proj(out_proj), mask(mask), normalize(normalize) {}

  // Rows that one product with v makes and takes: of one head, or of all heads when they are projected.
  int64_t groups() const { return out_proj ? batch : batch * heads; }
  int64_t rows_in() const { return out_proj ? heads * channels : channels; }
  int64_t rows_out() const { return out_proj ? out_proj->size(0) : channels; }
  int64_t batch_of(int64_t group) const { return out_proj ? group : group / heads; }
  int64_t head_of(int64_t group) const { return out_proj ? 0 : group % heads; }
  int64_t square() const { return channels * channels; }
  // So many heads' small matrices are worth a thread.
  int64_t heads_together() const { return ceil_div(4096, square() * branches); }

  T scale(int64_t bh) const {
    return temperature.const_data_ptr<T>()[bh / heads * temperature.stride(0) + bh % heads * temperature.stride(1)];
  }
  const T* branch_weights(int64_t bh) const {
    static constexpr T kOne = 1;
    if (!weights) return &kOne;
    return weights->const_data_ptr<T>() + bh / heads * weights->stride(0) + bh % heads * weights->stride(1);
  }

  int64_t row_size() const { return RowMixture<T>::size(channels, topk); }

  // mixture (C, C) of one head from its similarities; what rows (C, row_size) know stays in `rows`.
  void mix(int64_t bh, const T* similarity, T* rows, T* mixture) const {
    for (int64_t i = 0; i < channels; ++i) {
      RowMixture<T> row(channels, topk, rows + i * row_size());
      row.set(similarity + i * channels, scale(bh), branch_weights(bh), weights ? weights->stride(2) : 0);
      row.mixture(mixture + i * channels);
    }
  }

  // W_h (C_out x C), in the accumulation type, is what the projection applies to head h.
  void load_projection(T* target) const {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out_proj->scalar_type(), "out_proj", [&] {
      copy_tile<scalar_t, T>({out_proj->const_data_ptr<scalar_t>(), out_proj->stride(0), out_proj->stride(1)},
                             {target, rows_in()}, rows_out(), rows_in());
    });
  }

  // The matrix that v is multiplied with, per group: the mixture itself, or W blockdiag(mixture).
  void fold(int64_t bh, const T* mixture, const T* projection, T* folded) const {
    const int64_t b = bh / heads, column = bh % heads * channels;
    multiply<T>({projection + column, rows_in()}, {mixture, channels},
                {folded + b * rows_out() * rows_in() + column, rows_in()}, rows_out(), channels, channels);
  }
};

// target (count) = sum over chunks of partial (chunks x count), in order.
template <typename T>
void add_partials(const T* partial, int64_t chunks, T* target, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kGrain = 1 << 17;  // numbers of all chunks
  at::parallel_for(0, count, ceil_div(kGrain, chunks), [&](int64_t begin, int64_t end) {
    std::copy(partial + begin, partial + end, target + begin);
    for (int64_t c = 1; c < chunks; ++c)
      at::vec::map2([](Vec sum, Vec x) { return sum + x; }, target + begin, target + begin, partial + c * count + begin,
                    end - begin);
  });
}

// similarity (C x C) and norms (2C) of one head from the Gram matrix and the squared norms (2C) after it.
template <typename T>
void normalise(const Problem<T>& p, const T* gram, T* similarity, T* norms) {
  const int64_t C = p.channels;
  for (int64_t i = 0; i < 2 * C; ++i)
    norms[i] = p.normalize ? std::max<T>(std::sqrt(gram[C * C + i]), T(kNormFloor)) : T(1);
  for (int64_t i = 0; i < C; ++i)
    for (int64_t j = 0; j < C; ++j) {
      // One quotient, so that a single pixel gives exactly 1 or -1, tied as it should be. Where
      // norms overflow, x / |x| is 0, not inf / inf; NaN stays NaN.
      const T norm_ij = norms[i] * norms[C + j];
      similarity[i * C + j] = std::isinf(norm_ij) ? T(0) : gram[i * C + j] / norm_ij;
    }
}

// grad_mixture (B, H, C, C) from the gradient of the folded matrix; also the projection's gradient.
template <typename T>
void unfold(const Problem<T>& p, const T* grad_matrix, const T* projection, const T* mixture, T* grad_mixture,
            T* grad_projection) {
  const int64_t in = p.rows_in(), rows_out = p.rows_out(), C = p.channels;
  at::parallel_for(0, p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t bh = b * p.heads + h, column = h * C;
        const Matrix<const T> grad{grad_matrix + b * rows_out * in + column, in}, w{projection + column, in};
        multiply<T>(w.transposed(), grad, {grad_mixture + bh * C * C, C}, C, C, rows_out);
        std::vector<T> mixture_transposed(C * C);
        copy_tile<T, T>(Matrix<const T>{mixture + bh * C * C, C}.transposed(), {mixture_transposed.data(), C}, C, C);
        const Matrix<T> target{grad_projection + column, in};
        multiply<T>(grad, {mixture_transposed.data(), C}, target, rows_out, C, C, b > 0 ? Addend<T>{target} : Addend<T>{});
      }
  });
}

// One head: E (C x C), the two diagonals (2C), and the gradients of temperature and weights (J).
template <typename T>
void backward_scores(const Problem<T>& p, int64_t bh, const T* similarity, const T* norms, T* rows,
                     const T* grad_mixture, T* e, T* diagonals, T* grad_temperature, T* grad_weights) {
  using Vec = at::vec::Vectorized<T>;
  const int64_t C = p.channels, padded = RowMixture<T>::padded(C);
  const T scale = p.scale(bh);
  const T *norm_q = norms, *norm_k = norms + C;
  T *diagonal_q = diagonals, *diagonal_k = diagonals + C;
  std::vector<T> grad_row(padded), grad(padded);
  std::fill_n(diagonals, 2 * C, T(0));
  std::fill_n(grad_weights, p.branches, T(0));
  *grad_temperature = 0;
  for (int64_t i = 0; i < C; ++i) {
    const T* a = similarity + i * C;
    std::copy_n(grad_mixture + i * C, C, grad_row.data());
    RowMixture<T>(C, p.topk, rows + i * p.row_size()).backward(grad_row.data(), grad.data(), grad_weights);
    const T share = at::vec::map2_reduce_all<T>([](Vec x, Vec y) { return x * y; },
                                                [](Vec x, Vec y) { return x + y; }, grad.data(), a, C);
    *grad_temperature += share;
    diagonal_q[i] -= scale * share;
    at::vec::map3([scale](Vec sum, Vec g, Vec x) { return sum - Vec(scale) * g * x; }, diagonal_k, diagonal_k,
                  grad.data(), a, C);
    at::vec::map2([scale, n = norm_q[i]](Vec g, Vec m) { return Vec(scale) * g / (Vec(n) * m); }, e + i * C,
                  grad.data(), norm_k, C);
  }
  for (int64_t i = 0; i < 2 * C; ++i) {
    // Where the norm is clamped it is a constant and has no gradient of its own.
    const bool differentiable = p.normalize && norms[i] > T(kNormFloor);
    diagonals[i] = differentiable ? diagonals[i] / norms[i] / norms[i] : T(0);
  }
}

}  // namespace channel
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
