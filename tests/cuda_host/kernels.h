// What the tests call: kernels on the host, on tensors that come as addresses. A seed draws the order of
// blocks and threads. Errors are std::runtime_error.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace restore_kernels::host_tests {

using Sizes = std::array<int64_t, 4>;  // or strides, in elements

// Of the operators' launches (csrc/cuda/launch.h).
void seed(uint64_t value);

// Gram matrices and squared norms of q, k (B, H, C, N): sums (B, H, C * (C + 2)), on the way partials
// (B, H, chunks, C * (C + 2)). Returns whether tiles were copied 16 bytes at a time.
bool gram(const std::string& dtype, uintptr_t q, const Sizes& q_strides, uintptr_t k,
          const Sizes& k_strides, const Sizes& shape, int64_t tiles_per_chunk, uintptr_t partials, uintptr_t sums,
          uint64_t seed);

// Of probes.cuh:
void reverse(const std::string& fence, uintptr_t in, uintptr_t out, unsigned blocks, unsigned threads, uint64_t seed);
void copy_vectors(uintptr_t in, uintptr_t out, const std::array<unsigned, 2>& grid,
                  const std::array<unsigned, 2>& block, uint64_t seed);
void copy_through_shared(bool wait, uintptr_t in, uintptr_t out, int bytes, uint64_t seed);
void warp_calls(uintptr_t in, uintptr_t flipped, uintptr_t read, uintptr_t votes, int flip, int source,
                uint64_t seed);
void histogram(uintptr_t in, uintptr_t bins, uintptr_t total, uintptr_t count, unsigned blocks, unsigned threads,
               uint64_t seed);
void multiply(const std::string& dtype, uintptr_t a, uintptr_t b, uintptr_t d, uint64_t seed);
void load_matrices(uintptr_t in, uintptr_t words, uintptr_t transposed, uint64_t seed);
void pack(const std::string& dtype, uintptr_t in, uintptr_t pairs, unsigned threads, uint64_t seed);
void fault(const std::string& name, uintptr_t out, uint64_t seed);

}  // namespace restore_kernels::host_tests
