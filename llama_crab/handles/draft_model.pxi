# Speculative drafts of a model, or of a model's heads.

cdef enum:
    _DRAFT = 0
    _MTP = 1     # as HeadKind
    _EAGLE3 = 2

cdef dict _DRAFT_KINDS = {"draft": _DRAFT, "mtp": _MTP, "eagle3": _EAGLE3}


@cython.final
cdef class DraftModel:
    """Drafts what follows the sequences of a target `Context`: greedily, all of a call together.

    `kind` is ``"draft"`` (`model` is a smaller model with the target's vocabulary), ``"mtp"`` (the
    MTP layers of `model`, or of the target's own model when that is None; loaded with
    ``load_mtp=True``) or ``"eagle3"`` (`model` is an EAGLE3 head for the target). Heads read the
    target's hidden states, so `decoded` must follow each of its decodes. They compute `n_max`
    tokens whatever is asked for.

    A draft has up to `n_max` tokens. It ends where the most likely token has a probability below
    `p_min` (0.0: never); that of a draft model also behind an end-of-generation token. The context
    of its own has the target's n_ctx, sequences and batches; further keyword arguments are fields
    of ``llama_context_params`` as for `Context`. While its thread counts are not above the
    target's, both compute with the same threads.

    Raises `DraftModelError` for a model that cannot draft for the target, with the first
    difference where the vocabularies differ; `ContextCreateError`, `OutOfMemoryError`.

    Thread-safety: as its target `Context`.
    """

    def __cinit__(
            self, Context target not None, Model model, kind, n_max, *, p_min=0.0, **fields):
        cdef nat.ContextHandle *handle = target._require_open()
        cdef nat.ContextPtr made
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef int c_kind = _choice(_DRAFT_KINDS, "kind", kind)
        cdef int32_t longest = <int32_t> _integer("n_max", n_max, 1, 1024)
        cdef float least = _number("p_min", p_min)
        if not 0.0 <= least <= 1.0:
            raise ValueError(f"p_min={p_min} is outside 0..1")
        if model is None:
            if kind != "mtp":
                raise TypeError(f"kind={kind!r} needs a model")
            model = target._model
        model._require_open()
        _refuse_draft_model(target, model, c_kind)
        handle = target._enter(False)
        try:
            _create_draft_context(target, model, c_kind, fields, made)
            with nogil:
                if c_kind == _DRAFT:
                    self._c_source = draft.new_draft_model(target._c_ctx, made, longest, least)
                else:
                    self._c_source = draft.new_head_drafts(
                        target._c_ctx, made, <draft.HeadKind> c_kind, longest, least, status)
        finally:
            handle.leave()
        if self._c_source == NULL:
            raise _error(errors.DraftModelError, status, mark, "llama.cpp refused the draft heads")
        self._target = target
        self._model = model
        self.kind = kind
        self._epoch = handle.epoch()

    def __dealloc__(self):
        with nogil:
            self._c_source.reset()

    cdef draft.DraftSource *_require_open(self) except NULL:
        self._target._require_open()
        if self._c_source == NULL:
            raise errors.ClosedError("the draft model is closed")
        return self._c_source.get()

    def close(self):
        """Give up this object's share: the context is freed when no stepper uses it. Idempotent."""
        # Taken away under the GIL: no thread may meet the pointer while it is being freed.
        cdef draft.DraftSourcePtr share = move(self._c_source)
        with nogil:
            share.reset()

    @property
    def closed(self):
        return self._c_source == NULL

    def __enter__(self):
        self._require_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __reduce__(self):
        raise TypeError("a DraftModel cannot be pickled")

    @property
    def target(self):
        """The `Context` that it drafts for."""
        return self._target

    @property
    def model(self):
        """The `Model` that drafts; the target's own for MTP layers in it."""
        return self._model

    @property
    def n_max(self):
        """Most tokens of a draft; heads may have a lower limit than the one asked for."""
        return self._require_open().n_max()

    def decoded(self, Batch batch not None):
        """Tell that the target has decoded `batch`; nothing is done for kind ``"draft"``.

        Heads read the hidden states of its tokens then. Those of a sequence must be in one piece.

        Raises `InvalidBatchError`, `InvalidTokenError`, `DecodeError`, `ContextBusyError`.
        """
        cdef draft.DraftSource *source = self._require_open()
        cdef lib.llama_batch *c = &batch._c_batch
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef int32_t i
        cdef int32_t n_vocab = self._target._model.vocab.n_tokens
        batch._require_open()
        cdef nat.ContextHandle *handle = self._target._enter(False)
        try:
            if (batch.n_embd != 0 or handle.epoch() == self._epoch
                    or c.n_tokens > <int32_t> lib.llama_n_batch(handle.ctx)):
                raise errors.InvalidBatchError("the target has not decoded this batch")
            for i in range(c.n_tokens):
                self._target._require_seq(c.seq_id[i][0])
                if not 0 <= c.token[i] < n_vocab:
                    raise errors.InvalidTokenError(
                        f"token {c.token[i]} is outside the vocabulary (0..{n_vocab - 1})")
            with nogil:
                source.decoded(c[0], status)
        finally:
            handle.leave()
        if status.kind != nat.STATUS_OK:
            raise _decode_error(status, mark)

    def rewind(self, seq, n):
        """Tell that sequence `seq` of the target has its first `n` tokens only."""
        cdef draft.DraftSource *source = self._require_open()
        cdef int32_t c_seq = <int32_t> _integer("seq", seq, 0, self._target._n_seq_max - 1)
        cdef int32_t n_kept = <int32_t> _integer("n", n, 0, (1 << 31) - 1)
        cdef nat.ContextHandle *handle = self._target._enter(False)
        try:
            source.rewind(c_seq, n_kept)
        finally:
            handle.leave()

    def draft(self, sequences, n_max):
        """Return drafts of up to `n_max` tokens as a dict of lists of int, by sequence.

        `sequences` maps sequences of the target (0 to n_seq_max - 1) to all their tokens, as an
        int32 buffer or an iterable of int. They are compared with those of earlier calls; only what
        is new is decoded. A call decodes no more than one micro-batch of text that it does not
        know, so the draft after a long prompt is empty for some calls. It is empty, too, where no
        position is left, and where a token is outside the draft model's vocabulary.

        Raises `InvalidBatchError` for an unknown or an empty sequence, `DecodeError`,
        `ContextBusyError`.
        """
        cdef draft.DraftSource *source = self._require_open()
        cdef vector[vector[int32_t]] tokens, drafts
        cdef vector[draft.Want] wants
        cdef draft.Want want
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef size_t i
        cdef list order = sorted(sequences)
        want.n_max = <int32_t> _integer("n_max", n_max, 1, 1 << 16)
        tokens.resize(len(order))
        drafts.resize(len(order))
        for i, seq in enumerate(order):
            want.seq = <int32_t> _integer("sequence", seq, -(1 << 31), (1 << 31) - 1)
            self._target._require_seq(want.seq)
            _tokens(sequences[seq], tokens[i])
            if tokens[i].empty():
                raise errors.InvalidBatchError(f"sequence {seq} has no tokens")
            want.tokens = &tokens[i]
            want.draft = &drafts[i]
            wants.push_back(want)
        cdef nat.ContextHandle *handle = self._target._enter(False)
        try:
            with nogil:
                source.draft(wants, status)
        finally:
            handle.leave()
        if status.kind != nat.STATUS_OK:
            raise _decode_error(status, mark)
        return {seq: drafts[i] for i, seq in enumerate(order)}


cdef int _refuse_draft_model(Context target, Model model, int kind) except -1:
    cdef lib.llama_model *of_target = target._model._require_open()
    cdef lib.llama_model *of_draft = model._require_open()
    cdef str reason = ""
    for whose, other in (("target", target._model), ("draft model", model)):
        if other.is_recurrent or other.is_hybrid:
            raise errors.DraftModelError(
                f"the {whose} keeps a recurrent state, which cannot go back to before a draft")
    if kind != _DRAFT:
        reason = _str(draft.heads_difference(of_target, of_draft, <draft.HeadKind> kind))
        if not reason and kind == _MTP and not model.load_mtp:
            reason = "the model was loaded without its MTP layers: give load_mtp=True"
    elif model.has_encoder:
        reason = "the draft model has an encoder: it cannot go on a text"
    elif model.n_ctx_train < target.n_ctx_seq:
        reason = (f"the draft model knows {model.n_ctx_train} positions, a sequence of the target "
                  f"has {target.n_ctx_seq}: choose a smaller n_ctx")
    if not reason and model is not target._model:
        reason = _str(draft.vocab_difference(
            lib.llama_model_get_vocab(of_target), lib.llama_model_get_vocab(of_draft)))
        if reason:
            reason = f"the draft model has another vocabulary: {reason}"
    if reason:
        raise errors.DraftModelError(reason)
    return 0


cdef int _create_draft_context(
        Context target, Model model, int kind, dict fields, nat.ContextPtr& out) except -1:
    cdef lib.llama_context *c_target = target._c_ctx.get().ctx
    cdef lib.llama_context_params c = lib.llama_context_default_params()
    c.n_ctx = lib.llama_n_ctx(c_target)
    c.n_batch = lib.llama_n_batch(c_target)
    c.n_ubatch = lib.llama_n_ubatch(c_target)
    c.n_threads = lib.llama_n_threads(c_target)
    c.n_threads_batch = lib.llama_n_threads_batch(c_target)
    c.kv_unified = target._kv_unified
    for field, value in fields.items():
        if field in ("n_seq_max", "n_outputs_max", "embeddings", "pooling_type", "ctx_type"):
            raise TypeError(f"{field} of a draft model follows from its target")
        _set_context_param(&c, field, value)
    c.n_seq_max = target._n_seq_max
    c.n_outputs_max = target._n_seq_max
    if kind != _DRAFT:
        c.n_batch = lib.llama_n_batch(c_target)  # heads read whole batches of the target
        c.ctx_other = c_target
    if kind == _MTP:
        c.ctx_type = lib.LLAMA_CONTEXT_TYPE_MTP
    _create_context(model, &c, out)
    if (lib.llama_get_memory(out.get().ctx) == NULL
            or not lib.llama_get_causal_attn(out.get().ctx)):
        raise errors.DraftModelError("the draft model embeds only: it cannot generate")
    n_ctx_seq = lib.llama_n_ctx_seq(out.get().ctx)
    needed = lib.llama_n_ctx_seq(c_target)
    if n_ctx_seq < needed:
        raise errors.DraftModelError(
            f"a sequence of the draft model has room for {n_ctx_seq} tokens, one of the target for "
            f"{needed}: give it a larger n_ctx")
    return 0
