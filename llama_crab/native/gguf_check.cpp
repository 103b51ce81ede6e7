#include "gguf_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"
#include "gguf.h"

namespace llama_crab {

namespace {

struct GgufFree {
    void operator()(gguf_context * gguf) const { gguf_free(gguf); }
};
using GgufPtr = std::unique_ptr<gguf_context, GgufFree>;

GgufPtr open_metadata(const std::string & path) {
    return GgufPtr(gguf_init_from_file(path.c_str(), {/*no_alloc =*/true, /*ctx =*/nullptr}));
}

bool ends_with(const std::string & text, const char * end) {
    const size_t n = std::strlen(end);
    return text.size() >= n && text.compare(text.size() - n, n, end) == 0;
}

// The numbers of a model by key without the architecture's prefix. NaN stands for no number.
using Numbers = std::map<std::string, double>;

std::string without_prefix(const std::string & key) { return key.substr(key.find('.') + 1); }

double number_of(const gguf_context * gguf, int64_t i) {
    switch (gguf_get_kv_type(gguf, i)) {
        case GGUF_TYPE_UINT32:  return gguf_get_val_u32(gguf, i);
        case GGUF_TYPE_INT32:   return gguf_get_val_i32(gguf, i);
        case GGUF_TYPE_UINT64:  return (double) gguf_get_val_u64(gguf, i);
        case GGUF_TYPE_FLOAT32: return gguf_get_val_f32(gguf, i);
        default:                return NAN;
    }
}

bool is_checked(const std::string & key) {
    return ends_with(key, "epsilon") || ends_with(key, ".rope.dimension_count") ||
           ends_with(key, ".rope.dimension_count_swa") || ends_with(key, ".attention.key_length") ||
           ends_with(key, ".attention.key_length_swa") || ends_with(key, ".attention.head_count") ||
           ends_with(key, ".embedding_length");
}

Numbers read_numbers(const gguf_context * gguf, const llama_model_kv_override * overrides) {
    Numbers found;
    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        const std::string key = gguf_get_key(gguf, i);
        if (is_checked(key)) {
            found[without_prefix(key)] = number_of(gguf, i);
        }
    }
    for (; overrides != nullptr && overrides->key[0] != 0; ++overrides) {
        if (!is_checked(overrides->key)) {
            continue;
        }
        if (overrides->tag == LLAMA_KV_OVERRIDE_TYPE_FLOAT) {
            found[without_prefix(overrides->key)] = overrides->val_f64;
        } else if (overrides->tag == LLAMA_KV_OVERRIDE_TYPE_INT) {
            found[without_prefix(overrides->key)] = (double) overrides->val_i64;
        }
    }
    return found;
}

double get(const Numbers & numbers, const std::string & key) {
    const auto it = numbers.find(key);
    return it == numbers.end() ? NAN : it->second;
}

void check_rope(const Numbers & numbers, const std::string & rope_key, const char * head_key) {
    const double n_rot = get(numbers, rope_key);
    double       head  = get(numbers, head_key);
    if (std::isnan(head)) {
        head = get(numbers, "attention.key_length");
    }
    if (std::isnan(head)) {
        head = std::floor(get(numbers, "embedding_length") / get(numbers, "attention.head_count"));
    }
    if (!std::isnan(n_rot) && std::fmod(n_rot, 2) != 0) {
        throw std::runtime_error(rope_key + " is odd");
    }
    if (n_rot > head) {
        throw std::runtime_error(rope_key + " exceeds the size of an attention head");
    }
}

void check_numbers(const Numbers & numbers) {
    for (const auto & [key, value] : numbers) {
        // Normalisation asserts this in every compute thread.
        if (ends_with(key, "epsilon") && !(value >= 0 && std::isfinite(value))) {
            throw std::runtime_error(key + " is not a number >= 0");
        }
    }
    check_rope(numbers, "rope.dimension_count", "attention.key_length");
    check_rope(numbers, "rope.dimension_count_swa", "attention.key_length_swa");
}

// An EAGLE3 head's map from its own tokens to those of the target, where an id outside of them is an
// assertion in a compute thread.
void check_token_map(const gguf_context * gguf, int64_t tensor, const std::string & path) {
    const int64_t        key     = gguf_find_key(gguf, "tokenizer.ggml.tokens");
    const bool           listed  = key >= 0 && gguf_get_kv_type(gguf, key) == GGUF_TYPE_ARRAY;
    const size_t         n_vocab = listed ? gguf_get_arr_n(gguf, key) : 0;
    std::vector<int64_t> ids(gguf_get_tensor_size(gguf, tensor) / sizeof(int64_t));
    std::ifstream        file(path, std::ios::binary);
    file.seekg((std::streamoff) (gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, tensor)));
    file.read(reinterpret_cast<char *>(ids.data()), (std::streamsize) (ids.size() * sizeof(int64_t)));
    const bool fits = std::all_of(ids.begin(), ids.end(), [&](int64_t id) {
        return id >= 0 && (uint64_t) id < n_vocab;
    });
    if (!file || !fits) {
        throw std::runtime_error("tensor d2t names tokens outside the vocabulary");
    }
}

void check_tensors(const gguf_context * gguf, const std::string & path) {
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
        const ggml_type   type = gguf_get_tensor_type(gguf, i);
        const std::string name = gguf_get_tensor_name(gguf, i);
        if (name == "d2t" && type == GGML_TYPE_I64) {
            check_token_map(gguf, i, path);
            continue;
        }
        // A matrix product calls the type's dot product, a null pointer for integers and the like.
        // Tables from token to expert are integers by design; they are only looked up.
        const bool computable = ggml_get_type_traits_cpu(type)->vec_dot != nullptr ||
                                name.find("tid2eid") != std::string::npos;
        // Norms and biases go through elementwise operators, which assert in the compute threads.
        const bool elementwise = ends_with(name, "norm.weight") || ends_with(name, ".bias");
        if (!computable || (elementwise && type != GGML_TYPE_F32)) {
            throw std::runtime_error("tensor " + name + " has type " + ggml_type_name(type) +
                                     ", with which llama.cpp cannot compute");
        }
    }
}

// `path` and the further files of a split model, as llama.cpp names them.
std::vector<std::string> with_further_splits(const gguf_context * gguf, const std::string & path) {
    std::vector<std::string> found = {path};
    const int64_t            key   = gguf_find_key(gguf, "split.count");
    if (key < 0 || gguf_get_kv_type(gguf, key) != GGUF_TYPE_UINT16) {
        return found;
    }
    const int         count = gguf_get_val_u16(gguf, key);
    std::vector<char> prefix(path.size() + 1), name(path.size() + 32);
    if (llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, count) <= 0) {
        return found;
    }
    for (int i = 1; i < count; ++i) {
        if (llama_split_path(name.data(), name.size(), prefix.data(), i, count) > 0) {
            found.emplace_back(name.data());
        }
    }
    return found;
}

}  // namespace

void check_gguf(const std::vector<std::string> & paths, const llama_model_kv_override * overrides) {
    std::vector<std::string> files = paths;
    for (size_t i = 0; i < files.size(); ++i) {
        const std::string path = files[i];
        const GgufPtr     gguf = open_metadata(path);
        if (gguf == nullptr) {
            throw std::runtime_error((files.size() > 1 ? path + " is " : std::string()) +
                                     "not a readable GGUF file");
        }
        check_tensors(gguf.get(), path);
        if (i == 0) {
            check_numbers(read_numbers(gguf.get(), overrides));
            if (paths.size() == 1) {
                files = with_further_splits(gguf.get(), path);
            }
        }
    }
}

}  // namespace llama_crab
