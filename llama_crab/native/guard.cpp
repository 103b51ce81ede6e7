#include "guard.h"

#include <cstdio>

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

void install_abort_handler() { ggml_set_abort_callback(on_abort); }

}  // namespace llama_crab
