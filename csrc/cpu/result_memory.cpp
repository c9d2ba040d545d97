#include "result_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/typeid.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>

namespace restore_kernels {
namespace {

constexpr size_t kLarge = 64 << 10, kGranule = 1 << 10, kHugePage = 2 << 20;  // bytes
constexpr size_t kSmallKept = 8 << 20;  // bytes of small blocks that may be kept
constexpr size_t kShareOfMemory = 8;  // at most an eighth of the machine's memory is kept
constexpr size_t kSpare = 128 << 20;  // bytes that may be kept beyond what was once in use

struct Block {
  void* data;
  size_t size;
};

// Large blocks lie on huge pages, where the system has them: a page of 4 KiB costs a fault to have and a walk
// to find, and a step of training touches half a million.
void* reserve(size_t size) {
#ifdef __linux__
  if (size >= kHugePage) {
    void* data = std::aligned_alloc(kHugePage, (size + kHugePage - 1) / kHugePage * kHugePage);
    TORCH_CHECK_WITH(OutOfMemoryError, data, "restore_kernels: no memory for a result of ", size, " bytes");
    madvise(data, size / kHugePage * kHugePage, MADV_HUGEPAGE);
    return data;
  }
#endif
  return c10::alloc_cpu(size);
}

size_t most_kept() {
#ifdef __linux__
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) / kShareOfMemory * static_cast<size_t>(sysconf(_SC_PAGESIZE));
#else
  return 128 << 20;
#endif
}

// Free blocks, oldest first.
struct Shelf {
  std::deque<Block> free;
  size_t kept = 0;  // bytes

  // The newest of that size, which caches know best, or the smallest that wastes at most a quarter; else one without data.
  Block take(size_t size) {
    auto best = free.end();
    for (auto it = free.end(); it != free.begin() && (best == free.end() || best->size != size);)
      if (--it; it->size >= size && it->size <= size + size / 4 && (best == free.end() || it->size < best->size)) best = it;
    if (best == free.end()) return {nullptr, size};
    const Block block = *best;
    free.erase(best);
    kept -= block.size;
    return block;
  }

  void put(const Block& block) {
    free.push_back(block);
    kept += block.size;
  }

  // Gives the oldest back to the system until at most so many bytes are kept.
  void keep_at_most(size_t most) {
    while (kept > most) {
      c10::free_cpu(free.front().data);
      kept -= free.front().size;
      free.pop_front();
    }
  }
};

class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t granule = bytes < kLarge ? kGranule : kLarge, size = (bytes + granule - 1) / granule * granule;
    auto* block = new Block(take(size));
    c10::reportMemoryUsageToProfiler(block->data, static_cast<int64_t>(block->size), 0, 0, c10::kCPU);
    return {block->data, block, &release, c10::kCPU};
  }
  void copy_data(void* target, const void* source, size_t bytes) const override { std::memcpy(target, source, bytes); }

  static ResultAllocator& instance() {
    static auto* allocator = new ResultAllocator;  // outlives every tensor
    return *allocator;
  }

 private:
  // A free block or a new one, for which large ones are given back where kept and used blocks together would take more
  // than used blocks ever did, and a little.
  Block take(size_t size) {
    std::lock_guard lock(mutex_);
    const bool large = size >= kLarge;
    Block block = (large ? large_ : small_).take(size);
    if (large) most_used_ = std::max(most_used_, used_ += block.size);
    if (!block.data) {
      if (large) large_.keep_at_most(most_used_ - used_ + kSpare);
      block.data = reserve(size);
    }
    return block;
  }

  void keep(const Block& block) {
    static const size_t most = most_kept();
    std::lock_guard lock(mutex_);
    const bool large = block.size >= kLarge;
    auto& shelf = large ? large_ : small_;
    shelf.put(block);
    if (large) used_ -= block.size;
    shelf.keep_at_most(large ? most : kSmallKept);
  }

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    c10::reportMemoryUsageToProfiler(block->data, -static_cast<int64_t>(block->size), 0, 0, c10::kCPU);
    instance().keep(*block);
    delete block;
  }

  std::mutex mutex_;
  Shelf small_, large_;
  size_t used_ = 0, most_used_ = 0;  // bytes of large blocks
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes == 0) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &ResultAllocator::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace restore_kernels
