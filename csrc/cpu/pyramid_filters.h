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
  return Vec<T>::blendv(Vec<T>(T(0)), x.exp(), x >= Vec<T>(kNegligible<T>));
}

enum class Is { kAbove, kAtLeast };

// Whether any lane of a is above, or at least, that of b.
template <Is is, typename T>
inline bool any(Vec<T> a, Vec<T> b) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int compare = is == Is::kAbove ? _CMP_GT_OQ : _CMP_GE_OQ;
  if constexpr (std::is_same_v<T, float>) return _mm512_cmp_ps_mask(a, b, compare) != 0;
  else return _mm512_cmp_pd_mask(a, b, compare) != 0;
#else
  return (is == Is::kAbove ? a > b : a >= b).zero_mask() != (1 << Vec<T>::size()) - 1;
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
  const __mmask16 matters = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kNegligible<float>), _CMP_GE_OQ);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(matters, _mm512_castps_si512(p), exponent));
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(sum), 23);
  const __m256 matters = _mm256_cmp_ps(x, _mm256_set1_ps(kNegligible<float>), _CMP_GE_OQ);
  return _mm256_and_ps(matters, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent)));
#endif
}
#endif

// Rows [begin, end) of a tile.
struct Rows {
  int64_t begin = 0, end = 0;

  bool empty() const { return begin >= end; }
  void add(Rows other) {
    if (other.empty()) return;
    begin = empty() ? other.begin : std::min(begin, other.begin);
    end = std::max(end, other.end);
  }
};

// What the filter reads and writes for one tile. kRadius 0: the radius is known at run time only.
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

  // One vector of the sum over the kept tiles and the input.
  template <int kRadius>
  Vec<T> sum(int64_t at) const {
    const int64_t count = 2 * (kRadius ? kRadius : any_radius);
    if (count == 0) return along_x<kRadius>(at);
    Vec<T> total = Vec<T>::loadu(older[0] + at);
    for (int64_t i = 1; i < count; ++i) total = total + Vec<T>::loadu(older[i] + at);
    return total + along_x<kRadius>(at);
  }
};

// Along one chain of tiles, each `rows` x `lanes`.
template <typename T>
class DiagonalBox {
 public:
  DiagonalBox(int64_t radius, int64_t most_rows, int64_t lanes)
      : radius_(radius), row_(lanes + kMargin<T>), most_rows_(most_rows),
        ring_tile_(most_rows * row_ + kApart - most_rows * row_ % kPage), input_((most_rows + 2 * radius) * row_ + kMargin<T>), ring_(taps() * ring_tile_),
        zeros_((most_rows + 2 * radius) * row_ + kMargin<T>) {
    std::fill_n(zeros_.get(), (most_rows + 2 * radius) * row_ + kMargin<T>, T(0));
  }

  int64_t taps() const { return 2 * radius_ + 1; }
  int64_t row() const { return row_; }

  // Tiles have `rows` rows from now on.
  void resize(int64_t rows) {
    rows_ = rows;
    std::fill_n(input_.get(), (most_rows_ + 2 * radius_) * row_ + kMargin<T>, T(0));
  }

  void start_chain() {
    for (int64_t i = 0; i < taps(); ++i) kept_[i] = zeros(), matters_[i] = {};
  }

  // Where the next tile of the chain goes; its margins are zero and stay so.
  T* input() { return inside(input_.get()); }

  // The next tile is input(), or zero where the chain has none.
  void advance(bool is_input) {
    for (int64_t i = 0; i + 1 < taps(); ++i) kept_[i] = kept_[i + 1], matters_[i] = matters_[i + 1];
    is_zero_ = !is_input;
    kept_[taps() - 1] = is_zero_ ? zeros() : ring_.get() + step_++ % taps() * ring_tile_;
    matters_[taps() - 1] = {0, is_zero_ ? 0 : rows_};
  }

  // Only these rows of the last tile were not zero.
  void settle(Rows matter) {
    matters_[taps() - 1] = matter;
    if (matter.empty()) kept_[taps() - 1] = zeros();
  }

  // The rows of the sums that are not zero.
  Rows sums() const {
    Rows all;
    for (int64_t i = 0; i < taps(); ++i) all.add(matters_[i]);
    return all.empty() ? all : Rows{std::max<int64_t>(all.begin - radius_, 0), std::min(all.end + radius_, rows_)};
  }

  Taps<T> last_taps() {
    Taps<T> taps{inside(input_.get()), kept_[2 * radius_], {}, row_ + 1, radius_, is_zero_};
    std::copy_n(kept_.begin(), 2 * radius_, taps.older.begin());
    return taps;
  }

 private:
  T* inside(T* framed) const { return framed + kMargin<T> + radius_ * row_; }
  T* zeros() { return inside(zeros_.get()); }

  // Tiles of the ring lie this far apart within a page: a load waits for earlier stores to the same place in
  // any page.
  static constexpr int64_t kPage = 4096 / sizeof(T), kApart = kPage + kPage / 3 / kMargin<T> * kMargin<T>;

  int64_t radius_, row_, most_rows_, ring_tile_, rows_ = 0, step_ = 0;
  Scratch<T> input_, ring_, zeros_;
  std::array<T*, 2 * kLargestRadius + 1> kept_{};  // oldest first
  std::array<Rows, 2 * kLargestRadius + 1> matters_{};
  bool is_zero_ = true;
};

// Calls consume(lane state, row, at, sums of the boxes) for every vector of these rows of a tile, down its
// columns, with the state that consume.begin(lane) makes and consume.end(state, lane) takes; `at` is where
// the vector lies in a tile. The input must be there `radius` rows further.
template <int kRadius, typename T, size_t kBoxes, typename Consume>
void filter(const std::array<DiagonalBox<T>*, kBoxes>& boxes, Rows rows, int64_t lanes, Consume& consume) {
  // Copies, which the compiler knows no store to change.
  std::array<Taps<T>, kBoxes> taps;
  for (size_t b = 0; b < kBoxes; ++b) taps[b] = boxes[b]->last_taps();
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
    const Taps<T> taps = box->last_taps();
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t lane = 0; lane < lanes; lane += Vec<T>::size()) taps.template along_x<kRadius>(i * box->row() + lane);
  }
}

}  // namespace pyramid
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
