cdef dict _POOLING_NAMES = {value: name for name, value in _POOLING_TYPES.items()}


@cython.final
cdef class Context:
    """A KV cache and compute buffers over a `Model`.

    Keyword arguments are the fields of ``llama_context_params`` under their own names; what is not
    given keeps llama.cpp's default. ggml's thread pool is attached for `n_threads` (and another
    one for `n_threads_batch` where it differs).

    Raises `ContextCreateError`, `OutOfMemoryError`.
    Thread-safety: one call at a time; a second thread gets `ContextBusyError`. `abort` may be
    called from any thread.

    Wraps ``llama_init_from_model``.
    """

    def __cinit__(self, Model model not None, **fields):
        cdef lib.llama_context_params c = lib.llama_context_default_params()
        model._require_open()
        for field, value in fields.items():
            _set_context_param(&c, field, value)
        _create_context(model, &c, self._c_ctx)
        self._model = model
        self._embeddings = c.embeddings
        self._n_seq_max = lib.llama_n_seq_max(self._c_ctx.get().ctx)
        self._kv_unified = c.kv_unified

    def __dealloc__(self):
        with nogil:
            self._c_ctx.reset()

    cdef nat.ContextHandle *_require_open(self) except NULL:
        if self._c_ctx == NULL:
            raise errors.ClosedError("the context is closed")
        _check_generation(self._c_ctx.get().generation)
        return self._c_ctx.get()

    cdef nat.ContextHandle *_enter(self, bint writes) except NULL:
        """Claim the context for one call; the caller must end it with ``leave()``."""
        cdef nat.ContextHandle *handle = self._require_open()
        if handle.broken:
            raise errors.DecodeError(
                "an assertion of llama.cpp failed in this context; its state is unknown: close it")
        if writes:
            _refuse_exports(handle)
        if not handle.try_enter():
            raise errors.ContextBusyError("another thread is using this context")
        return handle

    cdef int _require_seq(self, int64_t seq_id) except -1:
        if not 0 <= seq_id < self._n_seq_max:
            raise errors.InvalidBatchError(
                f"seq_id {seq_id} is outside 0..{self._n_seq_max - 1} (n_seq_max)")
        return 0

    def close(self):
        """Free the context; raises `BufferError` while a view's buffer is alive.

        Wraps ``llama_free``.
        """
        if self._c_ctx == NULL:
            return
        cdef nat.ContextHandle *handle = self._c_ctx.get()
        if handle.generation == nat.fork_generation:
            _refuse_exports(handle)
            if not handle.try_enter():
                raise errors.ContextBusyError("another thread is using this context")
            handle.leave()
        # Taken away under the GIL: no thread may meet the pointer while it is being freed.
        cdef nat.ContextPtr share = move(self._c_ctx)
        with nogil:
            share.reset()

    @property
    def closed(self):
        return self._c_ctx == NULL

    def __enter__(self):
        self._require_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        if self._c_ctx == NULL:
            return "<Context closed>"
        return (f"<Context n_ctx={self.n_ctx} n_batch={self.n_batch} n_ubatch={self.n_ubatch} "
                f"n_seq_max={self._n_seq_max} of {self._model!r}>")

    def __reduce__(self):
        raise TypeError("a Context cannot be pickled; see state_get")

    @property
    def model(self):
        return self._model

    @property
    def memory(self):
        """The context's `Memory` (KV cache or recurrent state). Wraps ``llama_get_memory``."""
        self._require_open()
        if self._memory is None:
            self._memory = _new_memory(self)
        return self._memory

    @property
    def n_ctx(self):
        """Positions of all sequences together. Wraps ``llama_n_ctx``."""
        return lib.llama_n_ctx(self._require_open().ctx)

    @property
    def n_ctx_seq(self):
        """Positions one sequence can use. Wraps ``llama_n_ctx_seq``."""
        return lib.llama_n_ctx_seq(self._require_open().ctx)

    @property
    def n_batch(self):
        """Most tokens of one decode. Wraps ``llama_n_batch``."""
        return lib.llama_n_batch(self._require_open().ctx)

    @property
    def n_ubatch(self):
        """Most tokens computed at once. Wraps ``llama_n_ubatch``."""
        return lib.llama_n_ubatch(self._require_open().ctx)

    @property
    def n_seq_max(self):
        """Number of sequences. Wraps ``llama_n_seq_max``."""
        self._require_open()
        return self._n_seq_max

    @property
    def n_outputs_max(self):
        """Most output rows of one decode."""
        return self._require_open().n_outputs_max

    @property
    def kv_unified(self):
        """True when all sequences share one KV buffer."""
        self._require_open()
        return self._kv_unified

    @property
    def pooling_type(self):
        """How embeddings are pooled, by name. Wraps ``llama_pooling_type``."""
        return _POOLING_NAMES.get(lib.c_pooling_type(self._require_open().ctx), "unspecified")

    @property
    def n_threads(self):
        """Threads for single tokens. Wraps ``llama_n_threads``."""
        return lib.llama_n_threads(self._require_open().ctx)

    @property
    def n_threads_batch(self):
        """Threads for batches. Wraps ``llama_n_threads_batch``."""
        return lib.llama_n_threads_batch(self._require_open().ctx)

    def set_n_threads(self, n_threads, n_threads_batch):
        """Change the thread counts and attach new pools. Wraps ``llama_set_n_threads``."""
        cdef int32_t n = <int32_t> _integer("n_threads", n_threads, 1, lib.GGML_MAX_N_THREADS)
        cdef int32_t n_batch = <int32_t> _integer(
            "n_threads_batch", n_threads_batch, 1, lib.GGML_MAX_N_THREADS)
        cdef nat.ContextHandle *handle = self._enter(False)
        try:
            with nogil:
                handle.set_threads(n, n_batch)
        finally:
            handle.leave()

    @property
    def embeddings_enabled(self):
        """Whether decodes give embeddings. Wraps ``llama_set_embeddings``."""
        self._require_open()
        return bool(self._embeddings)

    @embeddings_enabled.setter
    def embeddings_enabled(self, bint value):
        cdef nat.ContextHandle *handle = self._enter(False)
        lib.llama_set_embeddings(handle.ctx, value)
        self._embeddings = value
        handle.leave()

    @property
    def causal_attn(self):
        """Whether attention sees past tokens only. Wraps ``llama_set_causal_attn``."""
        return lib.llama_get_causal_attn(self._require_open().ctx)

    @causal_attn.setter
    def causal_attn(self, bint value):
        cdef nat.ContextHandle *handle = self._enter(False)
        lib.llama_set_causal_attn(handle.ctx, value)
        handle.leave()

    cdef object _run(self, Batch batch, bint encode):
        cdef nat.Status status
        cdef uint64_t mark
        cdef lib.llama_batch *c = &batch._c_batch
        cdef int32_t i, j
        cdef int32_t n_outputs = 0
        cdef nat.ContextHandle *handle = self._enter(True)
        try:
            batch._require_open()
            if (encode and lib.llama_get_memory(handle.ctx) != NULL
                    and not lib.llama_model_has_encoder(handle.model.get().model)):
                raise errors.InvalidBatchError("the model has no encoder: use decode")
            limit = lib.llama_n_batch(handle.ctx)
            whole = encode or not lib.llama_get_causal_attn(handle.ctx)
            if whole:
                limit = lib.llama_n_ubatch(handle.ctx)
            if c.n_tokens == 0:
                raise errors.InvalidBatchError("the batch is empty")
            if c.n_tokens > limit:
                raise errors.InvalidBatchError(
                    f"{c.n_tokens} tokens exceed {'n_ubatch' if whole else 'n_batch'}={limit}")
            if batch.n_embd != 0 and batch.n_embd != lib.llama_model_n_embd_inp(
                    handle.model.get().model):
                raise errors.InvalidBatchError(
                    f"the batch's rows have {batch.n_embd} values, the model takes "
                    f"{self._model.n_embd_inp}")
            n_vocab = self._model.vocab.n_tokens
            for i in range(c.n_tokens):
                n_outputs += c.logits[i] != 0
                for j in range(c.n_seq_id[i]):
                    self._require_seq(c.seq_id[i][j])
                if batch.n_embd == 0 and not 0 <= c.token[i] < n_vocab:
                    raise errors.InvalidTokenError(
                        f"token {c.token[i]} is outside the vocabulary (0..{n_vocab - 1})")
            if self._embeddings:
                n_outputs = c.n_tokens
            if n_outputs > handle.n_outputs_max:
                raise errors.InvalidBatchError(
                    f"{n_outputs} output rows exceed n_outputs_max={handle.n_outputs_max}")
            mark = nat.log_mark()
            with nogil:
                nat.run_batch(deref(handle), c[0], encode, status)
        finally:
            handle.leave()
        if status.kind == nat.STATUS_OK:
            return
        if status.kind == nat.STATUS_FAILED and status.code == -1:
            raise _error(errors.InvalidBatchError, status, mark, "llama.cpp refused the batch")
        raise _decode_error(status, mark)

    def decode(self, Batch batch not None):
        """Run the model over `batch` and extend the memory.

        Raises `InvalidBatchError`, `InvalidTokenError`, `KVCacheFullError`, `DecodeAborted`,
        `DecodeError`; `BufferError` while a view's buffer is alive. Wraps ``llama_decode``.
        """
        self._run(batch, False)

    def encode(self, Batch batch not None):
        """Run the encoder (or an embedding model) over `batch`; errors as `decode`.

        Wraps ``llama_encode``.
        """
        self._run(batch, True)

    def synchronize(self):
        """Wait until the device has finished. Wraps ``llama_synchronize``."""
        cdef nat.ContextHandle *handle = self._enter(False)
        with nogil:
            lib.llama_synchronize(handle.ctx)
        handle.leave()

    def abort(self):
        """Make the running (or else the next) decode stop with `DecodeAborted`.

        From any thread. Acts within a graph node on CPU and Metal, between micro-batches
        elsewhere. Wraps ``llama_set_abort_callback``.
        """
        self._require_open().request_abort()

    def clear_abort(self):
        """Withdraw an `abort` that has not acted yet."""
        self._require_open().clear_abort()

    def logits(self, int32_t i=-1):
        """Return output row `i` of the last decode as a zero-copy `Logits` view.

        `i` is an index into the batch (that token asked for logits), or negative from the end of
        the outputs. Raises IndexError. Lifetime: until the next decode; see `Logits`.
        Wraps ``llama_get_logits_ith``.
        """
        cdef float *data
        cdef nat.ContextHandle *handle = self._enter(False)
        with nogil:
            data = lib.llama_get_logits_ith(handle.ctx, i)
        handle.leave()
        if data == NULL:
            raise IndexError(f"the last decode has no logits for index {i}")
        return _new_view(Logits, self, data, self._model.vocab.n_tokens)

    def copy_logits(self, out, int32_t i=-1):
        """Copy output row `i` into `out`, a writable float32 buffer of n_vocab values."""
        return _copy_row(self.logits(i), out)

    def embeddings(self, int32_t i=-1):
        """Return the embedding of token `i` of the last batch as a zero-copy `Embeddings` view.

        For contexts with pooling ``none``. Raises IndexError.
        Lifetime: until the next decode; see `Embeddings`. Wraps ``llama_get_embeddings_ith``.
        """
        cdef float *data = NULL
        cdef nat.ContextHandle *handle = self._enter(False)
        # With pooling the rows of single tokens exist but are never filled.
        if lib.c_pooling_type(handle.ctx) == lib.LLAMA_POOLING_TYPE_NONE:
            with nogil:
                data = lib.llama_get_embeddings_ith(handle.ctx, i)
        handle.leave()
        if data == NULL:
            raise IndexError(
                f"the last batch has no embedding for index {i} (pooling {self.pooling_type})")
        return _new_view(Embeddings, self, data, self._model.n_embd_out)

    def embeddings_seq(self, seq_id):
        """Return the pooled embedding of a sequence (pooling ``rank``: its n_cls_out scores).

        Raises IndexError when there is none. Lifetime: as `embeddings`.
        Wraps ``llama_get_embeddings_seq``.
        """
        cdef int32_t seq = <int32_t> _integer("seq_id", seq_id, 0, (1 << 31) - 1)
        cdef float *data
        self._require_open()
        self._require_seq(seq)
        cdef nat.ContextHandle *handle = self._enter(False)
        with nogil:
            data = lib.llama_get_embeddings_seq(handle.ctx, seq)
        handle.leave()
        if data == NULL:
            raise IndexError(f"no pooled embedding for sequence {seq}")
        n = self._model.n_cls_out if self.pooling_type == "rank" else self._model.n_embd_out
        return _new_view(Embeddings, self, data, n)

    def copy_embeddings(self, out, int32_t i=-1):
        """Copy the embedding of token `i` into `out`, a writable float32 buffer."""
        return _copy_row(self.embeddings(i), out)

    def state_get(self, seq_id=None, *, bint partial_only=False):
        """Return the state of the context, or of one sequence, as bytes.

        `partial_only` saves only what cannot be cut back (sliding window, recurrent state).
        Raises `StateError`. Wraps ``llama_state_get_data``, ``llama_state_seq_get_data_ext``.
        """
        return _state_get(self, seq_id, partial_only)

    def state_set(self, data, seq_id=None, *, bint partial_only=False):
        """Restore what `state_get` returned, into this context or into sequence `seq_id`.

        Raises `StateError` for data of another model or shape, or damaged data.
        Wraps ``llama_state_set_data``, ``llama_state_seq_set_data_ext``.
        """
        _state_set(self, data, seq_id, partial_only)

    def state_save(self, path, tokens, seq_id=None):
        """Write the state (of one sequence) and the `tokens` it stands for to a file.

        Raises `StateError`. Wraps ``llama_state_save_file``, ``llama_state_seq_save_file``.
        """
        _state_save(self, path, tokens, seq_id)

    def state_load(self, path, seq_id=None):
        """Restore what `state_save` wrote; return its tokens as a list of int.

        Raises `StateError`. Wraps ``llama_state_load_file``, ``llama_state_seq_load_file``.
        """
        return _state_load(self, path, seq_id)

    def set_adapters(self, adapters):
        """Use these LoRA adapters: a mapping of `LoraAdapter` to scale; empty removes all.

        Raises `AdapterError`. Wraps ``llama_set_adapters_lora``.
        """
        _set_adapters(self, adapters)

    def set_control_vector(self, data, il_start=1, il_end=None):
        """Apply a control vector: float32 of n_embd values per layer from layer 1; None removes it.

        It acts on layers `il_start` to `il_end`, both included. Raises `AdapterError`.
        Wraps ``llama_set_adapter_cvec``.
        """
        _set_control_vector(self, data, il_start, il_end)

    def perf(self):
        """Return llama.cpp's own counters as a dict: times in ms, counts in tokens.

        Zero while ``no_perf`` is on (llama.cpp's default). Wraps ``llama_perf_context``.
        """
        cdef lib.llama_perf_context_data data = lib.llama_perf_context(self._require_open().ctx)
        return {
            "t_load_ms": data.t_load_ms, "t_p_eval_ms": data.t_p_eval_ms,
            "t_eval_ms": data.t_eval_ms, "n_p_eval": data.n_p_eval, "n_eval": data.n_eval,
            "n_reused": data.n_reused,
        }

    def perf_reset(self):
        """Zero the counters. Wraps ``llama_perf_context_reset``."""
        lib.llama_perf_context_reset(self._require_open().ctx)
