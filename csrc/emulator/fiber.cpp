#include "emulator/fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// ucontext asks the kernel for the signal mask at every switch, 0.3 us; this stores the six registers that a call must
// preserve and changes stacks.
extern "C" __attribute__((visibility("hidden"))) void microtome_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl microtome_switch_stack
.hidden microtome_switch_stack
.type microtome_switch_stack, @function
microtome_switch_stack:
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
.size microtome_switch_stack, .-microtome_switch_stack
)");
#endif

namespace microtome::simt {
namespace {

constexpr size_t kStack = 128 << 10;

}  // namespace

Fiber::Fiber() : stack_(new char[kStack]) {}

void Fiber::begin(void (*entry)()) {
    fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_.get(), kStack);  // frames that never returned
#endif
#if defined(__x86_64__)
    // At its first instruction a function finds its return address 8 below a multiple of 16.
    auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_.get()) + kStack) & ~uintptr_t{63});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    mine_ = top;
#else
    getcontext(&mine_);
    mine_.uc_stack.ss_sp = stack_.get();
    mine_.uc_stack.ss_size = kStack;
    mine_.uc_link = nullptr;
    makecontext(&mine_, entry, 0);
#endif
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&caller_fake_stack_, stack_.get(), kStack);
#endif
#if defined(__x86_64__)
    microtome_switch_stack(&caller_, mine_);
#else
    swapcontext(&caller_, &mine_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(caller_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend(bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack_, caller_bottom_, caller_size_);
#else
    static_cast<void>(for_ever);
#endif
#if defined(__x86_64__)
    microtome_switch_stack(&mine_, caller_);
#else
    swapcontext(&mine_, &caller_);
#endif
    arrive();
}

void Fiber::arrive() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &caller_bottom_, &caller_size_);
#endif
}

}  // namespace microtome::simt
