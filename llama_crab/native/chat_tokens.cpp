#include "chat_tokens.h"

#include <algorithm>
#include <cctype>
#include <stdexcept>

#include "handles.h"

namespace llama_crab {

namespace {

bool is_inside(const TextRanges & ranges, size_t begin, size_t end) {
    const auto after = std::upper_bound(
        ranges.begin(), ranges.end(), begin,
        [](size_t at, const std::pair<size_t, size_t> & range) { return at < range.first; });
    return after != ranges.begin() && end <= std::prev(after)->second;
}

}  // namespace

SpecialTokens::SpecialTokens(const llama_vocab * vocab) : vocab_(vocab) {
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return;
    }
    const int32_t n = llama_vocab_n_tokens(vocab);
    for (llama_token id = 0; id < n; ++id) {
        const int  attr       = llama_vocab_get_attr(vocab, id);
        const bool is_control = attr & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN);
        const std::string_view text = llama_vocab_get_text(vocab, id);
        if (text.empty() || !(is_control || attr & LLAMA_TOKEN_ATTR_USER_DEFINED)) {
            continue;
        }
        tokens_.push_back({text, id, is_control, (attr & LLAMA_TOKEN_ATTR_LSTRIP) != 0,
                           (attr & LLAMA_TOKEN_ATTR_RSTRIP) != 0});
        strips_ = strips_ || tokens_.back().strips_left || tokens_.back().strips_right;
    }
    std::stable_sort(tokens_.begin(), tokens_.end(), [](const Token & a, const Token & b) {
        return a.text.size() > b.text.size();
    });
    for (size_t i = 0; i < tokens_.size(); ++i) {
        const std::string_view text    = tokens_[i].text;
        std::vector<size_t> &  lengths = lengths_[(unsigned char) text[0]];
        by_text_.emplace(text, i);
        if (lengths.empty() || lengths.back() != text.size()) {
            lengths.push_back(text.size());
        }
    }
}

const SpecialTokens::Token * SpecialTokens::token_at(std::string_view text, size_t pos,
                                                     size_t length) const {
    if (length > text.size() - pos) {
        return nullptr;
    }
    const auto found = by_text_.find(text.substr(pos, length));
    return found == by_text_.end() ? nullptr : &tokens_[found->second];
}

std::string_view SpecialTokens::control_at(std::string_view text, size_t pos) const {
    for (const size_t length : lengths_[(unsigned char) text[pos]]) {
        const Token * token = token_at(text, pos, length);
        if (token && token->is_control) {
            return token->text;
        }
    }
    return {};
}

void SpecialTokens::add_ids(std::string_view text, Ids & out) const {
    constexpr size_t capacity = 1 << 20;  // bytes of text in each of the two generations
    const std::string key(text);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        auto found = recent_.find(key);
        if (found == recent_.end()) {
            const auto old = older_.find(key);
            if (old != older_.end()) {
                recent_bytes_ += key.size();
                found = recent_.emplace(key, std::move(old->second)).first;
                older_.erase(old);
            }
        }
        if (found != recent_.end()) {
            out.insert(out.end(), found->second.begin(), found->second.end());
            return;
        }
    }
    Ids    ids;
    Status status;
    llama_crab::tokenize(vocab_, text.data(), text.size(), false, false, ids, status);
    if (status.kind != Status::ok) {
        throw std::runtime_error(status.message);
    }
    out.insert(out.end(), ids.begin(), ids.end());
    ids.shrink_to_fit();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (recent_bytes_ + key.size() > capacity) {
        older_.swap(recent_);
        recent_.clear();
        recent_bytes_ = 0;
    }
    recent_bytes_ += key.size();
    recent_.emplace(key, std::move(ids));
}

// False where a special token overlaps with another one, so that their order matters.
bool SpecialTokens::cut_at_controls(std::string_view text, const TextRanges & input,
                                    std::vector<Fragment> & fragments) const {
    size_t reach = 0;  // the end of the special tokens seen so far
    size_t begin = 0;
    for (size_t i = 0; i < text.size(); ++i) {
        const Token * longest = nullptr;
        for (const size_t length : lengths_[(unsigned char) text[i]]) {
            const Token * token = token_at(text, i, length);
            if (!token || (token->is_control && is_inside(input, i, i + length))) {
                continue;
            }
            if (token->is_control && (longest || i < reach)) {
                return false;
            }
            if (!token->is_control && i < begin) {
                return false;
            }
            if (!longest) {
                longest = token;
                reach   = std::max(reach, i + length);
            }
        }
        if (longest && longest->is_control) {
            if (i > begin) {
                fragments.push_back({begin, i, LLAMA_TOKEN_NULL});
            }
            begin = i + longest->text.size();
            fragments.push_back({i, begin, longest->id});
        }
    }
    if (begin < text.size()) {
        fragments.push_back({begin, text.size(), LLAMA_TOKEN_NULL});
    }
    return true;
}

// llama.cpp's own order, less what is inside an input.
std::vector<SpecialTokens::Fragment> SpecialTokens::partition(std::string_view   text,
                                                              const TextRanges & input) const {
    std::vector<Fragment> fragments = {{0, text.size(), LLAMA_TOKEN_NULL}};
    std::vector<Fragment> next;
    for (const Token & token : tokens_) {
        if (text.find(token.text) == std::string_view::npos) {
            continue;
        }
        next.clear();
        for (Fragment rest : fragments) {
            size_t from = rest.begin;
            while (rest.token == LLAMA_TOKEN_NULL) {
                const size_t at = text.substr(0, rest.end).find(token.text, from);
                if (at == std::string_view::npos) {
                    break;
                }
                size_t end = at + token.text.size();
                if (token.is_control && is_inside(input, at, end)) {
                    from = at + 1;
                    continue;
                }
                size_t left = at;
                while (token.strips_left && left > rest.begin
                       && std::isspace((unsigned char) text[left - 1])) {
                    --left;
                }
                while (token.strips_right && end < rest.end
                       && std::isspace((unsigned char) text[end])) {
                    ++end;
                }
                if (left > rest.begin) {
                    next.push_back({rest.begin, left, LLAMA_TOKEN_NULL});
                }
                next.push_back({at, end, token.id});
                from = rest.begin = end;
            }
            if (rest.token != LLAMA_TOKEN_NULL || rest.begin < rest.end) {
                next.push_back(rest);
            }
        }
        fragments.swap(next);
    }
    return fragments;
}

// llama.cpp tokenises what lies between two special tokens on its own, so cutting there changes
// nothing.
void SpecialTokens::tokenize(const std::string & text, const TextRanges & input,
                             std::vector<llama_token> & out) const {
    std::vector<Fragment> fragments;
    if (strips_ || !cut_at_controls(text, input, fragments)) {
        fragments = partition(text, input);
    }
    for (const Fragment & fragment : fragments) {
        if (fragment.token != LLAMA_TOKEN_NULL) {
            out.push_back(fragment.token);
        } else {
            add_ids(std::string_view(text).substr(fragment.begin, fragment.end - fragment.begin),
                    out);
        }
    }
}

}  // namespace llama_crab
