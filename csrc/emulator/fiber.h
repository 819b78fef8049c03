// A function on a stack of its own that can stop in the middle and go on later.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace microtome::simt {

class Fiber {
  public:
    Fiber();
    Fiber(const Fiber&) = delete;
    // The next resume() calls `entry`, which must not return but suspend for ever; what ran before is forgotten.
    void begin(void (*entry)());
    // Run it until it suspends.
    void resume();
    // Called on the fiber's own stack; `for_ever` where it will not be resumed.
    void suspend(bool for_ever = false);
    // First on a new stack: AddressSanitizer must be told where it is.
    void arrive();

  private:
    std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
    void* mine_ = nullptr;  // stack pointers, saved registers above them
    void* caller_ = nullptr;
#else
    ucontext_t mine_, caller_;
#endif
    void* fake_stack_ = nullptr;
    void* caller_fake_stack_ = nullptr;
    const void* caller_bottom_ = nullptr;
    size_t caller_size_ = 0;
};

}  // namespace microtome::simt
