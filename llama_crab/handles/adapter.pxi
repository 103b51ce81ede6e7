@cython.final
cdef class LoraAdapter:
    """A LoRA adapter loaded for one `Model`; apply it with `Context.set_adapters`.

    Raises `ModelNotFoundError`, `AdapterError`.
    Thread-safety: immutable.

    Wraps ``llama_adapter_lora_init``.
    """

    def __cinit__(self, Model model not None, path):
        cdef string name = _path_bytes(path)
        cdef nat.Status status
        cdef uint64_t mark = nat.log_mark()
        model._require_open()
        if model.vocab_only or model.no_alloc:
            raise errors.AdapterError("the model was loaded without weights")
        if not os.path.exists(path):
            raise errors.ModelNotFoundError(f"no such file: {os.fspath(path)}")
        with nogil:
            self._c_adapter = nat.load_adapter(model._c_model, name, status)
        if self._c_adapter == NULL:
            raise _error(errors.AdapterError, status, mark, f"cannot load {os.fsdecode(path)}")
        self._model = model
        self.path = os.fsdecode(path)

    def __dealloc__(self):
        with nogil:
            self._c_adapter.reset()

    cdef lib.llama_adapter_lora *_require_open(self) except NULL:
        if self._c_adapter == NULL:
            raise errors.ClosedError("the adapter is closed")
        _check_generation(self._c_adapter.get().generation)
        return self._c_adapter.get().adapter

    def close(self):
        """Give up this object's share; contexts that use the adapter keep it.

        Wraps ``llama_adapter_lora_free``.
        """
        cdef nat.AdapterPtr share = move(self._c_adapter)
        with nogil:
            share.reset()

    @property
    def closed(self):
        return self._c_adapter == NULL

    def __repr__(self):
        return "<LoraAdapter closed>" if self._c_adapter == NULL else f"<LoraAdapter {self.path!r}>"

    def __reduce__(self):
        raise TypeError("a LoraAdapter cannot be pickled; pickle its path")

    @property
    def model(self):
        return self._model

    @property
    def metadata(self):
        """The adapter's scalar metadata as a dict of strings."""
        cdef lib.llama_adapter_lora *adapter = self._require_open()
        cdef dict found = {}
        cdef char key[256]
        cdef vector[char] value
        cdef int32_t i, n
        for i in range(lib.llama_adapter_meta_count(adapter)):
            lib.llama_adapter_meta_key_by_index(adapter, i, key, sizeof(key))
            value.resize(256)
            n = lib.llama_adapter_meta_val_str_by_index(adapter, i, value.data(), value.size())
            if n >= <int32_t> value.size():
                value.resize(n + 1)
                lib.llama_adapter_meta_val_str_by_index(adapter, i, value.data(), value.size())
            if n >= 0:
                found[_text(key)] = _text(value.data())
        return found

    @property
    def invocation_tokens(self):
        """Ids that switch an activated LoRA (aLoRA) on; empty for ordinary adapters."""
        cdef lib.llama_adapter_lora *adapter = self._require_open()
        cdef uint64_t n = lib.llama_adapter_get_alora_n_invocation_tokens(adapter)
        cdef const int32_t *ids = lib.llama_adapter_get_alora_invocation_tokens(adapter)
        cdef uint64_t i
        return tuple([ids[i] for i in range(n)])


cdef int _adapter_set(Context context, object adapters, vector[nat.AdapterPtr] &pointers,
                      vector[float] &scales) except -1:
    """Check a mapping of adapter to scale and take it apart."""
    cdef LoraAdapter adapter
    for item, scale in adapters.items():
        adapter = <LoraAdapter?> item
        adapter._require_open()
        if adapter._model is not context._model:
            raise errors.AdapterError("the adapter was loaded for another Model")
        pointers.push_back(adapter._c_adapter)
        scales.push_back(_number("scale", scale))
    return 0


cdef object _set_adapters(Context context, object adapters):
    cdef vector[nat.AdapterPtr] pointers
    cdef vector[float] scales
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    _adapter_set(context, adapters, pointers, scales)
    cdef nat.ContextHandle *handle = context._enter(True)
    with nogil:
        nat.set_adapters(deref(handle), pointers, scales, status)
    handle.leave()
    if status.kind != nat.STATUS_OK:
        raise _error(errors.AdapterError, status, mark, _str(status.message))


cdef object _set_control_vector(Context context, object data, object il_start, object il_end):
    cdef Py_buffer view
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef int32_t n_embd = context._model.n_embd
    cdef int32_t last = context._model.n_layer - 1 if il_end is None else il_end
    cdef int32_t first = il_start
    cdef nat.ContextHandle *handle = context._enter(True)
    try:
        if data is None:
            nat.set_control_vector(deref(handle), NULL, 0, n_embd, -1, -1, status)
        else:
            PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO | PyBUF_FORMAT)
            try:
                if view.format[0] != c"f" or (view.len // 4) % n_embd != 0:
                    raise errors.AdapterError(
                        f"a control vector is float32 rows of {n_embd} values")
                if not 1 <= first <= last < context._model.n_layer:
                    raise errors.AdapterError(
                        f"layers {first}..{last} are outside 1..{context._model.n_layer - 1}")
                nat.set_control_vector(
                    deref(handle), <float *> view.buf, view.len // 4, n_embd, first, last,
                    status)
            finally:
                PyBuffer_Release(&view)
    finally:
        handle.leave()
    if status.kind != nat.STATUS_OK:
        raise _error(errors.AdapterError, status, mark, _str(status.message))
