// Changes from one stack to another: what fibers are made of.
//
// On x86-64 by hand, which takes a few nanoseconds; elsewhere by swapcontext, which asks the kernel for the
// signal mask every time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace restore_kernels::cuda_host {

#ifdef __x86_64__

class Context {
 public:
  // The next change to this context calls entry, which may not return, on a stack of its own.
  void prepare(std::byte* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    pointer_ = top - kSavedRegisters;
  }

  // Goes on with another context; returns when somebody changes back to this one.
  void change_to(Context& other) { change(&pointer_, other.pointer_); }

 private:
  static constexpr int kSavedRegisters = 6;

  // Registers that a call preserves go to the old stack and come from the new one.
  __attribute__((naked, noinline)) static void change(void**, void*) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
  }

  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(std::byte* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void change_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace restore_kernels::cuda_host
