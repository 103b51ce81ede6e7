#include "tokenized_texts.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <string>
#include <thread>

#include "handles.h"

namespace llama_crab {

namespace {

// What the threads of one call share: the next text that nobody has taken.
class Work {
public:
    Work(const llama_vocab * vocab, const std::vector<TextSpan> & texts, bool add_special,
         bool parse_special, TokenLists & out)
        : vocab_(vocab), texts_(texts), add_special_(add_special), parse_special_(parse_special),
          out_(out) {}

    // Takes texts until none is left or one has failed, here or on another thread.
    void run(Status & status) noexcept {
        std::vector<llama_token> ids;  // roomy and reused: what is kept has its exact size
        for (size_t i = next_++; i < texts_.size() && status.kind == Status::ok; i = next_++) {
            tokenize(vocab_, texts_[i].data, texts_[i].size, add_special_, parse_special_, ids,
                     status);
            guarded(status, [&] {
                if (status.kind == Status::ok) {
                    out_[i].assign(ids.begin(), ids.end());
                } else {
                    next_          = texts_.size();
                    status.message = "text " + std::to_string(i) + ": " + status.message;
                }
            });
        }
    }

private:
    const llama_vocab *           vocab_;
    const std::vector<TextSpan> & texts_;
    const bool                    add_special_;
    const bool                    parse_special_;
    TokenLists &                  out_;
    std::atomic<size_t>           next_{0};
};

}  // namespace

void tokenize_many(const llama_vocab * vocab, const std::vector<TextSpan> & texts, bool add_special,
                   bool parse_special, int32_t n_threads, TokenLists & out,
                   Status & status) noexcept {
    guarded(status, [&] {
        out.assign(texts.size(), {});
        Work work(vocab, texts, add_special, parse_special, out);
        const size_t n_others =
            std::min((size_t) n_threads, std::max<size_t>(texts.size(), 1)) - 1;
        std::vector<Status>      statuses(n_others);
        std::vector<std::thread> threads;
        threads.reserve(n_others);
        for (size_t i = 0; i < n_others; ++i) {
            try {
                threads.emplace_back([&work, &statuses, i] { work.run(statuses[i]); });
            } catch (const std::exception &) {
                break;  // no more threads to be had: those there are do it all
            }
        }
        work.run(status);
        for (std::thread & thread : threads) {
            thread.join();
        }
        for (const Status & other : statuses) {
            if (status.kind == Status::ok) {
                status = other;
            }
        }
    });
}

size_t truncate(TokenLists & texts, size_t max_tokens, bool keep_last) {
    size_t n_cut = 0;
    for (std::vector<llama_token> & ids : texts) {
        if (ids.size() > max_tokens) {
            const llama_token last = ids.back();
            ids.resize(max_tokens);
            if (keep_last) {
                ids.back() = last;
            }
            ++n_cut;
        }
    }
    return n_cut;
}

}  // namespace llama_crab
