#include "vocab_cache.h"

#include <algorithm>

namespace llama_crab {

template <typename Value, typename Make>
std::shared_ptr<Value> VocabCache::look_up(Entries<Value> & entries, std::vector<std::string> key,
                                           Make make) {
    constexpr size_t capacity = 16;
    const auto found = std::find_if(entries.begin(), entries.end(),
                                    [&](const Entry<Value> & entry) { return entry.key == key; });
    if (found != entries.end()) {
        entries.splice(entries.begin(), entries, found);
    } else {
        entries.push_front({std::move(key), make()});
        if (entries.size() > capacity) {
            entries.pop_back();
        }
    }
    return entries.front().value;
}

std::shared_ptr<const DryBreakers> VocabCache::dry_breakers(
    const std::vector<std::string> & breakers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return look_up(breakers_, breakers, [&] {
        return std::make_shared<const DryBreakers>(find_breakers(vocab_, breakers));
    });
}

std::shared_ptr<Grammar> VocabCache::grammar(const std::string & gbnf, const std::string & root) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return look_up(grammars_, {gbnf, root}, [&] {
        if (!index_) {
            index_ = std::make_shared<const VocabIndex>(vocab_);
        }
        return Grammar::parse(index_, vocab_, gbnf, root);
    });
}

}  // namespace llama_crab
