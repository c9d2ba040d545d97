// Launches of the kernels on the host.
#include "kernels.h"

#include <stdexcept>

#include "channel_gram.cuh"
#include "launch.h"
#include "probes.cuh"

namespace restore_kernels::host_tests {

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
bool run_gram(uintptr_t a, const Sizes& as, uintptr_t b, const Sizes& bs, const Sizes& shape, int64_t tiles_per_chunk,
              uintptr_t partials, uintptr_t sums, uint64_t seed) {
  using namespace channel;
  const auto [batch, heads, channels, pixels] = shape;
  const int64_t chunk = tiles_per_chunk * kTilePixels<T>, chunks = (pixels + chunk - 1) / chunk;
  const auto rows = [&](uintptr_t data, const Sizes& strides) {
    return Rows<const T>{{pointer<const T>(data), {strides[0], strides[1], strides[2], strides[3]}}, channels};
  };
  const int count = static_cast<int>(channels);
  const Gram<T> p{rows(a, as), rows(b, bs), {}, heads, count, count, pixels, chunk, chunks, pointer<float>(partials),
                  rows_align(rows(a, as).x) && rows_align(rows(b, bs).x)};
  const int64_t tiles = (channels + kTile - 1) / kTile;
  cuda_host::launch(channel_gram_kernel<T, sizeof(T) == 4>, batch * heads * chunks * tiles * tiles, kThreads, 0, seed, p);
  cuda_host::launch(channel_gram_sum_kernel, (batch * heads * p.size() + kThreads - 1) / kThreads, kThreads, 0, seed,
                    pointer<const float>(partials), pointer<float>(sums), batch * heads, chunks, p.size());
  return p.copies;
}

}  // namespace

void seed(uint64_t value) { cuda_host::seed = value; }

bool gram(const std::string& dtype, uintptr_t q, const Sizes& qs, uintptr_t k, const Sizes& ks, const Sizes& shape,
          int64_t tiles_per_chunk, uintptr_t partials, uintptr_t sums, uint64_t seed) {
  const auto run = dtype == "float32"    ? run_gram<float>
                   : dtype == "bfloat16" ? run_gram<bfloat16>
                                         : run_gram<float16>;
  return run(q, qs, k, ks, shape, tiles_per_chunk, partials, sums, seed);
}

void reverse(const std::string& fence, uintptr_t in, uintptr_t out, unsigned blocks, unsigned threads,
             uint64_t seed) {
  const auto kernel = fence == "block"  ? probes::reverse<probes::Fence::kBlock>
                      : fence == "warp" ? probes::reverse<probes::Fence::kWarp>
                                        : probes::reverse<probes::Fence::kNone>;
  cuda_host::launch(kernel, blocks, threads, threads * sizeof(float), seed, pointer<const float>(in), pointer<float>(out));
}

void multiply(const std::string& dtype, uintptr_t a, uintptr_t b, uintptr_t d, uint64_t seed) {
  const auto kernel = dtype == "float32"    ? probes::multiply<float>
                      : dtype == "bfloat16" ? probes::multiply<bfloat16>
                                            : probes::multiply<float16>;
  cuda_host::launch(kernel, 1, 32, 0, seed, pointer<const unsigned[4]>(a), pointer<const unsigned[2]>(b), pointer<float[4]>(d));
}

void load_matrices(uintptr_t in, uintptr_t words, uintptr_t transposed, uint64_t seed) {
  cuda_host::launch(probes::load_four_matrices, 1, 32, 0, seed, pointer<const unsigned short>(in), pointer<unsigned[4]>(words),
         pointer<unsigned[4]>(transposed));
}

void pack(const std::string& dtype, uintptr_t in, uintptr_t pairs, unsigned threads, uint64_t seed) {
  const auto kernel = dtype == "bfloat16" ? probes::pack_pairs<bfloat16> : probes::pack_pairs<float16>;
  cuda_host::launch(kernel, 1, threads, 0, seed, pointer<const float>(in), pointer<unsigned>(pairs));
}

void fault(const std::string& name, uintptr_t out, uint64_t seed) {
  float* floats = pointer<float>(out);
  if (name == "some_threads_leave") return cuda_host::launch(probes::some_threads_leave, 2, 64, 0, seed);
  if (name == "two_barriers") return cuda_host::launch(probes::two_barriers, 2, 64, 0, seed);
  if (name == "lanes_stay_away") return cuda_host::launch(probes::lanes_stay_away, 1, 32, 0, seed, floats);
  if (name == "lanes_that_do_not_exist") return cuda_host::launch(probes::lanes_stay_away, 1, 4, 0, seed, floats);
  if (name == "mask_without_caller") return cuda_host::launch(probes::mask_without_caller, 1, 32, 0, seed, floats);
  if (name == "source_outside_mask") return cuda_host::launch(probes::source_outside_mask, 1, 32, 0, seed, floats);
  if (name == "misaligned_copy") return cuda_host::launch(probes::misaligned_copy, 1, 1, 0, seed, pointer<unsigned>(out));
  if (name == "write_past_tensor") return cuda_host::launch(probes::write_past_tensor, 1, 32, 0, seed, floats);
  if (name == "write_past_shared") return cuda_host::launch(probes::write_past_shared, 1, 32, 32 * sizeof(float), seed, floats);
  throw std::invalid_argument(name);
}

void copy_vectors(uintptr_t in, uintptr_t out, const std::array<unsigned, 2>& grid,
                  const std::array<unsigned, 2>& block, uint64_t seed) {
  cuda_host::launch(probes::copy_vectors, {grid[0], grid[1]}, {block[0], block[1]}, 0, seed, pointer<const float4>(in),
         pointer<float4>(out));
}

void copy_through_shared(bool wait, uintptr_t in, uintptr_t out, int bytes, uint64_t seed) {
  cuda_host::launch(wait ? probes::copy_through_shared<true> : probes::copy_through_shared<false>, 1, 32, 0, seed,
         pointer<const uint4>(in), pointer<uint4>(out), bytes);
}

void warp_calls(uintptr_t in, uintptr_t flipped, uintptr_t read, uintptr_t votes, int flip, int source,
                uint64_t seed) {
  cuda_host::launch(probes::warp_calls, 1, 64, 0, seed, pointer<const float>(in), pointer<float>(flipped), pointer<float>(read),
         pointer<unsigned>(votes), flip, source);
}

void histogram(uintptr_t in, uintptr_t bins, uintptr_t total, uintptr_t count, unsigned blocks, unsigned threads,
               uint64_t seed) {
  cuda_host::launch(probes::histogram, blocks, threads, 0, seed, pointer<const float>(in), pointer<const int>(bins),
         pointer<float>(total), pointer<int>(count));
}

}  // namespace restore_kernels::host_tests
