// First stage of channel attention, forward and backward: products a bᵀ of rows over the pixels, and the
// squared norms of the rows. Forward a, b are q, k; backward the output's gradient and v, whose product is
// the gradient of the matrix that multiplies v. A gate multiplies b, element by element. float32, bfloat16
// or float16 of any strides; sums in float32.
//
// Schedule
//   channel_gram_kernel      A block owns one chunk of pixels of one group (channel_tiles.cuh) and one tile
//                            of 48 x 48 of its product. It walks the chunk in tiles of 128 bytes of pixels:
//                            one is multiplied while the next two are on their way. At the end the warps'
//                            sums are added in order and written as the chunk's partial result: the product
//                            (A, B), then |a|² (A) and |b|² (B).
//   channel_gram_sum_kernel  A thread owns one entry and adds it up over the chunks, in order.
// So the result depends on the size of a chunk, and on nothing else: not on the order of blocks.
//
// Bytes and operations, for B H heads of C N elements of e bytes, T = B H C N e:
//   reads 2 T ceil(C / 48), all but 2 T of it from the L2 cache;
//   writes 4 C (C + 2) bytes a chunk and reads them again: 2 (C + 2) / (chunk e) of what is read, each;
//   2 C² B H N operations (6 C² B H N of tf32 in float32), with C rounded up to 48.
// At C = 48 that is 24 operations a byte in bfloat16 and 36 in float32, where A100 and H200 balance at
// more than 80: memory is the bound. (8, 1, 48, 128x128) in bfloat16 is 25 MB: 5.9 µs on H200 at 4.3 TB/s,
// 14 µs on A100 at 1.8 TB/s. Not measured yet. A gate is read where it is used, 4 bytes an element.
//
// Occupancy: three blocks (12 warps) a processor, by registers (at most 168 a thread) and by shared memory
// (41 KiB a block); two for float32 and with a gate, by registers (at most 255). Two tiles a block are 55 to
// 83 KiB on their way to a processor, where 4.3 TB/s at 0.8 µs of latency need 26 KiB.
#pragma once

#include "channel_tiles.cuh"

namespace restore_kernels::channel {

template <bool WIDE>
constexpr int kGramBlocks = WIDE ? 2 : 3;  // on one processor at once

template <typename T>
struct Gram {
  Rows<const T> a, b;
  Rows<const float> gate;  // of b; no data: none
  int64_t groups;          // of an image
  int a_rows, b_rows;      // of a group
  int64_t pixels;
  int64_t chunk, chunks;  // pixels of a chunk, a multiple of kTilePixels<T>; chunks of an image
  float* partials;        // (B * groups, chunks, size())
  bool copies;            // rows_align of both

  __host__ __device__ int64_t size() const { return static_cast<int64_t>(a_rows) * b_rows + a_rows + b_rows; }
};

// The sum over the four lanes that hold parts of the same row.
__device__ __forceinline__ float sum_of_group(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

union alignas(16) GramStorage {  // copy_async
  Tile tiles[kStages][2];  // of a, of b
  struct {
    float product[kTile][kTile];
    float squares[2][kTile];
  } sums[kWarps];
};

// What one lane adds up: its part of the product, and of the squares of rows 8 i + group.
struct GramSums {
  float product[kTile / 16][kTile / 8][4] = {};
  float a_squares[kTile / 8] = {}, b_squares[kTile / 8] = {};
};

template <typename T>
__device__ __forceinline__ void add_pairs(const Tile& a_tile, const Tile& b_tile, int group, int word,
                                          GramSums& sums) {
  const auto square = [](unsigned pair) {
    const float2 x = unpack<T>(pair);
    return x.x * x.x + x.y * x.y;
  };
  Pairs<T, 4> a[kTile / 16];
#pragma unroll
  for (int m = 0; m < kTile / 16; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[m].pair[i] = a_tile[16 * m + i % 2 * 8 + group][word + i / 2 * 4];
      sums.a_squares[2 * m + i % 2] += square(a[m].pair[i]);
    }
  }
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    Pairs<T, 2> b;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b.pair[i] = b_tile[8 * n + group][word + i * 4];
      sums.b_squares[n] += square(b.pair[i]);
    }
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) multiply_add(sums.product[m][n], a[m], b);
  }
}

// gate(row, i): of element e of the lane's i-th word of this row of the tile.
template <typename T, typename Gate>
__device__ __forceinline__ void add_wide(const Tile& a_tile, const Tile& b_tile, int group, int word, int e,
                                         const Gate& gate, GramSums& sums) {
  std::conditional_t<sizeof(T) == 4, Split<4>, Exact<4>> a[kTile / 16];
#pragma unroll
  for (int m = 0; m < kTile / 16; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = element<T>(a_tile[16 * m + i % 2 * 8 + group][word + i / 2 * 4], e);
      a[m].set(i, x);
      sums.a_squares[2 * m + i % 2] += x * x;
    }
  }
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    Split<2> b;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = element<T>(b_tile[8 * n + group][word + i * 4], e) * gate(8 * n + group, i);
      b.set(i, x);
      sums.b_squares[n] += x * x;
    }
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) multiply_add(sums.product[m][n], a[m], b);
  }
}

// Grid: B * groups * chunks * tiles of the product, these running fastest. WIDE: for float32,
// and with a gate.
template <typename T, bool WIDE>
__global__ void __launch_bounds__(kThreads, kGramBlocks<WIDE>) channel_gram_kernel(const Gram<T> p) {
  static_assert(WIDE || sizeof(T) == 2);
  SHARED(GramStorage, storage);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;

  const int a_tiles = (p.a_rows + kTile - 1) / kTile, b_tiles = (p.b_rows + kTile - 1) / kTile;
  const int a_row = blockIdx.x / b_tiles % a_tiles * kTile, b_row = blockIdx.x % b_tiles * kTile;
  const int64_t owned = blockIdx.x / (a_tiles * b_tiles);  // which chunk of which group
  const int64_t chunk = owned % p.chunks, batch = owned / p.chunks / p.groups, index = owned / p.chunks % p.groups;
  const int64_t begin = chunk * p.chunk, end = begin + p.chunk < p.pixels ? begin + p.chunk : p.pixels;
  const T *a = p.a.group(batch, index), *b = p.b.group(batch, index);
  const float* gates = p.gate.x.data ? p.gate.group(batch, index) : nullptr;
  const int steps = static_cast<int>((end - begin + kTilePixels<T> - 1) / kTilePixels<T>);

  const auto load = [&](int step) {
    if (step < steps) {
      auto& tile = storage.tiles[step % kStages];
      const int64_t pixel = begin + static_cast<int64_t>(step) * kTilePixels<T>;
      load_tile<T>(p.copies, a, p.a, a_row, p.a_rows, pixel, end, tile[0]);
      load_tile<T>(p.copies, b, p.b, b_row, p.b_rows, pixel, end, tile[1]);
    }
    commit_copies();  // also an empty group: waiting counts groups
  };

  GramSums sums;
  const int word = warp * 8 + member;
  for (int step = 1 - kStages; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile of this step is there, and the one that the next load replaces is read
    load(step + kStages - 1);
    if (step < 0) continue;
    const auto& tile = storage.tiles[step % kStages];
    if constexpr (WIDE) {
      const int64_t first = begin + static_cast<int64_t>(step) * kTilePixels<T> + word * kElements<T>;
#pragma unroll 1
      for (int e = 0; e < kElements<T>; ++e) {
        const auto gate = [&](int row, int i) {
          const int64_t pixel = first + i * 4 * kElements<T> + e;
          if (!gates || b_row + row >= p.b_rows || pixel >= end) return 1.0f;
          return __ldg(gates + p.gate.offset(b_row + row) + pixel * p.gate.x.stride[3]);
        };
        add_wide<T>(tile[0], tile[1], group, word, e, gate, sums);
      }
    } else {
      add_pairs<T>(tile[0], tile[1], group, word, sums);
    }
  }

  __syncthreads();  // the sums take the place of the tiles
  auto& own = storage.sums[warp];
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    const float a_square = sum_of_group(sums.a_squares[n]), b_square = sum_of_group(sums.b_squares[n]);
    if (member == 0) {
      own.squares[0][8 * n + group] = a_square;
      own.squares[1][8 * n + group] = b_square;
    }
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        own.product[16 * m + i / 2 * 8 + group][8 * n + 2 * member + i % 2] = sums.product[m][n][i];
    }
  }
  __syncthreads();

  float* partial = p.partials + owned * p.size();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int row = i / kTile, column = i % kTile;
    if (a_row + row >= p.a_rows || b_row + column >= p.b_rows) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += storage.sums[w].product[row][column];
    partial[static_cast<int64_t>(a_row + row) * p.b_rows + b_row + column] = sum;
  }
  // A row's squares are found by every tile of its row (column) of the product; the first one writes them.
  partial += static_cast<int64_t>(p.a_rows) * p.b_rows;
  for (int i = threadIdx.x; i < 2 * kTile; i += kThreads) {
    const int side = i / kTile, row = (side ? b_row : a_row) + i % kTile;
    if (row >= (side ? p.b_rows : p.a_rows) || (side ? a_row : b_row) != 0) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += storage.sums[w].squares[side][i % kTile];
    partial[(side ? p.a_rows : 0) + row] = sum;
  }
}

// sums (matrices, size) = partials (matrices, chunks, size) added up in order. Grid and block: one thread
// for every entry of sums.
__global__ void __launch_bounds__(kThreads)
    channel_gram_sum_kernel(const float* partials, float* sums, int64_t matrices, int64_t chunks, int64_t size) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= matrices * size) return;
  const float* partial = partials + entry / size * chunks * size + entry % size;
  float sum = 0;
#pragma unroll 4
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += __ldg(partial + chunk * size);
  sums[entry] = sum;
}

}  // namespace restore_kernels::channel
