// Runs CUDA kernels on the host: one fiber per CUDA thread, a grid block by block.
//
// A thread runs until it meets others: at __syncthreads, or at a collective call of its warp. It
// then waits, and another one runs. The order is drawn from a seed: blocks in any order, the threads
// of a block in any order after every barrier, and a warp whose lanes have met runs ahead of the
// others as far as it can. Threads of a warp are not in step but where they meet. So two threads that
// touch the same memory without a barrier between them do so in one order under some seeds and in
// the other one under others, and a missing barrier shows as a result that is wrong or changes.
//
// What a GPU would not forgive is an error here, with block, thread and source line (`Error`):
//   - threads of a block that meet at different barriers, or of which some have ended;
//   - a collective call whose mask names lanes that never come to this very call, or not the caller;
//   - what an instruction's own host version checks (device.cuh).
// The rules are stricter than the hardware's, which forgives some of this on some architectures.
//
// Shared memory is allocated anew for every block, with exactly the bytes asked for, and filled with
// NaN: under AddressSanitizer an access past its end is an error, and what was never written shows.
//
// What it cannot show: orders finer than the stretches between two meetings, which run as a whole;
// memory order between blocks; time. Kernels may not wait for one another by polling memory. One launch
// at a time per host thread; a kernel that is abandoned because of an error is not unwound, so kernels
// own nothing that needs a destructor.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace restore_kernels::cuda_host {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;  // of one thread; touched only as far as it is used

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
inline std::string text(const char* call, const std::source_location& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return std::string(call) + " (" + (slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line()) + ")";
}

// Where a thread waits for others.
struct Meeting {
  // Called once, when all have come, with their arguments by lane.
  using Combine = void (*)(void* const* arguments, unsigned mask);

  const char* call;  // its name in messages
  std::source_location where;
  unsigned mask = 0;  // the lanes of the warp that meet; 0: all threads of the block
  void* argument = nullptr;
  Combine combine = nullptr;

  bool same(const Meeting& other) const {
    return mask == other.mask && combine == other.combine && where.line() == other.where.line() &&
           where.column() == other.where.column() && !std::strcmp(where.file_name(), other.where.file_name());
  }
};

struct Copy {  // an asynchronous one, of 16 bytes: `bytes` from memory, zeros after them
  void* to;
  const void* from;
  size_t bytes;

  void perform() const {
    std::memset(to, 0, 16);
    std::memcpy(to, from, bytes);
  }
};

struct Thread {
  enum State { kReady, kWaiting, kFinished };

  uint3 index;
  State state = kReady;
  Meeting meeting;  // while it waits
  std::vector<Copy> copies;                   // that have not happened yet
  std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
  Context context;
  std::unique_ptr<std::byte[]> stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);

  bool waits_at(const Meeting& other) const { return state == kWaiting && meeting.same(other); }
};

// The block that runs. Its fibers are used again for the next block.
class Block {
 public:
  Block(dim3 size, size_t dynamic_bytes, uint64_t seed)
      : dynamic_bytes_(dynamic_bytes), random_(seed), threads_(size.x * size.y * size.z) {
    for (unsigned i = 0; i < threads_.size(); ++i)
      threads_[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    current_ = this;
  }
  Block(const Block&) = delete;
  ~Block() { current_ = nullptr; }

  static Block& current() { return *current_; }
  Thread& running() { return *running_; }
  bool toss() { return random_() & 1; }  // whether what may happen now or later happens now
  unsigned lane() const { return (running_ - threads_.data()) % kWarp; }

  void run(uint3 index, const std::function<void()>& kernel) {
    blockIdx = index;
    kernel_ = &kernel;
    shared_.clear();
    for (Thread& thread : threads_) prepare(thread);
    release_all();
    change(nullptr, next());
    if (!failure_.empty())
      throw Error("block " + text(blockIdx) + ", thread " + text(running_->index) + ": " + failure_);
    for (const Thread& thread : threads_)
      if (thread.state == Thread::kWaiting) throw Error(why_stuck(thread));
  }

  // __syncthreads: all threads of the block, at the same line.
  void synchronize(const std::source_location& where) {
    running_->meeting = {"__syncthreads", where};
    running_->state = Thread::kWaiting;
    const Meeting& meeting = running_->meeting;
    if (std::ranges::all_of(threads_, [&](const Thread& t) { return t.waits_at(meeting); })) release_all();
    suspend();
  }

  // The lanes of mask meet, at the same line; combine reads and writes the arguments of all.
  void meet(const char* call, unsigned mask, void* argument, Meeting::Combine combine,
            const std::source_location& where) {
    if (!(mask >> lane() & 1)) throw Error(text(call, where) + ": the mask does not name the calling lane");
    running_->meeting = {call, where, mask, argument, combine};
    running_->state = Thread::kWaiting;
    void* arguments[kWarp] = {};
    std::vector<Thread*> lanes;
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!(mask >> l & 1)) continue;
      Thread* other = lane_of(*running_, l);
      if (!other || !other->waits_at(running_->meeting)) return suspend();
      arguments[l] = other->meeting.argument;
      lanes.push_back(other);
    }
    combine(arguments, mask);
    release(lanes);
    suspend();
  }

  // Shared memory of this block by the address of a tag; nullptr: the dynamic shared memory.
  void* shared(const void* tag, size_t bytes) {
    auto& memory = shared_[tag];
    if (!memory) {
      if (!tag) bytes = dynamic_bytes_;
      memory.reset(new std::byte[bytes]);
      std::memset(memory.get(), 0xff, bytes);
    }
    return memory.get();
  }

 private:
  Thread* lane_of(const Thread& thread, unsigned lane) {
    const size_t index = (&thread - threads_.data()) / kWarp * kWarp + lane;
    return index < threads_.size() ? &threads_[index] : nullptr;
  }

  void release(std::vector<Thread*>& threads) {
    std::ranges::shuffle(threads, random_);
    for (Thread* thread : threads) {
      thread->state = Thread::kReady;
      ready_.push_back(thread);
    }
  }
  void release_all() {
    std::vector<Thread*> threads;
    for (Thread& thread : threads_) threads.push_back(&thread);
    release(threads);
  }

  std::string why_stuck(const Thread& thread) {
    const Meeting& meeting = thread.meeting;
    const auto message = [&](const std::string& other) {
      return "block " + text(blockIdx) + ": thread " + text(thread.index) + " waits at " +
             text(meeting.call, meeting.where) + ", but " + other;
    };
    for (unsigned i = 0; i < (meeting.mask ? kWarp : threads_.size()); ++i) {
      if (meeting.mask && !(meeting.mask >> i & 1)) continue;
      const Thread* other = meeting.mask ? lane_of(thread, i) : &threads_[i];
      if (!other) return message("lane " + std::to_string(i) + " of its mask does not exist");
      if (other->waits_at(meeting)) continue;
      return message("thread " + text(other->index) + (other->state == Thread::kFinished ? " has finished"
                     : " waits at " + text(other->meeting.call, other->meeting.where)));
    }
    return message("was not released");  // cannot be: all have come
  }

  void prepare(Thread& thread) {
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.context.prepare(thread.stack.get(), kStackBytes, enter);
  }

  static void enter() {
    Block& block = *current_;
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!block.scheduler_stack_) {  // the first thread comes from the scheduler
      block.scheduler_stack_ = bottom;
      block.scheduler_stack_bytes_ = bytes;
    }
#endif
    try {
      (*block.kernel_)();
    } catch (const std::exception& error) {
      block.failure_ = error.what();
    }
    block.running_->state = Thread::kFinished;
    block.suspend();
  }

  Thread* next() {  // nullptr: none can run, or none may
    if (ready_.empty() || !failure_.empty()) return nullptr;
    Thread* thread = ready_.back();
    ready_.pop_back();
    return thread;
  }

  // Runs others until it is the running thread's turn again; the scheduler, when none can run.
  void suspend() {
    Thread* self = running_;
    Thread* other = next();
    if (other != self) change(self, other);
  }

  // From one fiber to another, until somebody changes back. nullptr: the scheduler.
  void change(Thread* from, Thread* to) {
    if (to) {
      running_ = to;
      threadIdx = to->index;
    }
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    const bool last = from && from->state == Thread::kFinished;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to ? to->stack.get() : scheduler_stack_,
                                   to ? kStackBytes : scheduler_stack_bytes_);
#endif
    (from ? from->context : scheduler_).change_to(to ? to->context : scheduler_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  inline static thread_local Block* current_ = nullptr;

  const size_t dynamic_bytes_;
  std::mt19937_64 random_;
  std::vector<Thread> threads_;
  std::vector<Thread*> ready_;  // the last one runs next
  Thread* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::map<const void*, std::unique_ptr<std::byte[]>> shared_;
  std::string failure_;
  Context scheduler_;  // the caller of run()
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// kernel<<<grid, block, dynamic_bytes>>>(arguments...), in an order drawn from the seed; throws Error.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, uint64_t seed,
            const Arguments&... arguments) {
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  std::mt19937_64 random(seed);
  std::ranges::shuffle(blocks, random);
  gridDim = grid;
  blockDim = block;
  Block runner(block, dynamic_bytes, random());
  for (const uint3& index : blocks) runner.run(index, [&] { kernel(arguments...); });
}

}  // namespace restore_kernels::cuda_host
