# Saving and restoring what a context remembers; the bodies of Context.state_*.

cdef int32_t _seq_or_all(Context context, object seq_id) except? -2:
    """Return the checked sequence, or -1 for None: the whole context."""
    if seq_id is None:
        return -1
    cdef int64_t seq = _integer("seq_id", seq_id, 0, (1 << 31) - 1)
    context._require_seq(seq)
    return <int32_t> seq


cdef object _state_get(Context context, object seq_id, bint partial_only):
    cdef int32_t seq = _seq_or_all(context, seq_id)
    cdef vector[uint8_t] data
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    if seq < 0 and partial_only:
        raise ValueError("partial_only needs a seq_id")
    cdef uint32_t flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial_only else 0
    cdef nat.ContextHandle *handle = context._enter(False)
    with nogil:
        nat.state_get(deref(handle), seq, flags, data, status)
    handle.leave()
    if status.kind != nat.STATUS_OK:
        raise _error(errors.StateError, status, mark, _str(status.message))
    return PyBytes_FromStringAndSize(<char *> data.data(), data.size())


cdef object _state_set(Context context, object data, object seq_id, bint partial_only):
    cdef int32_t seq = _seq_or_all(context, seq_id)
    cdef Py_buffer view
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    if seq < 0 and partial_only:
        raise ValueError("partial_only needs a seq_id")
    cdef uint32_t flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial_only else 0
    cdef nat.ContextHandle *handle = context._enter(True)
    try:
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                nat.state_set(
                    deref(handle), seq, flags, <uint8_t *> view.buf, view.len, status)
        finally:
            PyBuffer_Release(&view)
    finally:
        handle.leave()
    if status.kind != nat.STATUS_OK:
        raise _error(errors.StateError, status, mark, _str(status.message))


cdef object _state_save(Context context, object path, object tokens, object seq_id):
    cdef int32_t seq = _seq_or_all(context, seq_id)
    cdef vector[int32_t] ids
    cdef string name = _path_bytes(path)
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    _tokens(tokens, ids)
    cdef nat.ContextHandle *handle = context._enter(False)
    with nogil:
        nat.state_save_file(deref(handle), seq, name, ids, status)
    handle.leave()
    if status.kind != nat.STATUS_OK:
        raise _error(errors.StateError, status, mark, f"cannot save {os.fsdecode(path)}")


cdef object _state_load(Context context, object path, object seq_id):
    cdef int32_t seq = _seq_or_all(context, seq_id)
    cdef vector[int32_t] ids
    cdef string name = _path_bytes(path)
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef nat.ContextHandle *handle = context._enter(True)
    with nogil:
        nat.state_load_file(deref(handle), seq, name, ids, status)
    handle.leave()
    if status.kind != nat.STATUS_OK:
        raise _error(errors.StateError, status, mark, f"cannot load {os.fsdecode(path)}")
    return ids
