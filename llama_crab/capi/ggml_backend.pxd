# ggml-backend.h
from libc.stddef cimport size_t

cdef extern from "ggml-backend.h" nogil:
    ctypedef struct ggml_backend_device:
        pass
    ctypedef ggml_backend_device *ggml_backend_dev_t
    ctypedef struct ggml_backend_reg:
        pass
    ctypedef ggml_backend_reg *ggml_backend_reg_t

    ctypedef struct ggml_backend_buffer_type:
        pass
    ctypedef ggml_backend_buffer_type *ggml_backend_buffer_type_t

    enum ggml_backend_dev_type:
        GGML_BACKEND_DEVICE_TYPE_CPU
        GGML_BACKEND_DEVICE_TYPE_GPU
        GGML_BACKEND_DEVICE_TYPE_IGPU
        GGML_BACKEND_DEVICE_TYPE_ACCEL
        GGML_BACKEND_DEVICE_TYPE_META

    const char *ggml_backend_dev_name(ggml_backend_dev_t device)
    const char *ggml_backend_dev_description(ggml_backend_dev_t device)
    void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t *free, size_t *total)
    # The C function shares its name with the enum above.
    int c_dev_type "ggml_backend_dev_type" (ggml_backend_dev_t device)
    ggml_backend_reg_t ggml_backend_dev_backend_reg(ggml_backend_dev_t device)

    ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device)

    const char *ggml_backend_reg_name(ggml_backend_reg_t reg)

    size_t ggml_backend_dev_count()
    ggml_backend_dev_t ggml_backend_dev_get(size_t index)
    ggml_backend_dev_t ggml_backend_dev_by_name(const char *name)
