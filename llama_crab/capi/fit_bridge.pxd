# native/fit_bridge.h: what a model would allocate.
from libc.stdint cimport int32_t, uint64_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from llama_crab.capi.llama cimport llama_context_params, llama_model_params
from llama_crab.capi.native cimport Status

cdef extern from "native/fit_bridge.h" namespace "llama_crab" nogil:
    cppclass DeviceRoom:
        string name
        uint64_t free
        uint64_t total

    cppclass MemoryRow:
        DeviceRoom room
        uint64_t model
        uint64_t context
        uint64_t compute

    cppclass MemoryUse:
        vector[MemoryRow] rows
        int32_t n_layer_max
    MemoryUse measure_memory(
        const string& path, llama_model_params model_params, llama_context_params context_params,
        const vector[DeviceRoom]& rooms, Status& status)

    cppclass CommonFit:
        int status
        int32_t n_gpu_layers
        vector[float] tensor_split
        int32_t n_overrides
    CommonFit common_fit(
        const string& path, llama_model_params model_params, llama_context_params context_params,
        const vector[DeviceRoom]& rooms, uint64_t margin, Status& status)
