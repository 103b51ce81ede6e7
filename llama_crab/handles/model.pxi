cdef bint _was_cancelled(const nat.Status& status, uint64_t mark):
    # A callback that returns False makes llama.cpp free the model without an error line.
    return status.kind == nat.STATUS_FAILED and nat.log_errors_since(mark).empty()


@cython.final
cdef class Model:
    """A loaded GGUF model: weights, vocabulary and metadata.

    `path` names a GGUF file (the first one of a split model), or is a list of all split files in
    order, whose names can then have any form. Keyword arguments are the fields of
    ``llama_model_params`` under their own names; what is not given keeps llama.cpp's default.
    ``progress_callback(fraction)`` may return False to cancel.

    Raises `ModelNotFoundError`, `ModelLoadError`, `ModelLoadCancelled`.
    Thread-safety: immutable after the load; any thread may read it.

    Wraps ``llama_model_load_from_file`` and ``llama_model_load_from_splits``.
    """

    def __cinit__(self, path, **fields):
        cdef list paths = list(path) if isinstance(path, (list, tuple)) else [path]
        cdef _ModelParams params = _ModelParams()
        cdef vector[string] names
        cdef nat.Status status
        cdef uint64_t mark
        if not paths:
            raise ValueError("no path is given")
        for part in paths:
            names.push_back(_path_bytes(part))
            # llama.cpp says "failed to open" and "not a GGUF" alike as NULL; tell them apart here.
            if not os.path.exists(part):
                raise errors.ModelNotFoundError(f"no such file: {os.fsdecode(part)}")
            if os.path.isdir(part):
                raise errors.ModelLoadError(f"is a directory: {os.fsdecode(part)}")
        for field, value in fields.items():
            params.set(field, value)
        params.c.progress_callback = _on_progress
        params.c.progress_callback_user_data = <void *> params
        mark = nat.log_mark()
        with nogil:
            self._c_model = nat.load_model(names, params.c, status)
        if params.raised is not None:
            raise params.raised
        if self._c_model == NULL:
            shown = ", ".join([os.fsdecode(part) for part in paths])
            if params.progress_callback is not None and _was_cancelled(status, mark):
                raise errors.ModelLoadCancelled(f"loading was cancelled: {shown}")
            raise _error(errors.ModelLoadError, status, mark, f"cannot load {shown}")
        self._generation = nat.fork_generation
        self.vocab_only = params.c.vocab_only
        self.no_alloc = params.c.no_alloc
        self.load_mtp = params.c.load_mtp
        self.path = os.fsdecode(paths[0]) if len(paths) == 1 else tuple(map(os.fsdecode, paths))

    def __dealloc__(self):
        with nogil:
            self._c_model.reset()

    cdef lib.llama_model *_require_open(self) except NULL:
        if self._c_model == NULL:
            raise errors.ClosedError("the model is closed")
        _check_generation(self._generation)
        return self._c_model.get().model

    def close(self):
        """Give up this object's share; the weights are freed when no context uses them.

        Wraps ``llama_model_free``.
        """
        # Taken away under the GIL: no thread may meet the pointer while it is being freed.
        cdef nat.ModelPtr share = move(self._c_model)
        with nogil:
            share.reset()

    @property
    def closed(self):
        return self._c_model == NULL

    def __enter__(self):
        self._require_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        if self._c_model == NULL:
            return "<Model closed>"
        return f"<Model {self.desc!r} {self.path!r}>"

    def __reduce__(self):
        raise TypeError("a Model cannot be pickled; pickle its path")

    @property
    def vocab(self):
        """The model's `Vocab`. Wraps ``llama_model_get_vocab``."""
        self._require_open()
        if self._vocab is None:
            self._vocab = _new_vocab(self)
        return self._vocab

    @property
    def desc(self):
        """Architecture, size class and quantisation, e.g. ``llama 256M Q4_1``."""
        cdef char buf[256]
        lib.llama_model_desc(self._require_open(), buf, sizeof(buf))
        return _text(buf)

    @property
    def ftype(self):
        """Quantisation by name, e.g. ``Q4_K - Medium``. Wraps ``llama_model_ftype``."""
        return _text(lib.llama_ftype_name(lib.llama_model_ftype(self._require_open())))

    @property
    def size(self):
        """Bytes of all tensors. Wraps ``llama_model_size``."""
        return lib.llama_model_size(self._require_open())

    @property
    def n_params(self):
        """Number of parameters. Wraps ``llama_model_n_params``."""
        return lib.llama_model_n_params(self._require_open())

    @property
    def n_ctx_train(self):
        """Context length of the training. Wraps ``llama_model_n_ctx_train``."""
        return lib.llama_model_n_ctx_train(self._require_open())

    @property
    def n_embd(self):
        """Width of the hidden state. Wraps ``llama_model_n_embd``."""
        return lib.llama_model_n_embd(self._require_open())

    @property
    def n_embd_inp(self):
        """Width of an input embedding. Wraps ``llama_model_n_embd_inp``."""
        return lib.llama_model_n_embd_inp(self._require_open())

    @property
    def n_embd_out(self):
        """Width of an output embedding. Wraps ``llama_model_n_embd_out``."""
        return lib.llama_model_n_embd_out(self._require_open())

    @property
    def n_layer(self):
        """Number of layers. Wraps ``llama_model_n_layer``."""
        return lib.llama_model_n_layer(self._require_open())

    @property
    def n_head(self):
        """Attention heads of the first layer. Wraps ``llama_model_n_head``."""
        return lib.llama_model_n_head(self._require_open())

    @property
    def n_head_kv(self):
        """Key/value heads of the first layer. Wraps ``llama_model_n_head_kv``."""
        return lib.llama_model_n_head_kv(self._require_open())

    @property
    def n_swa(self):
        """Sliding window in tokens, 0 when there is none. Wraps ``llama_model_n_swa``."""
        return lib.llama_model_n_swa(self._require_open())

    @property
    def rope_type(self):
        """``llama_rope_type`` as an int, -1 for none. Wraps ``llama_model_rope_type``."""
        return lib.llama_model_rope_type(self._require_open())

    @property
    def rope_freq_scale_train(self):
        """RoPE frequency scale of the training. Wraps ``llama_model_rope_freq_scale_train``."""
        return lib.llama_model_rope_freq_scale_train(self._require_open())

    @property
    def n_cls_out(self):
        """Classifier outputs, 1 without a classifier. Wraps ``llama_model_n_cls_out``."""
        return lib.llama_model_n_cls_out(self._require_open())

    @property
    def cls_labels(self):
        """Names of the classifier outputs, empty when the GGUF has none."""
        cdef lib.llama_model *model = self._require_open()
        cdef list labels = []
        cdef const char *label
        cdef uint32_t i
        for i in range(lib.llama_model_n_cls_out(model)):
            label = lib.llama_model_cls_label(model, i)
            if label != NULL:
                labels.append(_text(label))
        return labels

    @property
    def has_encoder(self):
        """True for models that need ``llama_encode``. Wraps ``llama_model_has_encoder``."""
        return lib.llama_model_has_encoder(self._require_open())

    @property
    def has_decoder(self):
        """True for models that generate. Wraps ``llama_model_has_decoder``."""
        return lib.llama_model_has_decoder(self._require_open())

    @property
    def decoder_start_token(self):
        """First token for the decoder of an encoder-decoder model, else None."""
        cdef int32_t token = lib.llama_model_decoder_start_token(self._require_open())
        return None if token < 0 else token

    @property
    def is_recurrent(self):
        """True for Mamba, RWKV and their like. Wraps ``llama_model_is_recurrent``."""
        return lib.llama_model_is_recurrent(self._require_open())

    @property
    def is_hybrid(self):
        """True for models with recurrent and attention layers. Wraps ``llama_model_is_hybrid``."""
        return lib.llama_model_is_hybrid(self._require_open())

    @property
    def is_diffusion(self):
        """True for diffusion language models. Wraps ``llama_model_is_diffusion``."""
        return lib.llama_model_is_diffusion(self._require_open())

    @property
    def metadata(self):
        """The GGUF's scalar metadata as a dict of strings (arrays are not included).

        Wraps ``llama_model_meta_val_str_by_index``.
        """
        cdef lib.llama_model *model = self._require_open()
        cdef dict found = {}
        cdef vector[char] buf
        cdef int32_t i, n
        for i in range(lib.llama_model_meta_count(model)):
            buf.resize(256)
            n = lib.llama_model_meta_key_by_index(model, i, buf.data(), buf.size())
            if n >= <int32_t> buf.size():
                buf.resize(n + 1)
                lib.llama_model_meta_key_by_index(model, i, buf.data(), buf.size())
            key = _text(buf.data())
            n = lib.llama_model_meta_val_str_by_index(model, i, buf.data(), buf.size())
            if n >= <int32_t> buf.size():
                buf.resize(n + 1)
                lib.llama_model_meta_val_str_by_index(model, i, buf.data(), buf.size())
            if n >= 0:
                found[key] = _text(buf.data())
        return found

    def chat_template(self, name=None):
        """Return the GGUF's chat template (Jinja source), or None. `name` picks a variant.

        Wraps ``llama_model_chat_template``.
        """
        cdef lib.llama_model *model = self._require_open()
        cdef bytes encoded
        cdef const char *template
        if name is None:
            template = lib.llama_model_chat_template(model, NULL)
        else:
            encoded = name.encode()
            template = lib.llama_model_chat_template(model, encoded)
        return None if template == NULL else _text(template)

    def save(self, path):
        """Write the model as a GGUF file. Wraps ``llama_model_save_to_file``."""
        self._require_open()
        cdef string name = _path_bytes(path)
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        if self.vocab_only or self.no_alloc:
            raise ValueError("the model was loaded without weights")
        cdef nat.ModelPtr share = self._c_model  # lives on if another thread closes this object
        with nogil:
            nat.save_model(deref(share), name, status)
        if status.kind != nat.STATUS_OK:
            raise _error(errors.ModelLoadError, status, mark, f"cannot write {os.fsdecode(path)}")
