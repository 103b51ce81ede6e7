// The process-wide sink for llama.cpp's log: a ring in C++, drained by the Python side.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llama_crab {

struct LogLine {
    int         level;
    std::string text;
};

void log_install();

// Lines below `level` (ggml_log_level) are dropped before they reach the ring.
void log_set_level(int level);

// True when a line waits; one relaxed load, cheap enough for every step.
bool log_pending() noexcept;

// While one lives, lines of this thread reach no reader but log_errors_since(): for work that is
// repeated, whose warnings the real call says again.
class LogMute {
public:
    LogMute() noexcept;
    ~LogMute();
    LogMute(const LogMute &) = delete;
    LogMute & operator=(const LogMute &) = delete;
};

// A warning of our own, as if llama.cpp had written it.
void log_warn(const std::string & text);

std::vector<LogLine> log_drain();

// Number of lines seen so far; pass it to log_errors_since() after a call that failed.
uint64_t log_mark() noexcept;

// Warnings and errors that this thread caused since `mark`, oldest first.
std::vector<std::string> log_errors_since(uint64_t mark);

}  // namespace llama_crab
