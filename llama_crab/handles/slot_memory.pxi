# What a Stepper's slots have in memory, out of it and back; the bodies of some of its methods.

@cython.final
cdef class SuspendedSlot:
    """A request that `Stepper.suspend` took out of its slot, with all that it has generated.

    Thread-safety: none.
    """

    def __init__(self):
        raise TypeError("use Stepper.suspend")

    def __reduce__(self):
        raise TypeError("a SuspendedSlot cannot be pickled")


cdef object _suspend(Stepper stepper, int i):
    cdef nat.CStepper *c = stepper._require_open()
    cdef SuspendedSlot suspended
    stepper._require_slot(i)
    if not c.slot(i).active:
        raise ValueError(f"slot {i} is running no request")
    cdef nat.ContextHandle *handle = stepper._context._enter(True)
    try:
        suspended = SuspendedSlot.__new__(SuspendedSlot)
        suspended._c_slot = c.suspend(i)
        suspended._sampler, stepper._samplers[i] = stepper._samplers[i], None
    finally:
        handle.leave()
    return suspended


cdef object _resume(Stepper stepper, int i, SuspendedSlot suspended, int32_t source,
                    int32_t n_keep):
    cdef nat.CStepper *c = stepper._require_open()
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef int32_t kept
    stepper._require_slot(i)
    if source >= 0:
        stepper._require_slot(source)
    if c.slot(i).active:
        raise errors.ContextBusyError(f"slot {i} is running a request")
    if not suspended._c_slot:
        raise ValueError("this request was resumed before")
    if not 0 <= n_keep < <int64_t> deref(suspended._c_slot).tokens.size():
        raise ValueError(f"n_keep={n_keep} does not leave a token to decode")
    cdef nat.ContextHandle *handle = stepper._context._enter(True)
    try:
        kept = c.resume(i, move(suspended._c_slot), source, n_keep, status)
    finally:
        handle.leave()
    stepper._samplers[i] = suspended._sampler
    if status.kind != nat.STATUS_OK:
        raise _error(errors.StateError, status, mark, "the sequence could not be resumed")
    return kept


cdef object _save(Stepper stepper, int i):
    cdef nat.CStepper *c = stepper._require_open()
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef vector[uint8_t] data
    cdef bint possible
    stepper._require_slot(i)
    cdef nat.ContextHandle *handle = stepper._context._enter(False)
    try:
        with nogil:
            possible = c.save(i, data, status)
    finally:
        handle.leave()
    if status.kind != nat.STATUS_OK:
        raise _error(errors.StateError, status, mark, _str(status.message))
    return PyBytes_FromStringAndSize(<char *> data.data(), data.size()) if possible else None


cdef object _restore(Stepper stepper, int i, object tokens, object data, int32_t adapters):
    cdef nat.CStepper *c = stepper._require_open()
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef vector[int32_t] ids
    cdef Py_buffer view
    cdef bint possible
    stepper._require_slot(i)
    if c.slot(i).active:
        raise errors.ContextBusyError(f"slot {i} is running a request")
    _tokens(tokens, ids)
    cdef nat.ContextHandle *handle = stepper._context._enter(True)
    try:
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                possible = c.restore(
                    i, ids, adapters, <uint8_t *> view.buf, view.len, status)
        finally:
            PyBuffer_Release(&view)
    finally:
        handle.leave()
    if status.kind != nat.STATUS_OK:
        raise _error(errors.StateError, status, mark, _str(status.message))
    return possible


cdef object _set_slot_adapters(Stepper stepper, int32_t index, object adapters):
    cdef nat.CStepper *c = stepper._require_open()
    cdef nat.AdapterSet chosen
    if not 1 <= index < 65536:
        raise ValueError(f"index={index} is outside 1..65535")
    _adapter_set(stepper._context, adapters, chosen.adapters, chosen.scales)
    cdef nat.ContextHandle *handle = stepper._context._enter(True)
    try:
        c.set_adapters(index, chosen)
    finally:
        handle.leave()
