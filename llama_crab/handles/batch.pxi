@cython.final
cdef class Batch:
    """Input of `Context.decode`: tokens (or embedding rows) with positions and sequence ids.

    ``Batch(capacity, n_seq_max, n_embd)``: room for `capacity` tokens, each in up to `n_seq_max`
    sequences; `n_embd` > 0 makes a batch of float32 rows of that width instead of token ids.
    The arrays are allocated once and reused after `clear`.

    Thread-safety: none; one thread at a time.

    Wraps ``llama_batch``.
    """

    def __cinit__(self, capacity, n_seq_max=1, n_embd=0):
        self.capacity = _integer("capacity", capacity, 1, 1 << 24)
        self.n_seq_max = _integer("n_seq_max", n_seq_max, 1, lib.llama_max_parallel_sequences())
        self.n_embd = _integer("n_embd", n_embd, 0, 1 << 20)
        self._c_batch = lib.llama_batch_init(self.capacity, self.n_embd, self.n_seq_max)
        self._open = True
        nat.count_batches(1)

    def __dealloc__(self):
        if self._open:
            lib.llama_batch_free(self._c_batch)
            nat.count_batches(-1)

    cdef int _require_open(self) except -1:
        if not self._open:
            raise errors.ClosedError("the batch is closed")
        return 0

    cdef int _require_room(self, int64_t n) except -1:
        if self._c_batch.n_tokens + n > self.capacity:
            raise errors.InvalidBatchError(
                f"{self._c_batch.n_tokens} + {n} tokens do not fit in a batch of {self.capacity}")
        return 0

    def close(self):
        """Free the arrays. Wraps ``llama_batch_free``."""
        if self._open:
            self._open = False
            lib.llama_batch_free(self._c_batch)
            nat.count_batches(-1)

    @property
    def closed(self):
        return not self._open

    def __enter__(self):
        self._require_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __len__(self):
        self._require_open()
        return self._c_batch.n_tokens

    def __repr__(self):
        if not self._open:
            return "<Batch closed>"
        return f"<Batch {self._c_batch.n_tokens}/{self.capacity}>"

    def __reduce__(self):
        raise TypeError("a Batch cannot be pickled")

    def clear(self):
        """Forget the tokens, keep the memory."""
        self._require_open()
        self._c_batch.n_tokens = 0

    def add(self, token, pos, seq_ids, bint logits):
        """Append one token at position `pos` of every sequence in `seq_ids`.

        `logits` asks for an output row. Raises `InvalidBatchError` when full.
        """
        self._require_open()
        self._require_room(1)
        if self.n_embd != 0:
            raise errors.InvalidBatchError("this batch holds embeddings: use extend_embeddings")
        cdef int32_t at = self._c_batch.n_tokens
        cdef int32_t n = 0
        self._c_batch.token[at] = _integer("token", token, 0, (1 << 31) - 1)
        self._c_batch.pos[at] = _integer("pos", pos, 0, (1 << 31) - 1)
        for seq_id in seq_ids:
            if n == self.n_seq_max:
                raise errors.InvalidBatchError(
                    f"a token of this batch can be in {self.n_seq_max} sequences at most")
            self._c_batch.seq_id[at][n] = _integer("seq_id", seq_id, 0, (1 << 31) - 1)
            n += 1
        if n == 0:
            raise errors.InvalidBatchError("seq_ids is empty")
        self._c_batch.n_seq_id[at] = n
        self._c_batch.logits[at] = logits
        self._c_batch.n_tokens += 1

    def extend(self, tokens, pos, seq_id, logits):
        """Append a run of tokens of one sequence at positions `pos`, `pos` + 1, ...

        `tokens` is an int32 buffer (numpy, array: copied at once) or any iterable of int.
        `logits` is ``"last"``, ``"all"`` or ``"none"``.
        """
        self._require_open()
        if self.n_embd != 0:
            raise errors.InvalidBatchError("this batch holds embeddings: use extend_embeddings")
        cdef vector[int32_t] ids
        _tokens(tokens, ids)
        cdef int32_t n = <int32_t> ids.size()
        self._require_room(n)
        self._fill(n, pos, seq_id, logits)
        if n > 0:
            memcpy(self._c_batch.token + self._c_batch.n_tokens, ids.data(), n * sizeof(int32_t))
        self._c_batch.n_tokens += n

    def extend_embeddings(self, rows, pos, seq_id, logits):
        """Append embedding rows: a C-contiguous float32 buffer of shape (n, n_embd)."""
        self._require_open()
        if self.n_embd == 0:
            raise errors.InvalidBatchError("this batch holds token ids: use extend")
        cdef Py_buffer view
        cdef int32_t n
        PyObject_GetBuffer(rows, &view, PyBUF_CONTIG_RO | PyBUF_FORMAT)
        try:
            if view.format[0] != c"f" or view.itemsize != 4 or view.len % (4 * self.n_embd) != 0:
                raise errors.InvalidBatchError(
                    f"embeddings must be float32 rows of {self.n_embd} values")
            if view.ndim == 2 and view.shape[1] != self.n_embd:
                raise errors.InvalidBatchError(
                    f"embeddings have {view.shape[1]} columns, the batch {self.n_embd}")
            self._require_room(view.len // (4 * self.n_embd))
            n = <int32_t> (view.len // (4 * self.n_embd))
            self._fill(n, pos, seq_id, logits)
            memcpy(self._c_batch.embd + <Py_ssize_t> self._c_batch.n_tokens * self.n_embd,
                   view.buf, view.len)
            self._c_batch.n_tokens += n
        finally:
            PyBuffer_Release(&view)

    def _fill(self, int32_t n, pos, seq_id, logits):
        cdef int64_t first = _integer("pos", pos, 0, (1 << 31) - 1 - n)
        cdef int32_t seq = <int32_t> _integer("seq_id", seq_id, 0, (1 << 31) - 1)
        cdef int32_t at = self._c_batch.n_tokens
        cdef int32_t i
        if logits not in ("last", "all", "none"):
            raise ValueError(f"logits={logits!r} is not one of 'last', 'all', 'none'")
        cdef bint all_rows = logits == "all"
        for i in range(n):
            self._c_batch.pos[at + i] = <int32_t> (first + i)
            self._c_batch.n_seq_id[at + i] = 1
            self._c_batch.seq_id[at + i][0] = seq
            self._c_batch.logits[at + i] = all_rows
        if n > 0 and logits == "last":
            self._c_batch.logits[at + n - 1] = 1

    @property
    def n_outputs(self):
        """Number of tokens whose row is asked for."""
        self._require_open()
        cdef int32_t i
        cdef int32_t n = 0
        for i in range(self._c_batch.n_tokens):
            n += self._c_batch.logits[i] != 0
        return n
