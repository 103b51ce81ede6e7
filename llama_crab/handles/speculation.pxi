# What a Stepper's drafts come from and what became of them; the bodies of some of its methods.

cdef tuple _DRAFT_ORIGINS = ("lookup", "cache", "model", "user")


@cython.final
cdef class Speculation:
    """Where the drafts of a request may come from, and how long they may be.

    At most `n_max` tokens, always as many as there are when `fixed`; from n-grams of `min_ngram` to
    `max_ngram` tokens of its own text (0: not), then from `cache`, then from what was given to
    `Stepper.set_draft_model` (`model`) or from the `draft` of `Stepper.step` (`user`).

    Thread-safety: immutable, share freely.
    """

    def __cinit__(self, int32_t n_max, *, bint fixed=False, int32_t min_ngram=0,
                  int32_t max_ngram=0, NgramCache cache=None, bint model=False, bint user=False):
        if not 1 <= n_max <= nat.N_COSTS // 2:
            raise ValueError(f"n_max={n_max} is not in 1..{nat.N_COSTS // 2}")
        if max_ngram and not 1 <= min_ngram <= max_ngram <= 16:
            raise ValueError(f"min_ngram={min_ngram}, max_ngram={max_ngram} are not in 1..16")
        self._c_speculation.n_max = n_max
        self._c_speculation.fixed = fixed
        self._c_speculation.min_ngram = min_ngram
        self._c_speculation.max_ngram = max_ngram
        self._c_speculation.model = model
        self._c_speculation.user = user
        if cache is not None:
            self._c_speculation.cache = cache._c_cache


cdef nat.DraftOrigin _origin(str name) except *:
    if name not in _DRAFT_ORIGINS:
        raise ValueError(f"origin {name!r} is not one of {_DRAFT_ORIGINS}")
    return nat.draft_origin(<int32_t> _DRAFT_ORIGINS.index(name))


@cython.final
cdef class DraftControl:
    """What a `Stepper` chooses the lengths of drafts with, by itself: for tests and simulations.

    `split` says that each sequence has a stream of cells of its own; there are `n_slots` sequences.

    Thread-safety: none.
    """

    def __cinit__(self, int n_slots, *, bint split=False):
        if not 1 <= n_slots <= 256:
            raise ValueError(f"n_slots={n_slots} is not in 1..256")
        self._c_control = new nat.DraftControl(split)
        self._c_acceptance.resize(n_slots)

    def __dealloc__(self):
        del self._c_control

    cdef int _require_slot(self, int slot) except -1:
        if not 0 <= slot < <int> self._c_acceptance.size():
            raise IndexError(slot)
        return 0

    def choose(self, list base, list offers, int32_t n_room):
        """Return how many tokens of each offer to decode, at most `n_room` together.

        `base` are the tokens of each slot that are decoded in any case; an offer is
        ``(slot, origin, agreed, n_max, fixed)``.
        """
        cdef vector[int32_t] c_base = base
        cdef vector[int32_t] lengths
        cdef vector[nat.DraftOffer] c_offers
        cdef nat.DraftOffer c_offer
        if c_base.size() != self._c_acceptance.size():
            raise ValueError(f"{c_base.size()} slots instead of {self._c_acceptance.size()}")
        for slot, origin, agreed, n_max, fixed in offers:
            self._require_slot(slot)
            c_offer.slot = slot
            c_offer.origin = _origin(origin)
            c_offer.agreed = agreed
            c_offer.n_max = n_max
            c_offer.fixed = fixed
            c_offer.acceptance = &self._c_acceptance[<size_t> slot]
            c_offers.push_back(c_offer)
        self._c_control.choose(c_base, c_offers, n_room, lengths)
        return lengths

    def observe_batch(self, list layout, int32_t n_drafted, int32_t n_slots, int32_t n_given,
                      int64_t us):
        """Tell what a batch of `layout` tokens per slot took, and how many tokens it gave."""
        cdef vector[int32_t] c_layout = layout
        self._c_control.observe_batch(c_layout, n_drafted, n_slots, n_given, us)

    def observe_token(self, int slot, str origin, int32_t agreed, bint held):
        """Tell whether a drafted token of a slot was the one that was chosen."""
        self._require_slot(slot)
        self._c_control.observe_token(
            _origin(origin), self._c_acceptance[<size_t> slot], agreed, held)

    def observe_drafting(self, str origin, int32_t n_tokens, int64_t us):
        """Tell what making `n_tokens` of drafts took."""
        self._c_control.observe_drafting(_origin(origin), n_tokens, us)

    def cost_us(self, int32_t n_tokens):
        """Return the microseconds that a batch of `n_tokens` is expected to take."""
        return self._c_control.cost_us(n_tokens)

    @property
    def gains(self):
        """``(expected, measured)`` gain of batches with drafts."""
        return self._c_control.expected_gain(), self._c_control.measured_gain()


cdef int _ask_drafts(Stepper stepper, object draft) except -1:
    """Give the slots that want them the drafts that Python makes, all together."""
    cdef nat.CStepper *c = stepper._c_stepper
    cdef vector[int32_t] slots = c.slots_to_draft()
    cdef vector[int32_t] ids
    cdef int32_t slot, n_vocab = stepper._context._model.vocab.n_tokens
    if slots.empty():
        return 0
    for slot, tokens in draft(slots).items():
        stepper._require_slot(slot)
        ids.clear()
        _tokens(tokens, ids)
        for j in range(ids.size()):
            if not 0 <= ids[j] < n_vocab:
                ids.resize(j)  # what follows a token that does not exist cannot be right
                break
        c.set_draft(slot, ids)
    return 0


cdef int _set_draft_model(Stepper stepper, DraftModel model) except -1:
    cdef nat.CStepper *c = stepper._require_open()
    model._require_open()
    if model._target is not stepper._context:
        raise ValueError("the draft model was made for another context")
    c.set_draft_source(model._c_source)
    return 0


cdef tuple _drafts(Stepper stepper, int i):
    cdef const nat.Slot *slot = _slot_of(stepper, i)
    return slot.draft.n_drafted, slot.draft.n_accepted


cdef dict _speculation(Stepper stepper):
    cdef nat.CStepper *c = stepper._require_open()
    cdef const nat.DraftControl *control = &c.draft_control()
    cdef const nat.DraftAcceptance *all_slots = &control.acceptance()
    cdef size_t origin, k
    cdef int32_t n
    costs = {n: control.cost_us(n) for n in range(1, nat.N_COSTS + 1) if control.n_observed(n)}
    acceptance = {}
    for origin in range(nat.N_DRAFT_ORIGINS):
        found = {}
        for k in range(nat.N_AGREEMENT_CLASSES):
            tried = all_slots.tried(nat.draft_origin(origin), k)
            if tried > 0:
                found[nat.smallest_agreement(k)] = (
                    all_slots.held(nat.draft_origin(origin), k) / tried, tried)
        if found:
            acceptance[_DRAFT_ORIGINS[origin]] = found
    return {
        "cost_us": costs,
        "acceptance": acceptance,
        "expected_gain": control.expected_gain(),
        "measured_gain": control.measured_gain(),
    }
