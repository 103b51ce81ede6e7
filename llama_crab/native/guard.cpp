#include "guard.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "ggml.h"

namespace llama_crab {

namespace {

thread_local int guard_depth = 0;

void on_abort(const char * message) {
    if (guard_depth > 0) {
        throw NativeAbort(message);
    }
    // Worker threads and unguarded calls cannot unwind to a caller: say why, then let abort() run.
    std::fprintf(stderr, "llama_crab: fatal error in llama.cpp: %s\n", message);
}

}  // namespace

AbortGuard::AbortGuard() { ++guard_depth; }
AbortGuard::~AbortGuard() { --guard_depth; }

namespace {

std::atomic<int>  callbacks{0};
std::atomic<bool> callbacks_refused{false};

}  // namespace

bool enter_callback() noexcept {
    ++callbacks;
    if (callbacks_refused) {
        --callbacks;
        return false;
    }
    return true;
}

void leave_callback() noexcept { --callbacks; }

void refuse_callbacks() noexcept {
    callbacks_refused = true;
    for (int i = 0; i < 1000 && callbacks > 0; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void install_abort_handler() { ggml_set_abort_callback(on_abort); }

}  // namespace llama_crab
