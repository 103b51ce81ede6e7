#include "logsink.h"

#include <atomic>
#include <deque>
#include <mutex>
#include <thread>

#include "llama.h"

namespace llama_crab {

namespace {

constexpr size_t ring_capacity  = 1024;
constexpr size_t error_capacity = 64;

struct ErrorLine {
    uint64_t        seq;
    std::thread::id thread;
    std::string     text;
};

std::mutex            mutex;
std::deque<LogLine>   ring;
std::deque<ErrorLine> errors;
std::atomic<int>      min_level{GGML_LOG_LEVEL_WARN};
std::atomic<uint64_t> seen{0};
std::atomic<bool>     pending{false};

// A line may come in several calls; each thread puts its own together.
thread_local std::string partial;
thread_local int         partial_level = GGML_LOG_LEVEL_INFO;
thread_local int         muted         = 0;

void finish_line() {
    const uint64_t seq = seen.fetch_add(1, std::memory_order_relaxed);
    if (partial_level >= GGML_LOG_LEVEL_WARN) {
        if (errors.size() == error_capacity) {
            errors.pop_front();
        }
        errors.push_back({seq, std::this_thread::get_id(), partial});
    }
    if (muted == 0 && partial_level >= min_level.load(std::memory_order_relaxed)) {
        if (ring.size() == ring_capacity) {
            ring.pop_front();
        }
        ring.push_back({partial_level, partial});
        pending.store(true, std::memory_order_relaxed);
    }
    partial.clear();
}

// Runs on whatever thread llama.cpp logs from, never with the GIL: it touches C++ memory only.
void on_log(ggml_log_level level, const char * text, void *) noexcept {
    try {
        std::lock_guard<std::mutex> lock(mutex);
        if (level != GGML_LOG_LEVEL_CONT) {
            if (!partial.empty()) {
                finish_line();
            }
            partial_level = level;
        }
        for (const char * p = text; *p != '\0'; ++p) {
            if (*p == '\n') {
                if (!partial.empty()) {
                    finish_line();
                }
            } else {
                partial.push_back(*p);
            }
        }
    } catch (...) {
        // A log line lost to lack of memory must not end the process.
    }
}

}  // namespace

void log_install() { llama_log_set(on_log, nullptr); }

void log_set_level(int level) { min_level.store(level, std::memory_order_relaxed); }

LogMute::LogMute() noexcept { ++muted; }
LogMute::~LogMute() { --muted; }

void log_warn(const std::string & text) {
    on_log(GGML_LOG_LEVEL_WARN, (text + "\n").c_str(), nullptr);
}

bool log_pending() noexcept { return pending.load(std::memory_order_relaxed); }

std::vector<LogLine> log_drain() {
    std::lock_guard<std::mutex> lock(mutex);
    std::vector<LogLine> lines(ring.begin(), ring.end());
    ring.clear();
    pending.store(false, std::memory_order_relaxed);
    return lines;
}

uint64_t log_mark() noexcept { return seen.load(std::memory_order_relaxed); }

std::vector<std::string> log_errors_since(uint64_t mark) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!partial.empty()) {
        finish_line();
    }
    std::vector<std::string> lines;
    for (const ErrorLine & line : errors) {
        if (line.seq >= mark && line.thread == std::this_thread::get_id()) {
            lines.push_back(line.text);
        }
    }
    return lines;
}

}  // namespace llama_crab
