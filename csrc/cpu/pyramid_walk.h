// What is done along a chain of tiles: the passes of pyramid attention.
#pragma once

#include "pyramid_chains.h"
#include "pyramid_filters.h"
#include "pyramid_problem.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pyramid {

// Running maximum and sum of exponentials of every lane.
template <typename T>
struct Statistics {
  T *largest, *sum;        // per lane
  const T* factors;        // per row of the tile
  struct State {
    Vec<T> largest, sum;
  };

  State begin(int64_t lane) const { return {Vec<T>::loadu(largest + lane), Vec<T>::loadu(sum + lane)}; }

  void operator()(State& state, int64_t row, int64_t, const std::array<Vec<T>, 1>& sums) const {
    const Vec<T> score = sums[0] * Vec<T>(factors[row]);
    if (any<Is::kAbove>(score, state.largest)) {  // seldom: the more tiles have been seen, the less often
      const Vec<T> now = at::vec::maximum(score, state.largest);
      state.sum = state.sum * weight(state.largest - now);
      state.largest = now;
    }
    state.sum = state.sum + weight(score - state.largest);
  }

  void end(const State& state, int64_t lane) const {
    state.largest.store(largest + lane);
    state.sum.store(sum + lane);
  }
};

// The largest score of every lane and its position; of equal ones the first position.
template <typename T>
struct Best {
  T* largest;         // per lane; infinite where no query is
  int64_t* position;  // per lane
  const T* factors;
  int64_t first;      // position of the tile's first row
  struct State {
    Vec<T> largest;
    int64_t lane;
  };

  State begin(int64_t lane) const { return {Vec<T>::loadu(largest + lane), lane}; }

  void operator()(State& state, int64_t row, int64_t, const std::array<Vec<T>, 1>& sums) const {
    const Vec<T> score = sums[0] * Vec<T>(factors[row]);
    if (!any<Is::kAtLeast>(score, state.largest)) return;
    T scores[Vec<T>::size()];
    score.store(scores);
    for (int64_t i = 0, lane = state.lane; i < Vec<T>::size(); ++i, ++lane)
      if (scores[i] > largest[lane] || (scores[i] == largest[lane] && first + row < position[lane]))
        largest[lane] = scores[i], position[lane] = first + row;
    state.largest = Vec<T>::loadu(largest + state.lane);
  }

  void end(const State&, int64_t) const {}
};

// The rows of a tile that are not all zero, found lane by lane.
template <typename T>
struct Matter {
  Rows rows;

  void see(Vec<T> logarithms, int64_t row) {
    if (!any<Is::kAtLeast>(logarithms, Vec<T>(kNegligible<T>))) return;
    if (rows.empty()) rows.begin = row;
    rows.end = row + 1;
  }
};

// The softmax, into the tile `weights`.
template <typename T>
struct Weights {
  const T *log_sum_exp, *factors;
  T* weights;
  Rows matter{};
  struct State {
    Vec<T> log_sum_exp;
    Matter<T> matter{};
  };

  State begin(int64_t lane) const { return {Vec<T>::loadu(log_sum_exp + lane)}; }

  void operator()(State& state, int64_t row, int64_t at, const std::array<Vec<T>, 1>& sums) const {
    const Vec<T> logarithm = sums[0] * Vec<T>(factors[row]) - state.log_sum_exp;
    weight(logarithm).store(weights + at);
    state.matter.see(logarithm, row);
  }

  void end(const State& state, int64_t) { matter.add(state.matter.rows); }
};

// delta, per lane += Σ over rows of P t
template <typename T>
struct Delta {
  const T *log_sum_exp, *factors;
  T* delta;
  struct State {
    Vec<T> log_sum_exp, delta;
  };

  State begin(int64_t lane) const { return {Vec<T>::loadu(log_sum_exp + lane), Vec<T>::loadu(delta + lane)}; }

  void operator()(State& state, int64_t row, int64_t, const std::array<Vec<T>, 2>& sums) const {
    const Vec<T> p = weight(sums[0] * Vec<T>(factors[row]) - state.log_sum_exp);
    state.delta = at::vec::fmadd(p, sums[1], state.delta);
  }

  void end(const State& state, int64_t lane) const { state.delta.store(delta + lane); }
};

// P and the gradient of the products' sums, dS times the row's factor; and Σ over the band's own lanes of
// dS S, a vector per row.
template <typename T>
struct Slopes {
  const T *log_sum_exp, *delta, *own;  // own: 1 at the lanes of the band's own columns, else 0
  const T* factors;
  T out_scale;
  T *weights, *slopes, *products;
  Rows matter{};
  struct State {
    Vec<T> log_sum_exp, delta, own;
    Matter<T> matter{};
  };

  State begin(int64_t lane) const {
    return {Vec<T>::loadu(log_sum_exp + lane), Vec<T>::loadu(delta + lane), Vec<T>::loadu(own + lane)};
  }

  void operator()(State& state, int64_t row, int64_t at, const std::array<Vec<T>, 2>& sums) const {
    const Vec<T> factor(factors[row]), score = sums[0] * factor;
    const Vec<T> p = weight(score - state.log_sum_exp);
    const Vec<T> slope = p * (sums[1] * Vec<T>(out_scale) - state.delta);
    p.store(weights + at);
    (slope * factor).store(slopes + at);
    T* product = products + row * Vec<T>::size();
    at::vec::fmadd(slope * state.own, score, Vec<T>::loadu(product)).store(product);
    state.matter.see(score - state.log_sum_exp, row);
  }

  void end(const State& state, int64_t) { matter.add(state.matter.rows); }
};

template <typename T, size_t kBoxes>
struct Store {
  std::array<T*, kBoxes> targets;
  struct State {};

  State begin(int64_t) const { return {}; }
  void operator()(State&, int64_t, int64_t at, const std::array<Vec<T>, kBoxes>& sums) const {
    for (size_t b = 0; b < kBoxes; ++b) sums[b].store(targets[b] + at);
  }
  void end(State, int64_t) const {}
};

// Walks chains of tiles; holds those of one task.
template <typename T, int kRadius>
class Walk {
 public:
  explicit Walk(const Problem<T>& p)
      : p_(p), row_(p.most_lanes() + kMargin<T>), scores_(box()), slopes_of_weights_(box()), weights_(box()),
        slopes_(box()), mixed_weights_(p.most_rows() * row_), mixed_slopes_(p.most_rows() * row_),
        products_(p.most_rows() * Vec<T>::size()) {}

  void statistics(const Chain& chain, T* largest, T* sum) {
    enter(chain);
    along<1>({&scores_}, [&](int64_t i, Rows rows) { multiply_scores(i, rows); },
             [&](int64_t i) { return Statistics<T>{lanes(largest, i), lanes(sum, i), factors(i)}; });
  }

  void best(const Chain& chain, T* largest, int64_t* position) {
    enter(chain);
    along<1>({&scores_}, [&](int64_t i, Rows rows) { multiply_scores(i, rows); }, [&](int64_t i) {
      const int64_t first = level_->first + chain_->key_row(i) * width();
      return Best<T>{lanes(largest, i), lanes(position, i), factors(i), first};
    });
  }

  // out (H x Cv x lanes) += box(P) v
  void output(const Chain& chain, const T* log_sum_exp, T* out) {
    enter(chain);
    along<1, 1>({&scores_}, [&](int64_t i, Rows rows) { multiply_scores(i, rows); },
                [&](int64_t i) { return Weights<T>{lanes(log_sum_exp, i), factors(i), weights_.input()}; },
                {&weights_}, {mixed_weights_.get()}, [&](int64_t i, Rows rows) {
                  const int64_t calls = idle_calls<T>(p_.channels, lanes(), rows.end - rows.begin);
                  multiply_add<T>(values(i).from(rows.begin, 0).transposed(), mixed(mixed_weights_, rows),
                                  query_row(out, p_.channels, i), p_.channels, lanes(), rows.end - rows.begin,
                                  {next(values(i + 1), width(), p_.channels, calls, i),
                                   next(query_row<const T>(out, p_.channels, i + 1), p_.channels, lanes(), calls, i)});
                });
  }

  // delta (H x lanes) += Σ_l P box(do vᵀ)
  void delta(const Chain& chain, const T* log_sum_exp, T* delta) {
    enter(chain);
    along<2>({&scores_, &slopes_of_weights_}, [&](int64_t i, Rows rows) { multiply_both(i, rows); },
             [&](int64_t i) { return Delta<T>{lanes(log_sum_exp, i), factors(i), lanes(delta, i)}; });
  }

  struct Gradients {
    T *query;         // of the band, H x Cq x lanes
    T *keys, *values;  // of the level, pixels x channels; keys' without what comes through the norms
    T *products;      // Σ_n dS S of every key patch
  };

  void gradients(const Chain& chain, const T* log_sum_exp, const T* delta, const T* own, T out_scale,
                 const Scratch<T>& queries, const Scratch<T>& grad_out, const Gradients& to) {
    enter(chain);
    const int64_t first = band_->begin - band_->left, columns = band_->end - band_->begin;
    along<2, 2>(
        {&scores_, &slopes_of_weights_}, [&](int64_t i, Rows rows) { multiply_both(i, rows); },
        [&](int64_t i) {
          std::fill_n(products_.get(), width() * Vec<T>::size(), T(0));
          return Slopes<T>{lanes(log_sum_exp, i), lanes(delta, i), own, factors(i), out_scale, weights_.input(),
                           slopes_.input(), products_.get()};
        },
        {&weights_, &slopes_}, {mixed_weights_.get(), mixed_slopes_.get()}, [&](int64_t i, Rows rows) {
          const int64_t count = rows.end - rows.begin, pixel = chain_->query_row(i) * p_.width + band_->begin;
          const Matrix<const T> weights = mixed(mixed_weights_, rows), slopes = mixed(mixed_slopes_, rows);
          multiply_add<T>(keys(i).from(rows.begin, 0).transposed(), slopes, query_row(to.query, p_.depth, i), p_.depth,
                          lanes(), count);
          multiply_add<T>(slopes.from(0, first), {queries.get() + pixel * p_.depth, p_.depth},
                          key_row(to.keys, p_.depth, i).from(rows.begin, 0), count, p_.depth, columns);
          multiply_add<T>(weights.from(0, first), {grad_out.get() + pixel * p_.channels, p_.channels},
                          key_row(to.values, p_.channels, i).from(rows.begin, 0), count, p_.channels, columns);
        },
        [&](int64_t i) {
          T* sums = to.products + chain_->key_row(i) * width();
          for (int64_t l = 0; l < width(); ++l)
            sums[l] += at::vec::vec_reduce_all<T>([](Vec<T> a, Vec<T> b) { return a + b; },
                                                  Vec<T>::loadu(products_.get() + l * Vec<T>::size()));
        });
  }

 private:
  static constexpr int64_t kChunk = 32;  // rows, a multiple of the products' block of rows

  DiagonalBox<T> box() const { return {p_.radius, p_.most_rows(), p_.most_lanes()}; }

  void enter(const Chain& chain) {
    chain_ = &chain;
    if (band_ == &p_.bands[chain.band] && level_ == &p_.levels[chain.level]) return;
    band_ = &p_.bands[chain.band], level_ = &p_.levels[chain.level];
    for (DiagonalBox<T>* b : {&scores_, &slopes_of_weights_, &weights_, &slopes_}) b->resize(width());
  }

  // Along the chain: produce(i, rows) fills rows of the inputs of step i, the sums around every step i go to
  // the consumer consume(i), which fills the inputs of the second filters, if there are any; their sums go
  // to `targets`, of which emit(i, rows) uses the rows that are not zero. consumed(i) follows each consumer.
  // A tile goes through all of this in chunks of rows, which stay in L1; filters run behind their inputs.
  template <size_t kFirst, size_t kSecond = 0, typename Produce, typename Consume, typename Emit, typename Consumed>
  void along(const std::array<DiagonalBox<T>*, kFirst>& first, Produce produce, Consume consume,
             const std::array<DiagonalBox<T>*, kSecond>& second, const std::array<T*, kSecond>& targets, Emit emit,
             Consumed consumed) {
    const int64_t length = chain_->length, radius = p_.radius;
    for (auto* b : first) b->start_chain();
    for (auto* b : second) b->start_chain();
    for (int64_t step = 0; step < length + radius * (kSecond ? 2 : 1); ++step) {
      const int64_t centre = step - radius, second_centre = centre - radius;
      const bool is_centre = centre >= 0 && centre < length;
      for (auto* b : first) b->advance(step < length);
      for (auto* b : second)
        if (centre >= 0) b->advance(is_centre);
      auto consumer = consume(is_centre ? centre : 0);
      Store<T, kSecond> store{targets};
      Rows made, filtered, mixed;  // the chunk's
      while (made.end < width()) {
        made = {made.end, std::min(made.end + kChunk, width())};
        if (step < length) produce(step, made);
        filtered = {filtered.end, made.end == width() ? width() : made.end - radius};
        if (is_centre) filter<kRadius, T, kFirst>(first, filtered, lanes(), consumer);
        else if (centre < 0) keep<kRadius, T, kFirst>(first, filtered, lanes());
        if constexpr (kSecond > 0) {
          mixed = {mixed.end, made.end == width() ? width() : filtered.end - radius};
          if (second_centre >= 0) filter<kRadius, T, kSecond>(second, mixed, lanes(), store);
          else if (centre >= 0) keep<kRadius, T, kSecond>(second, mixed, lanes());
        }
      }
      if (is_centre) consumed(centre);
      if constexpr (kSecond > 0) {
        if (is_centre)
          for (auto* b : second) b->settle(consumer.matter);
        const Rows rows = second[0]->sums();
        if (second_centre >= 0 && !rows.empty()) emit(second_centre, rows);
      }
    }
  }

  template <size_t kFirst, size_t kSecond, typename Produce, typename Consume, typename Emit>
  void along(const std::array<DiagonalBox<T>*, kFirst>& first, Produce produce, Consume consume,
             const std::array<DiagonalBox<T>*, kSecond>& second, const std::array<T*, kSecond>& targets, Emit emit) {
    along<kFirst, kSecond>(first, produce, consume, second, targets, emit, [](int64_t) {});
  }

  template <size_t kFirst, typename Produce, typename Consume>
  void along(const std::array<DiagonalBox<T>*, kFirst>& first, Produce produce, Consume consume) {
    along<kFirst, 0>(first, produce, consume, {}, {}, [](int64_t, Rows) {});
  }

  void multiply_scores(int64_t i, Rows rows) {
    multiply_rows(keys(i), p_.queries[chain_->band].get(), p_.depth, scores_, i, rows);
  }

  void multiply_both(int64_t i, Rows rows) {
    multiply_scores(i, rows);
    multiply_rows(values(i), p_.gradients[chain_->band].get(), p_.channels, slopes_of_weights_, i, rows);
  }

  // Rows of the tile of products of keys or values and the query image's features.
  void multiply_rows(Matrix<const T> pixels, const T* features, int64_t channels, DiagonalBox<T>& box, int64_t i, Rows rows) {
    multiply<T>(pixels.from(rows.begin, 0), query_row(features, channels, i), {box.input() + rows.begin * row_, row_},
                rows.end - rows.begin, lanes(), channels);
  }

  // Asks for what step i + 1 reads, where there is one.
  Prefetch next(Matrix<const T> tile, int64_t rows, int64_t columns, int64_t calls, int64_t i) const {
    return i + 1 < chain_->length ? Prefetch(tile, rows, columns, calls) : Prefetch();
  }

  int64_t width() const { return level_->width; }  // rows of a tile
  int64_t lanes() const { return band_->lanes; }

  // Of the query row of step i, and of its key row.
  template <typename U>
  U* lanes(U* of_band, int64_t i) const { return of_band + chain_->query_row(i) * lanes(); }
  template <typename U>
  Matrix<U> query_row(U* of_band, int64_t channels, int64_t i) const {
    return {of_band + chain_->query_row(i) * channels * lanes(), lanes()};
  }
  template <typename U>
  Matrix<U> key_row(U* of_level, int64_t channels, int64_t i) const {
    return {of_level + chain_->key_row(i) * width() * channels, channels};
  }
  Matrix<const T> keys(int64_t i) const { return key_row<const T>(level_->keys.get(), p_.depth, i); }
  Matrix<const T> values(int64_t i) const { return key_row<const T>(level_->values.get(), p_.channels, i); }
  const T* factors(int64_t i) const { return level_->factors.get() + chain_->key_row(i) * width(); }

  Matrix<const T> mixed(const Scratch<T>& tile, Rows rows) const { return {tile.get() + rows.begin * row_, row_}; }

  const Problem<T>& p_;
  int64_t row_;
  const Chain* chain_ = nullptr;
  const Band* band_ = nullptr;
  const Level<T>* level_ = nullptr;
  DiagonalBox<T> scores_, slopes_of_weights_;  // products q k and do v, of which dP is the sum
  DiagonalBox<T> weights_, slopes_;            // P and dS
  Scratch<T> mixed_weights_, mixed_slopes_;    // filtered
  Scratch<T> products_;
};

}  // namespace pyramid
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
