cdef Memory _new_memory(Context context):
    cdef Memory memory = Memory.__new__(Memory)
    memory._context = context
    return memory


@cython.final
cdef class Memory:
    """What a context remembers of its sequences: KV cells or recurrent states.

    Positions are half-open ranges ``[p0, p1)``; a negative `p0` means from the start, a negative
    `p1` to the end. Obtained as ``context.memory``.

    Thread-safety: as its `Context`.

    Wraps ``llama_memory_t``.
    """

    def __init__(self):
        raise TypeError("use context.memory")

    cdef lib.llama_memory_t _enter(self, nat.ContextHandle **handle) except NULL:
        handle[0] = self._require_context()._enter(False)
        cdef lib.llama_memory_t memory = lib.llama_get_memory(handle[0].ctx)
        if memory == NULL:
            handle[0].leave()
            raise errors.StateError("this model keeps no memory")
        return memory

    cdef Context _require_context(self):
        if self._context is None:  # made by __new__ alone
            raise errors.ClosedError("use context.memory")
        self._context._require_open()
        return self._context

    def __repr__(self):
        return f"<Memory of {self._context!r}>"

    def __reduce__(self):
        raise TypeError("a Memory cannot be pickled; see Context.state_get")

    def clear(self, bint data=True):
        """Forget all sequences; `data` also zeroes the buffers. Wraps ``llama_memory_clear``."""
        cdef nat.ContextHandle *handle
        cdef lib.llama_memory_t memory = self._enter(&handle)
        with nogil:
            lib.llama_memory_clear(memory, data)
        handle.leave()

    def seq_rm(self, seq_id, int32_t p0=-1, int32_t p1=-1):
        """Remove positions of a sequence (-1: of every sequence); return False if refused.

        A recurrent state cannot be cut. With a sliding window True does not mean that the rest is
        complete: compare `seq_pos_min`. Wraps ``llama_memory_seq_rm``.
        """
        cdef nat.ContextHandle *handle
        cdef bint done
        if seq_id != -1:
            self._require_context()._require_seq(seq_id)
        cdef int32_t seq = seq_id
        cdef lib.llama_memory_t memory = self._enter(&handle)
        with nogil:
            done = lib.llama_memory_seq_rm(memory, seq, p0, p1)
        handle.leave()
        return done

    def seq_cp(self, seq_id_src, seq_id_dst, int32_t p0=-1, int32_t p1=-1):
        """Copy positions of one sequence to another (shared cells when ``kv_unified``).

        Without ``kv_unified`` only whole sequences can be copied: `StateError` otherwise.
        Wraps ``llama_memory_seq_cp``.
        """
        cdef nat.ContextHandle *handle
        self._require_context()._require_seq(seq_id_src)
        self._require_context()._require_seq(seq_id_dst)
        cdef int32_t src = seq_id_src
        cdef int32_t dst = seq_id_dst
        if not self._context._kv_unified and src != dst and (p0 > 0 or p1 >= 0):
            raise errors.StateError(
                "a part of a sequence can be copied only in a context with kv_unified=True")
        cdef lib.llama_memory_t memory = self._enter(&handle)
        with nogil:
            if src != dst:
                lib.llama_memory_seq_cp(memory, src, dst, p0, p1)
        handle.leave()

    def seq_keep(self, seq_id):
        """Forget every other sequence. Wraps ``llama_memory_seq_keep``."""
        cdef nat.ContextHandle *handle
        self._require_context()._require_seq(seq_id)
        cdef int32_t seq = seq_id
        cdef lib.llama_memory_t memory = self._enter(&handle)
        cdef int32_t other
        with nogil:
            lib.llama_memory_seq_keep(memory, seq)
            # Without kv_unified it acts on the stream of `seq` only.
            if not self._context._kv_unified:
                for other in range(self._context._n_seq_max):
                    if other != seq:
                        lib.llama_memory_seq_rm(memory, other, -1, -1)
        handle.leave()

    def seq_add(self, seq_id, int32_t p0, int32_t p1, int32_t delta):
        """Shift positions of a sequence by `delta`. Raises `StateError` if the model cannot.

        Wraps ``llama_memory_seq_add``.
        """
        cdef nat.ContextHandle *handle
        self._require_context()._require_seq(seq_id)
        cdef int32_t seq = seq_id
        cdef lib.llama_memory_t memory = self._enter(&handle)
        cdef bint can = lib.llama_memory_can_shift(memory)
        if can:
            with nogil:
                lib.llama_memory_seq_add(memory, seq, p0, p1, delta)
        handle.leave()
        if not can:
            raise errors.StateError("positions of this model cannot be shifted")

    def seq_div(self, seq_id, int32_t p0, int32_t p1, int32_t d):
        """Divide positions of a sequence by `d` >= 1. Wraps ``llama_memory_seq_div``."""
        cdef nat.ContextHandle *handle
        self._require_context()._require_seq(seq_id)
        if d < 1:
            raise ValueError(f"d={d} must be at least 1")
        cdef int32_t seq = seq_id
        cdef lib.llama_memory_t memory = self._enter(&handle)
        cdef bint can = lib.llama_memory_can_shift(memory)
        if can:
            with nogil:
                lib.llama_memory_seq_div(memory, seq, p0, p1, d)
        handle.leave()
        if not can:
            raise errors.StateError("positions of this model cannot be divided")

    def seq_pos_min(self, seq_id):
        """Return the smallest position held, -1 if none. Wraps ``llama_memory_seq_pos_min``."""
        cdef nat.ContextHandle *handle
        self._require_context()._require_seq(seq_id)
        cdef lib.llama_memory_t memory = self._enter(&handle)
        pos = lib.llama_memory_seq_pos_min(memory, seq_id)
        handle.leave()
        return pos

    def seq_pos_max(self, seq_id):
        """Return the largest position held, -1 if none. Wraps ``llama_memory_seq_pos_max``."""
        cdef nat.ContextHandle *handle
        self._require_context()._require_seq(seq_id)
        cdef lib.llama_memory_t memory = self._enter(&handle)
        pos = lib.llama_memory_seq_pos_max(memory, seq_id)
        handle.leave()
        return pos

    @property
    def can_shift(self):
        """True when `seq_add` and `seq_div` work. Wraps ``llama_memory_can_shift``."""
        cdef nat.ContextHandle *handle
        cdef lib.llama_memory_t memory = self._enter(&handle)
        can = lib.llama_memory_can_shift(memory)
        handle.leave()
        return can
