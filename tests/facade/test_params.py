"""LlamaParams: values reach the core as given, and what llama.cpp would abort on is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from llama_crab.errors import LlamaCrabError
from llama_crab.params import CONTEXT_FIELDS, MODEL_FIELDS, LlamaParams, ParameterError
from llama_crab.sampling import SamplerChain


def test_nothing_set_leaves_every_native_default():
    params = LlamaParams()
    assert params.model is None
    assert params.model_params() == {}
    assert params.context_params() == {}


def test_set_fields_reach_the_core_under_llama_cpps_names():
    params = LlamaParams(
        "m.gguf", n_gpu_layers=-1, split_mode="row", tensor_split=[3, 1], n_ctx=0, type_k="q8_0"
    )
    assert params.model_params() == {
        "n_gpu_layers": -1,
        "split_mode": "row",
        "tensor_split": (3.0, 1.0),
    }
    assert params.context_params() == {"n_ctx": 0, "type_k": "q8_0"}


def test_every_field_belongs_to_the_model_the_context_or_the_facade():
    names = {field.name for field in dataclasses.fields(LlamaParams)}
    ours = {"model", "sampler", "seed", "verbose", "max_itl_ms"}
    ours |= {
        "cache_ram_mib",
        "cache_dir",
        "cache_disk_mib",
        "fit_margin_mib",
        "profile",
        "speculative",
    }
    assert names == ours | set(MODEL_FIELDS) | set(CONTEXT_FIELDS)


def test_only_the_model_is_positional():
    with pytest.raises(TypeError):
        LlamaParams("m.gguf", 2048)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "normal"),
    [(True, "enabled"), (False, "disabled"), ("AUTO", "auto"), ("enabled", "enabled")],
)
def test_flash_attention_takes_bools_and_names(given, normal):
    assert LlamaParams(flash_attn_type=given).flash_attn_type == normal


def test_names_of_choices_are_forgiving():
    params = LlamaParams(attention_type="non-causal", load_mode="mmap+mlock", type_v="BF16")
    assert params.attention_type == "non_causal"
    assert params.load_mode == "mmap_mlock"
    assert params.type_v == "bf16"


# Each of these was seen to end the process, or to return NULL, when given to llama.cpp directly.
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_ctx": -1}, "n_ctx: -1 is less than 0"),
        ({"n_batch": 0}, "n_batch: 0 is less than 1"),
        ({"n_ubatch": 0}, "n_ubatch: 0 is less than 1"),
        ({"n_seq_max": 0}, "n_seq_max: 0 is less than 1"),
        ({"n_seq_max": 257}, "n_seq_max: 257 is more than 256"),
        ({"n_threads": 0}, "n_threads: 0 is less than 1"),
        ({"n_threads_batch": 100_000}, "n_threads_batch: 100000 is more than 512"),
        ({"n_batch": 64, "n_ubatch": 65}, "n_ubatch: 65 is larger than n_batch 64"),
        ({"n_ubatch": 4096}, "n_ubatch: 4096 is larger than n_batch 2048 (the default)"),
        ({"n_seq_max": 4, "n_batch": 2}, "n_seq_max: 4 is larger than n_batch 2"),
        ({"n_seq_max": 4, "n_ctx": 3}, "n_seq_max: 4 is larger than n_ctx 3"),
        ({"n_seq_max": 4, "n_outputs_max": 1}, "n_seq_max: 4 is larger than n_outputs_max 1"),
        ({"attention_type": "non_causal", "n_ubatch": 32}, "n_ubatch: 32 is smaller than n_batch"),
        ({"type_k": "q8_1"}, "type_k: 'q8_1' is not one of"),
        ({"type_v": "i32"}, "type_v: 'i32' is not one of"),
        ({"type_v": "q8_0", "flash_attn_type": False}, "type_v: 'q8_0' needs flash attention"),
        ({"split_mode": "tensor", "flash_attn_type": False}, "split_mode: 'tensor' needs flash"),
        ({"kv_overrides": {"llama.attention.layer_norm_rms_epsilon": -1.0}}, "kv_overrides"),
        ({"kv_overrides": {"llama.rope.scaling.type": "nonsense"}}, "kv_overrides"),
    ],
)
def test_values_that_llama_cpp_aborts_on_are_refused(fields, message):
    with pytest.raises(ParameterError) as caught:
        LlamaParams(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": 3}, "model: expected a path or a repository name, not int"),
        ({"n_ctx": 2.5}, "n_ctx: expected an integer, not 2.5"),
        ({"n_ctx": True}, "n_ctx: expected an integer, not True"),
        ({"embeddings": 1}, "embeddings: expected True or False, not 1"),
        ({"rope_freq_base": float("nan")}, "rope_freq_base: expected a finite number"),
        ({"rope_freq_scale": -1.0}, "rope_freq_scale: -1.0 is less than 0"),
        ({"tensor_split": [0, 0]}, "tensor_split: at least one proportion"),
        ({"tensor_split": 3}, "tensor_split: expected one proportion per device"),
        ({"tensor_split": [1, -1]}, "tensor_split: -1.0 is less than 0"),
        ({"devices": ["CUDA0", 1]}, "devices: expected device names"),
        ({"devices": 5}, "devices: expected device names, not 5"),
        ({"devices": b"CUDA0"}, "devices: expected device names"),
        ({"tensor_split": [1e39, 1]}, "tensor_split: 1e+39 is beyond what a 32-bit float"),
        ({"tensor_split": [3e38, 3e38]}, "tensor_split: 3e+38 is beyond what a 32-bit float"),
        ({"tensor_split": [10**400]}, "tensor_split: expected a finite number"),
        ({"max_itl_ms": 10**400}, "max_itl_ms: expected a finite number"),
        ({"kv_overrides": {"k" * 128: 1}}, "is not 1 to 127 bytes"),
        ({"kv_overrides": {"k": "v" * 128}}, "longer than 127 bytes"),
        ({"kv_overrides": {"k": 2**63}}, "does not fit in 64 bits"),
        ({"kv_overrides": {"k": None}}, "expected a bool, int, finite float or str"),
        ({"seed": 0xFFFFFFFF}, "seed: 0xFFFFFFFF means 'random'"),
        ({"seed": -1}, "seed: -1 is less than 0"),
    ],
)
def test_wrong_types_and_ranges_name_the_field(fields, message):
    with pytest.raises(ParameterError) as caught:
        LlamaParams(**fields)
    assert message in str(caught.value)


def test_the_error_is_ours_and_a_value_error():
    assert issubclass(ParameterError, LlamaCrabError)
    assert issubclass(ParameterError, ValueError)


def test_a_typing_error_is_answered_with_the_nearest_name():
    with pytest.raises(ParameterError, match="did you mean 'disabled'"):
        LlamaParams(flash_attn_type="disbled")
    with pytest.raises(ParameterError, match=r"n_contex: .*did you mean 'n_ctx'"):
        LlamaParams.from_dict({"n_contex": 5})
    with pytest.raises(ParameterError, match="did you mean 'n_threads'"):
        LlamaParams().replace(n_thread=3)


def test_a_quantised_cache_with_automatic_flash_attention_is_allowed():
    assert LlamaParams(type_k="q4_0", type_v="q4_0").flash_attn_type is None


def test_resolve_fills_the_facades_defaults():
    params = LlamaParams(n_seq_max=4).resolve(n_ctx_train=8192, n_threads=6)
    assert params.context_params() == {
        "n_ctx": 4 * 4096,
        "n_seq_max": 4,
        "n_outputs_max": 4,
        "kv_unified": False,
        "n_threads": 6,
        "n_threads_batch": 6,
    }


@pytest.mark.parametrize("offloaded", [False, True])
def test_several_sequences_share_a_cache_on_a_gpu(offloaded: bool) -> None:
    machine = {"n_ctx_train": 8192, "n_threads": 6, "offloaded": offloaded}
    assert LlamaParams(n_seq_max=4).resolve(**machine).kv_unified is offloaded
    assert LlamaParams().resolve(**machine).kv_unified is None
    for given in (False, True):
        assert LlamaParams(n_seq_max=4, kv_unified=given).resolve(**machine).kv_unified is given


def test_resolve_keeps_what_was_set():
    given = LlamaParams(n_ctx=0, n_outputs_max=9, n_threads=3)
    params = given.resolve(n_ctx_train=8192, n_threads=6)
    assert (params.n_ctx, params.n_outputs_max) == (0, 9)
    assert (params.n_threads, params.n_threads_batch) == (3, 3)


def test_resolve_stays_within_a_short_trained_length():
    assert LlamaParams().resolve(n_ctx_train=512, n_threads=1).n_ctx == 512
    assert LlamaParams().resolve(n_ctx_train=0, n_threads=1).n_ctx == 4096


def test_resolve_leaves_room_for_the_output_of_every_token_of_an_embedding_batch():
    params = LlamaParams(embeddings=True).resolve(n_ctx_train=512, n_threads=1)
    assert params.n_outputs_max is None


def test_resolve_gives_non_causal_attention_whole_batches():
    params = LlamaParams(attention_type="non_causal", n_batch=600)
    assert params.resolve(n_ctx_train=512, n_threads=1).n_ubatch == 600


def test_replace_checks_again():
    params = LlamaParams(n_batch=64)
    assert params.replace(n_ubatch=64).n_ubatch == 64
    with pytest.raises(ParameterError, match="n_ubatch: 65"):
        params.replace(n_ubatch=65)


def test_parameters_survive_json_pickle_and_hashing():
    params = LlamaParams(
        "m.gguf",
        devices=["CPU"],
        tensor_split=[1, 2],
        kv_overrides={"general.name": "x", "llama.context_length": 64},
        flash_attn_type=True,
        sampler=SamplerChain.chat(),
        seed=7,
    )
    assert LlamaParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(params.replace())


def test_to_dict_and_repr_show_only_what_was_set():
    params = LlamaParams("m.gguf", n_ctx=512)
    assert params.to_dict() == {"model": "m.gguf", "n_ctx": 512}
    assert repr(params) == "LlamaParams(model='m.gguf', n_ctx=512)"


def test_parameters_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LlamaParams().n_ctx = 3  # type: ignore[misc]


def test_numpy_integers_are_integers():
    params = LlamaParams(n_ctx=np.int64(512))
    assert type(params.n_ctx) is int


def test_importing_params_does_not_import_numpy():
    code = "import sys, llama_crab.params; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
