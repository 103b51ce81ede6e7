# Zero-copy rows of the context's output buffers.

cdef class _FloatView:
    """A row of float32 values in memory of the context; supports the buffer protocol.

    Lifetime: borrowed until the context's next decode, encode or close. While a buffer over it
    lives (``np.asarray(view)``, ``memoryview(view)``), those raise `BufferError`; afterwards the
    view is stale and asking it for a buffer raises `BufferError`. ``with view as row:`` gives the
    buffer for a block.

    Thread-safety: reading is safe from any thread.
    """

    def __init__(self):
        raise TypeError("use Context.logits or Context.embeddings")

    def __len__(self):
        return self._n

    @property
    def shape(self):
        return (self._n,)

    def __repr__(self):
        return f"<{type(self).__name__} shape=({self._n},) float32>"

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self._c_ctx == NULL:  # made by __new__ alone
            raise BufferError("use Context.logits or Context.embeddings")
        _check_generation(self._c_ctx.get().generation)
        if self._epoch != self._c_ctx.get().epoch():
            raise BufferError("stale: the context has decoded since this row was taken")
        if flags & PyBUF_WRITABLE:
            raise BufferError("the row is read-only")
        buffer.buf = <void *> self._data
        buffer.obj = self
        buffer.len = self._n * sizeof(float)
        buffer.itemsize = sizeof(float)
        buffer.readonly = 1
        buffer.ndim = 1
        buffer.format = NULL
        if flags & PyBUF_FORMAT:
            buffer.format = <char *> "f"
        buffer.shape = NULL
        if flags & PyBUF_ND:
            buffer.shape = self._shape
        buffer.strides = self._strides
        buffer.suboffsets = NULL
        buffer.internal = NULL
        self._exports += 1
        self._c_ctx.get().add_export(1)

    def __releasebuffer__(self, Py_buffer *buffer):
        self._exports -= 1
        self._c_ctx.get().add_export(-1)

    def __enter__(self):
        row = memoryview(self)
        self._entered.append(row)
        return row

    def __exit__(self, *exc):
        self._entered.pop().release()


cdef object _new_view(type cls, Context context, const float *data, Py_ssize_t n):
    cdef _FloatView view = cls.__new__(cls)
    view._c_ctx = context._c_ctx
    view._context = context
    view._data = data
    view._n = n
    view._epoch = context._c_ctx.get().epoch()
    view._shape[0] = n
    view._strides[0] = sizeof(float)
    view._entered = []
    return view


@cython.final
cdef class Logits(_FloatView):
    """Logits of one output row: float32, shape (n_vocab,). Wraps ``llama_get_logits_ith``."""


@cython.final
cdef class Embeddings(_FloatView):
    """An embedding: float32, shape (n_embd_out,). Wraps ``llama_get_embeddings_ith``."""


cdef object _copy_row(_FloatView row, object out):
    cdef Py_buffer view
    PyObject_GetBuffer(out, &view, PyBUF_CONTIG_RO | PyBUF_FORMAT | PyBUF_WRITABLE)
    try:
        if view.format[0] != c"f" or view.len != row._n * 4:
            raise ValueError(f"out must be a writable float32 buffer of {row._n} values")
        memcpy(view.buf, row._data, view.len)
    finally:
        PyBuffer_Release(&view)
    return out
