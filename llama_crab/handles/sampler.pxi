cdef uint32_t _seed(object seed) except? 0:
    cdef int64_t value = _integer("seed", seed, 0, 0xFFFFFFFF)
    if value == lib.LLAMA_DEFAULT_SEED:
        raise errors.SamplerError(
            "seed 0xFFFFFFFF is llama.cpp's mark for a random seed: choose another")
    return <uint32_t> value


cdef object _new_sampler(lib.llama_sampler *c_sampler):
    if c_sampler == NULL:
        raise errors.SamplerError("llama.cpp could not create the sampler")
    cdef Sampler sampler = Sampler.__new__(Sampler)
    sampler._c_sampler = c_sampler
    sampler._c_chain.chain = c_sampler
    sampler._generation = nat.fork_generation
    sampler._owned = True
    nat.count_samplers(1)
    return sampler


cdef object _new_vocab_sampler(lib.llama_sampler *c_sampler, Vocab vocab):
    cdef Sampler sampler = _new_sampler(c_sampler)
    sampler._c_models.push_back(vocab._c_model)
    return sampler


cdef object _wrap_stages(Sampler chain):
    """Give Python faces to the stages that the C chain already owns."""
    cdef Sampler stage
    cdef int32_t i
    chain._stages = []
    for i in range(lib.llama_sampler_chain_n(chain._c_sampler)):
        stage = Sampler.__new__(Sampler)
        stage._c_sampler = lib.llama_sampler_chain_get(chain._c_sampler, i)
        stage._c_chain.chain = stage._c_sampler
        stage._generation = chain._generation
        stage._parent = chain
        stage._c_models = chain._c_models
        chain._stages.append(stage)


@cython.final
@cython.no_gc_clear
cdef class Sampler:
    """One of llama.cpp's samplers, or a chain of them; made by the static methods.

    A sampler that was added to a chain belongs to it: it stays usable through its own object as
    long as the chain is open. `SamplerChain` is the description to use in programs; this is the
    machine behind it.

    Thread-safety: none; one thread at a time.

    Wraps ``llama_sampler``.
    """

    def __init__(self):
        raise TypeError("use a static method such as Sampler.greedy()")

    def __dealloc__(self):
        if self._c_sampler != NULL and self._owned:
            nat.count_samplers(-1)
            if self._generation == nat.fork_generation:
                lib.llama_sampler_free(self._c_sampler)

    cdef lib.llama_sampler *_require_open(self) except NULL:
        if self._parent is not None and self._parent._c_sampler == NULL:
            raise errors.ClosedError("the chain that owns this sampler is closed")
        if self._c_sampler == NULL:
            raise errors.ClosedError("the sampler is closed")
        _check_generation(self._generation)
        return self._c_sampler

    def close(self):
        """Free the sampler, with its stages if it is a chain. Wraps ``llama_sampler_free``."""
        if self._c_sampler == NULL:
            return
        if self._parent is not None:
            raise errors.SamplerError("the chain owns this sampler; close the chain or remove it")
        nat.count_samplers(-1)
        if self._generation == nat.fork_generation:
            lib.llama_sampler_free(self._c_sampler)
        self._c_sampler = NULL
        self._c_models.clear()

    @property
    def closed(self):
        return self._c_sampler == NULL or (
            self._parent is not None and self._parent._c_sampler == NULL)

    def __enter__(self):
        self._require_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        if self.closed:
            return "<Sampler closed>"
        if self._stages is not None:
            return f"<Sampler chain [{', '.join([stage.name for stage in self._stages])}]>"
        return f"<Sampler {self.name}>"

    def __reduce__(self):
        raise TypeError("a Sampler cannot be pickled; pickle its SamplerChain")

    @property
    def name(self):
        """llama.cpp's name of the sampler. Wraps ``llama_sampler_name``."""
        return _text(lib.llama_sampler_name(self._require_open()))

    @property
    def seed(self):
        """The seed in use, or None for samplers without one. Wraps ``llama_sampler_get_seed``."""
        cdef uint32_t seed = lib.llama_sampler_get_seed(self._require_open())
        return None if seed == lib.LLAMA_DEFAULT_SEED else seed

    @staticmethod
    def chain():
        """Return an empty chain. Wraps ``llama_sampler_chain_init``."""
        cdef lib.llama_sampler_chain_params params = lib.llama_sampler_chain_default_params()
        cdef Sampler sampler = _new_sampler(lib.llama_sampler_chain_init(params))
        sampler._stages = []
        return sampler

    def add(self, Sampler stage not None):
        """Append a stage; the chain owns it from now on. Wraps ``llama_sampler_chain_add``."""
        self._require_open()
        stage._require_open()
        cdef size_t i
        if self._stages is None:
            raise errors.SamplerError("only a chain has stages")
        if stage._stages is not None:
            raise errors.SamplerError("a chain cannot be a stage")
        if stage._parent is not None:
            raise errors.SamplerError("the sampler already belongs to a chain")
        lib.llama_sampler_chain_add(self._c_sampler, stage._c_sampler)
        stage._parent = self
        stage._owned = False
        nat.count_samplers(-1)
        # The stages may read vocabularies of several models; all must live as long as the chain.
        for i in range(stage._c_models.size()):
            self._c_models.push_back(stage._c_models[i])
        self._stages.append(stage)

    def remove(self, int index):
        """Take stage `index` out of the chain and return it.

        Wraps ``llama_sampler_chain_remove``.
        """
        self._require_open()
        if self._stages is None or not 0 <= index < len(self._stages):
            raise IndexError(index)
        cdef Sampler stage = self._stages.pop(index)
        lib.llama_sampler_chain_remove(self._c_sampler, index)
        stage._parent = None
        stage._owned = True
        nat.count_samplers(1)
        return stage

    def __len__(self):
        self._require_open()
        return 0 if self._stages is None else len(self._stages)

    def __getitem__(self, int index):
        self._require_open()
        if self._stages is None:
            raise TypeError("only a chain has stages")
        if not 0 <= index < len(self._stages):  # the compiler directives leave it to us
            raise IndexError(index)
        return self._stages[index]

    def clone(self):
        """Return an independent copy with the same state. Wraps ``llama_sampler_clone``."""
        cdef Sampler copy = _new_sampler(lib.llama_sampler_clone(self._require_open()))
        copy._c_models = self._c_models
        if self._stages is not None:
            _wrap_stages(copy)
        return copy

    def reset(self):
        """Forget history and random state. Wraps ``llama_sampler_reset``."""
        lib.llama_sampler_reset(self._require_open())

    def accept(self, token):
        """Tell the sampler that `token` was chosen. Wraps ``llama_sampler_accept``.

        Raises `SamplerError` when a grammar does not allow it.
        """
        self._require_open()
        _accept(&self._c_chain, token)

    def apply(self, logits):
        """Apply the sampler to a float32 buffer of logits, one per token id.

        Returns ``(ids, logits, p, selected)``: the surviving candidates in their order as lists,
        and the selected id or None. The input is not changed. Wraps ``llama_sampler_apply``.
        """
        self._require_open()
        _open_row(logits, self._data, self._c_row)
        return _explain(&self._c_chain, self._c_row)

    def select(self, logits):
        """Choose from a float32 buffer of logits, accept the token and return its id.

        The input is not changed. Raises `SamplerError` for a row without a finite maximum or with
        a NaN, and when nothing can be chosen. Wraps ``llama_sampler_apply``.
        """
        self._require_open()
        cdef bint ok = _open_row(logits, self._data, self._c_row)
        return _choose(&self._c_chain, self._c_row, ok)

    def sample(self, Context context not None, int32_t i=-1):
        """Sample from output row `i` of the last decode and accept the token; return its id.

        Do not accept it again. Raises IndexError, `SamplerError` (no final stage, rows of NaN).
        Wraps ``llama_sampler_sample``.
        """
        self._require_open()
        return _choose_from_context(&self._c_chain, self._c_row, context, i)

    @staticmethod
    def greedy():
        """Wraps ``llama_sampler_init_greedy``."""
        return _new_sampler(lib.llama_sampler_init_greedy())

    @staticmethod
    def dist(seed):
        """Wraps ``llama_sampler_init_dist``."""
        return _new_sampler(lib.llama_sampler_init_dist(_seed(seed)))

    @staticmethod
    def top_k(k):
        """Wraps ``llama_sampler_init_top_k``."""
        return _new_sampler(lib.llama_sampler_init_top_k(_integer("k", k, -1, (1 << 31) - 1)))

    @staticmethod
    def top_p(p, min_keep):
        """Wraps ``llama_sampler_init_top_p``."""
        return _new_sampler(lib.llama_sampler_init_top_p(
            _number("p", p), _integer("min_keep", min_keep, 0, 1 << 31)))

    @staticmethod
    def min_p(p, min_keep):
        """Wraps ``llama_sampler_init_min_p``."""
        return _new_sampler(lib.llama_sampler_init_min_p(
            _number("p", p), _integer("min_keep", min_keep, 0, 1 << 31)))

    @staticmethod
    def typical(p, min_keep):
        """Wraps ``llama_sampler_init_typical``."""
        return _new_sampler(lib.llama_sampler_init_typical(
            _number("p", p), _integer("min_keep", min_keep, 0, 1 << 31)))

    @staticmethod
    def temp(t):
        """Wraps ``llama_sampler_init_temp``."""
        return _new_sampler(lib.llama_sampler_init_temp(_number("t", t)))

    @staticmethod
    def temp_ext(t, delta, exponent):
        """Wraps ``llama_sampler_init_temp_ext``."""
        return _new_sampler(lib.llama_sampler_init_temp_ext(
            _number("t", t), _number("delta", delta), _number("exponent", exponent)))

    @staticmethod
    def xtc(p, t, min_keep, seed):
        """Wraps ``llama_sampler_init_xtc``."""
        return _new_sampler(lib.llama_sampler_init_xtc(
            _number("p", p), _number("t", t), _integer("min_keep", min_keep, 0, 1 << 31),
            _seed(seed)))

    @staticmethod
    def top_n_sigma(n):
        """Wraps ``llama_sampler_init_top_n_sigma``."""
        return _new_sampler(lib.llama_sampler_init_top_n_sigma(_number("n", n)))

    @staticmethod
    def mirostat(n_vocab, seed, tau, eta, m):
        """Wraps ``llama_sampler_init_mirostat``."""
        return _new_sampler(lib.llama_sampler_init_mirostat(
            _integer("n_vocab", n_vocab, 1, (1 << 31) - 1), _seed(seed), _number("tau", tau),
            _number("eta", eta), _integer("m", m, 2, (1 << 31) - 1)))

    @staticmethod
    def mirostat_v2(seed, tau, eta):
        """Wraps ``llama_sampler_init_mirostat_v2``."""
        return _new_sampler(lib.llama_sampler_init_mirostat_v2(
            _seed(seed), _number("tau", tau), _number("eta", eta)))

    @staticmethod
    def grammar(Vocab vocab not None, grammar_str, grammar_root):
        """Raises `GrammarError`. Wraps ``llama_sampler_init_grammar``."""
        return _new_grammar(vocab, grammar_str, grammar_root, False, (), ())

    @staticmethod
    def grammar_lazy_patterns(
            Vocab vocab not None, grammar_str, grammar_root, trigger_patterns, trigger_tokens):
        """Raises `GrammarError`. Wraps ``llama_sampler_init_grammar_lazy_patterns``."""
        return _new_grammar(
            vocab, grammar_str, grammar_root, True, trigger_patterns, trigger_tokens)

    @staticmethod
    def penalties(n_vocab, penalty_last_n, penalty_repeat, penalty_freq, penalty_present):
        """Wraps ``llama_sampler_init_penalties``."""
        if not penalty_repeat > 0:
            raise errors.SamplerError(f"penalty_repeat={penalty_repeat} must be > 0")
        return _new_sampler(lib.llama_sampler_init_penalties(
            _integer("n_vocab", n_vocab, 1, (1 << 31) - 1),
            _integer("penalty_last_n", penalty_last_n, 0, 1 << 24),
            _number("penalty_repeat", penalty_repeat), _number("penalty_freq", penalty_freq),
            _number("penalty_present", penalty_present)))

    @staticmethod
    def dry(Vocab vocab not None, dry_multiplier, dry_base, dry_allowed_length,
            dry_penalty_last_n, seq_breakers):
        """Wraps ``llama_sampler_init_dry``."""
        cdef vector[string] texts
        cdef vector[const char *] pointers
        cdef size_t i
        vocab._require_token(0)
        for breaker in seq_breakers:
            texts.push_back(breaker.encode())
        for i in range(texts.size()):
            pointers.push_back(texts[i].c_str())
        return _new_vocab_sampler(lib.llama_sampler_init_dry(
            vocab._c_vocab, _number("dry_multiplier", dry_multiplier),
            _number("dry_base", dry_base),
            _integer("dry_allowed_length", dry_allowed_length, 0, (1 << 31) - 1),
            _integer("dry_penalty_last_n", dry_penalty_last_n, 0, 1 << 24),
            pointers.data(), pointers.size()), vocab)

    @staticmethod
    def adaptive_p(target, decay, seed):
        """Wraps ``llama_sampler_init_adaptive_p``."""
        return _new_sampler(lib.llama_sampler_init_adaptive_p(
            _number("target", target), _number("decay", decay), _seed(seed)))

    @staticmethod
    def logit_bias(n_vocab, biases):
        """`biases` maps token ids to values. Wraps ``llama_sampler_init_logit_bias``."""
        cdef vector[lib.llama_logit_bias] entries
        cdef lib.llama_logit_bias entry
        cdef int64_t n = _integer("n_vocab", n_vocab, 1, (1 << 31) - 1)
        for token, bias in biases.items():
            if not 0 <= token < n:
                raise errors.InvalidTokenError(
                    f"token {token} is outside the vocabulary (0..{n - 1})")
            entry.token = token
            # -inf bans a token, so only NaN and +inf are refused.
            if bias != bias or bias == float("inf"):
                raise errors.SamplerError(f"logit_bias of token {token} is {bias}")
            entry.bias = bias
            entries.push_back(entry)
        return _new_sampler(lib.llama_sampler_init_logit_bias(
            <int32_t> n, <int32_t> entries.size(), entries.data()))

    @staticmethod
    def infill(Vocab vocab not None):
        """Wraps ``llama_sampler_init_infill``."""
        vocab._require_token(0)
        return _new_vocab_sampler(lib.llama_sampler_init_infill(vocab._c_vocab), vocab)


cdef object _new_grammar(
        Vocab vocab, object grammar_str, object grammar_root, bint lazy, object trigger_patterns,
        object trigger_tokens):
    vocab._require_token(0)
    cdef string grammar = grammar_str.encode()
    cdef string root = grammar_root.encode()
    cdef vector[string] patterns
    cdef vector[int32_t] tokens
    cdef nat.Status status
    cdef lib.llama_sampler *sampler
    cdef size_t i
    cdef uint64_t mark = nat.log_mark()
    if not grammar_str.strip():
        raise errors.GrammarError("the grammar is empty")
    for pattern in trigger_patterns:
        patterns.push_back(pattern.encode())
    _tokens(trigger_tokens, tokens)
    for i in range(tokens.size()):
        vocab._require_token(tokens[i])
    with nogil:
        sampler = nat.new_grammar(
            vocab._c_vocab, grammar, root, lazy, patterns, tokens, status)
    if sampler == NULL:
        raise _error(errors.GrammarError, status, mark, "grammar_lazy" if lazy else "grammar")
    return _new_vocab_sampler(sampler, vocab)
