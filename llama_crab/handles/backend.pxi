# The process-wide facts: build, instruction sets, devices.

cdef dict _DEVICE_TYPES = {
    lib.GGML_BACKEND_DEVICE_TYPE_CPU: "cpu",
    lib.GGML_BACKEND_DEVICE_TYPE_GPU: "gpu",
    lib.GGML_BACKEND_DEVICE_TYPE_IGPU: "igpu",
    lib.GGML_BACKEND_DEVICE_TYPE_ACCEL: "accel",
    lib.GGML_BACKEND_DEVICE_TYPE_META: "meta",
}


@cython.final
cdef class Device:
    """A compute device as ggml sees it; memory in bytes, as of the moment it was listed.

    Wraps ``ggml_backend_dev_t``.
    """
    cdef readonly str name
    cdef readonly str description
    cdef readonly str type
    cdef readonly str backend
    cdef readonly size_t memory_free
    cdef readonly size_t memory_total

    def __repr__(self):
        return (f"Device({self.name!r}, type={self.type!r}, backend={self.backend!r}, "
                f"description={self.description!r}, "
                f"memory_free={self.memory_free}, memory_total={self.memory_total})")


def devices():
    """Return the devices of all compiled-in backends. Wraps ``ggml_backend_dev_get``."""
    cdef list found = []
    cdef lib.ggml_backend_dev_t dev
    cdef Device device
    cdef size_t i, free, total
    for i in range(lib.ggml_backend_dev_count()):
        dev = lib.ggml_backend_dev_get(i)
        free = total = 0
        with nogil:
            lib.ggml_backend_dev_memory(dev, &free, &total)
        device = Device.__new__(Device)
        device.name = _text(lib.ggml_backend_dev_name(dev))
        device.description = _text(lib.ggml_backend_dev_description(dev))
        device.type = _DEVICE_TYPES.get(lib.c_dev_type(dev), "unknown")
        device.backend = _text(lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(dev)))
        device.memory_free = free
        device.memory_total = total
        found.append(device)
    return found


def system_info():
    """Return the backends and the instruction sets compiled in and used.

    Wraps ``llama_print_system_info``.
    """
    return _text(lib.llama_print_system_info()).strip()


def llama_version():
    """Return llama.cpp's version. Wraps ``llama_version``."""
    return _text(lib.llama_version())


def build_commit():
    """Return the commit of llama.cpp that this core was built from."""
    return _text(nat.BUILD_COMMIT)


def build_backend():
    """Return the backend this core was built for: cpu, cuda, vulkan, rocm or metal."""
    return _text(nat.BUILD_BACKEND)


def ggml_version():
    """Return ggml's version. Wraps ``ggml_version``."""
    return _text(lib.ggml_version())


def supports_gpu_offload():
    """Return True when a GPU backend is compiled in and has a device."""
    return lib.llama_supports_gpu_offload()


def supports_mmap():
    """Return True when models can be memory-mapped. Wraps ``llama_supports_mmap``."""
    return lib.llama_supports_mmap()


def supports_mlock():
    """Return True when memory can be locked. Wraps ``llama_supports_mlock``."""
    return lib.llama_supports_mlock()


def supports_rpc():
    """Return True when ggml's RPC backend is compiled in. Wraps ``llama_supports_rpc``."""
    return lib.llama_supports_rpc()


def max_devices():
    """Return the most devices a model can be split over. Wraps ``llama_max_devices``."""
    return lib.llama_max_devices()


def max_parallel_sequences():
    """Return the most sequences a context can hold. Wraps ``llama_max_parallel_sequences``."""
    return lib.llama_max_parallel_sequences()


def time_us():
    """Return the monotonic clock that all timings use, in microseconds. Wraps ``llama_time_us``."""
    return lib.llama_time_us()
