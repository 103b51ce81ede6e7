#include "fit_bridge.h"

#include <memory>
#include <mutex>

#include "fit.h"
#include "handles.h"
#include "llama-ext.h"
#include "logsink.h"

namespace llama_crab {

namespace {

// Devices made for `rooms`, in the form that llama_model_params takes.
struct PlannedDevices {
    std::vector<std::unique_ptr<PlannedDevice>> owned;
    std::vector<ggml_backend_dev_t>             list;

    PlannedDevices(const std::vector<DeviceRoom> & rooms, llama_model_params & params) {
        for (const DeviceRoom & room : rooms) {
            owned.push_back(std::make_unique<PlannedDevice>(room));
            list.push_back(owned.back()->device());
        }
        list.push_back(nullptr);
        if (!rooms.empty()) {
            params.devices = list.data();
        }
    }
};

struct ContextDeleter {
    void operator()(llama_context * ctx) const { llama_free(ctx); }
};

DeviceRoom room_of(ggml_backend_dev_t dev) {
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(dev, &free, &total);
    return {ggml_backend_dev_name(dev), free, total};
}

}  // namespace

MemoryUse measure_memory(const std::string & path, llama_model_params model_params,
                         llama_context_params context_params, const std::vector<DeviceRoom> & rooms,
                         Status & status) noexcept {
    MemoryUse use;
    const LogMute mute;
    guarded(status, [&] {
        PlannedDevices planned(rooms, model_params);
        model_params.no_alloc  = true;
        model_params.load_mode = LLAMA_LOAD_MODE_NONE;
        const ModelPtr model = load_model({path}, model_params, status);
        if (model == nullptr) {
            return;
        }
        if (!has_room_for_cells(model->model, context_params, status)) {
            return;
        }
        const std::unique_ptr<llama_context, ContextDeleter> ctx(
            llama_init_from_model(model->model, context_params));
        if (ctx == nullptr) {
            status.set(Status::failed, "llama.cpp could not create the context");
            return;
        }
        use.n_layer_max = llama_model_n_layer(model->model) + 1 +
            (model_params.load_mtp ? llama_model_n_layer_nextn(model->model) : 0);

        // Asked after the context exists: a backend takes memory of its own when it starts.
        const size_t n_devices = llama_model_n_devices(model->model);
        use.rows.resize(n_devices + 1);
        for (size_t i = 0; i < n_devices; ++i) {
            use.rows[i].room = room_of(llama_model_get_device(model->model, i));
        }
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        use.rows.back().room = room_of(cpu);
        for (const auto & [buft, bytes] : llama_get_memory_breakdown(ctx.get())) {
            size_t i = n_devices;
            if (!ggml_backend_buft_is_host(buft)) {
                // What belongs to none of the devices, such as repacked weights, is in host memory.
                for (i = 0; i < n_devices; ++i) {
                    if (ggml_backend_buft_get_device(buft) == llama_model_get_device(model->model, i)) {
                        break;
                    }
                }
            }
            use.rows[i].model   += bytes.model;
            use.rows[i].context += bytes.context;
            use.rows[i].compute += bytes.compute;
        }
    });
    return use;
}

CommonFit common_fit(const std::string & path, llama_model_params model_params,
                     llama_context_params context_params, const std::vector<DeviceRoom> & rooms,
                     uint64_t margin, Status & status) noexcept {
    static std::mutex one_at_a_time;
    CommonFit result;
    const LogMute mute;
    guarded(status, [&] {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        PlannedDevices planned(rooms, model_params);
        std::vector<size_t> margins(llama_max_devices(), margin);
        std::vector<llama_model_tensor_buft_override> overrides(llama_max_tensor_buft_overrides());
        result.tensor_split.resize(llama_max_devices());
        result.status = common_fit_params(
            path.c_str(), &model_params, &context_params, result.tensor_split.data(),
            overrides.data(), margins.data(), context_params.n_ctx, nullptr, GGML_LOG_LEVEL_ERROR);
        result.n_gpu_layers = model_params.n_gpu_layers;
        result.tensor_split.resize(rooms.size());
        while (overrides[result.n_overrides].pattern != nullptr) {
            ++result.n_overrides;
        }
    });
    return result;
}

}  // namespace llama_crab
