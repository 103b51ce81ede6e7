cdef Vocab _new_vocab(Model model):
    cdef Vocab vocab = Vocab.__new__(Vocab)
    vocab._c_vocab = lib.llama_model_get_vocab(model._require_open())
    vocab._c_model = model._c_model
    vocab._model = model
    vocab.n_tokens = lib.llama_vocab_n_tokens(vocab._c_vocab)
    return vocab


cdef dict _VOCAB_TYPES = {
    lib.LLAMA_VOCAB_TYPE_NONE: "none", lib.LLAMA_VOCAB_TYPE_SPM: "spm",
    lib.LLAMA_VOCAB_TYPE_BPE: "bpe", lib.LLAMA_VOCAB_TYPE_WPM: "wpm",
    lib.LLAMA_VOCAB_TYPE_UGM: "ugm", lib.LLAMA_VOCAB_TYPE_RWKV: "rwkv",
    lib.LLAMA_VOCAB_TYPE_PLAMO2: "plamo2", lib.LLAMA_VOCAB_TYPE_TEST: "test",
}

cdef dict _TOKEN_ATTRS = {
    lib.LLAMA_TOKEN_ATTR_UNKNOWN: "unknown", lib.LLAMA_TOKEN_ATTR_UNUSED: "unused",
    lib.LLAMA_TOKEN_ATTR_NORMAL: "normal", lib.LLAMA_TOKEN_ATTR_CONTROL: "control",
    lib.LLAMA_TOKEN_ATTR_USER_DEFINED: "user_defined", lib.LLAMA_TOKEN_ATTR_BYTE: "byte",
    lib.LLAMA_TOKEN_ATTR_NORMALIZED: "normalized", lib.LLAMA_TOKEN_ATTR_LSTRIP: "lstrip",
    lib.LLAMA_TOKEN_ATTR_RSTRIP: "rstrip", lib.LLAMA_TOKEN_ATTR_SINGLE_WORD: "single_word",
}


cdef bytes _utf8(object text):
    # Lone surrogates have no UTF-8 form; "?" as every encoder with "replace" gives.
    return text.encode("utf-8", "replace") if isinstance(text, str) else bytes(text)


cdef object _optional(int32_t token):
    return None if token < 0 else token


@cython.final
cdef class Vocab:
    """The vocabulary of a model; obtained as ``model.vocab``, valid until it is closed.

    It keeps the model's weights in memory, also when the `Model` was closed.

    Thread-safety: immutable; any thread may tokenise.

    Wraps ``llama_vocab``.
    """

    def __init__(self):
        raise TypeError("use model.vocab")

    cdef int _require_open(self) except -1:
        if self._c_model == NULL:
            raise errors.ClosedError("the vocabulary is closed")
        _check_generation(self._c_model.get().generation)
        return 0

    cdef int _require_token(self, int64_t token) except -1:
        self._require_open()
        if not 0 <= token < self.n_tokens:
            raise errors.InvalidTokenError(
                f"token {token} is outside the vocabulary (0..{self.n_tokens - 1})")
        if lib.c_vocab_type(self._c_vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            raise errors.TokenizeError("the model has no tokenizer")
        return 0

    def close(self):
        """Give up this object's share of the model. Idempotent."""
        cdef nat.ModelPtr share = move(self._c_model)
        with nogil:
            share.reset()

    @property
    def closed(self):
        return self._c_model == NULL

    def __len__(self):
        return self.n_tokens

    def __repr__(self):
        return f"<Vocab {self.type} n_tokens={self.n_tokens}>"

    def __reduce__(self):
        raise TypeError("a Vocab cannot be pickled")

    @property
    def model(self):
        return self._model

    @property
    def type(self):
        """Tokeniser family: ``spm``, ``bpe``, ``wpm``, ``ugm``, ``rwkv``, ``plamo2``, ``none``."""
        self._require_open()
        return _VOCAB_TYPES.get(lib.c_vocab_type(self._c_vocab), "unknown")

    def tokenize(self, text, bint add_special, bint parse_special):
        """Return the token ids of `text` (str, or bytes taken as UTF-8) as a list of int.

        `add_special` adds BOS/EOS as the model asks; `parse_special` reads special tokens written
        in the text. Raises `TokenizeError`. Wraps ``llama_tokenize``.
        """
        self._require_open()
        cdef bytes data = _utf8(text)
        cdef const char *start = data
        cdef size_t n = len(data)
        cdef vector[int32_t] out
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef nat.ModelPtr kept = self._c_model  # another thread may close it
        if lib.c_vocab_type(self._c_vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            raise errors.TokenizeError("the model has no tokenizer")
        with nogil:
            nat.tokenize(self._c_vocab, start, n, add_special, parse_special, out, status)
        if status.kind != nat.STATUS_OK:
            raise _error(errors.TokenizeError, status, mark, _str(status.message))
        return out

    def tokenize_many(self, texts, *, bint add_special, bint parse_special, n_threads):
        """Return the ids of many texts as `TokenizedTexts`, tokenised by `n_threads` threads.

        `texts` is an iterable of what `tokenize` takes; flags and errors as there. The GIL is
        released. Wraps ``llama_tokenize``, which only reads the vocabulary.
        """
        self._require_open()
        cdef int32_t n = <int32_t> _integer("n_threads", n_threads, 1, lib.GGML_MAX_N_THREADS)
        if isinstance(texts, (str, bytes, bytearray)):
            raise TypeError(f"expected texts, not one {type(texts).__name__}")
        cdef list encoded = [_utf8(text) for text in texts]
        cdef vector[nat.TextSpan] spans
        cdef nat.TextSpan span
        cdef TokenizedTexts found = TokenizedTexts.__new__(TokenizedTexts)
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef nat.ModelPtr kept = self._c_model
        if lib.c_vocab_type(self._c_vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            raise errors.TokenizeError("the model has no tokenizer")
        for data in encoded:
            span.data = <const char *> (<bytes> data)
            span.size = len(<bytes> data)
            spans.push_back(span)
        with nogil:
            nat.tokenize_many(
                self._c_vocab, spans, add_special, parse_special, n, found._c_texts, status)
        if status.kind == nat.STATUS_FAILED:
            raise _error(errors.TokenizeError, status, mark, _str(status.message))
        if status.kind != nat.STATUS_OK:
            raise _error(errors.TokenizeError, status, mark, "a text cannot be tokenised")
        return found

    def detokenize(self, tokens, bint remove_special, bint unparse_special):
        """Return the bytes of a token sequence; the inverse of `tokenize`.

        `remove_special` drops BOS/EOS, `unparse_special` renders special tokens.
        Raises `InvalidTokenError`. Wraps ``llama_detokenize``.
        """
        self._require_open()
        cdef vector[int32_t] ids
        cdef string out
        cdef nat.Status status
        cdef size_t i
        cdef uint64_t mark = nat.log_mark()
        _tokens(tokens, ids)
        for i in range(ids.size()):
            self._require_token(ids[i])
        cdef nat.ModelPtr kept = self._c_model
        with nogil:
            nat.detokenize(self._c_vocab, ids, remove_special, unparse_special, out, status)
        if status.kind != nat.STATUS_OK:
            raise _error(errors.TokenizeError, status, mark, _str(status.message))
        return PyBytes_FromStringAndSize(out.data(), out.size())

    def piece(self, int64_t token, bint special, int32_t lstrip=0):
        """Return the bytes of one token; control tokens give b"" unless `special`.

        `lstrip` skips up to that many leading spaces. Wraps ``llama_token_to_piece``.
        """
        self._require_token(token)
        cdef char buf[256]
        cdef vector[char] large
        cdef int32_t n = lib.llama_token_to_piece(
            self._c_vocab, <int32_t> token, buf, sizeof(buf), lstrip, special)
        if n >= 0:
            return PyBytes_FromStringAndSize(buf, n)
        large.resize(-n)
        n = lib.llama_token_to_piece(
            self._c_vocab, <int32_t> token, large.data(), -n, lstrip, special)
        return PyBytes_FromStringAndSize(large.data(), n)

    def text(self, int64_t token):
        """Return the token as it is written in the GGUF. Wraps ``llama_vocab_get_text``."""
        self._require_token(token)
        return _text(lib.llama_vocab_get_text(self._c_vocab, <int32_t> token))

    def score(self, int64_t token):
        """Return the token's score. Wraps ``llama_vocab_get_score``."""
        self._require_token(token)
        return lib.llama_vocab_get_score(self._c_vocab, <int32_t> token)

    def attrs(self, int64_t token):
        """Return the names of the token's attributes. Wraps ``llama_vocab_get_attr``."""
        self._require_token(token)
        cdef int bits = lib.llama_vocab_get_attr(self._c_vocab, <int32_t> token)
        return frozenset(name for bit, name in _TOKEN_ATTRS.items() if bits & <int> bit)

    def is_eog(self, int64_t token):
        """Return True when the token ends a generation. Wraps ``llama_vocab_is_eog``."""
        self._require_token(token)
        return lib.llama_vocab_is_eog(self._c_vocab, <int32_t> token)

    def is_control(self, int64_t token):
        """Return True for control tokens. Wraps ``llama_vocab_is_control``."""
        self._require_token(token)
        return lib.llama_vocab_is_control(self._c_vocab, <int32_t> token)

    @property
    def eog_tokens(self):
        """All ids that end a generation, as a tuple."""
        self._require_open()
        cdef int32_t token
        cdef const lib.llama_vocab *vocab = self._c_vocab
        return tuple([token for token in range(self.n_tokens)
                      if lib.llama_vocab_is_eog(vocab, token)])

    @property
    def suppress_tokens(self):
        """Ids that the GGUF asks never to sample. Wraps ``llama_vocab_get_suppress_tokens``."""
        self._require_open()
        cdef int32_t n = 0
        cdef const int32_t *ids = lib.llama_vocab_get_suppress_tokens(self._c_vocab, &n)
        return tuple([ids[i] for i in range(n)])

    @property
    def bos(self):
        """Beginning-of-sentence id or None. Wraps ``llama_vocab_bos``."""
        self._require_open()
        return _optional(lib.llama_vocab_bos(self._c_vocab))

    @property
    def eos(self):
        """End-of-sentence id or None. Wraps ``llama_vocab_eos``."""
        self._require_open()
        return _optional(lib.llama_vocab_eos(self._c_vocab))

    @property
    def eot(self):
        """End-of-turn id or None. Wraps ``llama_vocab_eot``."""
        self._require_open()
        return _optional(lib.llama_vocab_eot(self._c_vocab))

    @property
    def sep(self):
        """Sentence separator id or None. Wraps ``llama_vocab_sep``."""
        self._require_open()
        return _optional(lib.llama_vocab_sep(self._c_vocab))

    @property
    def nl(self):
        """Newline id or None. Wraps ``llama_vocab_nl``."""
        self._require_open()
        return _optional(lib.llama_vocab_nl(self._c_vocab))

    @property
    def pad(self):
        """Padding id or None. Wraps ``llama_vocab_pad``."""
        self._require_open()
        return _optional(lib.llama_vocab_pad(self._c_vocab))

    @property
    def mask(self):
        """Mask id or None. Wraps ``llama_vocab_mask``."""
        self._require_open()
        return _optional(lib.llama_vocab_mask(self._c_vocab))

    @property
    def fim_pre(self):
        """Fill-in-the-middle prefix id or None. Wraps ``llama_vocab_fim_pre``."""
        self._require_open()
        return _optional(lib.llama_vocab_fim_pre(self._c_vocab))

    @property
    def fim_suf(self):
        """Fill-in-the-middle suffix id or None. Wraps ``llama_vocab_fim_suf``."""
        self._require_open()
        return _optional(lib.llama_vocab_fim_suf(self._c_vocab))

    @property
    def fim_mid(self):
        """Fill-in-the-middle middle id or None. Wraps ``llama_vocab_fim_mid``."""
        self._require_open()
        return _optional(lib.llama_vocab_fim_mid(self._c_vocab))

    @property
    def fim_pad(self):
        """Fill-in-the-middle padding id or None. Wraps ``llama_vocab_fim_pad``."""
        self._require_open()
        return _optional(lib.llama_vocab_fim_pad(self._c_vocab))

    @property
    def fim_rep(self):
        """Fill-in-the-middle repository id or None. Wraps ``llama_vocab_fim_rep``."""
        self._require_open()
        return _optional(lib.llama_vocab_fim_rep(self._c_vocab))

    @property
    def fim_sep(self):
        """Fill-in-the-middle file separator id or None. Wraps ``llama_vocab_fim_sep``."""
        self._require_open()
        return _optional(lib.llama_vocab_fim_sep(self._c_vocab))

    @property
    def add_bos(self):
        """True when the model wants a BOS in front. Wraps ``llama_vocab_get_add_bos``."""
        self._require_open()
        return lib.llama_vocab_get_add_bos(self._c_vocab)

    @property
    def add_eos(self):
        """True when the model wants an EOS at the end. Wraps ``llama_vocab_get_add_eos``."""
        self._require_open()
        return lib.llama_vocab_get_add_eos(self._c_vocab)

    @property
    def add_sep(self):
        """True when the model wants a SEP between texts. Wraps ``llama_vocab_get_add_sep``."""
        self._require_open()
        return lib.llama_vocab_get_add_sep(self._c_vocab)
