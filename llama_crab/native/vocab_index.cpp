#include "vocab_index.h"

#include <algorithm>
#include <map>
#include <utility>

namespace llama_crab {

namespace {

constexpr uint32_t end_of_token = UINT32_MAX;
constexpr uint32_t hub_children = 64;

}  // namespace

// A token on its way into the trie.
struct VocabIndex::Entry {
    uint64_t    high, low;  // its first symbols
    uint32_t    begin;      // of its symbols
    llama_token id;
    uint32_t    tail;
};

void decode_utf8(std::string_view text, PartialUtf8 & partial,
                 std::vector<uint32_t> & code_points) {
    code_points.clear();
    size_t     i        = 0;
    uint32_t   value    = partial.value;
    int32_t    n_remain = std::max(partial.n_remain, 0);
    const bool pending  = n_remain > 0;
    const auto more     = [&] { return i < text.size() && text[i] != 0; };

    for (; n_remain > 0 && more(); --n_remain) {
        const uint8_t byte = (uint8_t) text[i++];
        if ((byte >> 6) != 2) {
            partial = {0, -1};
            return;
        }
        value = (value << 6) + (byte & 0x3f);
    }
    if (pending && n_remain == 0) {
        code_points.push_back(value);
    }
    while (more()) {
        const uint8_t first = (uint8_t) text[i++];
        n_remain = first < 0x80 ? 0 : first < 0xc0 ? -1 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
        if (n_remain < 0) {
            code_points.clear();
            partial = {0, -1};
            return;
        }
        value = first & ((1u << (7 - n_remain)) - 1);
        for (; n_remain > 0 && more(); --n_remain) {
            value = (value << 6) + ((uint8_t) text[i++] & 0x3f);
        }
        if (n_remain == 0) {
            code_points.push_back(value);
        }
    }
    partial = {n_remain > 0 ? value : 0, n_remain};
}

VocabIndex::VocabIndex(const llama_vocab * vocab) {
    const int32_t n = llama_vocab_n_tokens(vocab);
    eog_.resize((size_t) n);
    spelled.resize(((size_t) n + 31) / 32);
    offsets_.reserve((size_t) n + 1);
    offsets_.push_back(0);
    partials.push_back({});

    std::vector<Entry>                               entries;
    std::vector<uint32_t>                            points, decoded;
    std::map<std::pair<uint32_t, int32_t>, uint32_t> known_tails;
    std::vector<char>                                buffer(256);
    text_.reserve((size_t) n * 8);
    points.reserve((size_t) n * 8);
    entries.reserve((size_t) n);
    const auto piece_of = [&](llama_token id) {
        return llama_token_to_piece(vocab, id, buffer.data(), (int32_t) buffer.size(), 0, true);
    };

    for (llama_token id = 0; id < n; ++id) {
        int32_t size = piece_of(id);
        if (size < 0) {
            buffer.resize((size_t) -size);
            size = piece_of(id);
        }
        text_.append(buffer.data(), (size_t) std::max(size, 0));
        offsets_.push_back(text_.size());
        if (llama_vocab_is_eog(vocab, id)) {
            eog_[(size_t) id] = true;
            eog_tokens.push_back(id);
            continue;
        }
        if (!is_text(id)) {
            continue;
        }
        if (((uint8_t) piece(id)[0] >> 6) == 2) {
            continuations.push_back(id);
            continue;
        }
        PartialUtf8 partial;
        decode_utf8(piece(id), partial, decoded);
        if (partial.n_remain < 0) {
            continue;
        }
        uint32_t tail = 0;
        if (partial.n_remain > 0) {
            tail = known_tails.emplace(std::make_pair(partial.value, partial.n_remain),
                                       (uint32_t) partials.size()).first->second;
            if (tail == partials.size()) {
                partials.push_back(partial);
            }
        }
        if (!decoded.empty()) {
            spelled[(size_t) id / 32] |= 1u << (id % 32);
            ++n_spelled;
        }
        entries.push_back({0, 0, (uint32_t) points.size(), id, tail});
        points.insert(points.end(), decoded.begin(), decoded.end());
        points.push_back(end_of_token);
    }

    // Code points become symbols, so that a grammar classifies each of them once.
    std::vector<uint32_t> symbol_of;
    for (const uint32_t point : points) {
        if (point == end_of_token) {
            continue;
        }
        if (point >= symbol_of.size()) {
            symbol_of.resize((size_t) point + 1);
        }
        symbol_of[point] = 1;
    }
    for (size_t point = 0; point < symbol_of.size(); ++point) {
        if (symbol_of[point] != 0) {
            symbol_of[point] = (uint32_t) symbols.size();
            symbols.push_back((uint32_t) point);
        }
    }
    for (uint32_t & point : points) {
        point = point == end_of_token ? point : symbol_of[point];
    }
    add_trie(points, entries);
}

void VocabIndex::add_trie(const std::vector<uint32_t> & points, std::vector<Entry> & entries) {
    // Six symbols in two words decide nearly all comparisons without a look at `points`.
    for (Entry & entry : entries) {
        uint64_t         words[2] = {0, 0};
        const uint32_t * p        = points.data() + entry.begin;
        for (int j = 0; j < 6; ++j) {
            const uint64_t symbol = *p == end_of_token ? 0 : *p++ + 1ull;
            words[j / 3] = (words[j / 3] << 21) | std::min<uint64_t>(symbol, 0x1fffff);
        }
        entry.high = words[0];
        entry.low  = words[1];
    }
    std::sort(entries.begin(), entries.end(), [&](const Entry & a, const Entry & b) {
        if (a.high != b.high) {
            return a.high < b.high;
        }
        if (a.low != b.low) {
            return a.low < b.low;
        }
        const uint32_t * x = points.data() + a.begin, * y = points.data() + b.begin;
        for (; *x == *y; ++x, ++y) {
            if (*x == end_of_token) {
                return a.id < b.id;
            }
        }
        return *x + 1 < *y + 1;  // an end counts as 0
    });

    std::vector<uint32_t> open{0};  // the nodes from the root to the last token's
    std::vector<uint32_t> depths;
    nodes.reserve(points.size() / 2);
    nodes.push_back({0, 0, 0, 0, false});
    const uint32_t * last = &end_of_token;
    for (size_t i = 0; i < entries.size(); ++i) {
        if (i + 8 < entries.size()) {
            __builtin_prefetch(points.data() + entries[i + 8].begin);
        }
        const uint32_t * now    = points.data() + entries[i].begin;
        size_t           common = 0;
        while (now[common] == last[common] && now[common] != end_of_token) {
            ++common;
        }
        for (; open.size() > common + 1; open.pop_back()) {
            nodes[open.back()].end = (uint32_t) nodes.size();
        }
        for (size_t j = common; now[j] != end_of_token; ++j) {
            open.push_back((uint32_t) nodes.size());
            const uint32_t depth = (uint32_t) (j + 1) & 0x7fffffff;
            nodes.push_back({now[j], 0, (uint32_t) tokens.size(), depth, false});
        }
        tokens.push_back(entries[i].id);
        tails.push_back(entries[i].tail);
        depths.push_back((uint32_t) open.size() - 1);
        max_depth = std::max(max_depth, depths.back());
        last = now;
    }
    for (const uint32_t node : open) {
        nodes[node].end = (uint32_t) nodes.size();
    }
    nodes.push_back({0, (uint32_t) nodes.size() + 1, (uint32_t) tokens.size(), 0, false});
    nodes.shrink_to_fit();

    for (uint32_t node = 0; node + 1 < nodes.size(); ++node) {
        std::vector<uint32_t> children;
        if (node == 0 || nodes[node].end - node > hub_children) {
            for (uint32_t i = node + 1; i < nodes[node].end; i = nodes[i].end) {
                children.push_back(i);
            }
        }
        if (node == 0 || children.size() > hub_children) {
            hubs.push_back({node, std::move(children)});
            nodes[node].is_hub = true;
        }
    }

    n_deeper.assign((size_t) max_depth + 1, 0);
    for (const uint32_t depth : depths) {
        for (uint32_t d = 0; d < depth; ++d) {
            ++n_deeper[d];
        }
    }
    deepest.resize(tokens.size());
    std::vector<uint32_t> fill = n_deeper;
    for (size_t i = 0; i < tokens.size(); ++i) {
        deepest[fill[depths[i]]++] = tokens[i];
    }
}

}  // namespace llama_crab
