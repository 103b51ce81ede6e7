// What the slots have in llama.cpp's memory: keeping, copying, saving and losing it.
#include <algorithm>
#include <map>

#include "stepper.h"

namespace llama_crab {

void Slot::grow(int32_t n) {
    if (n > 0) {
        if (cells.empty() || cells.back().birth != birth) {
            cells.push_back({birth, n_past, n_past});
        }
        n_past += n;
        cells.back().end = n_past;
    }
}

void Slot::cut(int32_t n) {
    n_past = std::min(n_past, n);
    while (!cells.empty() && cells.back().begin >= n_past) {
        cells.pop_back();
    }
    if (!cells.empty()) {
        cells.back().end = std::min(cells.back().end, n_past);
    }
}

void Slot::borrow(const Slot & other, int32_t n) {
    cells  = other.cells;
    n_past = other.n_past;
    cut(n);
}

int32_t Stepper::n_cells_used() const {
    std::map<uint64_t, std::pair<int32_t, int32_t>> runs;
    int32_t n = 0;
    for (const Slot & slot : slots_) {
        for (const CellRun & run : slot.cells) {
            if (!unified_) {
                n += run.end - run.begin;
                continue;
            }
            auto & known = runs.emplace(run.birth, std::make_pair(run.begin, run.begin)).first->second;
            n += std::max(0, run.end - known.second);
            known.second = std::max(known.second, run.end);
        }
    }
    return n;
}

int32_t Stepper::n_cells_to_come() const {
    int32_t n = 0;
    for (const Slot & slot : slots_) {
        if (slot.active) {
            const bool shares = unified_ && slot.request.leader >= 0;
            n += slot.n_waiting() - (shares ? slot.request.n_shared : 0);
        }
    }
    return n;
}

int32_t Stepper::reusable_prefix(int32_t i, const std::vector<llama_token> & tokens,
                                 int32_t adapters) const {
    const Slot & slot = slots_[(size_t) i];
    if (tokens.empty() || slot.adapters != adapters) {
        return 0;
    }
    // The last prompt token is always decoded: its logits are needed.
    const int32_t limit = std::min(slot.n_past, (int32_t) tokens.size() - 1);
    const auto    end   = slot.tokens.begin() + limit;
    const int32_t n = (int32_t) (std::mismatch(slot.tokens.begin(), end, tokens.begin()).first -
                                 slot.tokens.begin());
    if (n == 0 || n == slot.n_past) {
        return n;
    }
    // Part of the sequence must go. A recurrent state cannot be cut, and a sliding window may have
    // dropped cells that the shorter prefix still attends to (llama_memory_seq_rm does not say so).
    if (recurrent_ || llama_memory_seq_pos_min(memory_, i) > std::max(0, n - n_swa_)) {
        return 0;
    }
    return n;
}

void Stepper::remove_cells(int32_t i) {
    llama_memory_seq_rm(memory_, i, -1, -1);
    slots_[(size_t) i].cut(0);
    rewind_source(i, 0);
}

void Stepper::copy_cells(int32_t source, int32_t target, int32_t n) {
    llama_memory_seq_rm(memory_, target, -1, -1);
    if (unified_ && !recurrent_) {
        llama_memory_seq_cp(memory_, source, target, 0, n);
        return;
    }
    // A stream, like a recurrent state, is copied as a whole.
    llama_memory_seq_cp(memory_, source, target, -1, -1);
    if (slots_[(size_t) source].n_past > n) {
        llama_memory_seq_rm(memory_, target, n, -1);
    }
    if (!unified_) {
        // The metadata is copied now, the cells when the next batch begins.
        copy_pending_[(size_t) source] = copy_pending_[(size_t) target] = 1;
    }
}

// Fills `fresh`, about to become slot `i`, with the first `n_keep` cells of `source`.
int32_t Stepper::take_cells(int32_t i, Slot & fresh, int32_t source, int32_t n_keep) {
    const Slot & old = slots_[(size_t) i];
    if (n_keep > 0 && source != i) {
        copy_cells(source, i, n_keep);
        fresh.borrow(slots_[(size_t) source], n_keep);
    } else {
        if (old.n_past > n_keep && !llama_memory_seq_rm(memory_, i, n_keep, -1)) {
            n_keep = 0;
        }
        if (n_keep == 0) {
            llama_memory_seq_rm(memory_, i, -1, -1);
        }
        fresh.borrow(old, n_keep);
    }
    fresh.birth = next_birth_++;
    rewind_source(i, n_keep > 0 && source == i ? n_keep : 0);
    return n_keep;
}

int32_t Stepper::assign(int32_t i, SlotRequest request, Status & status) {
    Slot fresh;
    fresh.tokens.reserve(request.prompt.size() +
                         (size_t) std::max(0, std::min(request.max_tokens, n_ctx_seq_)));
    fresh.tokens.assign(request.prompt.begin(), request.prompt.end());
    fresh.n_prompt = (int32_t) fresh.tokens.size();
    int32_t n_keep = 0;
    guarded(status, [&] {
        const int32_t source = request.source < 0 ? i : request.source;
        n_keep = take_cells(i, fresh, source, request.leader >= 0 ? 0 : request.n_keep);
    });
    fresh.n_cached = n_keep;
    fresh.adapters = request.adapters;
    fresh.start_us = llama_time_us();
    if (status.kind == Status::ok) {
        request.sampler->accept_prompt(fresh.tokens.data(), fresh.tokens.size(), status);
    }
    fresh.active  = status.kind == Status::ok;
    fresh.request = std::move(request);
    fresh.request.prompt.clear();
    slots_[(size_t) i] = std::move(fresh);
    return n_keep;
}

std::unique_ptr<Slot> Stepper::suspend(int32_t i) {
    release(i, Finish::none);
    remove_cells(i);
    auto taken = std::make_unique<Slot>(std::move(slots_[(size_t) i]));
    slots_[(size_t) i] = Slot();
    taken->active         = true;
    taken->held           = false;
    taken->draft.drop();
    taken->request.leader = -1;
    return taken;
}

int32_t Stepper::resume(int32_t i, std::unique_ptr<Slot> slot, int32_t source, int32_t n_keep,
                        Status & status) {
    guarded(status, [&] { n_keep = take_cells(i, *slot, source < 0 ? i : source, n_keep); });
    slots_[(size_t) i] = std::move(*slot);
    return n_keep;
}

bool Stepper::save(int32_t i, std::vector<uint8_t> & out, Status & status) {
    if (copy_pending_[(size_t) i]) {
        return false;
    }
    state_get(*context_, i, 0, out, status);
    return true;
}

bool Stepper::restore(int32_t i, const std::vector<llama_token> & tokens, int32_t adapters,
                      const uint8_t * data, size_t size, Status & status) {
    if (copy_pending_[(size_t) i]) {
        return false;
    }
    clear(i);
    state_set(*context_, i, 0, data, size, status);
    const int32_t n = (int32_t) tokens.size();
    if (status.kind == Status::ok && llama_memory_seq_pos_max(memory_, i) + 1 != n) {
        status.set(Status::failed, "the state does not hold the tokens it is said to hold");
    }
    if (status.kind != Status::ok) {
        clear(i);
        return true;
    }
    Slot & slot   = slots_[(size_t) i];
    slot.tokens   = tokens;
    slot.adapters = adapters;
    slot.birth    = next_birth_++;
    slot.grow(n);
    return true;
}

// Sequences that share a part of another's prompt start when that part is in memory.
void Stepper::start_sharers() {
    for (int32_t i = 0; i < n_slots(); ++i) {
        Slot & slot = slots_[(size_t) i];
        const int32_t leader = slot.request.leader;
        if (!slot.active || leader < 0 || slot.request.n_shared == slot.n_prompt) {
            continue;  // copies of the whole prompt start with the leader's row
        }
        const Slot & from = slots_[(size_t) leader];
        if (from.n_past < slot.request.n_shared) {
            continue;
        }
        slot.request.leader = -1;
        // The leader paused there, so that also what cannot be cut is right.
        if (reusable_prefix(leader, slot.tokens, slot.adapters) >= slot.request.n_shared) {
            copy_cells(leader, i, slot.request.n_shared);
            slot.borrow(from, slot.request.n_shared);
            slot.n_cached = slot.request.n_shared;
        }
    }
}

// A failed or aborted ubatch drops every sequence in it from its first position there, so what is
// in memory is asked, not assumed. The dropped tokens are decoded again by the next plan; so are
// those of earlier ubatches that were to give a row, because a failed call keeps no rows.
void Stepper::resync() {
    for (int32_t i = 0; i < n_slots(); ++i) {
        Slot & slot = slots_[(size_t) i];
        const int32_t n_in_memory = llama_memory_seq_pos_max(memory_, i) + 1;
        int32_t n = std::min((int32_t) slot.tokens.size(), n_in_memory);
        if (n > slot.n_past) {
            slot.grow(n - slot.n_past);
        }
        for (const Row & row : rows_) {
            if (row.slot == i) {
                n = std::min(n, row.target - 1);
            }
        }
        // A recurrent state that the batch has touched is of no known position.
        if (recurrent_ && added_[(size_t) i] > 0) {
            n = 0;
        }
        if (n < n_in_memory && !llama_memory_seq_rm(memory_, i, n, -1)) {
            llama_memory_seq_rm(memory_, i, -1, -1);
            n = 0;
        }
        slot.cut(n);
        rewind_source(i, n);
    }
    drop_drafts();
}

void Stepper::set_adapters(int32_t index, AdapterSet set) {
    if ((size_t) index >= adapter_sets_.size()) {
        adapter_sets_.resize((size_t) index + 1);
    }
    adapter_sets_[(size_t) index] = std::move(set);
    if (index == adapters_) {
        Status status;
        llama_crab::set_adapters(*context_, {}, {}, status);
        adapters_ = status.kind == Status::ok ? 0 : -1;  // applied again when it is used
    }
}

void Stepper::clear(int32_t i) {
    release(i, Finish::none);
    llama_memory_seq_rm(memory_, i, -1, -1);
    slots_[(size_t) i] = Slot();
}

}  // namespace llama_crab
