// The passes of attention between channels over the pixels.
//
// Schedule. The pixels of every image are cut into chunks that threads own; a chunk is walked in
// tiles that stay in the L2 cache. Rows of the accumulation type are read where they lie, others are
// converted first (tile_io.h); the first block of a product packs and gates what it reads for the
// others, and takes the squares of k (gate.h), beside its multiply-adds.
//   forward   1. chunks: Gram matrix q kᵀ and squared norms, partial sums per chunk
//             2. per head: add the partials in order, normalise, rank, mix the branches: P (C x C);
//                with an output projection W: M = W blockdiag(P) (C_out x HC)
//             3. chunks: out = P v, or M v
//   backward  1. chunks: dv = Mᵀ do and dM = do vᵀ (partials)
//             2. per head: dP, through the branches to dS; the products with the norms become
//                E = D_q dA D_k and the diagonals -rowsum(dA∘A)/|q|², -colsum(dA∘A)/|k|²
//             3. chunks: dk = Eᵀ q + diag k, dq = E k + diag q
// Moves q, k, v in and out once forward, and do, v, q, k in and dq, dk, dv out once backward; nothing
// else grows with N but the mask and its gradient. 2·2·C²·N operations per head forward, 2·4·C²·N
// backward: with C = 48 that is 12 and 14 operations per byte, so on a core with 30 GFLOP/s for every
// GB/s arithmetic is the bound.
// Partial sums are per chunk, not per thread, so results do not depend on the number of threads.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>

#include "channel_matrices.h"
#include "gate.h"
#include "image_tiles.h"
#include "result_memory.h"
#include "row_products.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace channel {

// Follows the memory format of x: pixel-major where x is.
inline Tensor empty_like_rows(const Tensor& x, at::IntArrayRef rows) {
  c10::SmallVector<int64_t, 4> sizes{x.size(0)};
  const bool pixel_major = x.stride(-2) == 1 && x.stride(-1) > 1;
  if (pixel_major) sizes.push_back(x.size(-1));
  sizes.append(rows.begin(), rows.end());
  if (!pixel_major) sizes.push_back(x.size(-1));
  Tensor out = empty_result(sizes, x.options());
  return pixel_major ? out.movedim(1, -1) : out;
}

// One group of rows of a tensor: of one head, or, where heads are projected together, of all.
template <typename S, typename T>
Image<S> group_of(const Problem<T>& p, const Tensor& x, int64_t group) {
  return p.out_proj ? all_heads<S>(x, group) : one_head<S>(x, group / p.heads, group % p.heads);
}
template <typename S, typename T>
Image<S> output_of(const Problem<T>& p, const Tensor& x, int64_t group) {
  return p.out_proj ? projected<S>(x, group) : one_head<S>(x, group / p.heads, group % p.heads);
}

// The transposed of `count` matrices (rows x columns) one after the other: of the first factor of a product, its columns.
template <typename T>
Scratch<T> transposed(const T* matrices, int64_t count, int64_t rows, int64_t columns) {
  constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread
  Scratch<T> result(count * rows * columns);
  at::parallel_for(0, count, ceil_div(kGrain, rows * columns), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * rows * columns; first < end * rows * columns; first += rows * columns)
      copy_tile<T, T>(Matrix<const T>{matrices + first, columns}, Matrix<T>{result.get() + first, 1, rows}, rows, columns);
  });
  return result;
}

// Columns of a product that are in hand at a time, packed.
template <typename T>
constexpr int64_t kPanel = gemm::kVectors * at::vec::Vectorized<T>::size();
template <typename T>
Matrix<T> in_hand(const Scratch<T>& panel) {
  return {panel.get(), kPanel<T>, 0};
}

// Per chunk: Gram matrix (C x C), then squared norms of q and of the gated k (2C).
template <typename S, typename T>
void gram_and_squares(const Problem<T>& p, const Division& division, const Tensor& q, const Tensor& k, T* partials) {
  using Vec = at::vec::Vectorized<T>;
  const int64_t C = p.channels, size = C * C + 2 * C, lanes = C * Vec::size();
  at::parallel_for(0, p.batch * p.heads * division.chunks, 1, [&](int64_t begin, int64_t end) {
    const int64_t row = pitch(division.tile);
    Scratch<T> q_scratch(C * row), k_scratch(C * row), squares(2 * lanes);
    const Matrix<T> q_tile{q_scratch.get(), row}, k_tile{k_scratch.get(), row};
    Gate<T> gate(p.mask, 1, C, division.tile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bh = task / division.chunks, b = bh / p.heads, h = bh % p.heads;
      const auto q_image = one_head<const S>(q, b, h), k_image = one_head<const S>(k, b, h);
      T* gram = partials + task * size;
      std::fill_n(gram, size, T(0));
      std::fill_n(squares.get(), 2 * lanes, T(0));
      if (task == begin) division.first_tile(task, [&](int64_t n, int64_t count) {
        ask_for(prefetch(q_image, n, count), prefetch(k_image, n, count));
      });
      division.tiles(task % division.chunks, [&](int64_t n, int64_t count) {
        gate.load(b, h, n, count);
        const bool gated = gate.rows();
        const Matrix<const T> q_rows = read_rows<S, T>(q_image, n, count, q_tile);
        const Matrix<const T> ungated = gated ? read_rows_once<S, T>(k_image, n, count, k_tile)
                                              : read_rows<S, T>(k_image, n, count, k_tile);
        const auto before_rows = [&](int64_t i, int64_t more) {
          if (p.normalize) add_lane_squares<T>(q_rows.from(i, 0), squares.get() + i * Vec::size(), more, count);
        };
        T* k_squares = squares.get() + lanes;
        const Prefetches next{prefetch(q_image, n + count, division.after(n)), prefetch(k_image, n + count, division.after(n))};
        if (gated)
          multiply_rows<T>(q_rows, FirstRead<T, true>{ungated, gate.rows(), k_tile, k_squares}, k_tile, {gram, C}, C, C, count,
                           next, before_rows);
        else
          multiply_rows<T>(q_rows, FirstRead<T, false>{ungated, nullptr, k_tile, k_squares}, ungated, {gram, C}, C, C, count,
                           next, before_rows);
      });
      fold_lanes(squares.get(), gram + C * C, 2 * C);
    }
  });
}

// out, similarity, norms; shapes as in the two ops.py.
template <typename S, typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Problem<T>& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t C = p.channels, heads = p.batch * p.heads, in = p.rows_in(), rows_out = p.rows_out();
  const auto options = q.options().dtype(c10::CppTypeToScalarType<T>::value);
  const Tensor similarity = empty_result({p.batch, p.heads, C, C}, options);
  const Tensor norms = empty_result({p.batch, p.heads, 2, C}, options);
  T *similarities = similarity.mutable_data_ptr<T>(), *all_norms = norms.mutable_data_ptr<T>();

  const Division gram_division = Division::of_sums(p.pixels, C, heads);
  const int64_t partial_size = C * C + 2 * C;
  Scratch<T> partials(heads * gram_division.chunks * partial_size), mixture(heads * p.square());
  Scratch<T> projection(p.out_proj ? rows_out * in : 0), folded(p.out_proj ? p.batch * rows_out * in : 0);
  gram_and_squares<S, T>(p, gram_division, q, k, partials.get());
  if (p.out_proj) p.load_projection(projection.get());
  at::parallel_for(0, heads, p.heads_together(), [&](int64_t begin, int64_t end) {
    Scratch<T> gram(partial_size), rows(C * p.row_size());
    for (int64_t bh = begin; bh < end; ++bh) {
      T *own_similarity = similarities + bh * p.square(), *own_mixture = mixture.get() + bh * p.square();
      add_partials(partials.get() + bh * gram_division.chunks * partial_size, gram_division.chunks, gram.get(), partial_size);
      normalise(p, gram.get(), own_similarity, all_norms + bh * 2 * C);
      p.mix(bh, own_similarity, rows.get(), own_mixture);
      if (p.out_proj) p.fold(bh, own_mixture, projection.get(), folded.get());
    }
  });
  const Scratch<T> matrix = transposed(p.out_proj ? folded.get() : mixture.get(), p.groups(), rows_out, in);

  const Tensor out = p.out_proj ? empty_like_rows(v, {rows_out}) : empty_like_rows(v, {p.heads, C});
  const Division division = Division::of_columns(p.pixels, std::max(in, rows_out), p.groups());
  at::parallel_for(0, p.groups() * division.chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> v_scratch(in * division.tile), out_scratch(rows_out * division.tile), panel(in * kPanel<T>);
    const Matrix<T> v_tile{v_scratch.get(), division.tile}, out_tile{out_scratch.get(), division.tile};
    Gate<T> gate(p.mask, in / C, C, division.tile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / division.chunks;
      const auto v_image = group_of<const S>(p, v, group);
      const auto out_image = output_of<S>(p, out, group);
      const gemm::Columns<const T> own{matrix.get() + group * rows_out * in, rows_out};
      if (task == begin) division.first_tile(task, [&](int64_t n, int64_t count) {
        ask_for(prefetch(v_image, n, count), prefetch_for_writing(out_image, n, count));
      });
      division.tiles(task % division.chunks, [&](int64_t n, int64_t count) {
        const Matrix<const T> v_rows = read_rows_once<S, T>(v_image, n, count, v_tile);
        gate.load(p.batch_of(group), p.head_of(group), n, count);
        auto next_v = prefetch(v_image, n + count, division.after(n));
        auto next_out = prefetch_for_writing(out_image, n + count, division.after(n));
        write_rows<S, T>(out_image, n, count, out_tile, [&](Matrix<T> target) {
          multiply_gated<T>(own, {v_rows, gate.rows(), in_hand(panel)}, gemm::Store<T>{target, {}}, rows_out, count, in,
                            {next_v, next_out});
        });
      });
    }
  });
  return {out, similarity, norms};
}

// Per chunk, partials (rows_out x rows_in) of do vᵀ with v gated; grad_v = matrixᵀ do, through the gate.
template <typename S, typename T>
void backward_values(const Problem<T>& p, const Division& division, const Tensor& grad_out, const Tensor& v,
                     const T* matrix, T* partials, const Tensor& grad_v, const Tensor& grad_mask) {
  const int64_t in = p.rows_in(), rows_out = p.rows_out(), size = rows_out * in;
  at::parallel_for(0, p.groups() * division.chunks, 1, [&](int64_t begin, int64_t end) {
    const int64_t row = pitch(division.tile);
    Scratch<T> v_scratch(in * row), gated_scratch(p.mask ? in * row : 0), do_scratch(rows_out * row), dv_scratch(in * row);
    const Matrix<T> v_tile{v_scratch.get(), row}, gated_tile{gated_scratch.get(), row}, do_tile{do_scratch.get(), row},
        dv_tile{dv_scratch.get(), row};
    Gate<T> gate(p.mask, in / p.channels, p.channels, division.tile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / division.chunks, b = p.batch_of(group), h = p.head_of(group);
      const auto v_image = group_of<const S>(p, v, group);
      const auto do_image = output_of<const S>(p, grad_out, group);
      const auto dv_image = group_of<S>(p, grad_v, group);
      const gemm::Columns<const T> own{matrix + group * size, in};  // transposed
      T* partial = partials + task * size;
      std::fill_n(partial, size, T(0));
      if (task == begin) division.first_tile(task, [&](int64_t n, int64_t count) {
        ask_for(prefetch(do_image, n, count), prefetch(v_image, n, count), prefetch_for_writing(dv_image, n, count));
      });
      division.tiles(task % division.chunks, [&](int64_t n, int64_t count) {
        const Matrix<const T> do_rows = read_rows_once<S, T>(do_image, n, count, do_tile);
        const Matrix<const T> v_rows = p.mask ? read_rows_once<S, T>(v_image, n, count, v_tile)
                                              : read_rows<S, T>(v_image, n, count, v_tile);
        gate.load(b, h, n, count);
        gate.collect(grad_mask, false, b, h, n, count);
        auto next_do = prefetch(do_image, n + count, division.after(n));
        auto next_v = prefetch(v_image, n + count, division.after(n));
        auto next_dv = prefetch_for_writing(dv_image, n + count, division.after(n));
        write_rows<S, T>(dv_image, n, count, dv_tile, [&](Matrix<T> dv) {
          multiply_and_ungate<T>(own, {do_rows, nullptr, do_tile}, dv, v_rows, nullptr, gate.rows(), gated_tile, in, count,
                                 rows_out, {next_do});
        });
        multiply_rows<T>(do_tile, p.mask ? Matrix<const T>(gated_tile) : v_rows, {partial, in}, rows_out, in, count,
                         {next_v, next_dv});
      });
    }
  });
}

template <typename S, typename T>
void backward_queries_keys(const Problem<T>& p, const Tensor& q, const Tensor& k, const T* e_rows, const T* diagonals,
                           const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_mask) {
  const int64_t C = p.channels, groups = p.batch * p.heads;
  const Division division = Division::of_columns(p.pixels, C, groups);
  const Scratch<T> e_columns = transposed(e_rows, groups, C, C);
  at::parallel_for(0, groups * division.chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> q_scratch(C * division.tile), k_scratch(C * division.tile), grad_scratch(C * division.tile), panel(C * kPanel<T>);
    const Matrix<T> q_tile{q_scratch.get(), division.tile}, k_tile{k_scratch.get(), division.tile},
        grad_tile{grad_scratch.get(), division.tile};
    Gate<T> gate(p.mask, 1, C, division.tile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bh = task / division.chunks, b = bh / p.heads, h = bh % p.heads;
      const auto q_image = one_head<const S>(q, b, h), k_image = one_head<const S>(k, b, h);
      const auto dq_image = one_head<S>(grad_q, b, h), dk_image = one_head<S>(grad_k, b, h);
      const gemm::Columns<const T> e{e_columns.get() + bh * C * C, C}, e_transposed{e_rows + bh * C * C, C};
      const T* diagonal = diagonals + bh * 2 * C;
      if (task == begin) division.first_tile(task, [&](int64_t n, int64_t count) {
        ask_for(prefetch(q_image, n, count), prefetch(k_image, n, count), prefetch_for_writing(dk_image, n, count));
      });
      division.tiles(task % division.chunks, [&](int64_t n, int64_t count) {
        const Matrix<const T> q_rows = read_rows_once<S, T>(q_image, n, count, q_tile);
        const Matrix<const T> k_rows = read_rows_once<S, T>(k_image, n, count, k_tile);
        gate.load(b, h, n, count);
        gate.collect(grad_mask, true, b, h, n, count);
        auto next_q = prefetch(q_image, n + count, division.after(n));
        auto next_k = prefetch(k_image, n + count, division.after(n));
        auto this_dq = prefetch_for_writing(dq_image, n, count);
        auto next_dk = prefetch_for_writing(dk_image, n + count, division.after(n));
        write_rows<S, T>(dk_image, n, count, grad_tile, [&](Matrix<T> dk) {
          multiply_and_ungate<T>(e_transposed, {q_rows, nullptr, q_tile}, dk, k_rows, diagonal + C, gate.rows(), {nullptr, 0}, C,
                                 count, C, {this_dq, next_k});
        });
        write_rows<S, T>(dq_image, n, count, grad_tile, [&](Matrix<T> dq) {
          multiply_gated<T>(e, {k_rows, gate.rows(), in_hand(panel)}, gemm::Store<T>{dq, {q_tile, diagonal}}, C, count, C,
                            {next_q, next_dk});
        });
      });
    }
  });
}

// Of q, k, v, mask, temperature, weights, out_proj.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S, typename T>
Gradients backward(const Problem<T>& p, const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& similarity, const Tensor& norms) {
  const int64_t C = p.channels, heads = p.batch * p.heads, in = p.rows_in(), rows_out = p.rows_out();
  const int64_t size = rows_out * in;
  const auto options = similarity.options();
  const Tensor grad_q = empty_like_rows(q, {p.heads, C}), grad_k = empty_like_rows(k, {p.heads, C}),
               grad_v = empty_like_rows(v, {p.heads, C});
  const Tensor grad_mask = p.mask ? empty_result(p.mask->sizes(), options) : at::empty({0}, options);
  const Tensor grad_temperature = empty_result({p.batch, p.heads}, options);
  const Tensor grad_weights = empty_result({p.weights ? p.batch : 0, p.heads, p.branches}, options);
  const Tensor grad_out_proj = p.out_proj ? at::empty({rows_out, in}, options) : at::empty({0}, options);
  if (p.batch == 0) grad_out_proj.zero_();

  Scratch<T> rows(heads * C * p.row_size()), mixture(heads * p.square()), grad_mixture(heads * p.square());
  Scratch<T> projection(p.out_proj ? rows_out * in : 0), folded(p.out_proj ? p.batch * size : 0);
  const T* similarities = similarity.const_data_ptr<T>();
  if (p.out_proj) p.load_projection(projection.get());
  at::parallel_for(0, heads, p.heads_together(), [&](int64_t begin, int64_t end) {
    for (int64_t bh = begin; bh < end; ++bh) {
      T* own = mixture.get() + bh * p.square();
      p.mix(bh, similarities + bh * p.square(), rows.get() + bh * C * p.row_size(), own);
      if (p.out_proj) p.fold(bh, own, projection.get(), folded.get());
    }
  });

  const Division division = Division::of_sums(p.pixels, std::max(in, rows_out), p.groups());
  Scratch<T> partials(p.groups() * division.chunks * size), grad_folded(p.out_proj ? p.batch * size : 0);
  backward_values<S, T>(p, division, grad_out, v, p.out_proj ? folded.get() : mixture.get(), partials.get(), grad_v, grad_mask);
  auto add = [&](int64_t group, T* target) {
    add_partials(partials.get() + group * division.chunks * size, division.chunks, target + group * size, size);
  };
  if (p.out_proj) {
    at::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) add(b, grad_folded.get());
    });
    unfold<T>(p, grad_folded.get(), projection.get(), mixture.get(), grad_mixture.get(), grad_out_proj.mutable_data_ptr<T>());
  }
  Scratch<T> e(heads * p.square()), diagonals(heads * 2 * C);
  Scratch<T> not_asked_for(p.weights ? 0 : heads * p.branches);
  T* temperatures = grad_temperature.mutable_data_ptr<T>();
  T* weights = p.weights ? grad_weights.mutable_data_ptr<T>() : not_asked_for.get();
  at::parallel_for(0, heads, p.heads_together(), [&](int64_t begin, int64_t end) {
    for (int64_t bh = begin; bh < end; ++bh) {
      if (!p.out_proj) add(bh, grad_mixture.get());
      backward_scores<T>(p, bh, similarities + bh * p.square(), norms.const_data_ptr<T>() + bh * 2 * C,
                         rows.get() + bh * C * p.row_size(), grad_mixture.get() + bh * p.square(),
                         e.get() + bh * p.square(), diagonals.get() + bh * 2 * C, temperatures + bh,
                         weights + bh * p.branches);
    }
  });
  backward_queries_keys<S, T>(p, q, k, e.get(), diagonals.get(), grad_q, grad_k, grad_mask);
  return {grad_q, grad_k, grad_v, grad_mask, grad_temperature, grad_weights, grad_out_proj};
}

}  // namespace channel
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
