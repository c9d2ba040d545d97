// The gate of masked attention, and products whose columns pass it: keys and values are multiplied by their factors
// where a product reads them first, and their gradients, once summed, pass on through the gate to where they belong.
// Without a mask the same products pass on what they read.
//
// So no tile is read for the gate's sake alone: what it does hides beside the multiply-adds of a product.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <optional>
#include <vector>

#include "image_tiles.h"
#include "scratch.h"
#include "tile_gemm.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {

// Of one row of a tile: the mask, and the mask's gradient, to which is added.
template <typename T>
struct GateRow {
  const T* factors;
  T* gradients;
};

// mask (B, H, 1 or C, N) of the accumulation type: one value per pixel, or one per channel and pixel.
template <typename T>
class Gate {
 public:
  // For the tiles of one thread: `heads` heads of so many channels, of at most `tile` pixels.
  Gate(const std::optional<Tensor>& mask, int64_t heads, int64_t channels, int64_t tile)
      : mask_(mask), heads_(heads), channels_(channels), tile_(tile), per_channel_(mask && mask->size(2) > 1),
        factors_(mask ? heads * rows_of_head() * tile : 0), rows_(mask ? heads * channels : 0) {
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i] = {factors_.get() + mask_row(i) * tile, nullptr};
  }

  // For each row of a tile; null without a mask.
  const GateRow<T>* rows() const { return mask_ ? rows_.data() : nullptr; }

  // Loads the factors of the pixels n to n + count, from head h on.
  void load(int64_t b, int64_t h, int64_t n, int64_t count) {
    if (!mask_) return;
    Image<const T> image = one_head<const T>(*mask_, b, h);
    image.heads = heads_;
    load_rows<T, T>(image, n, count, {factors_.get(), tile_});
  }

  // Gradients of those pixels will be added to what grad_mask, of the mask's shape and contiguous, holds; or else to 0.
  void collect(const Tensor& grad_mask, bool add, int64_t b, int64_t h, int64_t n, int64_t count) {
    if (!mask_) return;
    const int64_t pixels = mask_->size(3);
    T* first = grad_mask.mutable_data_ptr<T>() + (b * mask_->size(1) + h) * mask_->size(2) * pixels + n;
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i].gradients = first + mask_row(i) * pixels;
    for (int64_t r = 0; !add && r < heads_ * rows_of_head(); ++r) std::fill_n(first + r * pixels, count, T(0));
  }

 private:
  int64_t rows_of_head() const { return per_channel_ ? channels_ : 1; }
  int64_t mask_row(int64_t row) const { return per_channel_ ? row : row / channels_; }

  const std::optional<Tensor>& mask_;
  int64_t heads_, channels_, tile_;
  bool per_channel_;
  Scratch<T> factors_;
  std::vector<GateRow<T>> rows_;
};

namespace gated {

// Rows of B where they lie, through the gate, and packed for the row blocks after the first.
template <typename T>
struct Packing {
  const T* row;
  int64_t step;
  const GateRow<T>* gate;
  int64_t column;
  Matrix<T> packed;

  template <typename Vec, int vectors, bool full>
  void next(Vec (&to)[vectors], const gemm::RowPart<T, vectors, full>& part) {
    for (int v = 0; v < vectors; ++v) to[v] = part.load(row, v);
    row += step;
    if (gate) {
      for (int v = 0; v < vectors; ++v) to[v] = to[v] * part.load(gate->factors + column, v);
      ++gate;
    }
    for (int v = 0; v < vectors; ++v) part.store(to[v], packed.data, v);
    packed.data += packed.row;
  }
};

// The sums, and scale[i] of row i of `rows` after the gate, are the gradient of rows after the gate. c gets that of the
// rows before it, the gate its own, and `passed`, if there is one, the rows after it.
template <typename T>
struct Ungate {
  Matrix<T> c;
  Matrix<const T> rows;
  const T* scale;
  const GateRow<T>* gate;
  Matrix<T> passed;
  int64_t column = 0;

  Ungate from(int64_t i, int64_t j) const {
    const Matrix<T> to = passed.data ? passed.from(i, j) : passed;
    return {c.from(i, j), rows.from(i, j), scale ? scale + i : nullptr, gate + i, to, column + j};
  }

  template <typename Vec, int count, int vectors, bool full>
  __attribute__((always_inline)) void operator()(Vec (&sum)[count][vectors],
                                                 const gemm::RowPart<T, vectors, full>& part) const {
    // Rows share one of the mask's, or each has its own.
    T* shared = gate[0].gradients == gate[count - 1].gradients ? gate[0].gradients + column : nullptr;
    Vec factor[vectors], gradients[vectors];
    for (int v = 0; shared && v < vectors; ++v)
      factor[v] = part.load(gate[0].factors + column, v), gradients[v] = part.load(shared, v);
    gemm::unrolled<count>([&](auto i) __attribute__((always_inline)) {
      for (int v = 0; v < vectors; ++v) {
        if (!shared) {
          factor[v] = part.load(gate[i].factors + column, v);
          gradients[v] = part.load(gate[i].gradients + column, v);
        }
        const Vec row = part.load(rows.data + i * rows.row, v);
        if (scale) sum[i][v] = at::vec::fmadd(Vec(scale[i]), row * factor[v], sum[i][v]);
        gradients[v] = at::vec::fmadd(sum[i][v], row, gradients[v]);
        part.store(sum[i][v] * factor[v], c.data + i * c.row, v);
        if (passed.data) part.store(row * factor[v], passed.data + i * passed.row, v);
        if (!shared) part.store(gradients[v], gate[i].gradients + column, v);
      }
    });
    for (int v = 0; shared && v < vectors; ++v) part.store(gradients[v], shared, v);
  }
};

}  // namespace gated

// Rows of a product of rows where they are first read: their squares are added to `lanes`, a vector of a row, and what
// passes the gate, if there is one, is kept in `passed`.
template <typename T, bool is_gated>
struct FirstRead {
  using Vec = at::vec::Vectorized<T>;
  Matrix<const T> ungated;
  const GateRow<T>* gate;
  Matrix<T> passed;
  T* lanes;

  template <int count>
  struct Rows {
    FirstRead from;
    Vec squares[count];

    Vec load(int j, int64_t n, int64_t width = Vec::size()) {
      Vec x = Vec::loadu(from.ungated.data + j * from.ungated.row + n, width);
      if constexpr (is_gated) {
        x = x * Vec::loadu(from.gate[j].factors + n, width);
        x.store(from.passed.data + j * from.passed.row + n, width);
      }
      squares[j] = at::vec::fmadd(x, x, squares[j]);
      return x;
    }
    void finish() {
      for (int j = 0; j < count; ++j) squares[j].store(from.lanes + j * Vec::size());
    }
  };

  template <int count>
  Rows<count> rows(int64_t j) const {
    Rows<count> result{{ungated.from(j, 0), is_gated ? gate + j : gate, passed.from(j, 0), lanes + j * Vec::size()}, {}};
    for (int r = 0; r < count; ++r) result.squares[r] = Vec::loadu(result.from.lanes + r * Vec::size());
    return result;
  }
};

// The columns of a product as it reads them: rows where they lie, which pass the gate if there is one. They end up in
// `packed`, which has room for them all or, with col == 0, for those in hand.
template <typename T>
struct GatedRows {
  Matrix<const T> rows;
  const GateRow<T>* gate;
  Matrix<T> packed;
};

// As multiply, of columns that pass a gate.
template <typename T, typename Finish>
void multiply_gated(gemm::Columns<const T> a, const GatedRows<T>& b, const Finish& finish, int64_t rows, int64_t columns,
                    int64_t steps, Prefetches idle = {}) {
  const gemm::Depth depth = gemm::depth_of<T>(rows, columns, steps, idle);
  gemm::each_panel<T>(columns, [&](auto vectors, auto full, int64_t j, int64_t last) {
    const Matrix<T> packed = b.packed.from(0, j);
    const gated::Packing<T> first{b.rows.from(0, j).data, b.rows.row, b.gate, j, {packed.data, packed.row}};
    gemm::row_blocks<T, gemm::MultiplyAdd, vectors(), full()>(a, first, packed, rows, depth, finish.from(0, j), last, idle);
  });
}

// The product, and scale[i] of row i of `ungated` after the gate if there is a scale, are the gradient of rows after the
// gate. c gets that of the rows before it; where there is a gate, that gets its own, and `passed`, if there is one, the
// rows after it.
template <typename T>
void multiply_and_ungate(gemm::Columns<const T> a, const GatedRows<T>& b, Matrix<T> c, Matrix<const T> ungated,
                         const T* scale, const GateRow<T>* gate, Matrix<T> passed, int64_t rows, int64_t columns,
                         int64_t steps, Prefetches idle) {
  if (gate) return multiply_gated<T>(a, b, gated::Ungate<T>{c, ungated, scale, gate, passed}, rows, columns, steps, idle);
  const gemm::Store<T> store{c, scale ? Addend<T>{ungated, scale} : Addend<T>{}};
  multiply_gated<T>(a, b, store, rows, columns, steps, idle);
}

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
