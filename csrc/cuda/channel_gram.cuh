// First stage of channel attention: Gram matrices q kᵀ and the squared norms of the rows of q and k,
// from which the next stage makes normalised scores. q, k (B, H, C, N) of any strides, N pixels;
// float32, bfloat16 or float16; sums in float32.
//
// Schedule
//   channel_gram_kernel      A block owns one chunk of pixels of one image and head and one tile of
//                            TILE x TILE of its Gram matrix. It walks the chunk in tiles of 128 bytes
//                            of pixels: one is multiplied while the next two are on their way. Each of
//                            its four warps multiplies 32 bytes of every row with matrix instructions,
//                            so that one thread alone reads a word from shared memory. At the end the
//                            warps' sums are added in order and written as the chunk's partial result:
//                            (C, C), then |q|² (C) and |k|² (C).
//   channel_gram_sum_kernel  A thread owns one entry and adds it up over the chunks, in order.
// So the result depends on the size of a chunk, and on nothing else: not on the order of blocks.
//
// float32 is multiplied in three tf32 products (high·high + high·low + low·high), whose error is that of
// float32. Rows and columns past C, pixels past N: zeros in shared memory, never read from outside.
//
// Bytes and operations, for B H heads of C N elements of e bytes, T = B H C N e:
//   reads 2 T ceil(C / TILE), all but 2 T of it from the L2 cache;
//   writes 4 C (C + 2) bytes a chunk and reads them again: 2 (C + 2) / (chunk e) of what is read, each;
//   2 C² B H N operations (6 C² B H N of tf32 in float32), with C rounded up to TILE.
// At C = 48 that is 24 operations a byte in bfloat16 and 36 in float32, where A100 and H200 balance at
// more than 80: memory is the bound. (8, 1, 48, 128x128) in bfloat16 is 25 MB: 5.9 µs on H200 at 4.3 TB/s,
// 14 µs on A100 at 1.8 TB/s. Not measured yet.
//
// Occupancy: three blocks (12 warps) a processor with TILE 48, by registers (at most 168 a thread) and by
// shared memory (41 KiB a block); four with TILE 32. Two tiles a block are 72 KiB on their way to a processor,
// where 4.3 TB/s at 0.8 µs of latency need 26 KiB.
//
// Access: where pixels are contiguous and every row begins at a multiple of 16 bytes (`rows_align`) tiles
// come by cp.async, 16 bytes a thread; else element by element, lanes along the smaller stride: coalesced
// for NCHW and channels_last alike, but each thread waits for what it loads.
#pragma once

#include "device.cuh"

namespace restore_kernels::channel_gram {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kStages = 3;  // tiles in shared memory
template <int TILE>
constexpr int kBlocksPerProcessor = TILE <= 32 ? 4 : 3;
constexpr int kWords = 8 * kWarps;  // 32-bit words of a row in a tile: eight for each warp
// Words from row to row in shared memory. Its remainder by 32 puts the words that the lanes of a warp
// read together, word `member` of row `group`, into 32 different banks.
constexpr int kPitch = kWords + 4;

template <typename T>
constexpr int kTilePixels = kWords * 4 / static_cast<int>(sizeof(T));

template <typename T>
struct Tensor {  // (B, H, C, N)
  const T* data;
  int64_t batch_stride, head_stride, channel_stride, pixel_stride;
};

template <typename T>
struct Problem {
  Tensor<T> q, k;
  int64_t heads, channels, pixels;
  int64_t chunk, chunks;  // pixels of a chunk, a multiple of kTilePixels<T>; chunks of an image
  float* partials;        // (B * H, chunks, C * C + 2 * C)
};

// Whether tiles of x may be copied 16 bytes at a time.
template <typename T>
__host__ bool rows_align(const Tensor<T>& x) {
  const auto aligned = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
  return x.pixel_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && aligned(x.batch_stride) &&
         aligned(x.head_stride) && aligned(x.channel_stride);
}

// One operand's registers for a matrix instruction; set from words of shared memory.
template <typename T, int N>
struct Operand {
  unsigned pair[N];

  __device__ float set(int i, unsigned word) {  // returns the sum of squares of its elements
    pair[i] = word;
    const float2 x = unpack<T>(word);
    return x.x * x.x + x.y * x.y;
  }
};
template <int N>
struct Operand<float, N> {
  unsigned high[N], low[N];

  __device__ float set(int i, unsigned word) {
    const float x = __uint_as_float(word);
    high[i] = to_tf32(x);
    low[i] = to_tf32(x - __uint_as_float(high[i]));
    return x * x;
  }
};

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Operand<T, 4>& a, const Operand<T, 2>& b) {
  multiply_m16n8k16<T>(d, a.pair, b.pair);
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const Operand<float, 4>& a,
                                             const Operand<float, 2>& b) {
  multiply_m16n8k8(d, a.low, b.high);
  multiply_m16n8k8(d, a.high, b.low);
  multiply_m16n8k8(d, a.high, b.high);
}

// A tile is rows [row, row + TILE) and pixels [pixel, pixel + kTilePixels) of one head, zeros outside.
template <int TILE>
using Tile = unsigned[TILE][kPitch];

template <typename T, int TILE>
__device__ __forceinline__ void copy_tile(const T* head, const Tensor<T>& x, int row, int64_t channels, int64_t pixel,
                                          int64_t end, Tile<TILE>& tile) {
  constexpr int per_copy = 16 / sizeof(T), copies = kWords / 4;  // of a row
  static_assert(TILE * copies % kThreads == 0);
#pragma unroll
  for (int i = 0; i < TILE * copies / kThreads; ++i) {
    const int r = (i * kThreads + threadIdx.x) / copies, c = threadIdx.x % copies;
    const int64_t first = pixel + c * per_copy;
    const int64_t left = row + r < channels ? end - first : 0;
    const int count = left < 0 ? 0 : left < per_copy ? static_cast<int>(left) : per_copy;
    const T* from = count ? head + (row + r) * x.channel_stride + first : x.data;  // an address in any case
    copy_async(&tile[r][c * 4], from, count * static_cast<int>(sizeof(T)));
  }
}

// By single elements: ROWS x PIXELS of them at a time, one a thread, lanes along the smaller stride.
template <int ROWS, int PIXELS, typename T, int TILE>
__device__ __forceinline__ void load_elements(const T* head, const Tensor<T>& x, int row, int64_t channels,
                                              int64_t pixel, int64_t end, Tile<TILE>& tile) {
  static_assert(ROWS * PIXELS == kThreads && TILE % ROWS == 0 && kTilePixels<T> % PIXELS == 0);
  constexpr bool along_pixels = PIXELS > ROWS;
  const int thread = threadIdx.x;
  const int first_row = along_pixels ? thread / PIXELS : thread % ROWS;
  const int first_pixel = along_pixels ? thread % PIXELS : thread / ROWS;
#pragma unroll 1
  for (int r = first_row; r < TILE; r += ROWS) {
    const T* from = head + (row + r) * x.channel_stride + (pixel + first_pixel) * x.pixel_stride;
#pragma unroll
    for (int i = 0; i < kTilePixels<T> / PIXELS; ++i) {
      const int p = first_pixel + i * PIXELS;
      const bool inside = row + r < channels && pixel + p < end;
      reinterpret_cast<T*>(tile[r])[p] = inside ? __ldg(from + i * PIXELS * x.pixel_stride) : T{};
    }
  }
}

template <bool COPY, typename T, int TILE>
__device__ __forceinline__ void load_tile(const T* head, const Tensor<T>& x, int row, int64_t channels, int64_t pixel,
                                          int64_t end, Tile<TILE>& tile) {
  if constexpr (COPY) {
    copy_tile<T, TILE>(head, x, row, channels, pixel, end, tile);
  } else if (x.pixel_stride <= x.channel_stride) {
    load_elements<4, 32, T, TILE>(head, x, row, channels, pixel, end, tile);
  } else {
    load_elements<16, 8, T, TILE>(head, x, row, channels, pixel, end, tile);
  }
}

// The sum over the four lanes that hold parts of the same row.
__device__ __forceinline__ float sum_of_group(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

template <int TILE>
union Storage {
  Tile<TILE> tiles[kStages][2];  // of q, of k
  struct {
    float product[TILE][TILE];
    float squares[2][TILE];
  } sums[kWarps];
};

// Grid: B * H * chunks * tiles², the tile of the Gram matrix running fastest. COPY: rows_align of both.
template <typename T, int TILE, bool COPY>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<TILE>) channel_gram_kernel(const Problem<T> p) {
  static_assert(TILE % 16 == 0);
  SHARED(Storage<TILE>, storage);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;

  const int64_t tiles = (p.channels + TILE - 1) / TILE;
  const int q_row = blockIdx.x / tiles % tiles * TILE, k_row = blockIdx.x % tiles * TILE;
  const int64_t owned = blockIdx.x / (tiles * tiles);  // which chunk of which head
  const int64_t chunk = owned % p.chunks, head = owned / p.chunks;
  const int64_t begin = chunk * p.chunk, end = begin + p.chunk < p.pixels ? begin + p.chunk : p.pixels;
  const T* q = p.q.data + head / p.heads * p.q.batch_stride + head % p.heads * p.q.head_stride;
  const T* k = p.k.data + head / p.heads * p.k.batch_stride + head % p.heads * p.k.head_stride;
  const int steps = static_cast<int>((end - begin + kTilePixels<T> - 1) / kTilePixels<T>);

  const auto load = [&](int step) {
    if (step < steps) {
      auto& tile = storage.tiles[step % kStages];
      const int64_t pixel = begin + static_cast<int64_t>(step) * kTilePixels<T>;
      load_tile<COPY, T, TILE>(q, p.q, q_row, p.channels, pixel, end, tile[0]);
      load_tile<COPY, T, TILE>(k, p.k, k_row, p.channels, pixel, end, tile[1]);
    }
    commit_copies();  // also an empty group: waiting counts groups
  };

  float product[TILE / 16][TILE / 8][4] = {};
  float q_squares[TILE / 8] = {}, k_squares[TILE / 8] = {};  // of row 8 i + group, this lane's part
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile of this step is there, and the one that the next load replaces is read
    load(step + kStages - 1);
    const auto& tile = storage.tiles[step % kStages];
    const int word = warp * 8 + member;

    Operand<T, 4> a[TILE / 16];
#pragma unroll
    for (int m = 0; m < TILE / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        q_squares[2 * m + i % 2] += a[m].set(i, tile[0][16 * m + i % 2 * 8 + group][word + i / 2 * 4]);
    }
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n) {
      Operand<T, 2> b;
#pragma unroll
      for (int i = 0; i < 2; ++i) k_squares[n] += b.set(i, tile[1][8 * n + group][word + i * 4]);
#pragma unroll
      for (int m = 0; m < TILE / 16; ++m) multiply_add(product[m][n], a[m], b);
    }
  }

  __syncthreads();  // the sums take the place of the tiles
  auto& sums = storage.sums[warp];
#pragma unroll
  for (int n = 0; n < TILE / 8; ++n) {
    const float q_square = sum_of_group(q_squares[n]), k_square = sum_of_group(k_squares[n]);
    if (member == 0) {
      sums.squares[0][8 * n + group] = q_square;
      sums.squares[1][8 * n + group] = k_square;
    }
#pragma unroll
    for (int m = 0; m < TILE / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums.product[16 * m + i / 2 * 8 + group][8 * n + 2 * member + i % 2] = product[m][n][i];
    }
  }
  __syncthreads();

  float* partial = p.partials + owned * (p.channels * p.channels + 2 * p.channels);
  for (int i = threadIdx.x; i < TILE * TILE; i += kThreads) {
    const int row = i / TILE, column = i % TILE;
    if (q_row + row >= p.channels || k_row + column >= p.channels) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += storage.sums[w].product[row][column];
    partial[(q_row + row) * p.channels + k_row + column] = sum;
  }
  // A row's squares are found by every tile of its row (column) of the matrix; the first one writes them.
  for (int i = threadIdx.x; i < 2 * TILE; i += kThreads) {
    const int side = i / TILE, row = (side ? k_row : q_row) + i % TILE;
    if (row >= p.channels || (side ? q_row : k_row) != 0) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += storage.sums[w].squares[side][i % TILE];
    partial[p.channels * (p.channels + side) + row] = sum;
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

}  // namespace restore_kernels::channel_gram
