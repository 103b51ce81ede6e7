cdef int32_t _n_max(object n_max) except -1:
    return <int32_t> _integer("n_max", n_max, 0, 1 << 16)


@cython.final
cdef class NgramIndex:
    """Where the end of one sequence has occurred in it before. Wraps `native/ngram_index.h`.

    Parameters
    ----------
    min_ngram
        Tokens at the end that an earlier place must share to be a candidate; 1 at least.
    max_ngram
        Candidates with this many are found wherever they are, those with fewer among the latest
        ones; `min_ngram` to 16.

    Raises ValueError for other numbers.

    Thread-safety: calls hold the GIL.
    """

    def __cinit__(self, min_ngram, max_ngram):
        cdef int32_t low = <int32_t> _integer("min_ngram", min_ngram, 1, nat.MAX_ORDER)
        cdef int32_t high = <int32_t> _integer("max_ngram", max_ngram, low, nat.MAX_ORDER)
        self._c_index = new nat.CNgramIndex(low, high)

    def __dealloc__(self):
        del self._c_index

    def __reduce__(self):
        raise TypeError("an NgramIndex cannot be pickled: make one of the tokens")

    def __len__(self):
        return self._c_index.size()

    def __copy__(self):
        """Return a copy, which goes on by itself."""
        cdef NgramIndex copy = NgramIndex.__new__(NgramIndex, 1, 1)
        copy._c_index[0] = deref(self._c_index)
        return copy

    def extend(self, tokens):
        """Take in what is new in `tokens`, the whole sequence: an int32 buffer or iterable of int.

        Raises ValueError if it is shorter than before, `InvalidTokenError` for what is no id.
        """
        cdef vector[int32_t] ids
        _tokens(tokens, ids)
        if ids.size() < self._c_index.size():
            raise ValueError(
                f"{ids.size()} tokens after {self._c_index.size()}: a sequence only grows")
        self._c_index.extend(ids)

    def draft(self, tokens, n_max):
        """Return up to `n_max` (0 to 65536) ids that may follow, and how many tokens agreed.

        `tokens` is what `extend` was called with. Of the latest places with the same end the one
        with the longest agreement (up to 32) is copied from, then the one whose next token is the
        most frequent, then the latest. ``([], 0)``: nothing found. Raises ValueError.
        """
        cdef int32_t most = _n_max(n_max)
        cdef vector[int32_t] ids, out
        _tokens(tokens, ids)
        if ids.size() != self._c_index.size():
            raise ValueError(f"{ids.size()} tokens, but extend() was given {self._c_index.size()}")
        cdef int32_t agreed = self._c_index.draft(ids, most, out)
        return out, agreed

    @property
    def n_bytes(self):
        """Size in bytes."""
        return self._c_index.n_bytes()


def time_ngram_index(NgramIndex index not None, tokens, n_max, evict_bytes):
    """Take in the rest of `tokens` with a draft after each; return the microseconds of each token.

    Before each token `evict_bytes` (up to 1 GiB) of other memory are written to, as a decode does.
    Raises ValueError.
    """
    cdef int32_t most = _n_max(n_max)
    cdef size_t n_bytes = <size_t> _integer("evict_bytes", evict_bytes, 0, 1 << 30)
    cdef vector[int32_t] ids
    _tokens(tokens, ids)
    return nat.time_ngram_index(deref(index._c_index), ids, most, n_bytes)


@cython.final
cdef class NgramCache:
    """What followed the n-grams (2 to 4 tokens) of past answers. Wraps `native/ngram_cache.h`.

    Its size is fixed: what is not seen again gives way.

    Parameters
    ----------
    capacity
        Number of n-grams, of 16 bytes each; 1 to 2**28, else ValueError.

    Thread-safety: full; contexts may share one.
    """

    def __cinit__(self, capacity):
        cdef size_t n = <size_t> _integer("capacity", capacity, 1, nat.MAX_CAPACITY)
        self._generation = nat.fork_generation
        self._c_cache = nat.make_ngram_cache(n)

    cdef nat.CNgramCache *_require_open(self) except NULL:
        # Another thread may have held its lock while the process was forked.
        _check_generation(self._generation)
        return self._c_cache.get()

    def __reduce__(self):
        raise TypeError("an NgramCache cannot be pickled; see save")

    @property
    def capacity(self):
        """Number of n-grams that there is room for."""
        return self._require_open().capacity()

    @property
    def n_ngrams(self):
        """Number of n-grams known."""
        return self._require_open().size()

    def learn(self, tokens, begin=0, end=None):
        """Count ``tokens[begin:end]`` as what followed the tokens before each.

        `tokens` is an int32 buffer or iterable of int; `begin` and `end` are 0 to its length, else
        ValueError. Ids below 0 stand for what is no token, and are passed over.
        """
        cdef nat.CNgramCache *cache = self._require_open()
        cdef vector[int32_t] ids
        _tokens(tokens, ids)
        cdef int64_t n = <int64_t> ids.size()
        cdef size_t last = <size_t> _integer("end", n if end is None else end, 0, n)
        cdef size_t first = <size_t> _integer("begin", begin, 0, <int64_t> last)
        with nogil:
            cache.learn(ids, first, last)

    def draft(self, tokens, n_max):
        """Return up to `n_max` (0 to 65536) ids that may follow, and the order of the n-gram found.

        Each is the most frequent one behind the longest known n-gram at the end of what there is.
        ``([], 0)``: nothing found. Raises ValueError.
        """
        cdef nat.CNgramCache *cache = self._require_open()
        cdef int32_t most = _n_max(n_max)
        cdef vector[int32_t] ids, out
        cdef int32_t order
        _tokens(tokens, ids)
        with nogil:
            order = cache.draft(ids, most, out)
        return out, order

    def save(self, path, uint64_t key):
        """Write a file that is there whole or not at all, readable by its owner only.

        `key` (0 to 2**64 - 1, else OverflowError) stands for the vocabulary whose ids these are. Of
        several writers one's file stays. Raises OSError; an older file is then intact.
        """
        cdef nat.CNgramCache *cache = self._require_open()
        cdef string c_path = _path_bytes(path)
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        with nogil:
            cache.save(c_path, key, status)
        if status.kind != nat.STATUS_OK:
            raise _ngram_file_error(path, status, mark)

    def load(self, path, uint64_t key, n_vocab):
        """Replace what is known by a file's, of any capacity. A failure changes nothing.

        Raises `StateError` when the file is damaged, is no file of n-grams, is of another version
        or `key`, or has ids outside of ``0..n_vocab - 1``; OSError when it cannot be read.
        """
        cdef nat.CNgramCache *cache = self._require_open()
        cdef int32_t n = <int32_t> _integer("n_vocab", n_vocab, 1, (1 << 31) - 1)
        cdef string c_path = _path_bytes(path)
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        with nogil:
            cache.load(c_path, key, n, status)
        if status.kind != nat.STATUS_OK:
            raise _ngram_file_error(path, status, mark)


cdef object _ngram_file_error(object path, const nat.Status& status, uint64_t mark):
    name = os.fsdecode(path)
    if status.kind == nat.STATUS_FAILED and status.code != 0:
        return OSError(status.code, os.strerror(status.code), name)
    return _error(errors.StateError, status, mark, f"{name} cannot be used: {_str(status.message)}")
