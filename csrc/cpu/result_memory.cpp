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

constexpr size_t kPage = 4 << 10, kLarge = 64 << 10, kHugePage = 2 << 20;  // bytes
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

// Free blocks, oldest first; large ones, which are given back when they are too many, and small ones.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t granule = bytes < kLarge ? kPage : kLarge, size = (bytes + granule - 1) / granule * granule;
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
  // The newest free block of that size, which caches know best, or the smallest that wastes at most a quarter, or a new
  // one, for which others are given back where kept and used blocks together would take more than used blocks ever did,
  // and a little.
  Block take(size_t size) {
    std::lock_guard lock(mutex_);
    auto& free = free_of(size);
    auto best = free.end();
    for (auto it = free.end(); it != free.begin() && (best == free.end() || best->size != size);)
      if (--it; it->size >= size && it->size <= size + size / 4 && (best == free.end() || it->size < best->size)) best = it;
    Block block{nullptr, size};
    if (best != free.end()) {
      block = *best;
      free.erase(best);
      kept_ -= block.size;
    }
    used_ += block.size;
    most_used_ = std::max(most_used_, used_);
    if (!block.data) {
      give_back(most_used_ - used_ + kSpare);
      block.data = reserve(size);
    }
    return block;
  }

  void keep(const Block& block) {
    static const size_t most = most_kept();
    std::lock_guard lock(mutex_);
    free_of(block.size).push_back(block);
    kept_ += block.size;
    used_ -= block.size;
    give_back(most);
  }

  std::deque<Block>& free_of(size_t size) { return size < kLarge ? small_ : large_; }

  // The oldest large blocks, until at most so many bytes are kept.
  void give_back(size_t most) {
    while (kept_ > most && !large_.empty()) {
      c10::free_cpu(large_.front().data);
      kept_ -= large_.front().size;
      large_.pop_front();
    }
  }

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    c10::reportMemoryUsageToProfiler(block->data, -static_cast<int64_t>(block->size), 0, 0, c10::kCPU);
    instance().keep(*block);
    delete block;
  }

  std::mutex mutex_;
  std::deque<Block> small_, large_;
  size_t kept_ = 0, used_ = 0, most_used_ = 0;  // bytes
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes == 0) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &ResultAllocator::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace restore_kernels
