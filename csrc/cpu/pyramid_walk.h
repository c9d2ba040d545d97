// What is done along a chain of tiles: the passes of pyramid attention.
#pragma once

#include "pyramid_chains.h"
#include "pyramid_filters.h"
#include "pyramid_problem.h"

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace pyramid {

// What a consumer of sums has found out: the rows of the weights that are not all zero.
struct Consumer {
  Rows matter;
};

// Running maximum and sum of exponentials of every lane.
template <typename T>
struct Statistics : Consumer {
  T *largest, *sum;        // per lane
  const T* factors;        // per row of the tile
  struct State {
    Vec<T> largest, sum;
  };

  State begin(int64_t lane) const { return {Vec<T>::loadu(largest + lane), Vec<T>::loadu(sum + lane)}; }

  void operator()(State& state, int64_t row, int64_t, const std::array<Vec<T>, 1>& sums) const {
    const Vec<T> score = sums[0] * Vec<T>(factors[row]);
    if (any_above(score, state.largest)) {  // seldom: the more tiles have been seen, the less often
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
struct Best : Consumer {
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
    if (!any_not_below(score, state.largest)) return;
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
    if (!any_not_below(logarithms, Vec<T>(kNegligible<T>))) return;
    if (rows.empty()) rows.begin = row;
    rows.end = row + 1;
  }
};

// The softmax, into the tile `weights`.
template <typename T>
struct Weights : Consumer {
  const T *log_sum_exp, *factors;
  T* weights;
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

// delta and weights, per lane += Σ over rows of P t and of P
template <typename T>
struct Delta : Consumer {
  const T *log_sum_exp, *factors;
  T *delta, *weights;
  struct State {
    Vec<T> log_sum_exp, delta, weights;
  };

  State begin(int64_t lane) const {
    return {Vec<T>::loadu(log_sum_exp + lane), Vec<T>::loadu(delta + lane), Vec<T>::loadu(weights + lane)};
  }

  void operator()(State& state, int64_t row, int64_t, const std::array<Vec<T>, 2>& sums) const {
    const Vec<T> p = weight(sums[0] * Vec<T>(factors[row]) - state.log_sum_exp);
    state.delta = at::vec::fmadd(p, sums[1], state.delta);
    state.weights = state.weights + p;
  }

  void end(const State& state, int64_t lane) const {
    state.delta.store(delta + lane);
    state.weights.store(weights + lane);
  }
};

// P and the gradient of the products' sums, dS times the row's factor; and Σ over the band's own lanes of
// dS S, a vector per row.
template <typename T>
struct Slopes : Consumer {
  const T *log_sum_exp, *delta, *own;  // own: 1 at the lanes of the band's own columns, else 0
  const T* factors;
  T out_scale;
  T *weights, *slopes, *products;
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
//
// A tile goes through all filters in pieces of a few rows, which stay in L1; filters run `radius` rows behind
// what they read.
template <typename T, int kRadius>
class Walk {
 public:
  explicit Walk(const Problem<T>& p)
      : p_(p), row_(p.most_lanes() + kMargin<T>), piece_(kPiece + 4 * p.radius), scores_(box()), slopes_of_weights_(box()),
        weights_(box()), slopes_(box()), mixed_weights_(piece_ * row_), mixed_slopes_(piece_ * row_),
        products_(p.most_rows() * Vec<T>::size()) {}

  void statistics(const Chain& chain, T* largest, T* sum) {
    enter(chain);
    along<1>({&scores_}, [&](int64_t i, Rows rows) { multiply_scores(i, rows); },
             [&](int64_t i, Rows) { return Statistics<T>{{}, lanes(largest, i), lanes(sum, i), factors(i)}; });
  }

  void best(const Chain& chain, T* largest, int64_t* position) {
    enter(chain);
    along<1>({&scores_}, [&](int64_t i, Rows rows) { multiply_scores(i, rows); }, [&](int64_t i, Rows) {
      const int64_t first = level_->first + chain_->key_row(i) * width();
      return Best<T>{{}, lanes(largest, i), lanes(position, i), factors(i), first};
    });
  }

  // out (H x Cv x lanes) += box(P) v
  void output(const Chain& chain, const T* log_sum_exp, T* out) {
    enter(chain);
    along<1, 1>({&scores_}, {&weights_}, {&mixed_weights_}, [&](int64_t i, Rows rows) { multiply_scores(i, rows); },
                [&](int64_t i, Rows rows) {
                  return Weights<T>{{}, lanes(log_sum_exp, i), factors(i), weights_.rows_from(rows.begin)};
                },
                [&](int64_t i, Rows rows, const std::array<Matrix<const T>, 1>& mixed) {
                  multiply_add<T>(values(i).from(rows.begin, 0).transposed(), mixed[0], query_row(out, p_.channels, i),
                                  p_.channels, lanes(), rows.count());
                });
  }

  // delta (H x lanes) += Σ_l P box(do vᵀ), weights (H x lanes) += Σ_l P
  void delta(const Chain& chain, const T* log_sum_exp, T* delta, T* weights) {
    enter(chain);
    along<2>({&scores_, &slopes_of_weights_}, [&](int64_t i, Rows rows) { multiply_both(i, rows); },
             [&](int64_t i, Rows) {
               return Delta<T>{{}, lanes(log_sum_exp, i), factors(i), lanes(delta, i), lanes(weights, i)};
             });
  }

  struct Gradients {
    T* query;          // of the band, H x Cq x lanes
    T *keys, *values;  // of the level, pixels x channels; keys' without what comes through the norms
    T* products;       // Σ_n dS S of every key patch
  };

  // `queries`, `grad_out`: the images, pixel-major; `own`: 1 at the lanes of the band's own columns, else 0.
  void gradients(const Chain& chain, const T* log_sum_exp, const T* delta, const T* own, T out_scale,
                 const Scratch<T>& queries, const Scratch<T>& grad_out, const Gradients& to) {
    enter(chain);
    const int64_t first = band_->begin - band_->left, columns = band_->end - band_->begin;
    along<2, 2>(
        {&scores_, &slopes_of_weights_}, {&weights_, &slopes_}, {&mixed_weights_, &mixed_slopes_},
        [&](int64_t i, Rows rows) { multiply_both(i, rows); },
        [&](int64_t i, Rows rows) {
          std::fill_n(products_.get() + rows.begin * Vec<T>::size(), rows.count() * Vec<T>::size(), T(0));
          return Slopes<T>{{}, lanes(log_sum_exp, i), lanes(delta, i), own, factors(i), out_scale,
                           weights_.rows_from(rows.begin), slopes_.rows_from(rows.begin), products_.get()};
        },
        [&](int64_t i, Rows rows, const std::array<Matrix<const T>, 2>& mixed) {
          const auto& [weights, slopes] = mixed;
          const int64_t count = rows.count(), pixel = chain_->query_row(i) * p_.width + band_->begin;
          multiply_add<T>(keys(i).from(rows.begin, 0).transposed(), slopes, query_row(to.query, p_.depth, i), p_.depth,
                          lanes(), count);
          multiply_add<T>(slopes.from(0, first), {queries.get() + pixel * p_.depth, p_.depth},
                          key_row(to.keys, p_.depth, i).from(rows.begin, 0), count, p_.depth, columns);
          multiply_add<T>(weights.from(0, first), {grad_out.get() + pixel * p_.channels, p_.channels},
                          key_row(to.values, p_.channels, i).from(rows.begin, 0), count, p_.channels, columns);
        },
        [&](int64_t i, Rows rows) {
          T* sums = to.products + chain_->key_row(i) * width();
          for (int64_t l = rows.begin; l < rows.end; ++l)
            sums[l] += at::vec::vec_reduce_all<T>([](Vec<T> a, Vec<T> b) { return a + b; },
                                                  Vec<T>::loadu(products_.get() + l * Vec<T>::size()));
        });
  }

 private:
  static constexpr int64_t kPiece = 32;  // rows, a multiple of the products' blocks

  DiagonalBox<T> box() const { return {p_.radius, p_.most_rows(), p_.most_lanes(), piece_}; }

  void enter(const Chain& chain) {
    chain_ = &chain, band_ = &p_.bands[chain.band], level_ = &p_.levels[chain.level];
    for (DiagonalBox<T>* b : {&scores_, &slopes_of_weights_, &weights_, &slopes_}) b->start_chain(width(), lanes());
  }

  // Along the chain: produce(i, rows) makes rows of the inputs of step i. The sums around every step i go to the
  // consumer consume(i, rows), which makes rows of the inputs of the second filters, if there are any; then
  // consumed(i, rows) is called. The second sums around step i go to emit(i, rows, those rows of the sums),
  // unless they are zero.
  template <size_t kFirst, size_t kSecond, typename Produce, typename Consume, typename Emit, typename Consumed>
  void along(const std::array<DiagonalBox<T>*, kFirst>& first, const std::array<DiagonalBox<T>*, kSecond>& second,
             const std::array<const Scratch<T>*, kSecond>& mixed_pieces, Produce produce, Consume consume, Emit emit,
             Consumed consumed) {
    constexpr int kFilters = kSecond ? 2 : 1;
    const int64_t length = chain_->length, radius = p_.radius;
    for (int64_t step = 0; step < length + radius * kFilters; ++step) {
      const int64_t centre = step - radius, second_centre = centre - radius;
      const bool comes = step < length, is_centre = centre >= 0 && centre < length;
      for (auto* b : first) b->start_tile(comes);
      for (auto* b : second)
        if (centre >= 0) b->start_tile(is_centre);
      Rows made, filtered, mixed, matter;
      while (made.end < width()) {
        // The first piece is longer, so that the later filters get whole pieces.
        made = {made.end, std::min(made.end + kPiece + (made.end ? 0 : kFilters * radius), width())};
        const bool is_last = made.end == width();
        if (comes) {
          produce(step, made);
          if (is_last)
            for (auto* b : first) b->end_tile();
        }
        filtered = {filtered.end, is_last ? width() : made.end - radius};
        if (centre < 0) keep<kRadius, T, kFirst>(first, filtered, lanes());
        if (is_centre) {
          auto consumer = consume(centre, filtered);
          filter<kRadius, T, kFirst>(first, filtered, lanes(), consumer);
          consumed(centre, filtered);
          matter.add(consumer.matter);
          if (is_last)
            for (auto* b : second) b->end_tile();
        }
        if constexpr (kSecond > 0) {
          mixed = {mixed.end, is_last ? width() : filtered.end - radius};
          if (centre >= 0 && second_centre < 0) keep<kRadius, T, kSecond>(second, mixed, lanes());
          if (second_centre >= 0) {
            Store<T, kSecond> store;
            for (size_t b = 0; b < kSecond; ++b) store.targets[b] = mixed_pieces[b]->get() - mixed.begin * row_;
            filter<kRadius, T, kSecond>(second, mixed, lanes(), store);
            const Rows rows = second[0]->sums(matter, mixed);
            if (rows.empty()) continue;
            std::array<Matrix<const T>, kSecond> sums;
            for (size_t b = 0; b < kSecond; ++b) sums[b] = {store.targets[b] + rows.begin * row_, row_};
            emit(second_centre, rows, sums);
          }
        }
      }
      if (is_centre)
        for (auto* b : second) b->settle(matter);
    }
  }

  template <size_t kFirst, size_t kSecond, typename Produce, typename Consume, typename Emit>
  void along(const std::array<DiagonalBox<T>*, kFirst>& first, const std::array<DiagonalBox<T>*, kSecond>& second,
             const std::array<const Scratch<T>*, kSecond>& mixed_pieces, Produce produce, Consume consume, Emit emit) {
    along<kFirst, kSecond>(first, second, mixed_pieces, produce, consume, emit, [](int64_t, Rows) {});
  }

  template <size_t kFirst, typename Produce, typename Consume>
  void along(const std::array<DiagonalBox<T>*, kFirst>& first, Produce produce, Consume consume) {
    along<kFirst, 0>(first, {}, {}, produce, consume, [](int64_t, Rows, const auto&) {});
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
    multiply<T>(pixels.from(rows.begin, 0), query_row(features, channels, i),
                {box.rows_from(rows.begin) + rows.begin * row_, row_}, rows.count(), lanes(), channels);
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

  const Problem<T>& p_;
  int64_t row_, piece_;
  const Chain* chain_ = nullptr;
  const Band* band_ = nullptr;
  const Level<T>* level_ = nullptr;
  DiagonalBox<T> scores_, slopes_of_weights_;  // products q k, and do v, of which dP is the sum
  DiagonalBox<T> weights_, slopes_;            // P and dS
  Scratch<T> mixed_weights_, mixed_slopes_;    // a piece of each, filtered
  Scratch<T> products_;
};

}  // namespace pyramid
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
