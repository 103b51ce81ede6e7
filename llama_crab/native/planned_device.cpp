#include "planned_device.h"

#include <utility>

#include "ggml-backend-impl.h"

namespace llama_crab {

namespace {

// What CUDA does, the backend that pads and copies most: a plan for it is one for the others too.
constexpr size_t  alignment          = 128;
constexpr int64_t row_padding        = 512;  // elements, of quantised rows
constexpr int64_t offload_batch_size = 32;   // from here on it computes with weights of the host

// Of buffers that hold nothing. Only differences of addresses count, but NULL means unallocated.
void * const base_address = reinterpret_cast<void *>(uintptr_t(1) << 20);

size_t f16_copy(const ggml_tensor * cache) {
    return cache == nullptr || cache->type == GGML_TYPE_F16
        ? 0 : alignment + ggml_nelements(cache) * sizeof(ggml_fp16_t);
}

size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    size_t size = ggml_nbytes(tensor);
    if (tensor->op == GGML_OP_FLASH_ATTN_EXT) {
        size += f16_copy(tensor->src[1]) + f16_copy(tensor->src[2]);
    }
    if (ggml_is_quantized(tensor->type) && tensor->ne[0] % row_padding != 0) {
        size += ggml_row_size(tensor->type, row_padding - tensor->ne[0] % row_padding);
    }
    return size;
}

int64_t batch_size(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_GET_ROWS:
            return 0;
        case GGML_OP_MUL_MAT:
            return op->ne[1];
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE:
        case GGML_OP_ROPE_BACK:
            return op->ne[2];
        default:
            return ggml_nrows(op);
    }
}

// Some memories (recurrent states) are allocated even when nothing else is.
ggml_backend_buffer_i empty_buffer() {
    ggml_backend_buffer_i iface = {};
    iface.get_base      = [](ggml_backend_buffer_t) { return base_address; };
    iface.memset_tensor = [](ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t) {};
    iface.set_tensor    = [](ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {};
    iface.get_tensor    = [](ggml_backend_buffer_t, const ggml_tensor *, void *, size_t, size_t) {};
    iface.clear         = [](ggml_backend_buffer_t, uint8_t) {};
    return iface;
}

}  // namespace

struct PlannedDevice::Impl {
    DeviceRoom               room;
    // llama.cpp takes buffer types of one name for one, and a room may be called as one of the host's.
    std::string              buffer_name;
    ggml_backend_reg         reg;
    ggml_backend_device      device;
    ggml_backend_buffer_type buft;

    static Impl & of(ggml_backend_dev_t dev) { return *static_cast<Impl *>(dev->context); }

    explicit Impl(DeviceRoom room_) : room(std::move(room_)), buffer_name("planned:" + room.name), reg(), device(), buft() {
        reg.api_version            = GGML_BACKEND_API_VERSION;
        reg.context                = this;
        reg.iface.get_name         = [](ggml_backend_reg_t) { return "planned"; };
        reg.iface.get_device_count = [](ggml_backend_reg_t) { return size_t(1); };
        reg.iface.get_device       = [](ggml_backend_reg_t reg, size_t) {
            return &static_cast<Impl *>(reg->context)->device;
        };

        buft.device               = &device;
        buft.context              = this;
        buft.iface.get_name       = [](ggml_backend_buffer_type_t buft) {
            return static_cast<Impl *>(buft->context)->buffer_name.c_str();
        };
        buft.iface.get_alignment  = [](ggml_backend_buffer_type_t) { return alignment; };
        buft.iface.get_alloc_size = get_alloc_size;
        buft.iface.alloc_buffer   = [](ggml_backend_buffer_type_t buft, size_t size) {
            return ggml_backend_buffer_init(buft, empty_buffer(), nullptr, size);
        };

        device.reg                   = &reg;
        device.context               = this;
        device.iface.get_name        = [](ggml_backend_dev_t dev) { return of(dev).room.name.c_str(); };
        device.iface.get_description = [](ggml_backend_dev_t) { return "planned"; };
        device.iface.get_memory      = [](ggml_backend_dev_t dev, size_t * free, size_t * total) {
            *free  = of(dev).room.free;
            *total = of(dev).room.total;
        };
        device.iface.get_type  = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
        device.iface.get_props = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
            *props              = {};
            props->name         = of(dev).room.name.c_str();
            props->description  = "planned";
            props->memory_free  = of(dev).room.free;
            props->memory_total = of(dev).room.total;
            props->type         = GGML_BACKEND_DEVICE_TYPE_GPU;
            // With several devices these let llama.cpp overlap batches, which takes memory.
            props->caps.async   = true;
            props->caps.events  = true;
        };
        device.iface.init_backend = [](ggml_backend_dev_t dev, const char *) {
            static ggml_guid guid = {'l', 'l', 'a', 'm', 'a', '_', 'c', 'r', 'a', 'b', ' ', 'p', 'l', 'a', 'n'};
            ggml_backend_i iface = {};
            iface.get_name       = [](ggml_backend_t backend) {
                return of(backend->device).room.name.c_str();
            };
            iface.free          = [](ggml_backend_t backend) { delete backend; };
            iface.graph_compute = [](ggml_backend_t, ggml_cgraph *) { return GGML_STATUS_FAILED; };
            return new ggml_backend{&guid, iface, dev, nullptr};
        };
        device.iface.get_buffer_type = [](ggml_backend_dev_t dev) { return &of(dev).buft; };
        device.iface.supports_op     = [](ggml_backend_dev_t, const ggml_tensor *) { return true; };
        device.iface.supports_buft   = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
            return buft == &of(dev).buft;
        };
        device.iface.offload_op = [](ggml_backend_dev_t, const ggml_tensor * op) {
            return batch_size(op) >= offload_batch_size;
        };
    }
};

PlannedDevice::PlannedDevice(DeviceRoom room) : impl_(std::make_unique<Impl>(std::move(room))) {}
PlannedDevice::~PlannedDevice() = default;

ggml_backend_dev_t PlannedDevice::device() const { return &impl_->device; }

}  // namespace llama_crab
