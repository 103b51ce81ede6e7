#include "ngram_cache.h"

#include <algorithm>

namespace llama_crab {

namespace {

constexpr int     hash_bits = 48;
constexpr uint8_t most      = UINT8_MAX;
// Tokens learned under one hold of the lock.
constexpr size_t  learn_step = 64;

}  // namespace

// Files hold these hashes: a change needs a new version of the format.
uint64_t NgramCache::hash(const llama_token * end, int32_t order) {
    // Wide, so that no token makes it 0, which the steps below would keep.
    uint64_t hash = (uint64_t) order * 0x9FB21C651E98DF25u;
    for (int32_t i = 1; i <= order; ++i) {
        hash = (hash ^ (uint32_t) end[-i]) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    hash *= 0xD6E8FEB86659FD93u;
    return hash >> (64 - hash_bits);
}

// Of the hash's upper 32 bits, so that any number of buckets up to 2^32 is served evenly.
size_t NgramCache::index(uint64_t hash, size_t n_buckets) {
    return (size_t) ((hash >> (hash_bits - 32)) * (uint64_t) n_buckets >> 32);
}

void NgramCache::Entry::see(llama_token token) {
    if (next[0] != token && next[1] != token && count[1] > 0) {
        --count[1];
        return;
    }
    const int i = next[0] == token ? 0 : 1;
    if (next[i] != token) {
        next[i]  = token;
        count[i] = 0;
    }
    if (count[i] == most) {
        count[0] /= 2;
        count[1] /= 2;
    }
    ++count[i];
    // Of two that are as frequent the latest comes first.
    if (count[1] >= count[0] && i == 1) {
        std::swap(next[0], next[1]);
        std::swap(count[0], count[1]);
    }
}

void NgramCache::Entry::fade() {
    for (uint8_t & n : count) {
        n = (uint8_t) (n - (n > 0));
    }
}

NgramCache::NgramCache(size_t capacity)
    : n_buckets_((capacity + 3) / 4), buckets_(n_buckets_) {}

void NgramCache::see(uint64_t hash, llama_token token) {
    Bucket & bucket = buckets_[index(hash, n_buckets_)];
    size_t   i      = 0;
    while (i < bucket.size() && !bucket[i].empty() && bucket[i].hash() != hash) {
        ++i;
    }
    if (i == bucket.size()) {
        for (Entry & entry : bucket) {
            entry.fade();
        }
        while (i > 0 && bucket[i - 1].count[0] > 0) {
            --i;
        }
        if (i == 0) {
            return;
        }
        bucket[--i] = Entry();
        --n_ngrams_;
    }
    if (bucket[i].empty()) {
        bucket[i].hash_low  = (uint32_t) hash;
        bucket[i].hash_high = (uint16_t) (hash >> 32);
        bucket[i].next[0]   = token;
        bucket[i].count[0]  = 1;
        ++n_ngrams_;
    } else {
        bucket[i].see(token);
    }
    std::rotate(bucket.begin(), bucket.begin() + (ptrdiff_t) i, bucket.begin() + (ptrdiff_t) i + 1);
}

llama_token NgramCache::next(uint64_t hash) const {
    for (const Entry & entry : buckets_[index(hash, n_buckets_)]) {
        if (entry.hash() == hash && !entry.empty()) {
            return entry.next[0];
        }
    }
    return LLAMA_TOKEN_NULL;
}

void NgramCache::learn(const std::vector<llama_token> & tokens, size_t from, size_t to) {
    to = std::min(to, tokens.size());
    while (from < to) {
        const size_t                end = std::min(to, from + learn_step);
        std::lock_guard<std::mutex> lock(mutex_);
        for (; from < end; ++from) {
            if (tokens[from] < 0) {
                continue;
            }
            for (int32_t order = min_order; order <= max_order && (size_t) order <= from; ++order) {
                see(hash(tokens.data() + from, order), tokens[from]);
            }
        }
    }
}

int32_t NgramCache::draft(const std::vector<llama_token> & tokens, int32_t n_max,
                          std::vector<llama_token> & out) const {
    // The last max_order tokens, then what is found.
    std::array<llama_token, max_order + 1> end{};
    int32_t n = (int32_t) std::min(tokens.size(), (size_t) max_order);
    std::copy(tokens.end() - n, tokens.end(), end.begin());
    int32_t                     first = 0;
    std::lock_guard<std::mutex> lock(mutex_);
    for (int32_t i = 0; i < n_max; ++i) {
        int32_t     order = n;
        llama_token token = LLAMA_TOKEN_NULL;
        for (; order >= min_order; --order) {
            token = next(hash(end.data() + n, order));
            if (token >= 0) {
                break;
            }
        }
        if (token < 0) {
            break;
        }
        if (i == 0) {
            first = order;
        }
        out.push_back(token);
        end[(size_t) n++] = token;
        if (n > max_order) {
            std::copy(end.begin() + 1, end.end(), end.begin());
            n = max_order;
        }
    }
    return first;
}

size_t NgramCache::size() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return n_ngrams_;
}

}  // namespace llama_crab
