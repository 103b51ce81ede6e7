@cython.final
cdef class TokenizedTexts:
    """The token ids of many texts, kept outside Python: input of `Embedder.add`.

    Made by `Vocab.tokenize_many` or `TokenizedTexts.from_ids`.

    Thread-safety: reading is safe from any thread; not while one calls `truncate`.
    """

    def __init__(self):
        raise TypeError("use Vocab.tokenize_many or TokenizedTexts.from_ids")

    @staticmethod
    def from_ids(texts):
        """Make one of ids: an iterable of int32 buffers or of iterables of int, one for each text.

        Raises `InvalidTokenError` for ids that are no 32-bit integers; `Embedder.add` compares them
        with the vocabulary.
        """
        cdef TokenizedTexts found = TokenizedTexts.__new__(TokenizedTexts)
        cdef vector[int32_t] ids
        for text in texts:
            _tokens(text, ids)
            found._c_texts.push_back(ids)
        return found

    cdef const vector[int32_t] *_require_text(self, int64_t i) except NULL:
        if not 0 <= i < <int64_t> self._c_texts.size():
            raise IndexError(i)
        return &self._c_texts[<size_t> i]

    def __len__(self):
        return self._c_texts.size()

    def __repr__(self):
        return f"<TokenizedTexts of {self._c_texts.size()} texts>"

    def __reduce__(self):
        raise TypeError("a TokenizedTexts cannot be pickled; see ids")

    def lengths(self):
        """Return the number of tokens of each text as a list of int."""
        cdef size_t i
        return [self._c_texts[i].size() for i in range(self._c_texts.size())]

    def ids(self, int64_t i):
        """Return the token ids of text `i` as a list of int. Raises IndexError."""
        return deref(self._require_text(i))

    def truncate(self, max_tokens, bint keep_last):
        """Cut longer texts to `max_tokens`, which is 1 at least; return how many were cut.

        `keep_last` puts each cut text's last token at its new end: a [SEP] or EOS that the
        vocabulary added.
        """
        cdef size_t most = <size_t> _integer("max_tokens", max_tokens, 1, (1 << 31) - 1)
        cdef size_t n_cut
        with nogil:
            n_cut = nat.truncate(self._c_texts, most, keep_last)
        return n_cut
