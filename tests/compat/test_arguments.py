"""The constructor's arguments: what they become, what warns, what is refused."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from llama_crab import ParameterError, PromptLookupDecoding
from llama_crab.compat.llama_cpp import (
    GGML_TYPE_Q8_0,
    LLAMA_POOLING_TYPE_MEAN,
    LLAMA_SPLIT_MODE_ROW,
    Llama,
    LlamaCppCompatWarning,
    LlamaPromptLookupDecoding,
    NotSupportedError,
)
from llama_crab.compat.llama_cpp.arguments import REMOVED, load_params
from llama_crab.compat.llama_cpp.llama_speculative import LlamaDraftModel
from llama_crab.errors import ModelNotFoundError
from llama_crab.params import LlamaParams

# llama-cpp-python 0.3.36's, in its order.
ARGUMENTS = [
    *("model_path", "n_gpu_layers", "split_mode", "main_gpu", "tensor_split", "vocab_only"),
    *("use_mmap", "use_mlock", "kv_overrides", "seed", "n_ctx", "n_batch", "n_ubatch"),
    *("n_threads", "n_threads_batch", "rope_scaling_type", "pooling_type", "attention_type"),
    *("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor"),
    *("yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx", "logits_all", "embedding"),
    *("offload_kqv", "flash_attn", "op_offload", "swa_full", "no_perf", "last_n_tokens_size"),
    *("lora_base", "lora_scale", "lora_path", "numa", "chat_format", "chat_handler"),
    *("draft_model", "tokenizer", "type_k", "type_v", "spm_infill", "verbose"),
]


def params(**given: Any) -> LlamaParams:
    defaults = inspect.signature(Llama.__init__).parameters
    names = {name: item.default for name, item in defaults.items() if name in ARGUMENTS}
    return load_params({**names, "model_path": "m.gguf", **given}, None)


def test_the_signature_is_llama_cpp_pythons() -> None:
    names = list(inspect.signature(Llama.__init__).parameters)
    assert names == ["self", *ARGUMENTS, "llama_params", "removed"]


def test_defaults_are_left_to_llama_cpp() -> None:
    expected = LlamaParams(
        "m.gguf",
        verbose=True,
        split_mode="layer",
        n_gpu_layers=0,
        n_ctx=512,
        n_batch=512,
        n_ubatch=512,
    )
    assert params() == expected


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"use_mmap": False}, "load_mode", "none"),
        ({"use_mlock": True}, "load_mode", "mmap_mlock"),
        ({"use_mmap": False, "use_mlock": True}, "load_mode", "mlock"),
        ({"split_mode": LLAMA_SPLIT_MODE_ROW}, "split_mode", "row"),
        ({"pooling_type": LLAMA_POOLING_TYPE_MEAN}, "pooling_type", "mean"),
        ({"attention_type": 0}, "attention_type", "causal"),
        ({"rope_scaling_type": 2}, "rope_scaling_type", "yarn"),
        ({"rope_freq_base": 5e5}, "rope_freq_base", 5e5),
        ({"yarn_beta_fast": 16.0}, "yarn_beta_fast", 16.0),
        ({"flash_attn": True}, "flash_attn_type", "enabled"),
        ({"flash_attn": False}, "flash_attn_type", "disabled"),
        ({"type_k": GGML_TYPE_Q8_0}, "type_k", "q8_0"),
        ({"offload_kqv": False}, "offload_kqv", False),
        ({"op_offload": True}, "op_offload", True),
        ({"swa_full": True}, "swa_full", True),
        ({"n_ctx": 100}, "n_batch", 100),
        ({"n_batch": 8}, "n_ubatch", 8),
        ({"n_ctx": 0}, "n_batch", 512),
        ({"embedding": True, "n_batch": 96}, "n_seq_max", 48),
        ({"kv_overrides": {"a.b": 1}}, "kv_overrides", {"a.b": 1}),
        ({"tensor_split": [1.0, 2.0]}, "tensor_split", (1.0, 2.0)),
    ],
)
def test_what_arguments_become(given: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(params(**given), field) == value


def test_draft_models_draft(smol_path: Path) -> None:
    found = params(draft_model=LlamaPromptLookupDecoding(3, 500)).speculative
    assert found == PromptLookupDecoding(3, 128)
    with pytest.raises(ParameterError, match=r"^draft_model: 5 cannot be called"):
        params(draft_model=5)

    class Own(LlamaDraftModel):
        n_calls = 0

        def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
            self.n_calls += 1
            return input_ids[:4]

    own = Own()
    prompt = "one two three one two three one two"
    plain = Llama(str(smol_path), n_ctx=256, verbose=False)
    drafted = Llama(str(smol_path), n_ctx=256, verbose=False, draft_model=own)
    texts = [
        llama(prompt, max_tokens=16, temperature=0.0)["choices"][0]["text"]
        for llama in (plain, drafted)
    ]
    assert texts[0] == texts[1]
    assert own.n_calls > 5
    plain.close()
    drafted.close()


@pytest.mark.parametrize(
    "given",
    [
        {"logits_all": True},
        {"numa": True},
        {"lora_base": "base.gguf"},
        {"n_parts": 2},
        {"f16_kv": False},
        {"device": "cpu"},
    ],
)
def test_arguments_without_meaning_warn_once(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.warns(LlamaCppCompatWarning, match=f"^{name}: "):
        params(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params(**given)


def test_neutral_values_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params(logits_all=False, numa=False, n_parts=-1, f16_kv=True, device=None)


def test_gpu_layers_without_a_gpu_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_crab.compat.llama_cpp import arguments

    monkeypatch.setattr(arguments._core, "supports_gpu_offload", lambda: False)
    with pytest.warns(LlamaCppCompatWarning, match="n_gpu_layers"):
        assert params(n_gpu_layers=-1).n_gpu_layers == 0
    monkeypatch.setattr(arguments._core, "supports_gpu_offload", lambda: True)
    assert params(n_gpu_layers=-1).n_gpu_layers == -1


def test_what_is_refused(tiny_path: Path) -> None:
    with pytest.raises(TypeError, match="n_contexts"):
        Llama(str(tiny_path), n_contexts=3)
    with pytest.raises(ValueError, match="no file"):
        Llama("missing.gguf")
    with pytest.raises(NotSupportedError, match="tokenizer"):
        params(tokenizer=object())
    for name, value in (("split_mode", 9), ("type_k", 13), ("pooling_type", 7)):
        with pytest.raises(ParameterError, match=name):
            params(**{name: value})
    assert "n_parts" in REMOVED


def test_fields_of_ours_win(tiny_path: Path) -> None:
    llama = Llama(str(tiny_path), n_ctx=256, verbose=False, llama_params={"n_seq_max": 2})
    assert llama.crab.context.n_seq_max == 2
    llama.close()
    llama.close()


def test_adapters_hold_for_every_request(tiny_path: Path, tiny_lora_path: Path) -> None:
    prompt = [5, 6, 7]
    texts = []
    for options in ({}, {"lora_path": str(tiny_lora_path), "lora_scale": 4.0}):
        llama = Llama(str(tiny_path), n_ctx=64, n_threads=1, verbose=False, **options)
        llama(prompt, max_tokens=8, temperature=0)
        texts.append(llama.input_ids)
        llama.close()
    assert texts[0] != texts[1]


class FakeHub(types.ModuleType):
    """Stands for huggingface_hub: a list of files, and paths of what was asked for."""

    def __init__(self, names: list[str], path: Path) -> None:
        super().__init__("huggingface_hub")
        self.asked: list[tuple[str, dict[str, Any]]] = []

        class HfApi:
            def list_repo_files(self, repo_id: str) -> list[str]:
                return names

        self.HfApi = HfApi
        self.path = path

    def hf_hub_download(self, repo_id: str, name: str, **where: Any) -> str:
        self.asked.append((name, where))
        return str(self.path)


def test_from_pretrained_fetches_all_parts(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [f"q8/m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub = FakeHub(["m-Q4_0.gguf", *parts, "mmproj.gguf"], tiny_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    llama = Llama.from_pretrained(
        "o/m", "*Q8_0*.gguf", ["mmproj*"], cache_dir="c", n_ctx=64, verbose=False
    )
    assert llama.n_ctx() >= 64
    assert hub.asked == [(name, {"cache_dir": "c"}) for name in (*parts, "mmproj.gguf")]
    llama.close()
    for pattern, what in (("*.bin", "no file"), ("m*.gguf", "several files")):
        with pytest.raises(ModelNotFoundError, match=what):
            Llama.from_pretrained("o/m", pattern)


def test_it_takes_the_place_of_llama_cpp() -> None:
    code = """
import llama_crab.compat.llama_cpp as ours
ours.install_as_llama_cpp()
ours.install_as_llama_cpp()
import llama_cpp
from llama_cpp import Llama, LlamaGrammar, LlamaCache, LlamaDiskCache, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
import llama_cpp.llama_types
assert llama_cpp is ours and Llama is ours.Llama
try:
    llama_cpp.llama_decode
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "C API" in done.stdout
