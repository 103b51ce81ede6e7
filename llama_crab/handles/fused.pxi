cdef dict _STAGE_KINDS = {name: kind for kind, name in enumerate((
    "greedy", "dist", "top_k", "top_p", "min_p", "typical", "temp", "temp_ext", "xtc",
    "top_n_sigma", "mirostat", "mirostat_v2", "penalties", "dry", "adaptive_p", "logit_bias",
    "infill"))}
_SELECTORS = frozenset({"greedy", "dist", "mirostat", "mirostat_v2", "adaptive_p"})


cdef int _fill_stage(nat.StageSpec *spec, str name, dict params, Vocab vocab) except -1:
    spec.kind = <nat.StageKind> <int> _STAGE_KINDS[name]
    for key, value in params.items():
        if key == "p":
            spec.p = _number(key, value)
        elif key == "t":
            spec.t = _number(key, value)
        elif key == "delta":
            spec.delta = _number(key, value)
        elif key == "exponent":
            spec.exponent = _number(key, value)
        elif key == "n":
            spec.n = _number(key, value)
        elif key == "tau":
            spec.tau = _number(key, value)
        elif key == "eta":
            spec.eta = _number(key, value)
        elif key == "target":
            spec.target = _number(key, value)
        elif key == "decay":
            spec.decay = _number(key, value)
        elif key == "penalty_repeat":
            spec.penalty_repeat = _number(key, value)
        elif key == "penalty_freq":
            spec.penalty_freq = _number(key, value)
        elif key == "penalty_present":
            spec.penalty_present = _number(key, value)
        elif key == "dry_multiplier":
            spec.dry_multiplier = _number(key, value)
        elif key == "dry_base":
            spec.dry_base = _number(key, value)
        elif key == "k":
            spec.k = <int32_t> _integer(key, value, -1, (1 << 31) - 1)
        elif key == "m":
            spec.m = <int32_t> _integer(key, value, 2, (1 << 31) - 1)
        elif key == "min_keep":
            spec.min_keep = <int32_t> _integer(key, value, 0, (1 << 31) - 1)
        elif key in ("penalty_last_n", "dry_penalty_last_n"):
            spec.last_n = <int32_t> _integer(key, value, 0, 1 << 24)
        elif key == "dry_allowed_length":
            spec.dry_allowed_length = <int32_t> _integer(key, value, 0, (1 << 31) - 1)
        elif key == "seed":
            spec.seed = _seed(value)
        elif key == "seq_breakers":
            for breaker in value:
                if breaker:
                    spec.seq_breakers.push_back(breaker.encode())
        elif key == "logit_bias":
            for token, bias in value.items():
                vocab._require_token(token)
                # -inf bans a token, so only NaN and +inf are refused.
                if bias != bias or bias == float("inf"):
                    raise errors.SamplerError(f"logit_bias of token {token} is {bias}")
                spec.logit_bias.push_back((token, bias))
        else:
            raise errors.SamplerError(f"{name}: unknown parameter {key!r}")
    if name == "penalties" and not spec.penalty_repeat > 0:
        raise errors.SamplerError(f"penalty_repeat={spec.penalty_repeat} must be > 0")
    return 0


cdef int _fill_grammar(
        nat.GrammarSpec *spec, str name, dict params, Vocab vocab) except -1:
    if not params["grammar_str"].strip():
        raise errors.GrammarError("the grammar is empty")
    spec.gbnf = params["grammar_str"].encode()
    spec.root = params["grammar_root"].encode()
    spec.lazy = name == "grammar_lazy"
    for pattern in params.get("trigger_patterns", ()):
        spec.trigger_patterns.push_back(pattern.encode())
    for token in params.get("trigger_tokens", ()):
        vocab._require_token(token)
        spec.trigger_tokens.push_back(token)
    return 0


@cython.final
cdef class FusedSampler:
    """Our executor of a sampler chain: vectorised passes over the raw row of logits.

    ``FusedSampler(model, stages)``: `stages` are ``(name, params)`` pairs in the order they run, a
    ``grammar`` or ``grammar_lazy`` first, a selector last; parameters under llama.h's names.
    `SamplerChain.compile` makes them. Same meaning and random streams as llama.cpp's samplers.

    `opening` is what the prompt has of the answer: a text that the grammar reads first, the tag
    that opens thinking, and those that end it; a lazy grammar does not wake between them.

    Thread-safety: none; one thread at a time.
    """

    def __cinit__(self, Model model not None, stages, opening=None):
        cdef nat.ModelPtr c_model
        cdef vector[nat.StageSpec] specs
        cdef nat.GrammarSpec grammar
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef Vocab vocab = model.vocab
        stages = list(stages)
        model._require_open()
        c_model = model._c_model
        names = [name for name, _ in stages]
        for at, (name, params) in enumerate(stages):
            if name in ("grammar", "grammar_lazy"):
                if at > 0:
                    raise errors.SamplerError(f"{name}: a grammar must be the first stage")
                _fill_grammar(&grammar, name, params, vocab)
                continue
            if name not in _STAGE_KINDS or (name in _SELECTORS) != (at + 1 == len(names)):
                raise errors.SamplerError(
                    f"{name!r} cannot stand at position {at}: a chain ends with its one selector")
            if name == "infill" and vocab.eot is None and vocab.eos is None:
                # llama.cpp asserts that it can end the middle part.
                raise errors.SamplerError("infill: the model has neither an EOT nor an EOS token")
            specs.resize(specs.size() + 1)
            _fill_stage(&specs.back(), name, dict(params), vocab)
        if opening is not None:
            prefix, start, ends = opening
            grammar.opening.prefix = prefix.encode()
            grammar.opening.thinking_start = start.encode()
            for end in ends:
                if end:
                    grammar.opening.thinking_ends.push_back(end.encode())
        if specs.empty():
            raise errors.SamplerError("a chain needs a selector")
        with nogil:
            self._c_sampler = nat.new_fused_sampler(c_model, specs, grammar, status)
        if self._c_sampler == NULL:
            if grammar.gbnf.empty():
                raise _error(errors.SamplerError, status, mark, "cannot make the sampler")
            raise _error(errors.GrammarError, status, mark, names[0])
        self._generation = nat.fork_generation
        self._model = model
        self.stages = tuple([(name, dict(params)) for name, params in stages])

    def __dealloc__(self):
        # After a fork the parent owns what was made before it.
        if self._generation == nat.fork_generation:
            del self._c_sampler

    cdef nat.FusedSampler *_require_open(self) except NULL:
        if self._c_sampler == NULL:
            raise errors.ClosedError("the sampler is closed")
        _check_generation(self._generation)
        return self._c_sampler

    def close(self):
        """Free the sampler. Idempotent."""
        if self._generation == nat.fork_generation:
            del self._c_sampler
        self._c_sampler = NULL

    @property
    def closed(self):
        return self._c_sampler == NULL

    def __enter__(self):
        self._require_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        if self.closed:
            return "<FusedSampler closed>"
        return f"<FusedSampler [{', '.join([name for name, _ in self.stages])}]>"

    def __reduce__(self):
        raise TypeError("a FusedSampler cannot be pickled; pickle its SamplerChain")

    def clone(self):
        """Return an independent copy with the same state."""
        cdef nat.FusedSampler *sampler = self._require_open()
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        cdef FusedSampler copy = FusedSampler.__new__(FusedSampler, self._model, [("greedy", {})])
        copy.stages = self.stages
        del copy._c_sampler
        copy._c_sampler = nat.clone_fused_sampler(deref(sampler), status)
        if copy._c_sampler == NULL:
            raise _error(errors.SamplerError, status, mark, "cannot copy the sampler")
        return copy

    def reset(self):
        """Forget history and random state."""
        cdef nat.Status status
        self._require_open().reset(status)

    def accept(self, token):
        """Tell the sampler that `token` was chosen.

        Raises `SamplerError` when a grammar does not allow it.
        """
        _accept(self._require_open(), token)

    def apply(self, logits):
        """Apply the chain to a float32 buffer of logits, one per token id, without accepting.

        Returns ``(ids, logits, p, selected)``: the surviving candidates in the order the selector
        saw them, their logits and probabilities as lists, and the selected id. The input is not
        changed; the random streams advance. Raises `SamplerError` for a row without a finite
        maximum or with a NaN, and when no candidate is left.
        """
        cdef nat.FusedSampler *sampler = self._require_open()
        if _open_row(logits, self._data, self._c_row):
            return _explain(sampler, self._c_row)
        raise errors.SamplerError(nat.BAD_ROW.decode())

    def select(self, logits):
        """Choose from a float32 buffer of logits, accept the token and return its id.

        The input is not changed. Raises as `apply`.
        """
        cdef nat.FusedSampler *sampler = self._require_open()
        cdef bint ok = _open_row(logits, self._data, self._c_row)
        return _choose(sampler, self._c_row, ok)

    def sample(self, Context context not None, int32_t i=-1):
        """Sample from output row `i` of the last decode and accept the token; return its id.

        Do not accept it again. Raises IndexError and as `apply`.
        """
        return _choose_from_context(self._require_open(), self._c_row, context, i)
