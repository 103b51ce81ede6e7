# What `Sampler` and `FusedSampler` share: rows in, tokens out.

cdef int _open_row(object logits, vector[float]& data, nat.LogitsRow& row) except -1:
    """Copy a float32 buffer into `data` and scan it; return whether it can be sampled."""
    cdef Py_buffer view
    PyObject_GetBuffer(logits, &view, PyBUF_CONTIG_RO | PyBUF_FORMAT)
    try:
        if view.format[0] != c"f" or view.itemsize != 4 or view.len == 0:
            raise errors.SamplerError("logits must be a non-empty float32 buffer")
        data.assign(<const float *> view.buf, <const float *> view.buf + view.len // 4)
    finally:
        PyBuffer_Release(&view)
    return row.open(data.data(), <int32_t> data.size())


cdef tuple _explain(nat.RowSampler *sampler, nat.LogitsRow& row):
    cdef nat.Candidates found
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    found.selected = -1
    with nogil:
        sampler.explain(row, found, status)
    if status.kind != nat.STATUS_OK:
        raise _error(errors.SamplerError, status, mark, "cannot apply the sampler")
    return found.ids, found.logits, found.p, _optional(found.selected)


cdef int32_t _choose(nat.RowSampler *sampler, nat.LogitsRow& row, bint ok) except -1:
    """Sample from an open row and accept the token."""
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef int32_t token = -1
    if not ok:
        raise errors.SamplerError(nat.BAD_ROW.decode())
    with nogil:
        token = sampler.sample(row, status)
        if token >= 0:
            sampler.accept(token, status)
        row.undo()
    if status.kind != nat.STATUS_OK:
        failed = status.kind == nat.STATUS_FAILED
        message = _str(status.message) if failed else "the sampler failed"
        raise _error(errors.SamplerError, status, mark, message)
    return token


cdef int32_t _choose_from_context(
        nat.RowSampler *sampler, nat.LogitsRow& row, Context context, int32_t i) except -1:
    cdef nat.ContextHandle *handle = context._enter(False)
    cdef int32_t n_vocab = context._model.vocab.n_tokens
    cdef float *data
    cdef bint ok = False
    try:
        with nogil:
            data = lib.llama_get_logits_ith(handle.ctx, i)
            if data != NULL:
                ok = row.open(data, n_vocab)
        if data == NULL:
            raise IndexError(f"the last decode has no logits for index {i}")
        return _choose(sampler, row, ok)
    finally:
        handle.leave()


cdef int _accept(nat.RowSampler *sampler, object token) except -1:
    cdef int32_t id = <int32_t> _integer("token", token, 0, (1 << 31) - 1)
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    sampler.accept(id, status)
    if status.kind != nat.STATUS_OK:
        raise _error(errors.SamplerError, status, mark, f"token {token} was refused")
    return 0


def time_sampler(sampler, logits, int32_t n_vocab, int32_t n_rounds):
    """Return the microseconds of each of `n_rounds` samplings, measured without Python's share.

    `sampler` is a chain `Sampler` or a `FusedSampler`; `logits` is a float32 buffer of one or more
    rows of `n_vocab`, which take turns. Raises `SamplerError`.
    """
    cdef nat.RowSampler *c_sampler = _row_sampler(sampler)
    cdef nat.LogitsRow row
    cdef vector[float] rows
    cdef vector[double] times
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef bint scan = isinstance(sampler, FusedSampler)
    if not _open_row(logits, rows, row):
        raise errors.SamplerError(nat.BAD_ROW.decode())
    if n_vocab < 1 or rows.size() % <size_t> n_vocab != 0:
        raise errors.SamplerError(f"{rows.size()} logits are no rows of {n_vocab}")
    with nogil:
        times = nat.time_sampler(deref(c_sampler), rows, n_vocab, n_rounds, scan, status)
    if status.kind != nat.STATUS_OK:
        raise _error(errors.SamplerError, status, mark, "the sampler failed")
    return times


def row_kernels():
    """Return the names of the vector kernels that this processor runs, the one in use first."""
    return [_str(name) for name in nat.kernel_names()]


def use_row_kernels(name):
    """Choose the vector kernels for the whole process, by a name of `row_kernels`; for tests.

    Raises ValueError for a set that this processor cannot run.
    """
    if not nat.use_kernels(name.encode()):
        raise ValueError(f"no kernels named {name!r} run here")


cdef nat.RowSampler *_row_sampler(object sampler) except NULL:
    if isinstance(sampler, FusedSampler):
        return (<FusedSampler> sampler)._require_open()
    cdef Sampler chain = sampler
    chain._require_open()
    if chain._stages is None:
        raise errors.SamplerError("a slot needs a chain, not a single sampler")
    return &chain._c_chain
