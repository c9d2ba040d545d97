// The factors of the products of a pointwise convolution, packed: as numbers of the accumulation type, or, where the
// processor multiplies bfloat16 itself, as pairs of those (bfloat16_pairs.h).
//
// Both hold a tile, rows x columns, that comes from one or several images: as second factor its rows are the depth of
// the product, as first factor its columns are, and columns() is it transposed, as second factor.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <memory>
#include <vector>

#include "bfloat16_pairs.h"
#include "tile_gemm.h"
#include "tile_io.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pointwise {

using at::Tensor;

inline Tensor in_working_type(const Tensor& weight) {
  return weight.to(weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

// Scratch is taken when it is first needed: who only adds rows has no columns.
template <typename T>
class LazyScratch {
 public:
  explicit LazyScratch(int64_t count) : count_(count) {}
  T* get() const {
    if (!scratch_) scratch_ = std::make_unique<Scratch<T>>(count_);
    return scratch_->get();
  }

 private:
  int64_t count_;
  mutable std::unique_ptr<Scratch<T>> scratch_;
};

template <typename S>
class Numbers {
  using T = Accumulate<S>;

 public:
  using Number = S;
  struct Session {};  // what a thread has while it multiplies
  static constexpr int64_t kTogether = 1;  // numbers in an element, along the depth
  static constexpr int64_t kStep = 1;  // a depth is cut into multiples of it

  Numbers(int64_t rows, int64_t columns)
      : row_(pitch(columns)), column_(pitch(rows)), rows_(rows * row_), columns_(columns * column_) {}

  // Rows `at` and following, or columns of the transposed tile.
  void add(Matrix<const S> source, int64_t at, int64_t rows, int64_t columns) const {
    copy_tile<S, T>(source, {rows_.get() + at * row_, row_}, rows, columns);
  }
  void add_columns(Matrix<const S> source, int64_t at, int64_t rows, int64_t columns) const {
    copy_tile<S, T>(source, Matrix<T>{columns_.get() + at, column_}.transposed(), rows, columns);
  }

  Matrix<const T> second_factor(int64_t, int64_t) const { return {rows_.get(), row_}; }
  Matrix<const T> first_factor() const { return {rows_.get(), row_}; }
  Matrix<const T> columns() const { return {columns_.get(), column_}; }

  void add_row_sums(T* sums, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i)
      sums[i] += at::vec::reduce_all<T>([](auto a, auto b) { return a + b; }, rows_.get() + i * row_, columns);
  }

  static void multiply(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t columns, int64_t depth,
                       Addend<T> addend, Prefetches idle) {
    restore_kernels::multiply<T>(a, b, c, rows, columns, depth, addend, idle);
  }

  // See FirstFactors.
  static Tensor pack(const Tensor& matrices, bool) { return in_working_type(matrices); }
  static Matrix<const T> packed(const Tensor& matrices, int64_t i, int64_t rows, int64_t columns, bool transposed) {
    const Matrix<const T> matrix{matrices.const_data_ptr<T>() + i * rows * columns, columns};
    return transposed ? matrix.transposed() : matrix;
  }

 private:
  int64_t row_, column_;
  LazyScratch<T> rows_, columns_;
};

class Pairs {
 public:
  using Number = c10::BFloat16;
  using Session = amx::Session;
  static constexpr int64_t kTogether = 2, kStep = amx::kDepth;

  Pairs(int64_t rows, int64_t columns)
      : row_(pitch(pairs::padded(columns) / 2)), joined_row_(pitch(columns)), column_(pitch(rows)),
        rows_((rows + amx::kSide) * row_), joined_(pairs::padded(rows) / 2 * joined_row_),
        columns_(pairs::padded(columns) / 2 * column_) {}

  void add(Matrix<const Number> source, int64_t at, int64_t rows, int64_t columns) const {
    pairs::copy_rows(source, rows_.get() + at * row_, row_, rows, columns);
  }
  void add_columns(Matrix<const Number> source, int64_t at, int64_t rows, int64_t columns) const {
    add(source, 0, rows, columns);
    tile_io::transpose(rows_.get(), row_, columns_.get() + at, column_, rows, pairs::padded(columns) / 2);
  }

  Matrix<const float> second_factor(int64_t rows, int64_t columns) const {
    pairs::join_rows(rows_.get(), 2 * row_, joined_.get(), joined_row_, rows, columns);
    return {joined_.get(), joined_row_};
  }
  Matrix<const float> first_factor() const { return {rows_.get(), row_}; }
  Matrix<const float> columns() const { return {columns_.get(), column_}; }

  void add_row_sums(float* sums, int64_t rows, int64_t columns) const {
    std::vector<float> wide(columns);
    for (int64_t i = 0; i < rows; ++i) {
      pairs::widen(rows_.get() + i * row_, wide.data(), columns);
      sums[i] += at::vec::reduce_all<float>([](auto a, auto b) { return a + b; }, wide.data(), columns);
    }
  }

  static void multiply(Matrix<const float> a, Matrix<const float> b, Matrix<float> c, int64_t rows, int64_t columns,
                       int64_t depth, Addend<float> addend, Prefetches idle) {
    pairs::multiply(a, b, c, rows, columns, depth, addend, idle);
  }

  static Tensor pack(const Tensor& matrices, bool transposed) {
    const int64_t rows = matrices.size(-4), columns = matrices.size(-3);
    const Tensor plain = matrices.contiguous().view({-1, rows, columns});
    const Packed to(transposed ? columns : rows, transposed ? rows : columns);
    const Tensor packed = at::empty({plain.size(0), to.size}, plain.options().dtype(at::kFloat));
    const int64_t joined_row = pitch(columns);
    const Scratch<float> joined(transposed ? pairs::padded(rows) / 2 * joined_row : 0);
    for (int64_t i = 0; i < plain.size(0); ++i) {
      const Number* source = plain.const_data_ptr<Number>() + i * rows * columns;
      float* target = packed.mutable_data_ptr<float>() + i * to.size;
      if (transposed) {
        pairs::join_rows(source, columns, joined.get(), joined_row, rows, columns);
        tile_io::transpose(joined.get(), joined_row, target, to.row, pairs::padded(rows) / 2, columns);
      } else pairs::copy_rows({source, columns}, target, to.row, rows, columns);
    }
    return packed;
  }
  static Matrix<const float> packed(const Tensor& matrices, int64_t i, int64_t rows, int64_t columns, bool transposed) {
    const Packed from(transposed ? columns : rows, transposed ? rows : columns);
    return {matrices.const_data_ptr<float>() + i * from.size, from.row};
  }

 private:
  // A weight as first factor: the distance of its rows, and its size with those that are read past the last.
  struct Packed {
    int64_t row, size;
    Packed(int64_t rows, int64_t depth) : row(pitch(pairs::padded(depth) / 2)), size((rows + amx::kSide) * row) {}
  };

  int64_t row_, joined_row_, column_;  // distances, in pairs
  LazyScratch<float> rows_, joined_, columns_;
};

// The weights of a call, one (outputs, channels, 1, 1) or one per image, as first factors, or transposed.
template <typename Factors>
class FirstFactors {
 public:
  FirstFactors(const Tensor& matrices, bool transposed)
      : rows_(matrices.size(-4)), columns_(matrices.size(-3)), transposed_(transposed),
        packed_(Factors::pack(matrices, transposed)) {}

  auto operator[](int64_t i) const { return Factors::packed(packed_, i, rows_, columns_, transposed_); }

 private:
  int64_t rows_, columns_;
  bool transposed_;
  Tensor packed_;
};

}  // namespace pointwise
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
