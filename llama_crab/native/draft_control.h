// How long drafts should be: what a batch costs by its tokens, and how often drafted tokens hold.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace llama_crab {

enum class DraftOrigin : int32_t { lookup = 0, cache = 1, model = 2, user = 3 };
constexpr size_t n_draft_origins = 4;

// How often a drafted token was the one that the model chose, by where it came from and by how many
// tokens of context agreed before it. A token behind k others of a draft had k more that agreed, so
// that one number describes both an n-gram's order and a token's place in a draft.
class DraftAcceptance {
public:
    static constexpr size_t n_classes = 12;
    // Classes of agreement: 1, 2, 3, 4, 5, 6, 7-8, 9-12, 13-16, 17-24, 25-32, more.
    static size_t  class_of(int32_t agreed);
    static int32_t smallest_of(size_t k);

    // Old trials fade: `memory` is how many count.
    void   observe(DraftOrigin origin, int32_t agreed, bool held, double memory);
    double held(DraftOrigin origin, size_t k) const { return held_[(size_t) origin][k]; }
    double tried(DraftOrigin origin, size_t k) const { return tried_[(size_t) origin][k]; }

private:
    std::array<std::array<float, n_classes>, n_draft_origins> held_{}, tried_{};
};

// A draft that could be decoded with the next batch.
struct DraftOffer {
    int32_t                 slot;
    DraftOrigin             origin;
    int32_t                 agreed;  // context that agreed before its first token
    int32_t                 n_max;   // tokens that there are, or could be made
    bool                    fixed;   // its length is not for us to choose
    const DraftAcceptance * acceptance;  // of its sequence
};

// Learns and chooses. Costs are kept as ratios: the time of a batch is `unit` (which follows depth and
// the machine's load quickly) times a factor of its number of tokens (which changes slowly), so that
// what was learned at one depth serves at another.
class DraftControl {
public:
    // Most tokens of a batch whose cost is kept apart.
    static constexpr int32_t n_most = 256;

    // Whether the sequences' cells lie in streams of their own: then llama.cpp computes only
    // sequences of equal length and neighbouring slots together.
    explicit DraftControl(bool split) : split_(split) {}

    // Chooses for each offer how many of its tokens to decode, n_room together at most. `base` has the
    // tokens of each slot that are decoded in any case, 0 for slots without.
    void choose(const std::vector<int32_t> & base, const std::vector<DraftOffer> & offers,
                int32_t n_room, std::vector<int32_t> & lengths);

    // A batch of `layout` tokens per slot took `us`, and gave `n_given` tokens to `n_slots` sequences.
    void observe_batch(const std::vector<int32_t> & layout, int32_t n_drafted, int32_t n_slots,
                       int32_t n_given, int64_t us);
    // Making n_tokens of drafts took `us`.
    void observe_drafting(DraftOrigin origin, int32_t n_tokens, int64_t us);
    void observe_token(DraftOrigin origin, DraftAcceptance & of_sequence, int32_t agreed, bool held);

    // Probability that a token with this agreement holds; `of_sequence` may be null.
    double acceptance(DraftOrigin origin, int32_t agreed,
                      const DraftAcceptance * of_sequence) const;
    // Microseconds of a batch of one micro-batch, as expected; 0.0 while nothing is known.
    double cost_us(int32_t n_tokens) const;
    int64_t n_observed(int32_t n_tokens) const { return costs_[(size_t) n_tokens].n; }

    // Of batches with drafts lately: what plain ones would have taken for the same tokens, over what
    // they took. 1.0 while there were none.
    double measured_gain() const { return spent_us_ > 0.0 ? worth_us_ / spent_us_ : 1.0; }
    // The same as expected when their lengths were chosen.
    double expected_gain() const { return expected_gain_; }
    // What drafts saved by that reckoning in the batch of the last observe_batch.
    int64_t saved_us() const { return saved_us_; }

    const DraftAcceptance & acceptance() const { return all_; }

private:
    struct Cost {
        double  factor = 0.0;
        int64_t n      = 0;  // batches seen,
        int64_t last   = 0;  // and which of all was the last
        double  share  = 0.0;  // of the batches lately
    };
    struct Choice {
        std::vector<int32_t> lengths;
        double               rate = 0.0;  // tokens per microsecond
        double               cost = 0.0;
    };

    bool   known(int32_t n_tokens, bool hopeful) const;
    double factor(int32_t n_tokens, bool hopeful) const;
    double layout_cost(const std::vector<int32_t> & layout, bool hopeful) const;
    void   micro_batches(const std::vector<int32_t> & layout, std::vector<int32_t> & sizes) const;
    double weigh(const std::vector<int32_t> & lengths, bool hopeful, Choice & best);
    bool   lengthen(int32_t n_room);

    const bool                          split_;
    double                              unit_ = 0.0;
    std::array<Cost, n_most + 1>        costs_;
    int32_t                             largest_ = 0;  // size that was seen
    std::array<double, n_draft_origins> drafting_us_{};  // per drafted token
    DraftAcceptance                     all_;
    double                              worth_us_ = 0.0, spent_us_ = 0.0;  // of batches with drafts
    double                              expected_gain_ = 1.0, expected_now_ = 1.0;
    double                              allowance_us_ = 0.0;  // time that trials may lose
    bool                                trial_ = false;       // the last choice was one
    int64_t                             n_batches_ = 0, saved_us_ = 0;

    // Of the choice that is being made.
    const std::vector<int32_t> *        base_   = nullptr;
    const std::vector<DraftOffer> *     offers_ = nullptr;
    std::vector<std::vector<double>>    chances_;  // per offer: that the first 1, 2, ... tokens hold
    std::vector<int32_t>                layout_, lengths_;
    mutable std::vector<int32_t>        sizes_, left_;
};

}  // namespace llama_crab
