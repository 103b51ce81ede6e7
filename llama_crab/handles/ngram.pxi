@cython.final
cdef class NgramCache:
    """Temporary."""
