"""Model: loading with every parameter, metadata, overrides, progress, splits, bad files."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from llama_crab import _core, errors

PARAMETERS: dict[str, list[Any]] = {
    "n_gpu_layers": [-1, 0, 99],
    "split_mode": ["none", "layer"],
    "load_mode": ["auto", "none", "mmap"],
    "lazy_mode": ["off", "auto", "on"],
    "main_gpu": [0],
    "tensor_split": [[1.0], [0.5, 0.5]],
    "devices": [[]],
    "kv_overrides": [{}, {"general.name": "other"}],
    "tensor_buft_overrides": [
        {},
        {r"blk\.\d+\.ffn_.*": "CPU"},
        {"token_embd": _core.devices()[-1]},
    ],
    "progress_callback": [lambda fraction: None],
    "vocab_only": [False, True],
    "check_tensors": [False, True],
    "use_extra_bufts": [False, True],
    "no_host": [False, True],
    "no_alloc": [False],
    "load_mtp": [False, True],
}


def logits_of(model: _core.Model, tokens: list[int]) -> np.ndarray:
    with (
        _core.Context(model, n_ctx=64, n_batch=32, n_threads=1, n_threads_batch=1) as context,
        _core.Batch(32) as batch,
    ):
        batch.extend(tokens, 0, 0, "last")
        context.decode(batch)
        out = np.empty(model.vocab.n_tokens, np.float32)
        return context.copy_logits(out)


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_is_accepted(tiny_path: Path, name: str) -> None:
    for value in PARAMETERS[name]:
        fields: Any = {name: value}
        with _core.Model(tiny_path, **fields) as model:
            assert model.n_embd == (0 if value is True and name == "vocab_only" else 64)


def test_every_field_of_the_c_struct_is_covered(llama_cpp_tree: Path) -> None:
    header = (llama_cpp_tree / "include" / "llama.h").read_text(encoding="utf-8")
    body = header.split("struct llama_model_params {")[1].split("};")[0]
    names = {
        line.split(";")[0].split()[-1].lstrip("*")
        for line in body.splitlines()
        if ";" in line and not line.strip().startswith("//")
    }
    # It belongs to the callback.
    hidden = {"progress_callback_user_data"}
    assert names - hidden == set(PARAMETERS)


def test_unknown_parameters_and_values_are_refused(tiny_path: Path) -> None:
    anything: Any = {"n_gpu_layer": 1}
    with pytest.raises(TypeError, match="n_gpu_layer"):
        _core.Model(tiny_path, **anything)
    anything = {"split_mode": "rows"}
    with pytest.raises(ValueError, match="'row'"):
        _core.Model(tiny_path, **anything)
    with pytest.raises(ValueError, match="tensor_split"):
        _core.Model(tiny_path, tensor_split=[1.0] * 1000)
    with pytest.raises(ValueError, match="finite"):
        _core.Model(tiny_path, tensor_split=[float("nan")])
    with pytest.raises(errors.BackendUnavailableError, match="CPU"):
        _core.Model(tiny_path, devices=["no such device"])
    with pytest.raises(errors.BackendUnavailableError, match="CPU"):
        _core.Model(tiny_path, tensor_buft_overrides={"blk": "no such device"})
    with pytest.raises(errors.ModelLoadError, match="cannot load"):
        _core.Model(tiny_path, tensor_buft_overrides={"(": "CPU"})
    with pytest.raises(ValueError, match="127 bytes"):
        _core.Model(tiny_path, kv_overrides={"k" * 128: 1})


def test_facts_are_those_that_were_written(tiny: _core.Model, tiny_gguf: ModuleType) -> None:
    t = tiny_gguf
    assert (tiny.n_embd, tiny.n_layer, tiny.n_head, tiny.n_head_kv, tiny.n_ctx_train) == (
        *(t.N_EMBD, t.N_LAYER, t.N_HEAD, t.N_HEAD_KV),
        t.N_CTX_TRAIN,
    )
    shapes = t._tensors("llama", tiny.vocab.n_tokens, np.random.default_rng(0)).values()
    assert tiny.n_params == sum(tensor.size for tensor in shapes)
    assert tiny.size == sum(tensor.nbytes for tensor in shapes)
    assert tiny.chat_template() == t.CHAT_TEMPLATE
    assert tiny.chat_template("no such variant") is None
    assert tiny.desc.startswith("llama")
    assert tiny.ftype == "all F32"
    assert (tiny.n_swa, tiny.has_encoder, tiny.has_decoder) == (0, False, True)
    assert (tiny.is_recurrent, tiny.is_hybrid, tiny.is_diffusion) == (False, False, False)
    assert (tiny.n_embd_inp, tiny.n_embd_out) == (t.N_EMBD, t.N_EMBD)
    assert tiny.decoder_start_token is None
    assert tiny.rope_freq_scale_train == 1.0
    assert (tiny.n_cls_out, tiny.cls_labels) == (1, [])


def test_metadata_equals_what_an_independent_reader_finds(
    smol: _core.Model, smol_path: Path
) -> None:
    found = smol.metadata
    scalars = {
        field.name: field.contents()
        for field in gguf.GGUFReader(smol_path).fields.values()
        if field.types and field.types[0] != gguf.GGUFValueType.ARRAY
    }
    checked = 0
    for key, value in scalars.items():
        if key.startswith("GGUF."):
            continue
        if isinstance(value, bool):
            assert found[key] == str(value).lower()
        elif isinstance(value, float):
            assert float(found[key]) == pytest.approx(value, rel=1e-4, abs=1e-6)
        else:
            assert found[key] == str(value)
        checked += 1
    assert checked > 15


def test_real_models_describe_themselves(smol: _core.Model, gemma: _core.Model) -> None:
    assert (smol.n_layer, smol.n_embd, smol.vocab.n_tokens) == (30, 576, 49152)
    assert (gemma.n_swa, gemma.vocab.n_tokens) == (512, 262144)
    assert "Q4_K" in gemma.ftype
    template = smol.chat_template()
    assert template is not None
    assert "<|im_start|>" in template


def test_overrides_of_each_type_take_effect(tiny_path: Path, tiny: _core.Model) -> None:
    with _core.Model(
        tiny_path,
        kv_overrides={
            "tokenizer.ggml.bos_token_id": 7,
            "tokenizer.ggml.add_bos_token": False,
            "llama.attention.layer_norm_rms_epsilon": 0.5,
            "llama.rope.scaling.type": "none",
        },
    ) as model:
        assert (tiny.vocab.bos, tiny.vocab.add_bos) == (1, True)
        assert (model.vocab.bos, model.vocab.add_bos) == (7, False)
        plain, changed = logits_of(tiny, [1, 5, 6]), logits_of(model, [1, 5, 6])
    assert np.abs(plain - changed).max() > 0.01


def test_a_string_override_takes_effect(tiny_path: Path) -> None:
    with pytest.raises(errors.ModelLoadError, match="no such tokenizer"):
        _core.Model(tiny_path, kv_overrides={"tokenizer.ggml.model": "no such tokenizer"})


def test_an_override_cannot_smuggle_in_what_computing_asserts(tiny_path: Path) -> None:
    with pytest.raises(errors.ModelLoadError, match="epsilon"):
        _core.Model(tiny_path, kv_overrides={"llama.attention.layer_norm_rms_epsilon": -1.0})


def test_progress_rises_from_0_to_1(tiny_path: Path) -> None:
    seen: list[float] = []
    _core.Model(tiny_path, progress_callback=seen.append).close()
    assert seen == sorted(seen)
    assert seen[0] < 0.5
    assert seen[-1] == 1.0


def test_progress_callback_cancels_with_false_only(tiny_path: Path) -> None:
    before = _core.live_handles()["models"]
    with pytest.raises(errors.ModelLoadCancelled, match=r"tiny\.gguf"):
        _core.Model(tiny_path, progress_callback=lambda fraction: fraction < 0.0)
    assert _core.live_handles()["models"] == before
    _core.Model(tiny_path, progress_callback=lambda fraction: 0).close()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_what_the_progress_callback_raises_arrives(
    tiny_path: Path, kind: type[BaseException]
) -> None:
    def callback(fraction: float) -> None:
        raise kind("from the callback")

    with pytest.raises(kind, match="from the callback"):
        _core.Model(tiny_path, progress_callback=callback)


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers SIGINT to consoles only")
def test_ctrl_c_ends_a_load(tiny_path: Path) -> None:
    sent: list[float] = []

    def interrupt_once(fraction: float) -> None:
        if not sent:
            sent.append(fraction)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _core.Model(tiny_path, progress_callback=interrupt_once)


def test_splits_give_the_same_logits_as_one_file(
    tiny: _core.Model, tiny_splits: list[Path], tmp_path: Path
) -> None:
    expected = logits_of(tiny, [1, 300, 301, 302])
    with _core.Model(tiny_splits[0]) as model:
        assert model.n_params == tiny.n_params
        np.testing.assert_array_equal(logits_of(model, [1, 300, 301, 302]), expected)
    # Files of any name, given in order.
    renamed = [
        Path(shutil.copy(part, tmp_path / name))
        for part, name in zip(tiny_splits, ("c", "a", "b"), strict=True)
    ]
    with _core.Model([*renamed]) as model:
        assert model.path == tuple(map(str, renamed))
        np.testing.assert_array_equal(logits_of(model, [1, 300, 301, 302]), expected)


def test_a_missing_split_is_named(tiny_splits: list[Path], tmp_path: Path) -> None:
    first = Path(shutil.copy(tiny_splits[0], tmp_path))
    with pytest.raises(errors.ModelLoadError, match="00002-of-00003"):
        _core.Model(first)


def test_a_later_split_alone_is_refused(tiny_splits: list[Path]) -> None:
    with pytest.raises(errors.ModelLoadError):
        _core.Model(tiny_splits[1])


def _truncated(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


def _not_gguf(path: Path, data: bytes) -> None:
    path.write_bytes(b"PK\3\4" + bytes(1000))


def _empty(path: Path, data: bytes) -> None:
    path.write_bytes(b"")


def _version_9(path: Path, data: bytes) -> None:
    path.write_bytes(data[:4] + struct.pack("<I", 9) + data[8:])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncated, "not within the file bounds|corrupted or incomplete"),
        (_not_gguf, "magic"),
        (_empty, "not a readable GGUF"),
        (_version_9, "version 9"),
    ],
)
def test_a_bad_file_is_a_load_error_with_llama_cpps_reason(
    tiny_path: Path, tmp_path: Path, damage: Callable[[Path, bytes], None], says: str
) -> None:
    path = tmp_path / "bad.gguf"
    damage(path, tiny_path.read_bytes())
    with pytest.raises(errors.ModelLoadError, match=says) as caught:
        _core.Model(path)
    assert isinstance(caught.value, OSError)
    assert "bad.gguf" in str(caught.value)
    assert caught.value.log


def test_a_bad_file_is_never_taken_for_a_cancelled_load(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(errors.ModelLoadError) as caught:
        _core.Model(path, progress_callback=lambda fraction: None)
    assert type(caught.value) is errors.ModelLoadError


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelNotFoundError, match="no such file") as caught:
        _core.Model(tmp_path / "absent.gguf")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(errors.ModelLoadError, match="directory"):
        _core.Model(tmp_path)
    with pytest.raises(ValueError, match="null byte"):
        _core.Model("a\0b")
    with pytest.raises(ValueError, match="no path"):
        _core.Model([])


def test_paths_of_every_kind_and_of_any_letters(tiny_path: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copy(tiny_path, tmp_path / "modèle 模型.gguf"))
    for form in (odd, str(odd), os.fsencode(odd)):
        with _core.Model(form) as model:
            assert model.path == str(odd)


def test_saved_model_loads_with_the_same_logits(tiny: _core.Model, tmp_path: Path) -> None:
    tiny.save(tmp_path / "saved.gguf")
    with _core.Model(tmp_path / "saved.gguf") as again:
        np.testing.assert_array_equal(logits_of(again, [1, 2, 3]), logits_of(tiny, [1, 2, 3]))


def test_saving_where_it_is_impossible_is_an_error(tiny: _core.Model, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelLoadError, match="cannot write"):
        tiny.save(tmp_path / "no folder" / "saved.gguf")


def test_vocab_only_has_a_vocabulary_and_no_contexts(tiny_path: Path, tmp_path: Path) -> None:
    with _core.Model(tiny_path, vocab_only=True) as model:
        assert model.vocab_only
        assert model.vocab.tokenize("a", False, False)
        with pytest.raises(errors.ContextCreateError, match="without weights"):
            _core.Context(model)
        with pytest.raises(ValueError, match="without weights"):
            model.save(tmp_path / "never.gguf")


def test_close_is_idempotent_and_pickling_says_what_to_do(tiny_path: Path) -> None:
    model = _core.Model(tiny_path)
    with pytest.raises(TypeError, match="path"):
        pickle.dumps(model)
    assert not model.closed
    model.close()
    model.close()
    assert model.closed
    assert repr(model) == "<Model closed>"
