# Memory that a model and its context would take, without allocating them.

@cython.final
cdef class _FitRequest:
    """The arguments of the two functions below, in C."""
    cdef string path
    cdef _ModelParams model
    cdef lib.llama_context_params context
    cdef vector[fit_bridge.DeviceRoom] rooms

    def __cinit__(self, path, model_fields, context_fields, rooms):
        cdef fit_bridge.DeviceRoom room
        self.path = _path_bytes(path)
        # llama.cpp says "failed to open" and "not a GGUF" alike as NULL; tell them apart here.
        if not os.path.exists(path):
            raise errors.ModelNotFoundError(f"no such file: {os.fsdecode(path)}")
        if os.path.isdir(path):
            raise errors.ModelLoadError(f"is a directory: {os.fsdecode(path)}")
        self.model = _ModelParams()
        for field, value in model_fields.items():
            self.model.set(field, value)
        if self.model.c.vocab_only:
            raise ValueError("vocab_only leaves nothing to measure")
        self.context = lib.llama_context_default_params()
        for field, value in context_fields.items():
            _set_context_param(&self.context, field, value)
        _refuse_unfit_fields(&self.context, self.context.n_ctx or 0xFFFFFFFF)
        rooms = list(rooms)
        if len({name for name, _, _ in rooms}) < len(rooms):
            raise ValueError("rooms must have different names")
        for name, free, total in rooms:
            room.name = name.encode()
            room.free = _integer("free", free, 0, (1 << 63) - 1)
            room.total = _integer("total", total, 0, (1 << 63) - 1)
            self.rooms.push_back(room)
        if self.rooms.size() > lib.llama_max_devices():
            raise ValueError(f"a model can be split over {lib.llama_max_devices()} devices at most")
        if self.rooms.size() > 0 and self.model.c.split_mode not in (
                lib.LLAMA_SPLIT_MODE_NONE, lib.LLAMA_SPLIT_MODE_LAYER):
            raise ValueError("split_mode must be 'none' or 'layer' on planned devices")

    cdef object failure(self, const nat.Status& status, uint64_t mark):
        cls = errors.ModelLoadError
        if status.kind == nat.STATUS_FAILED and "context" in _str(status.message):
            cls = errors.ContextCreateError
        message = f"cannot measure {os.fsdecode(self.path)}"
        if status.kind == nat.STATUS_NO_MEMORY:
            message = f"{message}: {_str(status.message)}"
        return _error(cls, status, mark, message)


def measure_memory(path, model_fields, context_fields, rooms=()):
    """Return the bytes that a model and a context would take on each device; nothing is allocated.

    The fields are those of `Model` and `Context`. `rooms` are devices to plan on in place of real
    ones, as (name, free, total) in bytes: they compute nothing, and llama.cpp lays out weights, KV
    cache and compute buffers on them as on a GPU. The result has a row per device and, last, the
    host's, and ``n_layer_max``, the ``n_gpu_layers`` that offloads everything.

    Costs as much as loading the metadata: no tensor is read. Raises `ModelNotFoundError`,
    `ModelLoadError`, `ContextCreateError`, and `OutOfMemoryError` for more cells of a KV cache than
    main memory could keep account of. Thread-safety: any thread.

    Wraps ``llama_get_memory_breakdown``.
    """
    cdef _FitRequest request = _FitRequest(path, model_fields, context_fields, rooms)
    cdef fit_bridge.MemoryUse use
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef size_t i
    with nogil:
        use = fit_bridge.measure_memory(
            request.path, request.model.c, request.context, request.rooms, status)
    if status.kind != nat.STATUS_OK:
        raise request.failure(status, mark)
    cdef list rows = []
    for i in range(use.rows.size()):
        rows.append({
            "device": _str(use.rows[i].room.name),
            "free": use.rows[i].room.free, "total": use.rows[i].room.total,
            "model": use.rows[i].model, "context": use.rows[i].context,
            "compute": use.rows[i].compute,
        })
    return {"n_layer_max": use.n_layer_max, "rows": rows}


def common_fit(path, model_fields, context_fields, rooms, margin):
    """Return what llama-common's fit chooses for planned devices, to compare with.

    The arguments are those of `measure_memory`; `margin` is in bytes per device. While it runs, the
    process's logger is another one, so nothing else may use llama.cpp.

    Wraps ``common_fit_params``.
    """
    cdef _FitRequest request = _FitRequest(path, model_fields, context_fields, rooms)
    cdef fit_bridge.CommonFit found
    cdef nat.Status status
    cdef uint64_t mark = nat.log_mark()
    cdef uint64_t bytes_left = _integer("margin", margin, 0, (1 << 62))
    if request.context.n_ctx == 0:
        raise ValueError("n_ctx must be given")
    if request.rooms.size() == 0:
        raise ValueError("no device is given")
    with nogil:
        found = fit_bridge.common_fit(
            request.path, request.model.c, request.context, request.rooms, bytes_left, status)
    if status.kind != nat.STATUS_OK or found.status == 2:
        raise request.failure(status, mark)
    return {
        "fits": found.status == 0, "n_gpu_layers": found.n_gpu_layers,
        "tensor_split": list(found.tensor_split), "n_overrides": found.n_overrides,
    }
