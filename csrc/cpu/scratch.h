// Memory for what a kernel makes on the way, which a thread keeps for its next kernels: the system's allocator takes
// as long to find and merge such blocks as small kernels do to run, and what was used last lies in the caches.
#pragma once

#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace restore_kernels {
inline namespace CPU_CAPABILITY {
namespace scratch {

struct Block {
  void* data;
  size_t size;  // bytes
};

// The free blocks of one thread, oldest first.
class Blocks {
 public:
  Blocks() = default;
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  ~Blocks() {
    while (count_ > 0) c10::free_cpu(remove(count_ - 1).data);
  }

  static Blocks& own() {
    thread_local Blocks blocks;
    return blocks;
  }

  // The newest that is not much too large, or else a new one.
  Block take(size_t size) {
    for (int i = count_ - 1; i >= 0; --i)
      if (free_[i].size >= size && free_[i].size <= size + size / 4 + kSlack) return remove(i);
    return {c10::alloc_cpu(size), size};
  }

  void keep(Block block) {
    if (block.size > kLargest) return c10::free_cpu(block.data);
    if (count_ == kMost) c10::free_cpu(remove(0).data);
    free_[count_++] = block;
  }

 private:
  static constexpr int kMost = 16;
  static constexpr size_t kLargest = 1 << 20, kSlack = 4 << 10;  // bytes

  Block remove(int i) {
    const Block block = free_[i];
    std::copy(free_ + i + 1, free_ + count_--, free_ + i);
    return block;
  }

  Block free_[kMost];
  int count_ = 0;
};

}  // namespace scratch

// Uninitialised, 64-byte aligned.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : Scratch(scratch::Blocks::own().take(count * sizeof(T))) {}
  T* get() const { return data_.get(); }

 private:
  struct Keep {
    size_t size;
    void operator()(T* data) const { scratch::Blocks::own().keep({data, size}); }
  };
  explicit Scratch(scratch::Block block) : data_(static_cast<T*>(block.data), Keep{block.size}) {}
  std::unique_ptr<T, Keep> data_;
};

}  // namespace CPU_CAPABILITY
}  // namespace restore_kernels
