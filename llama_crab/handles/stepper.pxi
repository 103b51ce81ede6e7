cdef tuple _FINISH_NAMES = (
    None, "eog", "stop_token", "length", "context_full", "error", "cancelled")


@cython.final
cdef class Stepper:
    """The engine's step over a `Context`: plan, decode, sample and detokenise without the GIL.

    The context's sequences 0..n_seq_max-1 are its slots. `assign` gives a slot a request, `step`
    advances all slots by one batch and returns the indices of slots with news.

    Thread-safety: as its `Context`.
    """

    def __cinit__(self, Context context not None):
        context._require_open()
        if lib.llama_get_memory(context._c_ctx.get().ctx) == NULL:
            raise errors.ContextCreateError("this model keeps no memory: it cannot generate")
        self._c_stepper = new nat.CStepper(context._c_ctx)
        self._counters = StepCounters.__new__(StepCounters)
        self._counters._c_counters = self._c_stepper.counters
        self._context = context
        self._samplers = [None] * context._n_seq_max

    def __dealloc__(self):
        with nogil:
            del self._c_stepper

    cdef nat.CStepper *_require_open(self) except NULL:
        self._context._require_open()
        if self._c_stepper == NULL:
            raise errors.ClosedError("the stepper is closed")
        return self._c_stepper

    def close(self):
        """Give up the share of the context, and the samplers. Idempotent."""
        cdef nat.CStepper *stepper = self._c_stepper
        self._c_stepper = NULL
        self._samplers = []
        with nogil:
            del stepper

    cdef int _require_slot(self, int i) except -1:
        if not 0 <= i < self._c_stepper.n_slots():
            raise IndexError(i)
        return 0

    @property
    def context(self):
        return self._context

    @property
    def n_slots(self):
        """Number of slots: the context's n_seq_max."""
        return self._require_open().n_slots()

    @property
    def counters(self):
        """What it has done so far, as `StepCounters` that can be read after `close`, too."""
        self._require_open()
        return self._counters

    @property
    def n_steps(self):
        """Batches decoded so far."""
        return self._require_open().counters.get().n_steps

    @property
    def n_decoded(self):
        """Tokens decoded so far, prompts included."""
        return self._require_open().counters.get().n_decoded

    @property
    def decode_us(self):
        """Microseconds spent in llama.cpp's decode so far, until its output was there."""
        return self._require_open().counters.get().decode_us

    @property
    def sample_us(self):
        """Microseconds spent on output rows so far: log-probabilities, sampling, detokenising."""
        return self._require_open().counters.get().sample_us

    @property
    def can_cut(self):
        """Whether any prefix of a sequence can be kept without the rest.

        Not of a recurrent state; of a sliding window only while it covers the place.
        """
        return self._require_open().can_cut()

    @property
    def can_cut_saved(self):
        """Whether the same holds of a state that `save` gave: of a sliding window never."""
        return self._require_open().can_cut_saved()

    @property
    def can_abort(self):
        """Whether a batch that `Context.abort` stopped can be decoded again."""
        return self._require_open().can_abort()

    @property
    def can_draft(self):
        """Whether drafts can be taken out of memory again: not of a recurrent state."""
        return self._require_open().can_draft()

    @property
    def n_cells_used(self):
        """Cells of the KV cache in use; those that sequences share are counted once."""
        return self._require_open().n_cells_used()

    @property
    def n_cells_to_come(self):
        """Cells that the known tokens of running slots will take beyond those in use."""
        return self._require_open().n_cells_to_come()

    @property
    def target_us(self):
        """Microseconds between two tokens of an answer that prompts in its batch may not exceed.

        0 for no bound. At least 32 prompt tokens are taken in any case.
        """
        return self._require_open().budget.target_us

    @target_us.setter
    def target_us(self, int64_t value):
        self._require_open().budget.target_us = value

    @property
    def prompt_us(self):
        """Microseconds that a prompt token has taken lately, 0.0 when none was computed."""
        return self._require_open().budget.prompt_us()

    def reusable_prefix(self, int i, tokens, int32_t adapters=0):
        """Return how many leading `tokens` slot `i` has in memory, to be kept or copied.

        They must have been computed with LoRA set `adapters`.
        """
        cdef nat.CStepper *stepper = self._require_open()
        cdef vector[int32_t] ids
        self._require_slot(i)
        _tokens(tokens, ids)
        cdef nat.ContextHandle *handle = self._context._enter(False)
        cdef int32_t n = stepper.reusable_prefix(i, ids, adapters)
        handle.leave()
        return n

    def assign(self, int i, prompt, *, sampler not None, int32_t n_keep, int32_t leader,
               int32_t max_tokens, int32_t min_tokens, stop_tokens, int32_t n_logprobs,
               bint prompt_logprobs, bint ignore_eos, bint special, bint emit,
               bint processed=False, int32_t source=-1, int32_t n_shared=-1,
               int32_t checkpoint=-1, int64_t rank=0, int32_t adapters=0, int64_t submit_us=0,
               Speculation speculation=None):
        """Give slot `i` a request; return how many prompt tokens are in memory.

        The first `n_keep` tokens are those that slot `source` has (-1: slot `i` itself). `leader`
        >= 0 names the slot whose prefill this one waits for: it copies the first `n_shared` tokens
        (-1: the whole prompt, and samples from the same row). `sampler` is a chain `Sampler` or a
        `FusedSampler`; `processed` has `step` hand its rows out; `checkpoint` is a prompt position
        at which prefill pauses once and `step` returns; of several prompts the one with the
        smallest `rank` goes first; `adapters` is the index of a LoRA set; `max_tokens` < 0 goes on
        until the context is full; `n_logprobs` < 0 asks for none; `emit` reports every token
        instead of the end only; the time from `submit_us` (0: none) to its first token is counted;
        without `speculation` no drafts are made.
        """
        cdef nat.CStepper *stepper = self._require_open()
        cdef nat.SlotRequest request
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef int32_t kept, n_vocab = self._context._model.vocab.n_tokens
        cdef size_t j
        self._require_slot(i)
        if stepper.slot(i).active:
            raise errors.ContextBusyError(f"slot {i} is running a request")
        _tokens(prompt, request.prompt)
        if request.prompt.empty():
            raise errors.InvalidBatchError("the prompt has no tokens")
        if request.prompt.size() > lib.llama_n_ctx_seq(self._context._c_ctx.get().ctx):
            raise errors.ContextLengthError(
                f"the prompt has {request.prompt.size()} tokens, a sequence holds "
                f"{self._context.n_ctx_seq}")
        for j in range(request.prompt.size()):
            if not 0 <= request.prompt[j] < n_vocab:
                raise errors.InvalidTokenError(
                    f"token {request.prompt[j]} is outside the vocabulary (0..{n_vocab - 1})")
        if not 0 <= n_keep < <int64_t> request.prompt.size():
            raise ValueError(f"n_keep={n_keep} does not leave a token to decode")
        _tokens(sorted(stop_tokens), request.stop_tokens)
        for j in range(request.stop_tokens.size()):
            if not 0 <= request.stop_tokens[j] < n_vocab:
                raise errors.InvalidTokenError(
                    f"stop token {request.stop_tokens[j]} is outside the vocabulary "
                    f"(0..{n_vocab - 1})")
        if leader >= 0:
            self._require_slot(leader)
            if not stepper.slot(leader).active or leader == i:
                raise ValueError(f"slot {leader} cannot lead slot {i}")
        if source >= 0:
            self._require_slot(source)
        if not 0 <= adapters < stepper.n_adapter_sets():
            raise ValueError(f"there is no LoRA set {adapters}")
        request.source = source
        request.n_keep = n_keep
        request.leader = leader
        request.n_shared = <int32_t> request.prompt.size() if n_shared < 0 else n_shared
        request.checkpoint = checkpoint
        request.rank = rank
        request.submit_us = submit_us
        request.adapters = adapters
        request.max_tokens = max_tokens
        request.min_tokens = min_tokens
        request.n_logprobs = min(n_logprobs, n_vocab)
        request.prompt_logprobs = prompt_logprobs
        request.ignore_eos = ignore_eos
        request.special = special
        request.emit = emit
        request.processed = processed
        if speculation is not None:
            request.speculation = speculation._c_speculation
        request.sampler = _row_sampler(sampler)
        cdef nat.ContextHandle *handle = self._context._enter(True)
        try:
            with nogil:
                kept = stepper.assign(i, request, status)
        finally:
            handle.leave()
        self._samplers[i] = sampler
        if status.kind != nat.STATUS_OK:
            raise _error(errors.SamplerError, status, mark, "the sampler refused the prompt")
        return kept

    def step(self, int32_t n_tokens_max, int n_steps_max=1, process=None, int64_t until_us=0,
             draft=None):
        """Decode up to `n_tokens_max` tokens and sample; return the slots with news as a list.

        A slot appears for each token when it asked to `emit`, and when it has finished. Without
        news the step is repeated, `n_steps_max` times at most; signals are handled in between, and
        `pause` ends it. ``process(slots, rows)`` is called once a batch when slots that asked for
        it are to be sampled: `rows` is their logits as a writable `RowScratch`, one row a slot, and
        the slots it returns end with an error instead of being sampled. ``draft(slots)`` is called
        before a batch with the slots whose `Speculation` says `user`; it returns a mapping of slots
        to the token ids that may follow.

        Raises `KVCacheFullError` (nothing was lost; free a slot and step again), `DecodeAborted`
        (the next step decodes again what was dropped), `DecodeError`, and what `process` and
        `draft` raise (nothing is lost).
        """
        cdef nat.CStepper *stepper = self._require_open()
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef int i
        cdef int64_t n_before
        for i in range(stepper.n_slots()):
            if stepper.slot(i).active:
                _row_sampler(self._samplers[i])
        cdef nat.ContextHandle *handle = self._context._enter(True)
        try:
            for i in range(n_steps_max):
                n_before = stepper.counters.get().n_steps
                if draft is not None:
                    _ask_drafts(self, draft)
                with nogil:
                    stepper.decode(n_tokens_max, status)
                if (status.kind != nat.STATUS_OK
                        or stepper.counters.get().n_steps == n_before):
                    break
                if process is not None:
                    self._process(process)
                with nogil:
                    stepper.sample(status)
                if status.kind != nat.STATUS_OK or not stepper.events.empty() or self._pause:
                    break
                if until_us > 0 and lib.llama_time_us() >= until_us:
                    break
                PyErr_CheckSignals()
        finally:
            self._pause = False
            handle.leave()
        if status.kind == nat.STATUS_OK:
            return stepper.events
        raise _decode_error(status, mark)

    cdef int _process(self, object process) except -1:
        cdef nat.CStepper *stepper = self._c_stepper
        cdef vector[int32_t] slots = stepper.slots_to_process()
        cdef int32_t slot
        if slots.empty():
            return 0
        self._scratch = _scratch_for(
            self._scratch, slots.size(), self._context._model.vocab.n_tokens)
        with nogil:
            stepper.copy_rows(self._scratch._data.data())
        try:
            for slot in process(slots, self._scratch):
                self._require_slot(slot)
                stepper.fail(slot, b"a logits processor failed")
        except BaseException:
            stepper.discard_rows()
            raise
        return 0

    def pause(self):
        """Make a `step` of another thread return after the batch it is at."""
        self._pause = True

    def release(self, int i):
        """End slot `i`'s request; what it has in memory stays for reuse."""
        cdef nat.CStepper *stepper = self._require_open()
        self._require_slot(i)
        if stepper.slot(i).active:
            stepper.release(i, nat.FINISH_CANCELLED)
        self._samplers[i] = None

    def clear(self, int i):
        """End slot `i`'s request and remove its sequence from memory."""
        cdef nat.CStepper *stepper = self._require_open()
        self._require_slot(i)
        cdef nat.ContextHandle *handle = self._context._enter(True)
        try:
            stepper.clear(i)
        finally:
            handle.leave()
        self._samplers[i] = None

    def hold(self, int i, bint held):
        """Leave slot `i` out of batches, or take it in again."""
        cdef nat.CStepper *stepper = self._require_open()
        self._require_slot(i)
        stepper.hold(i, held)

    def suspend(self, int i):
        """Take slot `i`'s request out of it, and its sequence out of memory; see `resume`."""
        return _suspend(self, i)

    def resume(self, int i, SuspendedSlot suspended not None, int32_t source, int32_t n_keep):
        """Go on in slot `i` with what `suspend` took out of one.

        The first `n_keep` tokens are those that slot `source` has (-1: slot `i` itself); the others
        are decoded again. Return how many tokens are in memory.
        """
        return _resume(self, i, suspended, source, n_keep)

    def save(self, int i):
        """Return the state of all that slot `i` has in memory as bytes.

        None while a copy of it is to be made by the next step. Raises `StateError`.
        Wraps ``llama_state_seq_get_data_ext``.
        """
        return _save(self, i)

    def restore(self, int i, tokens, data, int32_t adapters=0):
        """Put a state that `save` returned, of these `tokens`, into idle slot `i`.

        Return False, and change nothing, while a copy of the slot is to be made by the next step.
        Raises `StateError` for data that does not fit; the slot is empty then.
        Wraps ``llama_state_seq_set_data_ext``.
        """
        return _restore(self, i, tokens, data, adapters)

    def set_adapters(self, int32_t index, adapters):
        """Make a mapping of `LoraAdapter` to scale the LoRA set `index` (1 and up) of `assign`."""
        _set_slot_adapters(self, index, adapters)

    def n_in_batch(self, int i):
        """Return how many of slot `i`'s tokens are being decoded at this moment.

        Thread-safety: from any thread.
        """
        cdef nat.CStepper *stepper = self._require_open()
        self._require_slot(i)
        return stepper.n_in_batch(i)

    def is_active(self, int i):
        """Return True while slot `i` works on a request."""
        cdef nat.CStepper *stepper = self._require_open()
        self._require_slot(i)
        return stepper.slot(i).active

    def progress(self, int i):
        """Return ``(n_prompt, n_cached, n_past, n_generated)`` of slot `i`, in tokens."""
        cdef nat.CStepper *stepper = self._require_open()
        self._require_slot(i)
        cdef const nat.Slot *slot = &stepper.slot(i)
        return slot.n_prompt, slot.n_cached, slot.n_past, slot.n_generated()

    def set_draft_model(self, DraftModel model not None):
        """Draft with `model`, made for this context, where a `Speculation` says so."""
        _set_draft_model(self, model)

    def drafts(self, int i):
        """Return ``(n_drafted, n_accepted)`` of slot `i`, in tokens."""
        return _drafts(self, i)

    def speculation(self):
        """Return what is known of drafts.

        ``cost_us``, the microseconds of a batch by its tokens; ``acceptance``, by where drafts come
        from and by how many tokens of context agreed, the share that held and the trials it is of;
        ``expected_gain``, ``measured_gain`` of batches with drafts lately, against plain ones.
        """
        return _speculation(self)

    def finish(self, int i):
        """Return why slot `i` ended, and the stop token if one was sampled.

        ``(reason, token)``: reason is None while running, else ``"eog"``, ``"stop_token"``,
        ``"length"``, ``"context_full"``, ``"error"`` or ``"cancelled"``.
        """
        cdef nat.CStepper *stepper = self._require_open()
        self._require_slot(i)
        cdef const nat.Slot *slot = &stepper.slot(i)
        return _FINISH_NAMES[<int> slot.finish], _optional(slot.stop_token)

    def tokens(self, int i, size_t start=0):
        """Return slot `i`'s token ids from `start` on: its prompt, then what was generated."""
        return _slot_tokens(self, i, start)

    def error(self, int i):
        """Return the message of a slot that ended with ``"error"``."""
        cdef nat.CStepper *stepper = self._require_open()
        self._require_slot(i)
        return _str(stepper.slot(i).error)

    def news(self, int i, Py_ssize_t n_bytes, size_t n_tokens):
        """Return what slot `i` has generated beyond its first `n_bytes` and `n_tokens`.

        ``(text, tokens, ends, reason)``: the bytes, the token ids, the byte offset after each of
        these tokens, and why the slot ended (see `finish`) or None.
        """
        return _slot_news(self, i, n_bytes, n_tokens)

    def logprobs(self, int i, size_t start=0):
        """Return ``[(logprob, [(id, logprob), ...]), ...]`` per generated token from `start` on.

        Log-probabilities of the model (natural logarithm), before any sampler stage.
        """
        return _slot_logprobs(self, i, start)

    def prompt_logprobs(self, int i):
        """Return the same per prompt token but the first, for requests with `prompt_logprobs`."""
        return _slot_prompt_logprobs(self, i)

    def times(self, int i):
        """Return ``(start, first, last, sample)`` of slot `i` in microseconds.

        `start`, `first` (token) and `last` (token) are readings of `time_us`, 0 when not reached;
        `sample` is the time spent in sampling.
        """
        return _slot_times(self, i)
