#include "ngram_index.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace llama_crab {

namespace {

// With a table half full a search that needs more steps is one that somebody has contrived; then an
// n-gram is forgotten.
constexpr size_t max_probes = 32;
constexpr size_t first_size = 256;

uint32_t finish(uint64_t hash, int32_t order) {
    hash += (uint64_t) order;
    hash ^= hash >> 32;
    hash *= 0xD6E8FEB86659FD93u;
    return (uint32_t) (hash >> 32);
}

// How many tokens before `place` are the same as before the end, the latest first.
int32_t agreement(const llama_token * tokens, size_t n, size_t place) {
    const size_t most = std::min(place, (size_t) NgramIndex::max_agreement);
    size_t       same = 0;
    while (same < most && tokens[place - 1 - same] == tokens[n - 1 - same]) {
        ++same;
    }
    return (int32_t) same;
}

// The place whose next token is the most frequent, the latest of them; `places` are latest first.
uint32_t most_frequent(const llama_token * tokens, const uint32_t * places, int32_t n) {
    int32_t  most = 0;
    uint32_t best = 0;
    for (int32_t i = 0; i < n && n - i > most; ++i) {
        int32_t count = 0;
        for (int32_t j = i; j < n; ++j) {
            count += tokens[places[j]] == tokens[places[i]];
        }
        if (count > most) {
            most = count;
            best = places[i];
        }
    }
    return best;
}

}  // namespace

NgramIndex::NgramIndex(int32_t min_ngram, int32_t max_ngram) {
    for (int32_t order = min_ngram; order < max_ngram; order *= 2) {
        orders_[(size_t) n_orders_++] = order;
    }
    orders_[(size_t) n_orders_++] = max_ngram;
}

size_t NgramIndex::n_bytes() const {
    return table_.capacity() * sizeof(Entry) + links_.capacity() * sizeof(uint32_t);
}

void NgramIndex::grow() {
    std::vector<Entry> old(std::max(first_size, 2 * table_.size()));
    old.swap(table_);
    n_used_ = 0;
    for (const Entry & entry : old) {
        if (entry.place != 0) {
            replace(entry.hash, entry.place);
        }
    }
}

// Notes the latest place of an n-gram; returns the one before it.
uint32_t NgramIndex::replace(uint32_t hash, uint32_t place) {
    const size_t mask = table_.size() - 1;
    size_t       i    = hash & mask;
    for (size_t probe = 1; table_[i].place != 0; ++probe) {
        if (table_[i].hash == hash) {
            return std::exchange(table_[i].place, place);
        }
        if (probe == max_probes) {
            table_[i] = {hash, place};
            return 0;
        }
        i = (i + 1) & mask;
    }
    table_[i] = {hash, place};
    ++n_used_;
    return 0;
}

void NgramIndex::extend(const std::vector<llama_token> & tokens) {
    const size_t n_orders = (size_t) n_orders_;
    const size_t begin    = size();
    if (tokens.size() <= begin) {
        return;
    }
    links_.resize(tokens.size() * n_orders, 0);
    for (size_t n = begin + 1; n <= tokens.size(); ++n) {
        if (table_.size() < 2 * (n_used_ + n_orders)) {
            grow();
        }
        uint64_t hash = 0;
        int32_t  taken = 0;
        for (size_t k = 0; k < n_orders && (size_t) orders_[k] <= n; ++k) {
            for (; taken < orders_[k]; ++taken) {
                hash = (hash ^ (uint32_t) tokens[n - 1 - (size_t) taken]) * 0x9E3779B97F4A7C15u;
                hash ^= hash >> 29;
            }
            links_[(n - 1) * n_orders + k] = replace(finish(hash, orders_[k]), (uint32_t) n);
        }
    }
}

int32_t NgramIndex::draft(const std::vector<llama_token> & tokens, int32_t n_max,
                          std::vector<llama_token> & out) const {
    const size_t n        = tokens.size();
    const size_t n_orders = (size_t) n_orders_;
    if (n == 0 || n != size() || n_max <= 0) {
        return 0;
    }
    // Of the highest order that has any; a hash may stand for another n-gram, so all are compared.
    std::array<uint32_t, max_walk> places;
    int32_t                        n_places = 0;
    int32_t                        longest  = 0;
    for (size_t k = n_orders; k-- > 0 && n_places == 0;) {
        uint32_t place = links_[(n - 1) * n_orders + k];
        longest        = orders_[k];
        for (int32_t i = 0; i < max_walk && place != 0; ++i) {
            const int32_t same = agreement(tokens.data(), n, place);
            // An id below 0 stands for what is no token.
            if (same >= longest && tokens[place] >= 0) {
                if (same > longest) {
                    longest  = same;
                    n_places = 0;
                }
                places[(size_t) n_places++] = place;
            }
            place = links_[(place - 1) * n_orders + k];
        }
    }
    if (n_places == 0) {
        return 0;
    }
    const size_t from = most_frequent(tokens.data(), places.data(), n_places);
    const size_t base = out.size();
    for (size_t i = from; i < from + (size_t) n_max; ++i) {
        const llama_token token = i < n ? tokens[i] : out[base + (i - n)];
        if (token < 0) {
            break;
        }
        out.push_back(token);
    }
    return longest;
}

std::vector<double> time_ngram_index(NgramIndex & index, const std::vector<llama_token> & tokens,
                                     int32_t n_max, size_t evict_bytes) {
    using Clock = std::chrono::steady_clock;
    const auto begin = tokens.begin();

    std::vector<double>      times;
    std::vector<uint8_t>     others(evict_bytes);
    std::vector<llama_token> out;
    std::vector<llama_token> known;
    known.reserve(tokens.size());
    known.assign(begin, begin + (ptrdiff_t) std::min(index.size(), tokens.size()));
    out.reserve((size_t) n_max);
    while (known.size() < tokens.size()) {
        for (size_t i = 0; i < evict_bytes; i += 64) {
            ++others[i];
        }
        known.push_back(tokens[known.size()]);
        out.clear();
        const auto start = Clock::now();
        index.extend(known);
        index.draft(known, n_max, out);
        times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    return times;
}

}  // namespace llama_crab
