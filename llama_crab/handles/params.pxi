# Keyword arguments -> C structs. A field that is not given keeps llama.cpp's own default.

cdef dict _SPLIT_MODES = {
    "none": lib.LLAMA_SPLIT_MODE_NONE, "layer": lib.LLAMA_SPLIT_MODE_LAYER,
    "row": lib.LLAMA_SPLIT_MODE_ROW, "tensor": lib.LLAMA_SPLIT_MODE_TENSOR,
}
cdef dict _LOAD_MODES = {
    "auto": lib.LLAMA_LOAD_MODE_AUTO, "none": lib.LLAMA_LOAD_MODE_NONE,
    "mmap": lib.LLAMA_LOAD_MODE_MMAP, "mlock": lib.LLAMA_LOAD_MODE_MLOCK,
    "mmap_mlock": lib.LLAMA_LOAD_MODE_MMAP_MLOCK, "direct_io": lib.LLAMA_LOAD_MODE_DIRECT_IO,
}
cdef dict _LAZY_MODES = {
    "off": lib.LLAMA_LAZY_MODE_OFF, "auto": lib.LLAMA_LAZY_MODE_AUTO,
    "on": lib.LLAMA_LAZY_MODE_ON,
}
cdef dict _CONTEXT_TYPES = {
    "default": lib.LLAMA_CONTEXT_TYPE_DEFAULT, "mtp": lib.LLAMA_CONTEXT_TYPE_MTP,
}
cdef dict _ROPE_SCALING_TYPES = {
    "unspecified": lib.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
    "none": lib.LLAMA_ROPE_SCALING_TYPE_NONE, "linear": lib.LLAMA_ROPE_SCALING_TYPE_LINEAR,
    "yarn": lib.LLAMA_ROPE_SCALING_TYPE_YARN, "longrope": lib.LLAMA_ROPE_SCALING_TYPE_LONGROPE,
}
cdef dict _POOLING_TYPES = {
    "unspecified": lib.LLAMA_POOLING_TYPE_UNSPECIFIED, "none": lib.LLAMA_POOLING_TYPE_NONE,
    "mean": lib.LLAMA_POOLING_TYPE_MEAN, "cls": lib.LLAMA_POOLING_TYPE_CLS,
    "last": lib.LLAMA_POOLING_TYPE_LAST, "rank": lib.LLAMA_POOLING_TYPE_RANK,
}
cdef dict _ATTENTION_TYPES = {
    "unspecified": lib.LLAMA_ATTENTION_TYPE_UNSPECIFIED,
    "causal": lib.LLAMA_ATTENTION_TYPE_CAUSAL,
    "non_causal": lib.LLAMA_ATTENTION_TYPE_NON_CAUSAL,
}
cdef dict _FLASH_ATTN_TYPES = {
    "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO, "disabled": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "enabled": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: lib.LLAMA_FLASH_ATTN_TYPE_DISABLED, True: lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}

# What llama.cpp's own tools allow for the KV cache; other types reach assertions.
_KV_TYPE_NAMES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


cdef dict _kv_types():
    cdef dict found = {}
    cdef int i
    for i in range(lib.GGML_TYPE_COUNT):
        name = _text(lib.ggml_type_name(<lib.ggml_type> i))
        if name in _KV_TYPE_NAMES:
            found[name] = i
    return found

cdef dict _KV_TYPES = _kv_types()


cdef int _choice(dict table, str field, object value) except? -1000:
    try:
        return table[value]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in table)
        raise ValueError(f"{field}={value!r} is not one of {names}") from None


cdef int64_t _integer(str field, object value, int64_t low, int64_t high) except? -1000:
    cdef object number = value.__index__() if hasattr(value, "__index__") else None
    if number is None:
        raise TypeError(f"{field} must be an int, not {type(value).__name__}")
    if not low <= number <= high:
        raise ValueError(f"{field}={number} is outside {low}..{high}")
    return number


cdef float _number(str field, object value) except? -1000:
    cdef double number = value
    if number != number or number - number != 0:
        raise ValueError(f"{field}={value!r} is not finite")
    return <float> number


cdef lib.ggml_backend_dev_t _device(object item) except NULL:
    """Return the device of a name or of a `Device`."""
    name = item.name if isinstance(item, Device) else item
    if not isinstance(name, str):
        raise TypeError(f"expected a device name, not {type(name).__name__}")
    encoded = name.encode()
    cdef lib.ggml_backend_dev_t dev = lib.ggml_backend_dev_by_name(encoded)
    if dev == NULL:
        have = ", ".join([device.name for device in devices()])
        raise errors.BackendUnavailableError(f"no device {name!r}; there are: {have}")
    return dev


@cython.final
cdef class _ModelParams:
    """llama_model_params together with the arrays its pointers name."""
    cdef lib.llama_model_params c
    cdef vector[lib.ggml_backend_dev_t] devices
    cdef vector[float] tensor_split
    cdef vector[lib.llama_model_tensor_buft_override] tensor_buft_overrides
    cdef list patterns                 # bytes that tensor_buft_overrides points into
    cdef vector[lib.llama_model_kv_override] kv_overrides
    cdef object progress_callback
    cdef object raised                 # exception of the callback, re-raised after the load

    def __cinit__(self):
        self.c = lib.llama_model_default_params()

    cdef int set(self, str field, object value) except -1:
        if field == "n_gpu_layers":
            self.c.n_gpu_layers = _integer(field, value, -(1 << 31), (1 << 31) - 1)
        elif field == "split_mode":
            self.c.split_mode = <lib.llama_split_mode> _choice(_SPLIT_MODES, field, value)
        elif field == "load_mode":
            self.c.load_mode = <lib.llama_load_mode> _choice(_LOAD_MODES, field, value)
        elif field == "lazy_mode":
            self.c.lazy_mode = <lib.llama_lazy_mode> _choice(_LAZY_MODES, field, value)
        elif field == "main_gpu":
            self.c.main_gpu = _integer(field, value, -1, lib.llama_max_devices() - 1)
        elif field == "tensor_split":
            self.set_tensor_split(value)
        elif field == "devices":
            self.set_devices(value)
        elif field == "tensor_buft_overrides":
            self.set_tensor_buft_overrides(value)
        elif field == "kv_overrides":
            self.set_kv_overrides(value)
        elif field == "progress_callback":
            if not callable(value):
                raise TypeError("progress_callback must be callable")
            self.progress_callback = value
        elif field == "vocab_only":
            self.c.vocab_only = value
        elif field == "check_tensors":
            self.c.check_tensors = value
        elif field == "use_extra_bufts":
            self.c.use_extra_bufts = value
        elif field == "no_host":
            self.c.no_host = value
        elif field == "no_alloc":
            self.c.no_alloc = value
        elif field == "load_mtp":
            self.c.load_mtp = value
        else:
            raise TypeError(f"unknown model parameter {field!r}")
        return 0

    cdef int set_tensor_split(self, object value) except -1:
        shares = [_number("tensor_split", share) for share in value]
        if len(shares) > lib.llama_max_devices() or any(share < 0 for share in shares):
            raise ValueError(
                f"tensor_split takes up to {lib.llama_max_devices()} shares, none negative")
        # llama.cpp reads llama_max_devices() entries whatever was given.
        self.tensor_split.assign(lib.llama_max_devices(), 0.0)
        for i, share in enumerate(shares):
            self.tensor_split[i] = share
        self.c.tensor_split = self.tensor_split.data()
        return 0

    cdef int set_devices(self, object value) except -1:
        for item in value:
            self.devices.push_back(_device(item))
        self.devices.push_back(NULL)
        self.c.devices = self.devices.data()
        return 0

    cdef int set_tensor_buft_overrides(self, object value) except -1:
        cdef lib.llama_model_tensor_buft_override entry
        cdef bytes encoded
        self.patterns = []
        for pattern, device in value.items():
            encoded = pattern.encode()
            self.patterns.append(encoded)
            entry.pattern = encoded
            entry.buft = lib.ggml_backend_dev_buffer_type(_device(device))
            self.tensor_buft_overrides.push_back(entry)
        if self.tensor_buft_overrides.size() >= lib.llama_max_tensor_buft_overrides():
            raise ValueError("tensor_buft_overrides has too many entries")
        # The list ends with an empty pattern.
        entry.pattern = NULL
        entry.buft = NULL
        self.tensor_buft_overrides.push_back(entry)
        self.c.tensor_buft_overrides = self.tensor_buft_overrides.data()
        return 0

    cdef int set_kv_overrides(self, object value) except -1:
        cdef lib.llama_model_kv_override entry
        cdef bytes key, text
        cdef Py_ssize_t i
        for name, setting in value.items():
            key = name.encode()
            if not 0 < len(key) < 128:
                raise ValueError(f"kv_overrides key {name!r} must have 1 to 127 bytes")
            for i in range(128):
                entry.key[i] = key[i] if i < len(key) else 0
            if isinstance(setting, bool):
                entry.tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
                entry.val_bool = setting
            elif isinstance(setting, int):
                entry.tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
                entry.val_i64 = setting
            elif isinstance(setting, float):
                entry.tag = lib.LLAMA_KV_OVERRIDE_TYPE_FLOAT
                entry.val_f64 = setting
            elif isinstance(setting, str):
                text = setting.encode()
                if len(text) > 127:
                    raise ValueError(f"kv_overrides[{name!r}] is longer than 127 bytes")
                entry.tag = lib.LLAMA_KV_OVERRIDE_TYPE_STR
                for i in range(128):
                    entry.val_str[i] = text[i] if i < len(text) else 0
            else:
                raise TypeError(f"kv_overrides[{name!r}] must be bool, int, float or str")
            self.kv_overrides.push_back(entry)
        # The list ends with an empty key.
        entry.key[0] = 0
        self.kv_overrides.push_back(entry)
        self.c.kv_overrides = self.kv_overrides.data()
        return 0


cdef cbool _on_progress(float progress, void *user_data) noexcept nogil:
    # The one callback that needs the GIL: a load is long, and Ctrl-C must be able to end it.
    cdef cbool go_on = False
    if nat.enter_callback():
        with gil:
            go_on = _call_progress(progress, user_data)
        nat.leave_callback()
    return go_on


cdef cbool _call_progress(float progress, void *user_data) noexcept:
    cdef _ModelParams params = <_ModelParams> user_data
    try:
        PyErr_CheckSignals()
        if params.progress_callback is not None:
            return params.progress_callback(progress) is not False
        return True
    except BaseException as error:
        params.raised = error
        return False


cdef int _set_context_param(lib.llama_context_params *c, str field, object value) except -1:
    cdef int64_t u32 = 0xFFFFFFFF
    if field == "n_ctx":
        c.n_ctx = _integer(field, value, 0, u32 - 1024)
    elif field == "n_batch":
        c.n_batch = _integer(field, value, 1, (1 << 31) - 1)
    elif field == "n_ubatch":
        c.n_ubatch = _integer(field, value, 1, (1 << 31) - 1)
    elif field == "n_seq_max":
        c.n_seq_max = _integer(field, value, 1, lib.llama_max_parallel_sequences())
    elif field == "n_rs_seq":
        c.n_rs_seq = _integer(field, value, 0, 1024)
    elif field == "n_outputs_max":
        c.n_outputs_max = _integer(field, value, 0, (1 << 31) - 1)
    elif field == "n_outputs_max_per_seq":
        c.n_outputs_max_per_seq = _integer(field, value, 0, (1 << 31) - 1)
    elif field == "n_threads":
        c.n_threads = _integer(field, value, 1, lib.GGML_MAX_N_THREADS)
    elif field == "n_threads_batch":
        c.n_threads_batch = _integer(field, value, 1, lib.GGML_MAX_N_THREADS)
    elif field == "ctx_type":
        c.ctx_type = <lib.llama_context_type> _choice(_CONTEXT_TYPES, field, value)
    elif field == "rope_scaling_type":
        c.rope_scaling_type = <lib.llama_rope_scaling_type> _choice(
            _ROPE_SCALING_TYPES, field, value)
    elif field == "pooling_type":
        c.pooling_type = <lib.llama_pooling_type> _choice(_POOLING_TYPES, field, value)
    elif field == "attention_type":
        c.attention_type = <lib.llama_attention_type> _choice(_ATTENTION_TYPES, field, value)
    elif field == "flash_attn_type":
        c.flash_attn_type = <lib.llama_flash_attn_type> _choice(_FLASH_ATTN_TYPES, field, value)
    elif field == "type_k":
        c.type_k = <lib.ggml_type> _choice(_KV_TYPES, field, value)
    elif field == "type_v":
        c.type_v = <lib.ggml_type> _choice(_KV_TYPES, field, value)
    elif field == "rope_freq_base":
        c.rope_freq_base = _number(field, value)
    elif field == "rope_freq_scale":
        c.rope_freq_scale = _number(field, value)
    elif field == "yarn_ext_factor":
        c.yarn_ext_factor = _number(field, value)
    elif field == "yarn_attn_factor":
        c.yarn_attn_factor = _number(field, value)
    elif field == "yarn_beta_fast":
        c.yarn_beta_fast = _number(field, value)
    elif field == "yarn_beta_slow":
        c.yarn_beta_slow = _number(field, value)
    elif field == "yarn_orig_ctx":
        c.yarn_orig_ctx = _integer(field, value, 0, u32)
    elif field == "embeddings":
        c.embeddings = value
    elif field == "offload_kqv":
        c.offload_kqv = value
    elif field == "no_perf":
        c.no_perf = value
    elif field == "op_offload":
        c.op_offload = value
    elif field == "swa_full":
        c.swa_full = value
    elif field == "kv_unified":
        c.kv_unified = value
    else:
        raise TypeError(f"unknown context parameter {field!r}")
    return 0
