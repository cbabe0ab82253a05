// A fiber per thread of the kernel: a stack, and a switch between two of them.
#pragma once
#include <stddef.h>
#include <sys/mman.h>
#include <stdexcept>
#include <vector>
#include "numbers.h"

#ifndef __x86_64__
  #include <ucontext.h>
#endif

namespace ptx {

// Stacks of one launch. They are mapped without being touched: a page costs memory only once it is used. The lowest
// page of each stays inaccessible, so that a stack that overflows ends in a fault and not in its neighbour.
class Stacks {
 public:
  static const size_t SIZE = 512 << 10, GUARD = 4096;
  explicit Stacks(size_t count) : bytes_(count * SIZE) {
    base_ = (u8*)mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the threads");
    for (size_t i = 0; i < count; i++) mprotect(base_ + i * SIZE, GUARD, PROT_NONE);
  }
  ~Stacks() { munmap(base_, bytes_); }
  Stacks(const Stacks&) = delete;
  u8* low(size_t i) const { return base_ + i * SIZE + GUARD; }
  u8* top(size_t i) const { return base_ + (i + 1) * SIZE; }

 private:
  u8* base_;
  size_t bytes_;
};

#ifdef __x86_64__
// Callee-saved registers of the System V ABI are pushed, the stack pointers exchanged.
struct Fiber {
  void* sp = nullptr;
};
extern "C" void ptx_switch(void** from, void* to);
asm(R"(
.text
.globl ptx_switch
.hidden ptx_switch
.type ptx_switch, @function
ptx_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptx_switch, .-ptx_switch
)");

static inline void start_fiber(Fiber& f, u8* low, u8* top, void (*entry)()) {
  (void)low;
  void** sp = (void**)(top - 64);
  *--sp = nullptr;       // where a caller's address would be: the stack pointer at entry is 8 mod 16
  *--sp = (void*)entry;  // ret goes there
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  f.sp = sp;
}
static inline void switch_fiber(Fiber& from, Fiber& to) { ptx_switch(&from.sp, to.sp); }
#else
struct Fiber {
  ucontext_t context;
};
static inline void start_fiber(Fiber& f, u8* low, u8* top, void (*entry)()) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = low;
  f.context.uc_stack.ss_size = size_t(top - low);
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
}
static inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

}  // namespace ptx
