// The passes of pyramid attention over all pairs of pixels; pyramid_attention.cuh has formulas and counts.
#pragma once

#include <cmath>

#include "pyramid_problem.cuh"

namespace restore_kernels::pyramid {

// A block at work.
template <typename T, Pass PASS>
struct Walk : Shape<T, PASS> {
  using typename Shape<T, PASS>::Does;
  using typename Shape<T, PASS>::Owned;
  using typename Shape<T, PASS>::Streamed;
  using Shape<T, PASS>::A, Shape<T, PASS>::B, Shape<T, PASS>::R, Shape<T, PASS>::W, Shape<T, PASS>::kColumns,
      Shape<T, PASS>::kSteps, Shape<T, PASS>::kStreamed, Shape<T, PASS>::kRing, Shape<T, PASS>::kParts,
      Shape<T, PASS>::kTiles, Shape<T, PASS>::kPitch, Shape<T, PASS>::kThreads;
  using Sums = Products<A, B>;

  const Problem& p;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  int64_t split, image;
  int top, left;   // the first owned row; the column of the first row of the matrices
  int first, end;  // offsets from owned to streamed rows
  int column;      // the first one of the tile of the streamed image
  Owned owned[2];
  Streamed streamed[2];
  unsigned* weights;

  Statistics statistics[PASS == Pass::kStatistics ? R : 1][2 * A];
  float totals[PASS == Pass::kRowSums ? R : 1][2 * A] = {};  // of rows; kGradKey: of row `member`
  float mixed[Does::mixes ? A : 1][kTiles][4] = {};

  __device__ Walk(const Problem& problem, unsigned* shared) : p(problem) {
    int64_t block = blockIdx.x;
    split = block % p.splits, block /= p.splits;
    left = static_cast<int>(block % p.tiles_x) * kColumns - Does::halo, block /= p.tiles_x;
    top = static_cast<int>(block % p.tiles_y) * R, image = block / p.tiles_y;
    const int highest = top + R - 1 + Does::halo, lowest = top - Does::halo;
    first = highest < p.owned[0].height ? -highest : 1 - p.owned[0].height;
    end = p.streamed[0].height - (lowest > 0 ? lowest : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      owned[i] = {shared, p.owned[i].pitch()};
      if (Shape<T, PASS>::owns(i)) shared = owned[i].row(kSteps);
      streamed[i] = {shared, p.streamed[i].pitch()};
      if (Shape<T, PASS>::streams(i)) shared = streamed[i].row(kRing);
    }
    weights = shared;
  }

  __device__ int row_of(int step) const { return top - Does::halo - 1 + step; }  // owned
  __device__ bool meet(int y, int offset) const {
    return y >= 0 && y < p.owned[0].height && y + offset >= 0 && y + offset < p.streamed[0].height;
  }

  __device__ void copy_owned() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!Shape<T, PASS>::owns(i)) continue;
      const unsigned* data = p.owned[i].data + image * p.owned[i].pixels() * p.owned[i].words;
      copy_rows(p.owned[i], data, row_of(0), kSteps, left - 1, owned[i], 0, kSteps);
    }
  }

  // Streamed rows [from, from + count) after the first one of the first group of chains, of what is only
  // multiplied or of what is mixed.
  __device__ void copy_streamed(bool of_mixed, int from, int count) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!Shape<T, PASS>::streams(i) || (Does::mixes && i == Does::mixed) != of_mixed) continue;
      const unsigned* data = p.streamed[i].data + image * p.streamed[i].pixels() * p.streamed[i].words;
      copy_rows(p.streamed[i], data, row_of(0) + first + from, count, column - 1, streamed[i], from, kRing);
    }
  }

  __device__ void run() {
    copy_owned();
    const int tiles = (p.streamed[0].width + 8 * B - 1) / (8 * B), begin = static_cast<int>(split) * p.tiles_per_split;
    for (int tile = begin; tile < tiles && tile < begin + p.tiles_per_split; ++tile) {
      column = tile * 8 * B;
      wait_for_copies<0>();
      __syncthreads();  // nobody reads the last tile's rows
      copy_streamed(false, 0, kStreamed);
      commit_copies();
      for (int start = 0; first + start < end; start += W) walk_group(start);
    }
  }

  // W chains, from this offset after the first on. The next group's rows come while those that they replace
  // are not needed: what is mixed while chains are walked, the rest while it is mixed.
  __device__ void walk_group(int start) {
    const bool is_last = first + start + W >= end;
    const int known = start ? kStreamed + start - W : 0;  // rows that have come
    if constexpr (Does::mixes) {
      copy_streamed(true, known, kStreamed + start - known);
      commit_copies();
      wait_for_copies<Does::mixes_first ? 0 : 1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    const auto copy_next = [&] {
      if (!is_last) copy_streamed(false, kStreamed + start, W);
      commit_copies();
    };
    if constexpr (!Does::mixes) copy_next();
    if (first + start + warp < end) walk_chain(start + warp);
    if constexpr (Does::mixes) {
      wait_for_copies<0>();
      __syncthreads();  // all weights are there
      copy_next();
      mix(start);
      __syncthreads();
    }
  }

  // The pairs of rows (y, y + offset) for all y, whose products and scores stay in registers.
  __device__ void walk_chain(int place) {
    const int offset = first + place;
    Box<A, B> scores, slopes, weighted;
#pragma unroll(Does::mixes ? 1 : kSteps)
    for (int step = 0; step < kSteps; ++step) {
      Sums s = {}, g = {};
      if (meet(row_of(step), offset)) {
        const int row = (step + place) % kRing;
        multiply_rows<T, A, B>(s, owned[0].row(step), streamed[0].row(row), owned[0].pitch);
        if constexpr (Does::both) multiply_rows<T, A, B>(g, owned[1].row(step), streamed[1].row(row), owned[1].pitch);
      }
      scores.add(s);
      if constexpr (Does::both) slopes.add(g);
      if (step < 2) continue;
      weigh(step - 2, row_of(step - 1), offset, s, g);
      if constexpr (Does::mixes) {
        weighted.add(s);
        if (step < 4) continue;
        unsigned* row = weights + (step - 4) * Owned::kSlots * kPitch;
        store_weights<T, A, B>(s, row, kPitch, (place % W) * 8 * kChunks<T, B>);
      }
    }
  }

  // Scores and, if any, gradients of weights of the patches around the pixels of a row: into totals, or weights
  // in their place.
  __device__ void weigh(int centre, int y, int offset, Sums& s, const Sums& g) {
    if (!meet(y, offset)) {
      if constexpr (Does::mixes) zero(s);
      return;
    }
    const Pixels<2 * A, Does::owns_keys> own(p, image, p.owned[0], y, [&](int i) { return left + 2 * A * group + i; });
    const Pixels<2 * B, !Does::owns_keys> other(p, image, p.streamed[0], y + offset, [&](int i) {
      return column + B * (2 * member + i % 2) + i / 2;
    });
#pragma unroll
    for (int half = 0; half < 2 * A; ++half) {
      float total = 0;
      float score[2 * B];
#pragma unroll
      for (int i = 0; i < 2 * B; ++i) {
        float& x = s[half / 2][i / 2][half % 2 * 2 + i % 2];
        const float scale = Does::owns_keys ? own.value[half] : other.value[i];
        score[i] = scale == 0 ? 0 : x * scale;  // also of a key whose norm overflows, as its products may
        const bool inside = own.inside[half] && other.inside[i];
        if constexpr (PASS == Pass::kStatistics) {
          if (!inside) score[i] = -INFINITY;
        } else {
          const float log_sum_exp = Does::owns_keys ? other.value[i] : own.value[half];
          const float weight = inside ? __expf(score[i] - log_sum_exp) : 0;
          if constexpr (Does::both) {
            const float slope = p.out_scale * g[half / 2][i / 2][half % 2 * 2 + i % 2];
            if constexpr (PASS == Pass::kRowSums) {
              total += weight * slope;
            } else {
              const float change = weight * (slope - (Does::owns_keys ? other.row_sum[i] : own.row_sum[half]));
              total += change * score[i];
              x = change * scale;
            }
          } else {
            x = weight;
          }
        }
      }
      if constexpr (PASS == Pass::kStatistics) add_scores(statistics[centre][half], score);
      if constexpr (PASS == Pass::kRowSums) totals[centre][half] += total;
      if constexpr (PASS == Pass::kGradKey) {
        total = sum_of_members(total);
        if (member == centre - 1) totals[0][half] += total;
      }
    }
  }

  static __device__ void zero(Sums& s) {
#pragma unroll
    for (int i = 0; i < 4 * A * B; ++i) s[i / (4 * B)][i / 4 % B][i % 4] = 0;
  }

  static __device__ void add_scores(Statistics& to, const float (&score)[2 * B]) {
    float now = to.largest, sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * B; ++i) now = fmaxf(now, score[i]);
#pragma unroll
    for (int i = 0; i < 2 * B; ++i) sum += __expf(score[i] - now);
    to.sum = to.sum * __expf(to.largest - now) + sum;
    to.largest = now;
  }

  // What is known of N pixels of a row, of keys or of the query.
  template <int N, bool OF_KEYS>
  struct Pixels {
    bool inside[N];
    float value[N] = {};    // scale, or log_sum_exp where it is known
    float row_sum[N] = {};  // of the query

    template <typename Place>
    __device__ Pixels(const Problem& p, int64_t image, const Image& at, int y, Place place) {
      const int64_t row = image * at.pixels() + static_cast<int64_t>(y) * at.width;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int x = place(i);
        inside[i] = x >= 0 && x < at.width;
        if (!inside[i]) continue;
        if constexpr (OF_KEYS) {
          value[i] = __ldg(p.scales + row + x);
        } else if constexpr (PASS != Pass::kStatistics) {
          value[i] = __ldg(p.log_sum_exp + row + x);
          if constexpr (Does::mixes_first) row_sum[i] = __ldg(p.row_sums + row + x);
        }
      }
    }
  };

  // Adds what the weights of a group's chains make of the streamed pixels to a row of sums.
  __device__ void mix(int start) {
    const int row = warp % R, part = warp / R, y = top + row;
    const int pitch = streamed[Does::mixed].pitch, channels = (pitch - 4) * kElements<T>;
    for (int chain = 0; chain < W && first + start + chain < end; ++chain) {
      if (!meet(y, first + start + chain)) continue;
      Half<T> a[kChunks<T, B>][2 * A + 2];
#pragma unroll
      for (int c = 0; c < kChunks<T, B>; ++c) {
        load_halves<T, 2 * A>(a[c], weights + row * Owned::kSlots * kPitch, kPitch, (chain * kChunks<T, B> + c) * 8);
      }
      const unsigned* pixels = streamed[Does::mixed].row((row + Does::halo + 1 + start + chain) % kRing);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int channel = 8 * (n * kParts + part);
        if (channel >= channels) break;
        Channels<T, B> x;
        x.load(pixels, pitch, channel);
#pragma unroll
        for (int c = 0; c < kChunks<T, B>; ++c) {
#pragma unroll
          for (int shift = 0; shift < 3; ++shift) {
#pragma unroll
            for (int i = 0; i < A; ++i)
              multiply_add(mixed[i][n], a[c][2 * i + 2 - shift], a[c][2 * i + 3 - shift], x.at(c, shift));
          }
        }
      }
    }
  }

  // Where pixel (row, place in the tile) has its result, or -1.
  __device__ int64_t pixel_of(int row, int place) const {
    const int y = top + row, x = left + place;
    const bool owned_here = place >= Does::halo && place < Does::halo + kColumns && x < p.owned[0].width;
    if (!owned_here || y >= p.owned[0].height) return -1;
    return (split * p.batch + image) * p.owned[0].pixels() + static_cast<int64_t>(y) * p.owned[0].width + x;
  }

  __device__ void write_mixed() const {
    const int64_t channels = p.streamed[Does::mixed].words * kElements<T>;
#pragma unroll
    for (int half = 0; half < 2 * A; ++half) {
      const int64_t pixel = pixel_of(warp % R, 2 * A * group + half);
      if (pixel < 0) continue;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int channel = 8 * (n * kParts + warp / R);
        if (channel >= channels) break;
        const float* pair = mixed[half / 2][n] + half % 2 * 2;
        *reinterpret_cast<float2*>(p.result + pixel * channels + channel + 2 * member) = {pair[0], pair[1]};
      }
    }
  }

  // Adds up over warps in order, the value of every pixel that value(row, half) has on some lanes.
  template <typename Value, typename OnLane, typename Get>
  __device__ void write_totals(Value* shared, Value* result, OnLane on_lane, Get get) const {
    __syncthreads();
#pragma unroll
    for (int row = 0; row < R; ++row) {
#pragma unroll
      for (int half = 0; half < 2 * A; ++half) {
        const Value value = get(row, half);  // of all lanes, which may meet in it
        if (on_lane(row)) shared[(warp * R + row) * 16 * A + 2 * A * group + half] = value;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < R * 16 * A; i += kThreads) {
      Value sum = shared[i];
      for (int w = 1; w < W; ++w) add(sum, shared[w * R * 16 * A + i]);
      const int64_t pixel = pixel_of(i / (16 * A), i % (16 * A));
      if (pixel >= 0) result[pixel] = sum;
    }
  }
  static __device__ void add(float& sum, float x) { sum += x; }
  static __device__ void add(Statistics& sum, const Statistics& x) { sum.add(x); }
};

// Grid: images * tiles_y * tiles_x * splits, splits running fastest.
template <typename T, Pass PASS>
__global__ void __launch_bounds__(Shape<T, PASS>::kThreads, 1) pyramid_kernel(const Problem p) {
  DYNAMIC_SHARED(unsigned, shared);
  Walk<T, PASS> walk(p, shared);
  walk.run();
  const int member = threadIdx.x % 4;
  if constexpr (PASS == Pass::kStatistics) {
    walk.write_totals(reinterpret_cast<Statistics*>(shared), reinterpret_cast<Statistics*>(p.result),
                      [&](int) { return member == 0; }, [&](int row, int half) {
                        Statistics sum = walk.statistics[row][half];
                        for (int flip = 1; flip < 4; flip *= 2)
                          sum.add({__shfl_xor_sync(0xffffffff, sum.largest, flip),
                                   __shfl_xor_sync(0xffffffff, sum.sum, flip)});
                        return sum;
                      });
  } else if constexpr (PASS == Pass::kRowSums) {
    walk.write_totals(reinterpret_cast<float*>(shared), p.result, [&](int) { return member == 0; },
                      [&](int row, int half) { return sum_of_members(walk.totals[row][half]); });
  } else {
    walk.write_mixed();
    if constexpr (PASS == Pass::kGradKey)
      walk.write_totals(reinterpret_cast<float*>(shared), p.radial, [&](int row) { return member == row; },
                        [&](int, int half) { return walk.totals[0][half]; });
  }
}

}  // namespace restore_kernels::pyramid
