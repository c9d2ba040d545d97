// Products of bfloat16 on AMX, the tiles of a processor that has them.
//
// A tile product adds 16 x 32 by 32 x 16 numbers to 16 x 16 sums of float32 in the time of 16 multiply-add
// instructions, which is 16 times their rate. Factors hold pairs of numbers as in bfloat16_pairs.h.
//
// (Three bfloat16 hold a float32, and six tile products its products to 2^-24, 2.7 times as fast as multiply-adds by
// the book, and half as wrong as a chain of those. On random numbers tiles lose a quarter of the rate that they have
// on zeros, and with the splitting it was 1.0 to 1.4 times in caches, and no gain in an operator.)
//
// Bound: a tile product takes 16 cycles, loading a tile from L1 8. 2 x 2 tiles of sums need one load each.
#pragma once

#include <ATen/cpu/Utils.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "matrix.h"
#include "prefetch.h"
#include "tile_gemm.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__) && defined(__linux__)
#include <cpuid.h>
#define RESTORE_KERNELS_HAVE_AMX 1
#else
#define RESTORE_KERNELS_HAVE_AMX 0
#endif

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace amx {

constexpr int64_t kSide = 16;  // rows and columns of a tile of sums
constexpr int64_t kDepth = 32;  // numbers of the depth in a tile of a factor, as pairs

#if RESTORE_KERNELS_HAVE_AMX

// RESTORE_KERNELS_AMX=0 does without.
inline bool supported() {
  static const bool known = [] {
    constexpr unsigned kLeaf = 7, kBfloat16 = 1u << 22;
    unsigned a, b, c, d = 0;
    const char* wanted = std::getenv("RESTORE_KERNELS_AMX");
    if (wanted && std::string_view(wanted) == "0") return false;
    return __get_cpuid_count(kLeaf, 0, &a, &b, &c, &d) && d & kBfloat16 && at::cpu::init_amx();
  }();
  return known;
}

// While it lives, its thread may multiply, if that is supported.
class Session {
 public:
  Session() {
    if (!supported()) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    constexpr int kTiles = 8, kRowBytes = 64;
    for (int i = 0; i < kTiles; ++i) shapes.row_bytes[i] = kRowBytes, shapes.rows[i] = kSide;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Session() {
    if (supported()) asm volatile("tilerelease");
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// As intrinsics they would want their callers compiled for these instructions.
template <int tile>
inline void load(const float* p, int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row * sizeof(float)), "i"(tile) : "memory");
}
template <int tile>
inline void store(float* p, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row * sizeof(float)), "i"(tile) : "memory");
}
template <int tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int sums, int a, int b>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

// c = a b, or c += a b, for c of so many tiles.
template <int rows, int columns>
void block(Matrix<const float> a, Matrix<const float> b, Matrix<float> c, bool add, int64_t steps, Prefetches& idle) {
  constexpr int64_t kPairs = kDepth / 2;
  const auto each_sum = [&](auto f) {
    f.template operator()<0>(c.from(0, 0));
    if constexpr (columns == 2) f.template operator()<1>(c.from(0, kSide));
    if constexpr (rows == 2) f.template operator()<2>(c.from(kSide, 0));
    if constexpr (rows == 2 && columns == 2) f.template operator()<3>(c.from(kSide, kSide));
  };
  each_sum([&]<int sum>(Matrix<float> tile) {
    if (add) load<sum>(tile.data, tile.row);
    else zero<sum>();
  });
  for (int64_t k = 0; k < steps; ++k, a = a.from(0, kPairs), b = b.from(kPairs, 0)) {
    load<4>(a.data, a.row);
    load<6>(b.data, b.row);
    multiply_add<0, 4, 6>();
    if constexpr (columns == 2) {
      load<7>(b.from(0, kSide).data, b.row);
      multiply_add<1, 4, 7>();
    }
    if constexpr (rows == 2) {
      load<5>(a.from(kSide, 0).data, a.row);
      multiply_add<2, 5, 6>();
      if constexpr (columns == 2) multiply_add<3, 5, 7>();
    }
    idle();
  }
  each_sum([&]<int sum>(Matrix<float> tile) { store<sum>(tile.data, tile.row); });
}

constexpr int64_t kBlock = 2 * kSide;

// c = a b + addend, in a Session, with rows of pairs in a and pairs of rows in b. The addend may be c itself. `depth`
// counts numbers; up to a multiple of 32 they are there, and 0. As many rows of a and columns of b as make a multiple
// of 16 may be read.
inline void multiply(Matrix<const float> a, Matrix<const float> b, Matrix<float> c, int64_t rows, int64_t columns,
                     int64_t depth, Addend<float> addend, Prefetches idle) {
  using Vec = at::vec::Vectorized<float>;
  const int64_t steps = ceil_div(depth, kDepth);
  idle.spread(ceil_div(rows, kBlock) * ceil_div(columns, kBlock) * steps, 1);  // called after every step
  const bool add = addend.matrix.data, to_itself = addend.matrix.data == c.data && !addend.scale;
  for (int64_t j = 0; j < columns; j += kBlock)
    for (int64_t i = 0; i < rows; i += kBlock) {
      const int64_t height = std::min(kBlock, rows - i), width = std::min(kBlock, columns - j);
      const auto product = [&](Matrix<float> to, bool add) {
        const auto a_i = a.from(i, 0), b_j = b.from(0, j);
        if (height > kSide && width > kSide) block<2, 2>(a_i, b_j, to, add, steps, idle);
        else if (height > kSide) block<2, 1>(a_i, b_j, to, add, steps, idle);
        else if (width > kSide) block<1, 2>(a_i, b_j, to, add, steps, idle);
        else block<1, 1>(a_i, b_j, to, add, steps, idle);
      };
      if (height % kSide == 0 && width % kSide == 0 && (to_itself || !add)) {
        product(c.from(i, j), add);
        continue;
      }
      alignas(64) float sums[kBlock * kBlock];
      product({sums, kBlock}, false);
      const Addend<float> other = addend.from(i, j);
      for (int64_t r = 0; r < height; ++r)
        for (int64_t v = 0; v < width; v += Vec::size()) {
          const int64_t count = std::min<int64_t>(Vec::size(), width - v);
          Vec sum = Vec::loadu(sums + r * kBlock + v);
          if (add) {
            const Vec scale(other.scale ? other.scale[r] : 1.f);
            sum = at::vec::fmadd(scale, Vec::loadu(other.matrix.data + r * other.matrix.row + v, count), sum);
          }
          sum.store(c.from(i + r, j + v).data, count);
        }
    }
}

#else
inline bool supported() { return false; }
struct Session {};
inline void multiply(Matrix<const float>, Matrix<const float>, Matrix<float>, int64_t, int64_t, int64_t, Addend<float>,
                     Prefetches) {}  // never called
#endif

}  // namespace amx
}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
