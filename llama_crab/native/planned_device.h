// A ggml device that has a name and memory but computes nothing: llama.cpp plans on it, without
// allocating, as on a GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "ggml-backend.h"

namespace llama_crab {

// Memory of a device in bytes.
struct DeviceRoom {
    std::string name;
    uint64_t    free;
    uint64_t    total;
};

class PlannedDevice {
public:
    explicit PlannedDevice(DeviceRoom room);
    ~PlannedDevice();
    PlannedDevice(const PlannedDevice &) = delete;

    // Valid as long as this object lives; models and contexts that use it must be freed before.
    ggml_backend_dev_t device() const;

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace llama_crab
