// Diagonal box filters over matrices of products, and what is computed from their sums.
//
// The product of query row y and key row j is a tile: a row per key pixel, a lane per query pixel. A
// patch score sums products along diagonals, S[n, l] = Σ_d s[n + d, l + d]: within a tile along x, and
// over the tiles of rows (y + d, j + d) along y. Tiles therefore come in chains, (y, y + offset) for all
// y, and a filter keeps the last 2 * radius of them, filtered along x. One loop reads a new tile, keeps
// it filtered along x, and hands the sum over the kept ones, still in registers, to what consumes it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "pyramid_levels.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pyramid {

constexpr int64_t kLargestRadius = 3;

// Weights below this (as a logarithm) are 0: the sum of 2^40 of them would still round to nothing.
template <typename T>
constexpr T kNegligible = -(std::numeric_limits<T>::digits + 40) * T(0.6931471805599453);

// exp(x) for x up to about 0; 0 where x is negligible.
template <typename T>
inline Vec<T> weight(Vec<T> x) {
  return Vec<T>::blendv(x.exp(), Vec<T>(T(0)), x < Vec<T>(kNegligible<T>));
}

// Whether any lane of a is not below that of b: above, equal, or not a number.
template <typename T>
inline bool any_not_below(Vec<T> a, Vec<T> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) != 0;
  else return _mm512_cmp_pd_mask(a, b, _CMP_NLT_UQ) != 0;
#else
  return (a < b).zero_mask() != 0;
#endif
}

// Whether any lane of a is above that of b.
template <typename T>
inline bool any_above(Vec<T> a, Vec<T> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
  else return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ) != 0;
#else
  return (a > b).zero_mask() != (1 << Vec<T>::size()) - 1;
#endif
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// The library's exponentials are calls, which spill the registers around them. Relative error 1e-7: x = n
// log(2) + r, a polynomial in r, and n added to its exponent. Adding kRound rounds x / log(2) to n and
// leaves n in the lowest bits of the sum.
template <>
inline Vec<float> weight(Vec<float> x) {
  constexpr float kLog2E = 1.442695041f, kLn2 = 0.693147181f, kRound = 1.5f * (1 << 23);
  const Vec<float> sum = at::vec::fmadd(x, Vec<float>(kLog2E), Vec<float>(kRound));
  const Vec<float> r = at::vec::fmadd(sum - Vec<float>(kRound), Vec<float>(-kLn2), x);
  Vec<float> p(1.3814539757e-3f);
  for (const float c : {8.3687451418e-3f, 4.1668390792e-2f, 1.66665203987e-1f, 4.9999993432e-1f, 1.f, 1.f})
    p = at::vec::fmadd(p, r, Vec<float>(c));
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(sum), 23);
  const __mmask16 matters = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kNegligible<float>), _CMP_NLT_UQ);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(matters, _mm512_castps_si512(p), exponent));
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(sum), 23);
  const __m256 matters = _mm256_cmp_ps(x, _mm256_set1_ps(kNegligible<float>), _CMP_NLT_UQ);
  return _mm256_and_ps(matters, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent)));
#endif
}
#endif

// Rows [begin, end) of a tile.
struct Rows {
  int64_t begin = 0, end = 0;

  bool empty() const { return begin >= end; }
  int64_t count() const { return end - begin; }
  void add(Rows other) {
    if (other.empty()) return;
    begin = empty() ? other.begin : std::min(begin, other.begin);
    end = std::max(end, other.end);
  }
};

// What a filter reads and writes for some rows of a tile. kRadius 0: the radius is known at run time only.
template <typename T>
struct Taps {
  const T* input;
  T* last;  // input filtered along x
  std::array<const T*, 2 * kLargestRadius> older;
  int64_t diagonal, any_radius;
  bool is_zero;  // the input

  // One vector of the input filtered along x; it is kept.
  template <int kRadius>
  Vec<T> along_x(int64_t at) const {
    if (is_zero) return Vec<T>(T(0));
    const int64_t radius = kRadius ? kRadius : any_radius;
    const T* p = input + at;
    Vec<T> sum = Vec<T>::loadu(p - radius * diagonal);
    for (int64_t d = 1 - radius; d <= radius; ++d) sum = sum + Vec<T>::loadu(p + d * diagonal);
    sum.store(last + at);
    return sum;
  }

  // One vector of the sum over the kept tiles and the input, which is then kept in place of the oldest.
  template <int kRadius>
  Vec<T> sum(int64_t at) const {
    const int64_t count = 2 * (kRadius ? kRadius : any_radius);
    if (count == 0) return along_x<kRadius>(at);
    Vec<T> total = Vec<T>::loadu(older[0] + at);
    for (int64_t i = 1; i < count; ++i) total = total + Vec<T>::loadu(older[i] + at);
    return total + along_x<kRadius>(at);
  }
};

// A diagonal box filter along one chain of tiles, each `rows` x `lanes`. A tile comes in pieces, a few rows
// at a time; of the input only what the filter still needs is held.
template <typename T>
class DiagonalBox {
 public:
  // `piece`: the most rows that come at a time.
  DiagonalBox(int64_t radius, int64_t most_rows, int64_t lanes, int64_t piece)
      : radius_(radius), row_(lanes + kMargin<T>), slots_(std::max<int64_t>(2 * radius, 1)),
        slot_(most_rows * row_ + kApart - most_rows * row_ % kPage), input_size_((piece + 3 * radius) * row_ + 2 * kMargin<T>),
        input_(input_size_), ring_(slots_ * slot_), zeros_(slot_) {
    std::fill_n(input_.get(), input_size_, T(0));
    std::fill_n(zeros_.get(), slot_, T(0));
  }

  int64_t row() const { return row_; }

  void start_chain(int64_t rows, int64_t lanes) {
    if (lanes != lanes_) std::fill_n(input_.get(), input_size_, T(0));  // the margin is elsewhere
    rows_ = rows, lanes_ = lanes;
    kept_.fill(zeros_.get());
    matters_.fill({});
  }

  // The next tile is what will come, or zero where the chain has none.
  void start_tile(bool comes) {
    const int64_t newest = 2 * radius_;
    for (int64_t i = 0; i < newest; ++i) kept_[i] = kept_[i + 1], matters_[i] = matters_[i + 1];
    comes_ = comes;
    kept_[newest] = comes ? free_slot() : zeros_.get();
    matters_[newest] = {};
    begin_ = 0;
    std::fill_n(input_.get(), 2 * radius_ * row_ + kMargin<T>, T(0));
  }

  // Where rows [begin, ...), which come next, go: row i at i * row(). Margins are zero and stay so.
  T* rows_from(int64_t begin) {
    const int64_t first = 2 * radius_;  // rows before it that are still needed
    if (begin > 0) std::copy_n(input_.get() + (begin - begin_) * row_, first * row_ + kMargin<T>, input_.get());
    begin_ = begin;
    return row_zero();
  }

  // The rows after the last one are zero.
  void end_tile() { std::fill_n(row_zero() + rows_ * row_, radius_ * row_, T(0)); }

  // Of the tile that came only these rows were not zero.
  void settle(Rows matter) {
    matters_[2 * radius_] = matter;
    if (matter.empty()) kept_[2 * radius_] = zeros_.get();
  }

  // Those of some rows of the sums that are not all zero, when the last tile was not zero in `matter`.
  Rows sums(Rows matter, Rows rows) const {
    for (int64_t i = 0; i < 2 * radius_; ++i) matter.add(matters_[i]);
    if (matter.empty()) return {};
    return {std::max(matter.begin - radius_, rows.begin), std::min(matter.end + radius_, rows.end)};
  }

  Taps<T> taps() {
    Taps<T> taps{row_zero(), kept_[2 * radius_], {}, row_ + 1, radius_, !comes_};
    std::copy_n(kept_.begin(), 2 * radius_, taps.older.begin());
    return taps;
  }

 private:
  T* row_zero() { return input_.get() + kMargin<T> + (2 * radius_ - begin_) * row_; }

  // In place of the oldest kept tile, which is read for the last time where this one is written.
  T* free_slot() {
    if (radius_ > 0 && kept_[0] != zeros_.get()) return kept_[0];
    for (int64_t i = 0; i < slots_; ++i) {
      T* slot = ring_.get() + i * slot_;
      if (std::find(kept_.begin(), kept_.begin() + 2 * radius_, slot) == kept_.begin() + 2 * radius_) return slot;
    }
    return nullptr;  // there are as many slots as tiles are kept
  }

  // Tiles of the ring lie this far apart within a page: a load waits for earlier stores to the same place in
  // any page.
  static constexpr int64_t kPage = 4096 / sizeof(T), kApart = kPage + kPage / 3 / kMargin<T> * kMargin<T>;

  int64_t radius_, row_, slots_, slot_, input_size_, rows_ = 0, lanes_ = 0, begin_ = 0;
  Scratch<T> input_, ring_, zeros_;
  std::array<T*, 2 * kLargestRadius + 1> kept_{};  // oldest first
  std::array<Rows, 2 * kLargestRadius + 1> matters_{};
  bool comes_ = false;
};

// Calls consume(lane state, row, at, sums of the boxes) for every vector of these rows of a tile, down its
// columns, with the state that consume.begin(lane) makes and consume.end(state, lane) takes; `at` is where
// the vector lies in a tile. The input must have come `radius` rows further.
template <int kRadius, typename T, size_t kBoxes, typename Consume>
void filter(const std::array<DiagonalBox<T>*, kBoxes>& boxes, Rows rows, int64_t lanes, Consume& consume) {
  // Copies, which the compiler knows no store to change.
  std::array<Taps<T>, kBoxes> taps;
  for (size_t b = 0; b < kBoxes; ++b) taps[b] = boxes[b]->taps();
  const int64_t row = boxes[0]->row();
  for (int64_t lane = 0; lane < lanes; lane += Vec<T>::size()) {
    auto state = consume.begin(lane);
    for (int64_t i = rows.begin, at = rows.begin * row + lane; i < rows.end; ++i, at += row) {
      std::array<Vec<T>, kBoxes> sums;
      for (size_t b = 0; b < kBoxes; ++b) sums[b] = taps[b].template sum<kRadius>(at);
      consume(state, i, at, sums);
    }
    consume.end(state, lane);
  }
}

// Filters these rows of the last tile along x only: the sums are not wanted yet.
template <int kRadius, typename T, size_t kBoxes>
void keep(const std::array<DiagonalBox<T>*, kBoxes>& boxes, Rows rows, int64_t lanes) {
  for (auto* box : boxes) {
    const Taps<T> taps = box->taps();
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t lane = 0; lane < lanes; lane += Vec<T>::size()) taps.template along_x<kRadius>(i * box->row() + lane);
  }
}

}  // namespace pyramid
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
