// CUDA's names for g++: what kernels use of the language and its built-in functions.
//
// Only what some kernel or test uses. Calls of a warp take the mask of the lanes that meet, as on the
// device, and find the line they are called from by themselves, for messages.
#pragma once

#include <bit>
#include <cmath>

#include "execution.h"

#define __global__ inline  // sources may share a header of kernels
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

inline float __expf(float x) { return std::exp(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline float __fmul_rn(float x, float y) { return x * y; }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

// Threads change only where they meet, so that nothing comes between reading and writing.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  restore_kernels::cuda_host::Block::current().synchronize(where);
}

namespace restore_kernels::cuda_host {

template <typename T>
struct Exchange {
  T value;
  unsigned source;
  T result;
};

// Every lane gets the value of the lane that it names.
template <typename T>
T exchange(const char* call, unsigned mask, T value, unsigned source, const std::source_location& where) {
  Exchange<T> mine{value, source % kWarp, {}};
  const auto combine = [](void* const* arguments, unsigned lanes) {
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!(lanes >> l & 1)) continue;
      auto& to = *static_cast<Exchange<T>*>(arguments[l]);
      if (!(lanes >> to.source & 1))
        throw Error("lane " + std::to_string(l) + " reads lane " + std::to_string(to.source) +
                    ", which the mask of its shuffle does not name");
      to.result = static_cast<Exchange<T>*>(arguments[to.source])->value;
    }
  };
  Block::current().meet(call, mask, &mine, combine, where);
  return mine.result;
}

// Bit l of the result: the predicate of lane l.
inline unsigned ballot(const char* call, unsigned mask, bool predicate, const std::source_location& where) {
  Exchange<unsigned> mine{predicate, 0, 0};
  const auto combine = [](void* const* arguments, unsigned lanes) {
    unsigned votes = 0;
    for (unsigned l = 0; l < kWarp; ++l)
      if (lanes >> l & 1) votes |= static_cast<Exchange<unsigned>*>(arguments[l])->value << l;
    for (unsigned l = 0; l < kWarp; ++l)
      if (lanes >> l & 1) static_cast<Exchange<unsigned>*>(arguments[l])->result = votes;
  };
  Block::current().meet(call, mask, &mine, combine, where);
  return mine.result;
}

}  // namespace restore_kernels::cuda_host

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, const std::source_location& where = std::source_location::current()) {
  return restore_kernels::cuda_host::exchange("__shfl_sync", mask, value, lane, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip,
                  const std::source_location& where = std::source_location::current()) {
  const unsigned lane = restore_kernels::cuda_host::Block::current().lane();
  return restore_kernels::cuda_host::exchange("__shfl_xor_sync", mask, value, lane ^ flip, where);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate,
                              const std::source_location& where = std::source_location::current()) {
  return restore_kernels::cuda_host::ballot("__ballot_sync", mask, predicate, where);
}
inline bool __any_sync(unsigned mask, bool predicate,
                       const std::source_location& where = std::source_location::current()) {
  return restore_kernels::cuda_host::ballot("__any_sync", mask, predicate, where) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate,
                       const std::source_location& where = std::source_location::current()) {
  return restore_kernels::cuda_host::ballot("__all_sync", mask, predicate, where) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffff,
                       const std::source_location& where = std::source_location::current()) {
  restore_kernels::cuda_host::ballot("__syncwarp", mask, true, where);
}
