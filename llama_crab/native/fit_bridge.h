// What a model and its context would take on each device, measured by llama.cpp without allocating.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "guard.h"
#include "llama.h"
#include "planned_device.h"

namespace llama_crab {

// Bytes on one device. The host's row is the last one; its room is that of the CPU device.
struct MemoryRow {
    DeviceRoom room;
    uint64_t   model   = 0;
    uint64_t   context = 0;
    uint64_t   compute = 0;
};

struct MemoryUse {
    std::vector<MemoryRow> rows;
    int32_t                n_layer_max = 0;  // n_gpu_layers that offloads everything
};

// `rooms` are devices to plan on in place of real ones; none means those of `params`. Any thread
// may call it: what llama.cpp logs meanwhile stays off the ring, and its logger is left as it is.
MemoryUse measure_memory(const std::string & path, llama_model_params model_params,
                         llama_context_params context_params, const std::vector<DeviceRoom> & rooms,
                         Status & status) noexcept;

// llama-common's own fit, to compare with. One at a time: it swaps the process's logger.
struct CommonFit {
    int                status       = 0;  // common_params_fit_status
    int32_t            n_gpu_layers = 0;
    std::vector<float> tensor_split;
    int32_t            n_overrides = 0;
};
CommonFit common_fit(const std::string & path, llama_model_params model_params,
                     llama_context_params context_params, const std::vector<DeviceRoom> & rooms,
                     uint64_t margin, Status & status) noexcept;

}  // namespace llama_crab
