// What followed the n-grams of past answers: drafts that no prompt holds.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "guard.h"
#include "llama.h"

namespace llama_crab {

// A bounded table of n-grams, each with its two most frequent next tokens. An n-gram can be in one
// bucket of four only, which is one cache line. A new one that finds its bucket full takes one off
// every count in it, and the place of one whose counts are used up: what is not seen again gives
// way, and a single odd answer does not drive out what is seen often.
//
// Thread-safety: full; shared by contexts. The lock is held for some microseconds (for a copy of the
// table while saving).
class NgramCache {
public:
    static constexpr int32_t min_order    = 2;
    static constexpr int32_t max_order    = 4;
    static constexpr size_t  max_capacity = (size_t) 1 << 28;

    // Room for `capacity` n-grams of 16 bytes, rounded up to whole buckets; 1 to max_capacity.
    explicit NgramCache(size_t capacity);

    // Counts tokens[from, to) as what followed the tokens before each. Ids below 0 are no tokens.
    void learn(const std::vector<llama_token> & tokens, size_t from, size_t to);

    // Appends to `out` up to n_max tokens, each the most frequent behind the longest known n-gram
    // that ends before it. Returns the order of the first one's n-gram; 0: nothing found.
    int32_t draft(const std::vector<llama_token> & tokens, int32_t n_max,
                  std::vector<llama_token> & out) const;

    // Writes a file that is there whole or not at all, readable by its owner only, the same on every
    // machine. `key` stands for the vocabulary. Status::failed with `code`, an errno.
    void save(const std::string & path, uint64_t key, Status & status) const;

    // Replaces the content by a file's, which may be of another capacity; a failure changes nothing.
    // Status::failed with `code`, an errno, or 0 when the file is damaged, is none of ours, is of
    // another version or key, or has tokens outside of 0..n_vocab-1.
    void load(const std::string & path, uint64_t key, int32_t n_vocab, Status & status);

    size_t capacity() const { return n_buckets_ * 4; }
    size_t size() const;  // n-grams known

private:
    struct Entry {
        uint32_t hash_low  = 0;
        uint16_t hash_high = 0;
        uint8_t  count[2]  = {0, 0};    // count[0] >= count[1]
        int32_t  next[2]   = {-1, -1};  // -1: none; an entry without next[0] is empty

        uint64_t hash() const { return (uint64_t) hash_high << 32 | hash_low; }
        bool     empty() const { return next[0] < 0; }
        void     see(llama_token token);
        void     fade();
    };
    // The one seen latest first, the empty ones last.
    struct alignas(64) Bucket : std::array<Entry, 4> {};

    static uint64_t hash(const llama_token * end, int32_t order);
    static bool     put(std::vector<Bucket> & buckets, const Entry & entry);
    static size_t   index(uint64_t hash, size_t n_buckets);
    void            see(uint64_t hash, llama_token token);
    llama_token     next(uint64_t hash) const;

    const size_t        n_buckets_;
    mutable std::mutex  mutex_;
    size_t              n_ngrams_ = 0;
    std::vector<Bucket> buckets_;
};

using NgramCachePtr = std::shared_ptr<NgramCache>;

}  // namespace llama_crab
