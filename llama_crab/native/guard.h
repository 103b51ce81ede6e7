// Turns what llama.cpp throws or asserts into a value.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace llama_crab {

// What a guarded call ended with. `code` is llama.cpp's own return value where it has one.
struct Status {
    enum Kind : int { ok = 0, failed = 1, threw = 2, asserted = 3, no_memory = 4 };

    int         kind = ok;
    int         code = 0;
    std::string message;

    void set(int kind_, std::string message_, int code_ = 0) {
        kind    = kind_;
        code    = code_;
        message = std::move(message_);
    }
};

// A GGML_ASSERT or GGML_ABORT hit inside a guarded call.
struct NativeAbort : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// While one lives, an assertion of llama.cpp on this thread throws NativeAbort. The checks in L2
// come first; this is the second line, for damaged files and states that no check foresees.
class AbortGuard {
public:
    AbortGuard();
    ~AbortGuard();
    AbortGuard(const AbortGuard &) = delete;
    AbortGuard & operator=(const AbortGuard &) = delete;
};

void install_abort_handler();

// Python ends a thread that waits for the GIL while the interpreter shuts down by unwinding its
// stack, which llama.cpp's frames do not survive. So callbacks ask first: false means do not wait.
bool enter_callback() noexcept;
void leave_callback() noexcept;

// From now on enter_callback() refuses; returns when those inside have left, or after a second.
void refuse_callbacks() noexcept;

template <typename Fn>
void guarded(Status & status, Fn && fn) noexcept {
    try {
        AbortGuard guard;
        fn();
    } catch (const NativeAbort & error) {
        status.set(Status::asserted, error.what());
    } catch (const std::bad_alloc &) {
        status.set(Status::no_memory, "out of memory");
    } catch (const std::exception & error) {
        status.set(Status::threw, error.what());
    } catch (...) {
        status.set(Status::threw, "unknown C++ exception");
    }
}

}  // namespace llama_crab
