"""The numbers by which llama-cpp-python's arguments name things, and our names for them."""

from __future__ import annotations

LLAMA_DEFAULT_SEED = 0xFFFFFFFF

LLAMA_SPLIT_MODE_NONE = 0
LLAMA_SPLIT_MODE_LAYER = 1
LLAMA_SPLIT_MODE_ROW = 2
LLAMA_SPLIT_MODE_TENSOR = 3

LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED = -1
LLAMA_ROPE_SCALING_TYPE_NONE = 0
LLAMA_ROPE_SCALING_TYPE_LINEAR = 1
LLAMA_ROPE_SCALING_TYPE_YARN = 2
LLAMA_ROPE_SCALING_TYPE_LONGROPE = 3

LLAMA_POOLING_TYPE_UNSPECIFIED = -1
LLAMA_POOLING_TYPE_NONE = 0
LLAMA_POOLING_TYPE_MEAN = 1
LLAMA_POOLING_TYPE_CLS = 2
LLAMA_POOLING_TYPE_LAST = 3
LLAMA_POOLING_TYPE_RANK = 4

LLAMA_ATTENTION_TYPE_UNSPECIFIED = -1
LLAMA_ATTENTION_TYPE_CAUSAL = 0
LLAMA_ATTENTION_TYPE_NON_CAUSAL = 1

GGML_NUMA_STRATEGY_DISABLED = 0
GGML_NUMA_STRATEGY_DISTRIBUTE = 1
GGML_NUMA_STRATEGY_ISOLATE = 2
GGML_NUMA_STRATEGY_NUMACTL = 3
GGML_NUMA_STRATEGY_MIRROR = 4

GGML_TYPE_F32 = 0
GGML_TYPE_F16 = 1
GGML_TYPE_Q4_0 = 2
GGML_TYPE_Q4_1 = 3
GGML_TYPE_Q5_0 = 6
GGML_TYPE_Q5_1 = 7
GGML_TYPE_Q8_0 = 8
GGML_TYPE_IQ4_NL = 20
GGML_TYPE_BF16 = 30

NAMES: dict[str, dict[int, str]] = {
    "split_mode": {0: "none", 1: "layer", 2: "row", 3: "tensor"},
    "rope_scaling_type": {-1: "unspecified", 0: "none", 1: "linear", 2: "yarn", 3: "longrope"},
    "pooling_type": {-1: "unspecified", 0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"},
    "attention_type": {-1: "unspecified", 0: "causal", 1: "non_causal"},
    "cache_type": {
        GGML_TYPE_F32: "f32",
        GGML_TYPE_F16: "f16",
        GGML_TYPE_BF16: "bf16",
        GGML_TYPE_Q8_0: "q8_0",
        GGML_TYPE_Q5_1: "q5_1",
        GGML_TYPE_Q5_0: "q5_0",
        GGML_TYPE_Q4_1: "q4_1",
        GGML_TYPE_Q4_0: "q4_0",
        GGML_TYPE_IQ4_NL: "iq4_nl",
    },
}
"""Per argument, what its numbers mean; ``cache_type`` for ``type_k`` and ``type_v``."""
