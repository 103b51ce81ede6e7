#include "grammar.h"

#include <algorithm>
#include <stdexcept>

namespace llama_crab {

namespace {

constexpr int32_t dead = GrammarAutomaton::dead;

// Beyond these everything cached is dropped and learned anew.
constexpr size_t max_table_bytes = 32 << 20;
constexpr size_t max_mask_bytes  = 32 << 20;

[[noreturn]] void refuse(llama_token token, std::string_view piece) {
    throw std::runtime_error("the grammar does not allow token " + std::to_string(token) + " ('"
                             + std::string(piece.substr(0, 64)) + "') here");
}

size_t bytes_of(const TokenMask & mask) {
    return sizeof(TokenMask) + mask.bits.size() * 4 + mask.ids.size() * 4;
}

}  // namespace

std::shared_ptr<Grammar> Grammar::parse(std::shared_ptr<const VocabIndex> index,
                                        const llama_vocab * vocab, const std::string & gbnf,
                                        const std::string & root) {
    const GbnfRules rules = parse_gbnf(vocab, gbnf, root);
    return std::shared_ptr<Grammar>(new Grammar(std::move(index), rules));
}

Grammar::Grammar(std::shared_ptr<const VocabIndex> index, const GbnfRules & rules)
    : index_(std::move(index)), program_(rules), automaton_(program_),
      builder_(*index_, program_, automaton_), table_limit_(max_table_bytes) {}

size_t Grammar::bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return automaton_.bytes() + known_.size() * sizeof(Known) + mask_bytes_;
}

void Grammar::add(Position * position, const Position & value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    positions_.insert(position);
    *position = value;
}

void Grammar::add(Position * position) {
    const std::lock_guard<std::mutex> lock(mutex_);
    positions_.insert(position);
    *position = {automaton_.start(), {}};
}

void Grammar::remove(Position * position) {
    const std::lock_guard<std::mutex> lock(mutex_);
    positions_.erase(position);
}

void Grammar::move(Position * position, const Position * to) {
    const std::lock_guard<std::mutex> lock(mutex_);
    *position = to != nullptr ? *to : Position{automaton_.start(), {}};
}

// Each call from outside starts here, with the lock held; only here do states change their ids.
void Grammar::begin() {
    automaton_.begin();
    if (automaton_.bytes() + automaton_.n_states() * sizeof(Known) < table_limit_) {
        return;
    }
    std::vector<int32_t *> held;
    for (Position * position : positions_) {
        held.push_back(&position->state);
    }
    automaton_.collect(held);
    known_.clear();
    known_.shrink_to_fit();
    mask_bytes_ = 0;
    // Many sequences deep in a grammar can hold that much by right.
    table_limit_ = std::max(max_table_bytes, 2 * automaton_.bytes());
}

Grammar::Known & Grammar::known(int32_t state) {
    if ((size_t) state >= known_.size()) {
        known_.resize(automaton_.n_states());
    }
    return known_[(size_t) state];
}

void Grammar::remember(int32_t state, TokenMask mask) {
    const size_t size = bytes_of(mask);
    if (mask_bytes_ + size > max_mask_bytes) {
        for (Known & other : known_) {
            other.mask = nullptr;
        }
        mask_bytes_ = 0;
    }
    mask_bytes_ += size;
    known(state).mask   = std::make_shared<const TokenMask>(std::move(mask));
    known(state).forced = LLAMA_TOKEN_NULL;
    if (known(state).mask->n_allowed == 1) {
        known(state).forced = known(state).mask->ids[0];
    }
}

std::shared_ptr<const TokenMask> Grammar::mask(const Position & position) {
    const std::lock_guard<std::mutex> lock(mutex_);
    begin();
    if (position.partial.n_remain > 0) {
        return std::make_shared<const TokenMask>(continue_character(position));
    }
    if (known(position.state).mask == nullptr) {
        remember(position.state, builder_.build(position.state));
    }
    return known(position.state).mask;
}

// Only what starts with a continuation byte can follow the start of a character, besides an end.
TokenMask Grammar::continue_character(const Position & position) {
    TokenSet out(index_->n_tokens());
    for (const llama_token id : index_->continuations) {
        if (consume(position, id, index_->piece(id)).allowed) {
            out.add(id);
        }
    }
    if (automaton_.complete(position.state)) {
        for (const llama_token id : index_->eog_tokens) {
            out.add(id);
        }
    }
    return out.take();
}

llama_token Grammar::forced(const Position & position) {
    const std::lock_guard<std::mutex> lock(mutex_);
    begin();
    if (position.partial.n_remain > 0) {
        const TokenMask mask = continue_character(position);
        return mask.n_allowed == 1 ? mask.ids[0] : LLAMA_TOKEN_NULL;
    }
    if (known(position.state).forced == not_asked) {
        TokenMask some = builder_.build(position.state, 2);
        if (some.n_allowed < 2) {
            remember(position.state, std::move(some));  // then it is all
        } else {
            known(position.state).forced = LLAMA_TOKEN_NULL;
        }
    }
    return known(position.state).forced;
}

bool Grammar::allows(const Position & position, llama_token token) {
    const std::lock_guard<std::mutex> lock(mutex_);
    begin();
    return allowed(position, token);
}

bool Grammar::allowed(const Position & position, llama_token token) {
    if (token < 0 || token >= index_->n_tokens()) {
        return false;
    }
    if (index_->is_eog(token)) {
        return automaton_.complete(position.state);
    }
    if (position.partial.n_remain == 0 && known(position.state).mask != nullptr) {
        return known(position.state).mask->has(token);
    }
    return index_->is_text(token) && consume(position, token, index_->piece(token)).allowed;
}

void Grammar::accept(Position & position, llama_token token) {
    const std::lock_guard<std::mutex> lock(mutex_);
    begin();
    if (token < 0 || token >= index_->n_tokens()) {
        refuse(token, "");
    }
    if (index_->is_eog(token)) {
        if (!automaton_.complete(position.state)) {
            refuse(token, index_->piece(token));
        }
        return;
    }
    const Outcome outcome = consume(position, token, index_->piece(token));
    if (!outcome.allowed || !index_->is_text(token)) {
        refuse(token, index_->piece(token));
    }
    position = outcome.after;
}

// What a trigger makes a lazy grammar read, by the laxer rules of llama.cpp's accept. All or none.
bool Grammar::accept_pieces(Position & position,
                            const std::vector<std::pair<llama_token, std::string>> & pieces) {
    const std::lock_guard<std::mutex> lock(mutex_);
    begin();
    Position at = position;
    for (const auto & [token, piece] : pieces) {
        at = consume(at, token, piece).after;
        if (at.state == dead) {
            return false;
        }
    }
    position = at;
    return true;
}

Grammar::Outcome Grammar::consume(const Position & from, llama_token token,
                                  std::string_view piece) {
    Outcome result{false, from};
    decode_utf8(piece, result.after.partial, code_points_);
    const PartialUtf8 partial = result.after.partial;

    int32_t state = from.state;
    for (size_t i = 0; i < code_points_.size() && state != dead; ++i) {
        state = automaton_.next(state, program_.class_of(code_points_[i]));
    }
    const bool has_text = !code_points_.empty();
    if (partial.n_remain >= 0) {
        const bool fits = state != dead && (partial.n_remain == 0
                                                ? has_text : automaton_.may_match(state, partial));
        result.allowed = fits || (has_text && automaton_.accepts_token(from.state, token));
    }
    result.after.state = automaton_.after_token(from.state, token, state, has_text);
    if (partial.n_remain < 0) {
        result.after.partial = {};
    }
    return result;
}

GrammarConstraint::GrammarConstraint(std::shared_ptr<Grammar> grammar, bool lazy,
                                     const std::vector<std::string> & trigger_patterns,
                                     const std::vector<llama_token> & trigger_tokens,
                                     const GrammarOpening & opening)
    : grammar_(std::move(grammar)),
      triggers_(lazy ? new Triggers{TriggerPatterns(trigger_patterns), trigger_tokens} : nullptr),
      opening_(new GrammarOpening(opening)), lazy_(lazy), waiting_(lazy) {
    grammar_->add(&position_);
    try {
        open();
    } catch (...) {
        grammar_->remove(&position_);
        throw;
    }
}

GrammarConstraint::GrammarConstraint(const GrammarConstraint & other)
    : grammar_(other.grammar_), triggers_(other.triggers_), opening_(other.opening_),
      lazy_(other.lazy_), waiting_(other.waiting_), thinking_(other.thinking_),
      buffer_(other.buffer_), seen_(other.seen_), buffered_(other.buffered_) {
    grammar_->add(&position_, other.position_);
}

GrammarConstraint & GrammarConstraint::operator=(const GrammarConstraint & other) {
    if (grammar_ != other.grammar_) {
        grammar_->remove(&position_);
        grammar_ = other.grammar_;
        grammar_->add(&position_, other.position_);
    } else {
        grammar_->move(&position_, &other.position_);
    }
    triggers_ = other.triggers_;
    opening_  = other.opening_;
    lazy_     = other.lazy_;
    waiting_  = other.waiting_;
    thinking_ = other.thinking_;
    buffer_   = other.buffer_;
    seen_     = other.seen_;
    buffered_ = other.buffered_;
    return *this;
}

GrammarConstraint::~GrammarConstraint() {
    grammar_->remove(&position_);
}

std::shared_ptr<const TokenMask> GrammarConstraint::mask() {
    return waiting_ ? nullptr : grammar_->mask(position_);
}

bool GrammarConstraint::allows(llama_token token) {
    return waiting_ || grammar_->allows(position_, token);
}

llama_token GrammarConstraint::forced() {
    return waiting_ ? LLAMA_TOKEN_NULL : grammar_->forced(position_);
}

void GrammarConstraint::accept(llama_token token) {
    if (!waiting_) {
        grammar_->accept(position_, token);
        return;
    }
    const VocabIndex & index = *grammar_->index_;
    if (token < 0 || token >= index.n_tokens()) {
        refuse(token, "");
    }
    const std::string piece(index.piece(token));
    Pieces            replayed;
    if (std::find(triggers_->tokens.begin(), triggers_->tokens.end(), token)
        != triggers_->tokens.end()) {
        replayed.push_back({token, piece});
    } else {
        const size_t before = buffer_.size();
        if (thinking_) {
            buffer_ += piece;
            buffered_.push_back({token, buffer_.size()});
            follow_thinking(before);
            if (thinking_) {
                return;
            }
            buffered_.pop_back();  // it comes below, as the token that has just been read
            buffer_.resize(buffered_.empty() ? 0 : buffered_.back().second);
        }
        buffer_ += piece;
        const size_t start = triggers_->patterns.find(buffer_, seen_);
        if (start == std::string::npos) {
            buffered_.push_back({token, buffer_.size()});
            follow_thinking(before);
            return;
        }
        // The tokens that reach past the start, the first perhaps in part.
        size_t     begin = 0;
        const auto replay = [&](llama_token id, size_t end) {
            if (end > start) {
                begin = std::max(begin, start);
                replayed.push_back({id, buffer_.substr(begin, end - begin)});
            }
            begin = end;
        };
        for (const auto & [id, end] : buffered_) {
            replay(id, end);
        }
        replay(token, buffer_.size());
    }
    if (!grammar_->accept_pieces(position_, replayed)) {
        buffer_.resize(buffered_.empty() ? 0 : buffered_.back().second);
        seen_.clear();
        refuse(token, piece);
    }
    waiting_ = false;
    forget();
}

void GrammarConstraint::reset() {
    grammar_->move(&position_, nullptr);
    waiting_ = lazy_;
    forget();
    open();
}

void GrammarConstraint::forget() {
    buffer_.clear();
    buffered_.clear();
    seen_.clear();
}

void GrammarConstraint::open() {
    thinking_ = false;
    const std::string & prefix = opening_->prefix;
    if (!lazy_) {
        if (!prefix.empty()
            && !grammar_->accept_pieces(position_, {{LLAMA_TOKEN_NULL, prefix}})) {
            throw std::runtime_error("the grammar does not allow what the prompt has of the answer");
        }
        return;
    }
    buffer_ = prefix;
    follow_thinking(0);
    while (thinking_) {
        const size_t left = buffer_.size();
        follow_thinking(0);
        if (buffer_.size() == left) {
            break;
        }
    }
    forget();
}

// Notes where thinking begins or ends in the text from `from` on; a tag may begin before it. Text up
// to such a tag is dropped: no trigger begins there.
void GrammarConstraint::follow_thinking(size_t from) {
    if (opening_->thinking_start.empty() || opening_->thinking_ends.empty()) {
        return;
    }
    const std::vector<std::string> starts = {opening_->thinking_start};
    size_t found = std::string::npos;
    for (const std::string & tag : thinking_ ? opening_->thinking_ends : starts) {
        found = std::min(found, buffer_.find(tag, from - std::min(from, tag.size() - 1)));
    }
    if (found == std::string::npos) {
        return;
    }
    thinking_ = !thinking_;
    // A format's trigger may begin with the tag that ends thinking.
    if (thinking_) {
        found += starts[0].size();
    }
    buffer_.erase(0, found);
    seen_.clear();
    size_t n_dropped = 0;
    for (auto & [id, end] : buffered_) {
        n_dropped += end <= found;
        end -= std::min(end, found);
    }
    buffered_.erase(buffered_.begin(), buffered_.begin() + (std::ptrdiff_t) n_dropped);
}

}  // namespace llama_crab
