// The instructions that kernels need beyond CUDA C++'s own functions, each with a device version
// (nvcc) and a host version (g++, on top of host/language.h). Kernels include this header alone.
//
//   SHARED(Type, name)           shared memory of a named type (arrays in a struct), at most 48 KiB a kernel
//   DYNAMIC_SHARED(Type, name)   pointer to the shared memory whose size the launch gives
//   bfloat16, float16            elements in memory; unpack<T> turns a pair in a word into floats, pack<T> back
//   to_float, rounded_to<T>      between T and float, to nearest
//   copy_async, commit_copies, wait_for_copies   16 bytes from global to shared memory (cp.async)
//   load_matrices                four 8 x 8 matrices of 16-bit elements into registers of one warp (ldmatrix)
//   to_tf32, multiply_m16n8k8, multiply_m16n8k16 matrix instructions of one warp (mma.sync)
//   add_rounded                  adds what a few of them make to sums that must have float32's own error
//
// On the host a copy happens either at once or when it is waited for, by the seed, so that a missing wait
// shows and so does a copy over what is still read; addresses that are not multiples of 16 are errors.
//
// Matrix fragments (PTX ISA, "Matrix Fragments for mma.m16n8k8" and "m16n8k16"), with group = lane / 4
// and member = lane % 4. A register holds one element of tf32 or a pair of 16-bit elements with
// neighbouring columns of A (rows of B), the lower one in the lower half; e = 1 and 2 elements.
//   a[0] A[group][e member]            a[2] A[group][e (member + 4)]
//   a[1] A[group + 8][e member]        a[3] A[group + 8][e (member + 4)]
//   b[0] B[e member][group]            b[1] B[e (member + 4)][group]
//   d[0], d[1] D[group][2 member], D[group][2 member + 1]; d[2], d[3] the same of row group + 8
// With K contiguous in memory a fragment is the same words of memory for either width of element.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SHARED(Type, name) __shared__ Type name
#define DYNAMIC_SHARED(Type, name)                                 \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  Type* name = reinterpret_cast<Type*>(dynamic_shared)

namespace restore_kernels {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

template <typename T>
__device__ float2 unpack(unsigned pair);
template <>
__device__ __forceinline__ float2 unpack<bfloat16>(unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<float16>(unsigned pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

// To nearest, ties to even.
template <typename T>
__device__ T rounded_to(float x);
template <>
__device__ __forceinline__ float rounded_to<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 rounded_to<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float16 rounded_to<float16>(float x) {
  return __float2half_rn(x);
}

// low and high, rounded to nearest, as the elements of a pair.
template <typename T>
__device__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ __forceinline__ unsigned pack<float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// The first `bytes` (0 to 16) of 16 bytes at `from`, zeros after them, to shared memory.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last `pending` groups of this thread's copies have arrived.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements in shared memory: lane l names 16 bytes, row l % 8 of matrix l / 8.
// words[i] holds of matrix i, transposed if TRANSPOSED, the pair in row lane / 4 and columns 2 (lane % 4) on.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const void* row) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared)
                 : "memory");
  }
}

// Rounded to tf32's 10 bits of mantissa, to nearest, ties away from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d (16, 8) += a (16, 8) b (8, 8) in tf32.
__device__ __forceinline__ void multiply_m16n8k8(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16, 8) += a (16, 16) b (16, 8) in T.
template <typename T>
__device__ void multiply_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void multiply_m16n8k16<bfloat16>(float (&d)[4], const unsigned (&a)[4],
                                                            const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_m16n8k16<float16>(float (&d)[4], const unsigned (&a)[4],
                                                           const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace restore_kernels

#else  // the host

#include "host/language.h"

#define SHARED(Type, name)     \
  static const char name##_tag = 0; \
  Type& name = *static_cast<Type*>(restore_kernels::cuda_host::Block::current().shared(&name##_tag, sizeof(Type)))
#define DYNAMIC_SHARED(Type, name) \
  Type* name = static_cast<Type*>(restore_kernels::cuda_host::Block::current().shared(nullptr, 0))

namespace restore_kernels {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
float2 unpack(unsigned pair);
template <>
inline float2 unpack<bfloat16>(unsigned pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
inline float2 unpack<float16>(unsigned pair) {
  const auto value = [](unsigned bits) { return float(std::bit_cast<_Float16>(static_cast<uint16_t>(bits))); };
  return {value(pair), value(pair >> 16)};
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return unpack<bfloat16>(x.bits).x; }
inline float to_float(float16 x) { return unpack<float16>(x.bits).x; }

template <typename T>
T rounded_to(float x);
template <>
inline float rounded_to<float>(float x) {
  return x;
}
template <>
inline bfloat16 rounded_to<bfloat16>(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 rounded_to<float16>(float x) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

template <typename T>
unsigned pack(float low, float high) {
  return rounded_to<T>(low).bits | static_cast<unsigned>(rounded_to<T>(high).bits) << 16;
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes < 0 || bytes > 16)
    throw cuda_host::Error("copy_async needs addresses that are multiples of 16 and 0 to 16 bytes");
  const cuda_host::Copy copy{to, from, static_cast<size_t>(bytes)};
  auto& block = cuda_host::Block::current();
  if (block.toss()) {
    copy.perform();
  } else {
    block.running().copies.push_back(copy);
  }
}
inline void commit_copies() {
  auto& thread = cuda_host::Block::current().running();
  thread.copy_groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}
template <int pending>
void wait_for_copies() {
  auto& groups = cuda_host::Block::current().running().copy_groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const auto& copy : groups.front()) copy.perform();
}

template <bool TRANSPOSED>
void load_matrices(unsigned (&words)[4], const void* row,
                   const std::source_location& where = std::source_location::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    throw cuda_host::Error("load_matrices needs addresses that are multiples of 16");
  struct Call {
    unsigned* words;
    const uint16_t* row;
  } mine{words, static_cast<const uint16_t*>(row)};
  const auto combine = [](void* const* arguments, unsigned) {
    const auto call = [&](unsigned lane) { return *static_cast<const Call*>(arguments[lane]); };
    for (unsigned lane = 0; lane < cuda_host::kWarp; ++lane)
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned r = lane / 4, c = lane % 4 * 2;
        const auto element = [&](unsigned e) {
          return unsigned{TRANSPOSED ? call(8 * i + c + e).row[r] : call(8 * i + r).row[c + e]};
        };
        call(lane).words[i] = element(0) | element(1) << 16;
      }
  };
  cuda_host::Block::current().meet("load_matrices", 0xffffffff, &mine, combine, where);
}

inline unsigned to_tf32(float x) { return x != x ? 0x7fffffffu : (__float_as_uint(x) + 0x1000u) & ~0x1fffu; }

namespace cuda_host {

struct Fragments {
  float (*d)[4];
  const unsigned (*a)[4];
  const unsigned (*b)[2];
};

// The elements of a register; tf32 takes the upper 19 bits of a float.
struct Tf32 {
  static constexpr unsigned kElements = 1;
  static float element(unsigned word, unsigned) { return __uint_as_float(word & ~0x1fffu); }
};
template <typename T>
struct Pair {
  static constexpr unsigned kElements = 2;
  static float element(unsigned word, unsigned e) { return e ? unpack<T>(word).y : unpack<T>(word).x; }
};

// The sum as matrix units make it, of terms that are exact: they are cut off one bit below the last place of the
// largest of them, added up, and the sum is cut off to float32, all towards zero. (Fasi et al., "Numerical behavior
// of NVIDIA tensor cores", 2021; Hopper keeps a bit more.)
template <unsigned count>
float sum_cut_off(const float (&terms)[count]) {
  float largest = 0, plain = 0;
  for (const float x : terms) {
    largest = std::max(largest, std::abs(x));
    plain += x;
  }
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);  // with its bias of 127
  if (exponent < 30 || exponent == 255 || plain != plain) return plain;   // next to nothing, or not finite
  const float scale = __uint_as_float(static_cast<unsigned>(127 + 24 - (exponent - 127)) << 23);
  int64_t sum = 0;  // in units of the bit below the last place of the largest
  for (const float x : terms) sum += static_cast<int64_t>(static_cast<double>(x) * scale);
  const int excess = std::bit_width(static_cast<uint64_t>(std::abs(sum))) - 24;
  if (excess > 0) sum = sum / (int64_t{1} << excess) * (int64_t{1} << excess);
  return static_cast<float>(sum / static_cast<double>(scale));
}

// d += a b for one warp: the registers become matrices, are multiplied, and go back.
template <typename Register>
void multiply(const char* call, Fragments mine, const std::source_location& where) {
  const auto combine = [](void* const* arguments, unsigned) {
    constexpr unsigned elements = Register::kElements, depth = 8 * elements;
    float a[16][depth], b[depth][8];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const auto& registers = *static_cast<const Fragments*>(arguments[lane]);
      const unsigned group = lane / 4, member = lane % 4;
      for (unsigned e = 0; e < elements; ++e) {
        for (unsigned i = 0; i < 4; ++i)
          a[group + i % 2 * 8][(member + i / 2 * 4) * elements + e] = Register::element((*registers.a)[i], e);
        for (unsigned i = 0; i < 2; ++i)
          b[(member + i * 4) * elements + e][group] = Register::element((*registers.b)[i], e);
      }
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      float(&d)[4] = *static_cast<const Fragments*>(arguments[lane])->d;
      for (unsigned i = 0; i < 4; ++i) {
        float terms[depth + 1] = {d[i]};
        for (unsigned k = 0; k < depth; ++k) terms[k + 1] = a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
        d[i] = sum_cut_off(terms);
      }
    }
  };
  Block::current().meet(call, 0xffffffff, &mine, combine, where);
}

}  // namespace cuda_host

inline void multiply_m16n8k8(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             const std::source_location& where = std::source_location::current()) {
  cuda_host::multiply<cuda_host::Tf32>("multiply_m16n8k8", {&d, &a, &b}, where);
}
template <typename T>
void multiply_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                       const std::source_location& where = std::source_location::current()) {
  cuda_host::multiply<cuda_host::Pair<T>>("multiply_m16n8k16", {&d, &a, &b}, where);
}

}  // namespace restore_kernels

#endif

namespace restore_kernels {

// d += what `instructions` add to zeros. Matrix units cut their sums off towards zero, by up to a unit in the last place
// at every instruction: along thousands of them that is a hundred times float32's own error. Ordinary additions round.
template <typename F>
__device__ __forceinline__ void add_rounded(float (&d)[4], const F& instructions) {
  float sum[4] = {};
  instructions(sum);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

}  // namespace restore_kernels
