@cython.final
cdef class _LentRows:
    """A float32 matrix that somebody lent to be written to."""

    def __cinit__(self, out):
        PyObject_GetBuffer(out, &self._view, PyBUF_CONTIG_RO | PyBUF_FORMAT | PyBUF_WRITABLE)
        self._pinned = True
        self._owner = out
        if self._view.ndim != 2 or self._view.format[0] != c"f" or self._view.itemsize != 4:
            raise ValueError("out must be a writable float32 buffer of shape (n, d)")

    def __dealloc__(self):
        if self._pinned:
            PyBuffer_Release(&self._view)


@cython.final
cdef class Embedder:
    """Turns texts into embeddings, many in one batch: `add` queues them, `run` writes their rows.

    Works over a `Context` with embeddings enabled, of an encoder (BERT and its like, which keep no
    memory) or of a decoder. Each text is a sequence of its own, with positions from 0. `run`
    empties the memory of these sequences before and after, so the context cannot generate as well.

    A row has `n_values` floats: the model's n_embd_out, or its n_cls_out scores with pooling
    ``rank``. With pooling ``none`` every token has a row.

    Raises `ContextCreateError` for an encoder-decoder model, for a context without embeddings, and
    for pooling over a decoder's memory of several sequences that is not unified: llama.cpp spreads
    a text over micro-batches there and pools the last piece only.
    Thread-safety: as its `Context`.
    """

    def __cinit__(self, Context context not None):
        cdef nat.ContextHandle *handle = context._require_open()
        model = context._model
        if not context._embeddings:
            raise errors.ContextCreateError("the context was made without embeddings")
        if model.has_encoder and model.has_decoder:
            raise errors.ContextCreateError("an encoder-decoder model gives no embeddings")
        if (lib.llama_get_memory(handle.ctx) != NULL and context._n_seq_max > 1
                and not context._kv_unified and not (model.is_recurrent or model.is_hybrid)
                and lib.c_pooling_type(handle.ctx) != lib.LLAMA_POOLING_TYPE_NONE):
            raise errors.ContextCreateError(
                f"pooling {context.pooling_type!r} over several sequences needs kv_unified=True")
        self._c_embedder = new nat.CEmbedder(context._c_ctx)
        self._context = context
        self._outs = []

    def __dealloc__(self):
        with nogil:
            del self._c_embedder

    cdef nat.CEmbedder *_require_open(self) except NULL:
        self._context._require_open()
        if self._c_embedder == NULL:
            raise errors.ClosedError("the embedder is closed")
        return self._c_embedder

    def close(self):
        """Give up the share of the context. Idempotent."""
        cdef nat.CEmbedder *embedder = self._c_embedder
        self._c_embedder = NULL
        self._outs = []
        with nogil:
            del embedder

    @property
    def context(self):
        return self._context

    @property
    def n_values(self):
        """Floats of a whole row: n_embd_out, or n_cls_out with pooling ``rank``."""
        return self._require_open().n_values()

    @property
    def per_token(self):
        """True with pooling ``none``: a text has as many rows as tokens."""
        return self._require_open().per_token()

    @property
    def n_tokens_max(self):
        """Most tokens of a batch: a text must lie within one micro-batch.

        The least of n_batch, n_ubatch and n_outputs_max; for decoders n_ctx as well.
        """
        return self._require_open().n_tokens_max()

    @property
    def n_texts_max(self):
        """Most texts of a batch: the context's n_seq_max."""
        return self._require_open().n_texts_max()

    @property
    def n_text_tokens_max(self):
        """Most tokens of one text: `n_tokens_max`, and not beyond the positions of the model."""
        return self._require_open().n_text_tokens_max()

    @property
    def n_texts(self):
        """Texts in the queue."""
        return self._require_open().n_texts()

    @property
    def n_tokens(self):
        """Tokens in the queue."""
        return self._require_open().n_tokens()

    def add(self, TokenizedTexts texts not None, int64_t i, out, int64_t row):
        """Queue text `i`; return False, and do nothing, when the batch has no room for it.

        Parameters
        ----------
        texts, i
            The text; its ids are copied.
        out
            Writable C-contiguous float32 buffer of shape (n, d), 1 <= d <= `n_values`; d < n_values
            keeps the leading values (Matryoshka embeddings). Pinned until `run` or `clear`.
        row
            Row of `out` for the text; with pooling ``none`` the first of one row for each token.

        Raises `ContextLengthError` for a text of more than `n_text_tokens_max` tokens,
        `InvalidBatchError` for an empty one and while embeddings are disabled in the context,
        `InvalidTokenError`, IndexError, and ValueError for an `out` that does not fit.
        """
        cdef nat.CEmbedder *embedder = self._require_open()
        cdef const vector[int32_t] *ids = texts._require_text(i)
        cdef int32_t n_dims = 0
        cdef float *to
        self._require_text(deref(ids), i)
        cdef nat.ContextHandle *handle = self._context._enter(False)
        try:
            if not embedder.fits(ids.size()):
                return False
            to = self._rows(out, row, ids.size() if embedder.per_token() else 1, &n_dims)
            embedder.add(deref(ids), to, n_dims)
        finally:
            handle.leave()
        return True

    cdef int _require_text(self, const vector[int32_t]& ids, int64_t i) except -1:
        cdef int32_t n_vocab = self._context._model.vocab.n_tokens
        cdef size_t j
        if not self._context._embeddings:
            raise errors.InvalidBatchError("embeddings are disabled in the context")
        if ids.empty():
            raise errors.InvalidBatchError(f"text {i} has no tokens")
        if <int64_t> ids.size() > self._c_embedder.n_text_tokens_max():
            raise errors.ContextLengthError(
                f"text {i} has {ids.size()} tokens, a text can have "
                f"{self._c_embedder.n_text_tokens_max()}")
        for j in range(ids.size()):
            if not 0 <= ids[j] < n_vocab:
                raise errors.InvalidTokenError(
                    f"token {ids[j]} of text {i} is outside the vocabulary (0..{n_vocab - 1})")
        return 0

    cdef float *_rows(self, object out, int64_t row, int64_t n, int32_t *n_dims) except NULL:
        """Return where `row` of `out` begins, and its width; `n` rows must be there."""
        cdef Py_ssize_t n_outs = len(self._outs)
        cdef _LentRows rows = self._outs[n_outs - 1] if n_outs > 0 else None
        cdef bint known = rows is not None and rows._owner is out
        if not known:
            rows = _LentRows(out)
        cdef int64_t n_rows = rows._view.shape[0]
        cdef int64_t width = rows._view.shape[1]
        if not 1 <= width <= self._c_embedder.n_values():
            raise ValueError(
                f"out has rows of {width} values, the model gives {self._c_embedder.n_values()}")
        if not 0 <= row <= n_rows - n:
            raise ValueError(f"out has {n_rows} rows, rows {row}..{row + n - 1} were asked for")
        if not known:
            self._outs.append(rows)
        n_dims[0] = <int32_t> width
        return <float *> rows._view.buf + row * width

    def run(self, normalize):
        """Decode the queued texts and write their rows; the queue is empty then, also on failure.

        `normalize` is ``"l2"`` (each row, as far as `out` keeps it, gets length 1; zeros stay) or
        ``"none"``. Nothing is done when nothing is queued.

        Raises `KVCacheFullError` (a decoder's other sequences fill its memory), `DecodeAborted`,
        `DecodeError`; rows may then be half written. `ContextBusyError` and `BufferError` leave the
        queue as it is.
        Wraps ``llama_encode`` or ``llama_decode``, ``llama_get_embeddings_seq``,
        ``llama_get_embeddings_ith``.
        """
        cdef nat.CEmbedder *embedder = self._require_open()
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        if normalize not in ("l2", "none"):
            raise ValueError(f"normalize={normalize!r} is not one of 'l2', 'none'")
        cdef bint l2 = normalize == "l2"
        cdef nat.ContextHandle *handle = self._context._enter(True)
        try:
            if embedder.n_texts() > 0:
                with nogil:
                    embedder.run(l2, status)
        finally:
            embedder.clear()
            self._outs = []
            handle.leave()
        if status.kind != nat.STATUS_OK:
            raise _decode_error(status, mark)

    def clear(self):
        """Empty the queue."""
        cdef nat.CEmbedder *embedder = self._require_open()
        cdef nat.ContextHandle *handle = self._context._enter(False)
        embedder.clear()
        self._outs = []
        handle.leave()
