// Last stage of channel attention: small matrices times rows over the pixels.
//
//   out = M x                                    forward: x is v, M the mixture P, or W P with a projection W
//   dv = g (Mᵀ do)                               backward, one side
//   dq = X k' - y_q q, dk = g (Xᵀ q - y_k k')    backward, two sides, which share what they read
//
// k' = g k where a gate g multiplies k. The gate's gradient is dv' v + dk' k, dv' and dk' being the
// gradients before they pass the gate. Tensors of float32, bfloat16 or float16 and any strides.
//
// Schedule. A block owns 48 rows of the output (of both, with two sides) of one group and a run of tiles of
// 128 bytes of pixels. For each of them it goes through the inner dimension in steps of 48: tiles of x come
// to shared memory while the two before them are multiplied. The matrix, 48 x 48 of it, stays in shared
// memory where that is all of the inner dimension; else it comes with each tile. A warp multiplies its slice
// of the pixels by all 48 x 48, puts the output, rounded, where it read x, and writes it from there: 32 bytes
// of every row at a time. Blocks of the same pixels are neighbours in the grid, so that all but the first
// find x in the L2 cache.
//
// Bytes and operations: with C <= 48, one side reads T and writes T, two sides 2 T each, T = B H C N e bytes;
// 2 C operations an element written (x 3 of tf32 in float32). At C = 48 that is 24 operations a byte in
// bfloat16, where A100 and H200 balance at more than 80: memory is the bound. (8, 1, 48, 128x128) in
// bfloat16 is 25 MB one side and 50 MB two: 5.9 µs and 11.7 µs on H200 at 4.3 TB/s, 14 µs and 28 µs on
// A100 at 1.8 TB/s. With a projection and H C = 384, H C / 48 blocks read the same x, which is 48 operations
// a byte from the L2 cache. Not measured yet.
//
// Occupancy of 16-bit elements with C <= 48: one side has 25 KiB of shared memory a block, two have 51 KiB,
// which is four blocks a processor of an H200 and three of an A100: 108 KiB on their way to it on H200,
// where 4.3 TB/s at 0.8 µs of latency need 26 KiB. float32 has 31 KiB and 62 KiB.
#pragma once

#include "channel_tiles.cuh"

namespace restore_kernels::channel {

// Where the gate's gradient goes, in float32: for a gate of one row a head to part `first` + row tile of
// (B, H, parts, N), parts that are added up afterwards; else, with parts = 0, every element to (B, H, C, N),
// with `add` on top of what is there.
struct GateGradient {
  float* data;
  int64_t parts;
  int first;
  bool add;
};

// M is T, or float, WIDE, for float32, with a gate, and where entries of the matrix are beyond float16.
template <typename T, typename M>
struct Side {
  const M* matrix;      // (B * groups, rows, pitch)
  const float* radial;  // (B * groups, rows): y; only of two sides
  Rows<const T> x;
  Rows<T> out;
  Rows<const float> x_gate, out_gate;  // no data: none
  Rows<const T> own;                   // k of dk, v of dv, for the gate's gradient
  GateGradient gate_gradient;
};

template <typename T, typename M, int SIDES>
struct Apply {
  Side<T, M> side[SIDES];
  int64_t groups;     // of an image
  int rows, inner;    // of a matrix
  int64_t pitch;      // a multiple of 8
  int64_t pixels;
  int64_t run, runs;  // tiles of a run; runs of an image
  bool copies;        // rows_align of all x and out
};

// Words from row to row of a matrix in shared memory: by their remainders by 32, lanes that read word
// `member`, or words 2 `member` and the next one, of row `group` read different banks.
template <typename M>
constexpr int kMatrixPitch = sizeof(M) == 2 ? 28 : 56;
template <typename M>
using MatrixTile = unsigned[kTile][kMatrixPitch<M>];

template <typename M>
__device__ __forceinline__ void copy_matrix(const M* matrix, int row, int rows, int column, int columns,
                                            int64_t pitch, MatrixTile<M>& tile) {
  constexpr int per_copy = 16 / sizeof(M), copies = kTile / per_copy;  // of a row
  for (int i = threadIdx.x; i < kTile * copies; i += kThreads) {
    const int r = i / copies, first = column + i % copies * per_copy;
    const int left = row + r < rows ? columns - first : 0;
    const int count = left < 0 ? 0 : left < per_copy ? left : per_copy;
    const M* from = count ? matrix + (row + r) * pitch + first : matrix;  // an address in any case
    copy_async(&tile[r][i % copies * 4], from, count * static_cast<int>(sizeof(M)));
  }
}

// One lane's part of an output: rows 16 m + group and, as elements 2 and 3, those 8 below; words 2 member
// and the next one of the warp's slice, element e of them.
template <typename T>
using Output = float[kTile / 16][kElements<T>][4];

// Pairs of elements of two rows: of the same word, the lower elements and the upper ones.
template <typename T>
__device__ __forceinline__ void multiply_pairs(const MatrixTile<T>& matrix, const Tile& x, int warp, int group,
                                               int member, Output<T>& out) {
#pragma unroll
  for (int k = 0; k < kTile; k += 16) {
    Pairs<T, 2> b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned first = x[k + 2 * member + 8 * i][8 * warp + group];
      const unsigned second = x[k + 2 * member + 8 * i + 1][8 * warp + group];
      b[0].pair[i] = (first & 0xffffu) | second << 16;
      b[1].pair[i] = first >> 16 | (second & 0xffff0000u);
    }
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) {
      Pairs<T, 4> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.pair[i] = matrix[16 * m + i % 2 * 8 + group][k / 2 + member + i / 2 * 4];
      multiply_add(out[m][0], a, b[0]);
      multiply_add(out[m][1], a, b[1]);
    }
  }
}

// gate(row, e): of element e of the lane's word of this row of the tile; where x is `gated`.
template <typename T, typename Gate>
__device__ __forceinline__ void multiply_wide(const MatrixTile<float>& matrix, const Tile& x, int warp, int group,
                                              int member, bool gated, const Gate& gate, Output<T>& out) {
  const bool exact = sizeof(T) == 2 && !gated;
#pragma unroll 1
  for (int k = 0; k < kTile; k += 8) {
    Split<2> b[kElements<T>];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = k + 2 * member + i;
      const unsigned word = x[row][8 * warp + group];
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) b[e].set(i, element<T>(word, e) * (gated ? gate(row, e) : 1));
    }
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) {
      Split<4> a;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto& row = matrix[16 * m + 8 * i + group];
        const float2 pair = *reinterpret_cast<const float2*>(&row[k + 2 * member]);
        a.set(i, pair.x);
        a.set(i + 2, pair.y);
      }
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) multiply_add(out[m][e], a, b[e], exact);
    }
  }
}

// Output through the gate, and the gate's gradient. pixel: the first of the warp's slice.
template <typename T, typename M>
__device__ void pass_gate(const Side<T, M>& side, int64_t batch, int64_t index, int64_t groups, int row, int rows,
                          int64_t pixel, int64_t pixels, int group, int member, Output<T>& out) {
  const T* own = side.own.group(batch, index);
  const float* gate = side.out_gate.group(batch, index);
  const auto& gradient = side.gate_gradient;
  const int64_t matrix = batch * groups + index;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) {
      const int64_t at = pixel + (2 * member + i) * kElements<T> + e;
      float sum = 0;
#pragma unroll
      for (int half = 0; half < kTile / 8; ++half) {
        const int r = row + 8 * half + group;
        if (r >= rows || at >= pixels) continue;
        float& x = out[half / 2][e][half % 2 * 2 + i];
        const float term = x * to_float(__ldg(own + side.own.offset(r) + at * side.own.x.stride[3]));
        sum += term;
        if (gradient.parts == 0) {
          float* to = gradient.data + (matrix * rows + r) * pixels + at;
          *to = gradient.add ? *to + term : term;
        }
        x *= __ldg(gate + side.out_gate.offset(r) + at * side.out_gate.x.stride[3]);
      }
      if (gradient.parts == 0) continue;
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
      if (group == 0 && at < pixels)
        gradient.data[(matrix * gradient.parts + gradient.first + row / kTile) * pixels + at] = sum;
    }
  }
}

// The warp's slice of a tile, to rows and pixels from these on.
template <typename T>
__device__ __forceinline__ void store_slice(bool vectors, const Tile& tile, int warp, T* group, const Rows<T>& x,
                                            int row, int rows, int64_t pixel, int64_t end) {
  const int lane = threadIdx.x % 32;
  if (vectors) {
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
      const int r = 16 * i + lane / 2, word = 8 * warp + lane % 2 * 4;
      const int64_t first = pixel + lane % 2 * 4 * kElements<T>;
      // Rows of a result begin at multiples of 16 bytes: they end at one too.
      if (row + r < rows && first < end)
        *reinterpret_cast<uint4*>(group + x.offset(row + r) + first) = *reinterpret_cast<const uint4*>(&tile[r][word]);
    }
  } else {
    constexpr int pixels = 8 * kElements<T>;
    const bool along_pixels = x.x.stride[3] <= x.x.stride[2];
#pragma unroll 4
    for (int i = lane; i < kTile * pixels; i += 32) {
      const int r = along_pixels ? i / pixels : i % kTile, p = along_pixels ? i % pixels : i / kTile;
      if (row + r < rows && pixel + p < end)
        group[x.offset(row + r) + (pixel + p) * x.x.stride[3]] =
            reinterpret_cast<const T*>(&tile[r][8 * warp])[p];
    }
  }
}

template <int SIDES>
struct ApplyStorage {  // followed by slots of SIDES matrix tiles
  Tile tiles[kStages][SIDES];
};

inline int apply_slots(int inner) { return inner > kTile ? kStages : 1; }
template <typename M, int SIDES>
constexpr size_t apply_shared_bytes(int slots) {
  return sizeof(ApplyStorage<SIDES>) + slots * SIDES * sizeof(MatrixTile<M>);
}

// Grid: B * groups * runs * row tiles, these running fastest. With two sides rows = inner, and the x of
// one is what the other's radial multiplies.
template <typename T, typename M, int SIDES>
__global__ void __launch_bounds__(kThreads) channel_apply_kernel(const Apply<T, M, SIDES> p) {
  constexpr bool wide = sizeof(M) == 4;
  DYNAMIC_SHARED(ApplyStorage<SIDES>, storage);
  auto* matrices = reinterpret_cast<MatrixTile<M>(*)[SIDES]>(storage + 1);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;

  const int row_tiles = (p.rows + kTile - 1) / kTile, chunks = (p.inner + kTile - 1) / kTile;
  const int row = blockIdx.x % row_tiles * kTile;
  const int64_t owned = blockIdx.x / row_tiles;  // which run of which group
  const int64_t matrix = owned / p.runs, batch = matrix / p.groups, index = matrix % p.groups;
  const int64_t first_tile = owned % p.runs * p.run, all_tiles = (p.pixels + kTilePixels<T> - 1) / kTilePixels<T>;
  const int64_t tiles = first_tile + p.run < all_tiles ? p.run : all_tiles - first_tile;
  const int steps = static_cast<int>(tiles) * chunks;

  const auto load = [&](int step) {
    if (step < steps) {
      const int column = step % chunks * kTile;
      const int64_t pixel = (first_tile + step / chunks) * kTilePixels<T>;
#pragma unroll
      for (int s = 0; s < SIDES; ++s) {
        const auto& side = p.side[s];
        load_tile<T>(p.copies, side.x.group(batch, index), side.x, column, p.inner, pixel, p.pixels,
                     storage->tiles[step % kStages][s]);
        if (chunks > 1 || step == 0)
          copy_matrix<M>(side.matrix + matrix * p.rows * p.pitch, row, p.rows, column, p.inner, p.pitch,
                         matrices[chunks > 1 ? step % kStages : 0][s]);
      }
    }
    commit_copies();  // also an empty group: waiting counts groups
  };

  Output<T> out[SIDES] = {};
  for (int step = 1 - kStages; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile of this step is there, and the one that the next load replaces is read
    load(step + kStages - 1);
    if (step < 0) continue;
    auto& x = storage->tiles[step % kStages];
    const auto& slot = matrices[chunks > 1 ? step % kStages : 0];
    const int column = step % chunks * kTile;
    // Of the warp's slice.
    const int64_t pixel = (first_tile + step / chunks) * kTilePixels<T> + 8 * warp * kElements<T>;

    const auto gate_at = [&](const Rows<const float>& gate, int r, int rows, int64_t at) {
      if (r >= rows || at >= p.pixels) return 1.0f;
      return __ldg(gate.group(batch, index) + gate.offset(r) + at * gate.x.stride[3]);
    };
#pragma unroll
    for (int s = 0; s < SIDES; ++s) {
      const auto& side = p.side[s];
      if constexpr (!wide) {
        multiply_pairs<T>(slot[s], x[s], warp, group, member, out[s]);
      } else {
        const auto gate = [&](int r, int e) {
          return gate_at(side.x_gate, column + r, p.inner, pixel + group * kElements<T> + e);
        };
        multiply_wide<T>(slot[s], x[s], warp, group, member, side.x_gate.x.data, gate, out[s]);
      }
      if constexpr (SIDES == 2) {
        if (side.radial && column == row) {  // these are the rows that the block owns
#pragma unroll
          for (int half = 0; half < kTile / 8; ++half) {
            const int r = 8 * half + group;
            const float radial = row + r < p.rows ? __ldg(side.radial + matrix * p.rows + row + r) : 0;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const unsigned word = x[1 - s][r][8 * warp + 2 * member + i];
#pragma unroll
              for (int e = 0; e < kElements<T>; ++e) {
                float own = element<T>(word, e);
                if constexpr (wide) {
                  if (side.out_gate.x.data)
                    own *= gate_at(side.out_gate, row + r, p.rows, pixel + (2 * member + i) * kElements<T> + e);
                }
                out[s][half / 2][e][half % 2 * 2 + i] -= radial * own;
              }
            }
          }
        }
      }
    }
    if (step % chunks < chunks - 1) continue;

    __syncwarp();  // the slice of x has been read: the output takes its place
#pragma unroll
    for (int s = 0; s < SIDES; ++s) {
      if constexpr (wide) {
        if (p.side[s].out_gate.x.data)
          pass_gate(p.side[s], batch, index, p.groups, row, p.rows, pixel, p.pixels, group, member, out[s]);
      }
#pragma unroll
      for (int half = 0; half < kTile / 8; ++half) {
        uint2 words;
        const auto& own = out[s][half / 2];
        if constexpr (sizeof(T) == 4) {
          words = {__float_as_uint(own[0][half % 2 * 2]), __float_as_uint(own[0][half % 2 * 2 + 1])};
        } else {
          words = {pack<T>(own[0][half % 2 * 2], own[1][half % 2 * 2]),
                   pack<T>(own[0][half % 2 * 2 + 1], own[1][half % 2 * 2 + 1])};
        }
        *reinterpret_cast<uint2*>(&x[s][8 * half + group][8 * warp + 2 * member]) = words;
      }
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < SIDES; ++s) {
      const auto& to = p.side[s].out;
      store_slice<T>(p.copies, x[s], warp, to.group(batch, index), to, row, p.rows, pixel, p.pixels);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(out[s]) / sizeof(float)); ++i) (&out[s][0][0][0])[i] = 0;
    }
  }
}

}  // namespace restore_kernels::channel
