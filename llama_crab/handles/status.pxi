# Where C failures become exceptions.

cdef str _text(const char *text):
    return text.decode("utf-8", "replace") if text != NULL else ""


cdef str _str(const string& text):
    return text.data()[:text.size()].decode("utf-8", "replace")


cdef object _error(type cls, const nat.Status& status, uint64_t mark, str message):
    """Build the exception for a failed guarded call; `mark` is log_mark() from before it."""
    cdef list lines = []
    cdef vector[string] found = nat.log_errors_since(mark)
    cdef size_t i
    for i in range(found.size()):
        lines.append(_str(found[i]))
    if status.kind == nat.STATUS_NO_MEMORY:
        cls = errors.OutOfMemoryError
    if status.kind in (nat.STATUS_THREW, nat.STATUS_ASSERTED):
        message = f"{message}: {_str(status.message)}"
    error = cls(message, log=tuple(lines))
    if isinstance(error, errors.DecodeError):
        error.code = status.code
    return error


cdef object _decode_error(const nat.Status& status, uint64_t mark):
    """Build the exception for a failed ``run_batch``."""
    if status.kind == nat.STATUS_FAILED and status.code == 1:
        return _error(errors.KVCacheFullError, status, mark, "no KV slot for the batch")
    if status.kind == nat.STATUS_FAILED and status.code == 2:
        return _error(errors.DecodeAborted, status, mark, "aborted")
    return _error(
        errors.DecodeError, status, mark, f"{_str(status.message)} with code {status.code}")


cdef int _check_generation(int generation) except -1:
    if generation != nat.fork_generation:
        raise errors.ForkedProcessError(
            "this object was made before a fork and belongs to the parent process; "
            "create it in the child")
    return 0


def _at_exit():
    with nogil:
        nat.refuse_callbacks()


def _after_fork_in_child():
    nat.enter_forked_child()


cdef int _tokens(object tokens, vector[int32_t]& out) except -1:
    """Fill `out` from an int32 buffer (one memcpy) or any iterable of ints."""
    cdef Py_buffer view
    cdef int64_t value
    if PyObject_CheckBuffer(tokens) and not isinstance(tokens, (bytes, bytearray)):
        PyObject_GetBuffer(tokens, &view, PyBUF_STRIDED_RO | PyBUF_FORMAT)
        try:
            if (view.ndim == 1 and view.itemsize == 4 and view.format[0] in b"il"
                    and PyBuffer_IsContiguous(&view, c"C")):
                out.resize(view.len // 4)
                if view.len > 0:
                    memcpy(out.data(), view.buf, view.len)
                return 0
        finally:
            PyBuffer_Release(&view)
    out.clear()
    try:
        for item in tokens:
            value = PyNumber_Index(item)
            if value < -2147483648 or value > 2147483647:
                raise OverflowError
            out.push_back(<int32_t> value)
    except OverflowError:
        raise errors.InvalidTokenError("a token id does not fit in 32 bits") from None
    return 0


cdef bytes _path_bytes(object path):
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte in path")
    return name


def live_handles():
    """Return the number of live C objects by kind; all zero once every object is closed."""
    return {
        "models": nat.live_models, "contexts": nat.live_contexts, "batches": nat.live_batches,
        "samplers": nat.live_samplers, "adapters": nat.live_adapters,
        "steppers": nat.live_steppers, "embedders": nat.live_embedders,
        "drafters": nat.live_drafters,
    }
