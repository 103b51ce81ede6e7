@cython.final
cdef class RowScratch:
    """Copies of rows of logits, writable: float32, shape (n_rows, n_vocab).

    Lifetime: the memory lives as long as a buffer over it. The engine samples from it after the
    call that it was handed to, and hands out another one if a view was kept.

    Thread-safety: none.
    """

    def __init__(self):
        raise TypeError("made by Stepper.step")

    @property
    def shape(self):
        return self._shape[0], self._shape[1]

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        buffer.buf = self._data.data()
        buffer.obj = self
        buffer.len = self._shape[0] * self._strides[0]
        buffer.readonly = 0
        buffer.itemsize = sizeof(float)
        buffer.format = NULL
        if flags & PyBUF_FORMAT:
            buffer.format = <char *> "f"
        buffer.ndim = 2
        buffer.shape = NULL
        if flags & PyBUF_ND:
            buffer.shape = self._shape
        buffer.strides = self._strides
        buffer.suboffsets = NULL
        buffer.internal = NULL
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self._exports -= 1


cdef RowScratch _scratch_for(RowScratch old, Py_ssize_t n_rows, Py_ssize_t n_vocab):
    """Return `old` with room for the rows, or a new one if somebody still looks at it."""
    cdef RowScratch scratch = old
    if scratch is None or scratch._exports > 0:
        scratch = RowScratch.__new__(RowScratch)
    scratch._data.resize(n_rows * n_vocab)
    scratch._shape[0] = n_rows
    scratch._shape[1] = n_vocab
    scratch._strides[0] = n_vocab * sizeof(float)
    scratch._strides[1] = sizeof(float)
    return scratch
