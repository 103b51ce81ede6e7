"""Fits on devices given by hand: nothing is over-committed, and the bytes are the right ones.

The bytes are compared with what the `gguf` package says of the tensors, with the sizes of a KV
cache by its definition, and with what llama-common's own fit chooses.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import gguf
import pytest

import llama_crab
from llama_crab import Llama, LlamaParams, ParameterError, _core
from llama_crab.cli import main
from llama_crab.errors import (
    BackendUnavailableError,
    ContextCreateError,
    ModelLoadError,
    ModelNotFoundError,
    OutOfMemoryError,
)
from llama_crab.tuning.fit import MIN_N_CTX, Fit, fit
from llama_crab.tuning.profile import Profile, build_facts, identity_of, machine_facts
from llama_crab.tuning.rooms import DeviceRoom

GIB, MIB = 2**30, 2**20
# llama.cpp rounds each tensor up to the device's alignment.
ALIGNMENT = 128


def rooms(*sizes: float) -> list[DeviceRoom]:
    return [DeviceRoom(f"gpu{i}", int(size * GIB)) for i, size in enumerate(sizes)]


def assert_within(found: Fit) -> None:
    """Check the promise: what is used and the margin are within what is free, on each device."""
    for row in found.rows:
        assert row.used + found.margin <= row.free
        assert row.used == row.model + row.context + row.compute
    assert found.fits


@cache
def tensor_bytes(path: Path) -> dict[str, int]:
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


def on_device(tensors: dict[str, int], n_gpu_layers: int, n_layer: int) -> tuple[int, int]:
    """Return the bytes of the tensors that llama.cpp offloads, and their number.

    The embedding of the tokens stays on the host. Where it is the output matrix as well, a copy of
    it is offloaded with the output layer.
    """
    first = n_layer + 1 - n_gpu_layers
    names = [
        name for name in tensors if name.startswith("blk.") and int(name.split(".")[1]) >= first
    ]
    if n_gpu_layers > 0:
        names += [name for name in tensors if name.startswith("output")]
        if "output.weight" not in tensors:
            names.append("token_embd.weight")
    return sum(tensors[name] for name in names), len(names)


# Sweeps. Sizes in GiB, from less than the margin to more than everything.

SWEEP = (0.2, 1, 1.05, 1.1, 1.2, 1.5, 24)
LARGE_SWEEP = (0.2, 1, 1.5, 2, 4, 6, 8, 12, 16, 24)


@pytest.mark.parametrize("fixture", ["smol_path", "gemma_path"])
def test_a_sweep_of_one_device_stays_within_and_grows(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(fixture)
    layers = []
    for size in SWEEP:
        found = fit(path, devices=rooms(size))
        assert_within(found)
        assert MIN_N_CTX <= found.n_ctx <= 4096
        layers.append(found.n_gpu_layers)
    assert layers == sorted(layers)
    assert layers[0] == 0
    assert layers[-1] == found.n_layer_max
    assert 0 < sorted(set(layers))[1] < found.n_layer_max


@pytest.mark.parametrize("name", ["7B", "70B", "8x7B"])
def test_a_sweep_with_large_models(name: str, large_path: Callable[[str], Path]) -> None:
    before: tuple[int, int] = (0, -1000)
    for size in LARGE_SWEEP:
        found = fit(large_path(name), devices=rooms(size))
        assert_within(found)
        # More layers, or as many and fewer experts left behind.
        after = (found.n_gpu_layers, -found.n_host_experts if found.n_gpu_layers else -1000)
        assert after >= before
        before = after
    assert before > (0, -1000)


@pytest.mark.parametrize("name", ["7B", "8x7B"])
def test_a_sweep_of_two_devices(name: str, large_path: Callable[[str], Path]) -> None:
    total = 0
    for size in (0.5, 2, 3, 5, 12):
        found = fit(large_path(name), devices=rooms(size, 3))
        assert_within(found)
        assert found.n_gpu_layers >= total
        total = found.n_gpu_layers
        if found.tensor_split is not None:
            assert sum(found.tensor_split) == found.n_gpu_layers
    assert len(found.rows) == 2
    # The first device is below the margin: it is left out, and said to be.
    alone = fit(large_path(name), devices=rooms(0.5, 3))
    assert [row.device for row in alone.dropped] == ["gpu0"]
    assert [row.device for row in alone.rows] == ["gpu1"]
    assert alone.apply(LlamaParams()).devices == ("gpu1",)


@pytest.mark.parametrize(
    "fixture",
    [
        *("tiny_path", "tiny_swa_path", "tiny_recurrent_path", "tiny_hybrid_path"),
        *("tiny_embedder_path", "tiny_reranker_path", "minilm_path"),
    ],
)
@pytest.mark.parametrize("margin", [0, 1])
def test_every_kind_of_model_stays_within(
    fixture: str, margin: int, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(fixture)
    whole = fit(path, devices=rooms(24), fit_margin_mib=margin)
    assert whole.offloads_all
    needed = whole.rows[0].used + whole.margin
    layers = []
    for percent in (0, 20, 60, 80, 90, 99, 100, 150):
        room = DeviceRoom("gpu", needed * percent // 100)
        found = fit(path, devices=[room], fit_margin_mib=margin)
        assert_within(found)
        layers.append(found.n_gpu_layers)
    assert layers == sorted(layers)
    assert layers[-2:] == [whole.n_layer_max] * 2


# Bytes


@pytest.mark.parametrize("n_gpu_layers", [0, 1, 7, 31, -1])
def test_weights_agree_with_the_file(smol_path: Path, n_gpu_layers: int) -> None:
    tensors = tensor_bytes(smol_path)
    found = fit(smol_path, devices=rooms(8), n_gpu_layers=n_gpu_layers, n_ctx=1024)
    n = 31 if n_gpu_layers < 0 else n_gpu_layers
    assert found.n_gpu_layers == n
    expected, n_tensors = on_device(tensors, n, 30)
    # Rows of 576 values are padded to 1024 at the end of each quantised tensor.
    assert 0 <= found.rows[0].model - expected <= n_tensors * 1024
    host = sum(tensors.values()) - expected
    if n > 0 and "output.weight" not in tensors:
        host += tensors["token_embd.weight"]
    assert abs(found.host.model - host) <= len(tensors) * ALIGNMENT
    # 3 heads of 64 for K and for V, two bytes each.
    per_layer = 1024 * 3 * 64 * 2 * 2
    # The output layer is one of those offloaded and has no cache.
    assert found.rows[0].context == per_layer * max(n - 1, 0)
    assert found.rows[0].context + found.host.context == per_layer * 30


@pytest.mark.parametrize(("name", "heads"), [("7B", 32), ("70B", 8), ("8x7B", 8)])
def test_bytes_of_large_models_agree_with_their_shapes(
    name: str, heads: int, large_path: Callable[[str], Path], large_gguf: ModuleType
) -> None:
    path = large_path(name)
    shape = large_gguf.SHAPES[name]
    tensors = tensor_bytes(path)
    found = fit(path, devices=rooms(80), n_ctx=4096)
    assert found.offloads_all
    expected, n_tensors = on_device(tensors, shape.n_layer + 1, shape.n_layer)
    assert 0 <= found.rows[0].model - expected <= n_tensors * ALIGNMENT
    assert found.rows[0].context == shape.n_layer * 4096 * heads * 128 * 2 * 2
    assert found.host.model == pytest.approx(tensors["token_embd.weight"], abs=ALIGNMENT)


def test_experts_on_the_host_are_the_ones_that_the_override_names(
    large_path: Callable[[str], Path],
) -> None:
    path = large_path("8x7B")
    found = fit(path, devices=rooms(10))
    assert found.tensor_buft_overrides is not None
    assert 0 < found.n_host_experts < 32
    experts = sum(
        size
        for name, size in tensor_bytes(path).items()
        if "exps" in name and int(name.split(".")[1]) < found.n_host_experts
    )
    embedding = tensor_bytes(path)["token_embd.weight"]
    assert found.host.model == pytest.approx(experts + embedding, abs=100 * ALIGNMENT)
    params = found.apply(LlamaParams(path))
    assert params.n_gpu_layers == 33
    assert params.tensor_buft_overrides == found.tensor_buft_overrides


def test_without_devices_the_bytes_are_those_of_a_real_context(smol_path: Path) -> None:
    found = fit(smol_path, n_ctx=2048)
    if _core.supports_gpu_offload():
        pytest.skip("this machine has a GPU, which would take part")
    assert found.rows == ()
    assert found.n_gpu_layers == 0
    with _core.Model(smol_path, use_extra_bufts=False) as model:
        assert found.host.model == pytest.approx(model.size, abs=len(tensor_bytes(smol_path)) * 128)


def test_cache_types_and_sequences_count(large_path: Callable[[str], Path]) -> None:
    path = large_path("7B")
    base = fit(path, devices=rooms(80), n_ctx=4096).rows[0]
    small = fit(path, devices=rooms(80), n_ctx=4096, type_k="q8_0", type_v="q8_0").rows[0]
    # 34 bytes for 32 values in place of 64; flash attention keeps copies in f16 meanwhile.
    assert small.context == base.context * 34 // 64
    assert small.compute > base.compute
    four = fit(path, devices=rooms(80), n_seq_max=4)
    assert four.n_ctx == 4 * 4096
    assert four.rows[0].context == 4 * base.context


@pytest.mark.parametrize("name", ["7B", "70B"])
def test_one_device_is_filled_as_llama_common_fills_it(
    name: str, large_path: Callable[[str], Path]
) -> None:
    path = large_path(name)
    context = {"n_ctx": 4096, "n_outputs_max": 1, "n_threads": 1, "n_threads_batch": 1}
    for size in (2, 4, 8, 16):
        free = size * GIB
        theirs = _core.common_fit(path, {}, context, [("gpu0", free, free)], GIB)
        ours = fit(path, devices=rooms(size), n_ctx=4096, n_threads=1)
        assert theirs["fits"]
        n = theirs["n_gpu_layers"]
        assert ours.n_gpu_layers == (ours.n_layer_max if n < 0 else n)


def test_experts_leave_the_host_as_in_llama_common(large_path: Callable[[str], Path]) -> None:
    path = large_path("8x7B")
    context = {"n_ctx": 4096, "n_outputs_max": 1, "n_threads": 1, "n_threads_batch": 1}
    free = 10 * GIB
    theirs = _core.common_fit(path, {}, context, [("gpu0", free, free)], GIB)
    ours = fit(path, devices=rooms(10), n_ctx=4096, n_threads=1)
    assert theirs["n_gpu_layers"] == ours.n_gpu_layers == 33
    # It may also divide the experts of one layer.
    assert abs(theirs["n_overrides"] - ours.n_host_experts) <= 1


# The context


def test_an_unset_context_shrinks_only_to_fit_everything(large_path: Callable[[str], Path]) -> None:
    path = large_path("7B")
    whole = fit(path, devices=rooms(24))
    room = whole.rows[0].used + whole.margin
    found = fit(path, devices=[DeviceRoom("gpu", room - 300 * MIB)])
    assert found.offloads_all
    assert MIN_N_CTX <= found.n_ctx < found.n_ctx_wanted == 4096
    assert found.n_ctx % 256 == 0
    assert found.apply(LlamaParams(path)).n_ctx == found.n_ctx
    kept = fit(path, devices=[DeviceRoom("gpu", room - 300 * MIB)], n_ctx=4096)
    assert kept.n_ctx == 4096
    assert kept.n_gpu_layers < kept.n_layer_max
    assert kept.apply(LlamaParams(path, n_ctx=4096)).n_ctx == 4096
    partial = fit(path, devices=rooms(3))
    assert partial.n_ctx == 4096
    assert partial.apply(LlamaParams(path)).n_ctx is None


def test_a_number_of_layers_is_measured_as_it_is(large_path: Callable[[str], Path]) -> None:
    found = fit(large_path("70B"), devices=rooms(8), n_gpu_layers=80)
    assert found.n_gpu_layers == 80
    assert not found.fits


def test_a_given_split_stays(large_path: Callable[[str], Path]) -> None:
    found = fit(large_path("7B"), devices=rooms(4, 4), tensor_split=(3, 1))
    assert_within(found)
    assert found.tensor_split is None
    assert 0 < found.n_gpu_layers < 33
    assert found.rows[0].model > 2 * found.rows[1].model


def test_one_device_of_several(large_path: Callable[[str], Path]) -> None:
    found = fit(large_path("7B"), devices=rooms(2, 8), split_mode="none", main_gpu=1)
    assert [row.device for row in found.rows] == ["gpu1"]
    with pytest.raises(ParameterError, match=r"^main_gpu: 2"):
        fit(large_path("7B"), devices=rooms(2, 8), split_mode="none", main_gpu=2)


# Loading


def test_a_load_without_a_gpu_measures_nothing(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if _core.supports_gpu_offload():
        pytest.skip("this machine has a GPU, so a load fits")

    def refuse(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(_core, "measure_memory", refuse)
    for value in (None, "auto", 0, -1):
        with Llama(tiny_path, n_gpu_layers=value) as llama:
            assert llama.n_ctx == 512


def test_a_gpu_that_is_asked_for_in_vain_is_an_error(tiny_path: Path) -> None:
    if _core.supports_gpu_offload():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailableError, match=r"n_gpu_layers=5"):
        Llama(tiny_path, n_gpu_layers=5)
    with pytest.raises(BackendUnavailableError, match=r"CUDA0"):
        Llama(tiny_path, n_gpu_layers="auto", devices="CUDA0")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let loads see one GPU of `size` bytes: planned for measuring, absent when loading."""
    real = _core.measure_memory

    def measure(path: str, fields: dict[str, object], context: dict[str, object], *_: object):
        names = fields.pop("devices", ("gpu0",))
        return real(path, fields | {"devices": ()}, context, [(n, size, size) for n in names])

    monkeypatch.setattr(_core, "measure_memory", measure)
    monkeypatch.setattr(_core, "supports_gpu_offload", lambda: True)


def test_a_load_takes_what_the_fit_chose(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpu(monkeypatch, 8 * GIB)
    with caplog.at_level(logging.INFO, "llama_crab.tuning"), Llama(tiny_path) as llama:
        assert llama.params.n_gpu_layers == 3
        assert llama.params.devices is None
    assert "3 of 3 layers (gpu0" in caplog.text


def test_where_nothing_fits_the_cpu_computes_with_a_warning(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpu(monkeypatch, 512 * MIB)
    with Llama(tiny_path) as llama:
        assert llama.params.n_gpu_layers == 0
        assert llama.params.devices == ()
        assert llama.create_completion("a", 2).usage.completion_tokens > 0
    assert "no layer fits with a margin of 1024 MiB: gpu0 has 512 MiB free" in caplog.text
    with Llama(tiny_path, fit_margin_mib=0) as llama:
        assert llama.params.n_gpu_layers == 3


def test_where_a_named_gpu_holds_nothing_it_is_an_error(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, 512 * MIB)
    gpu = type("D", (), {"name": "gpu0", "type": "gpu"})
    monkeypatch.setattr(_core, "devices", lambda: [gpu])
    with pytest.raises(BackendUnavailableError, match=r"devices: no layer fits .* 512 MiB free"):
        Llama(tiny_path, devices="gpu0")


@pytest.mark.skipif(
    not llama_crab.supports_gpu_offload(), reason="needs a GPU backend and a device that it sees"
)
def test_a_real_gpu_takes_all_of_a_small_model(smol_path: Path) -> None:
    before = {device.name: device.memory_free for device in _core.devices()}
    found = fit(smol_path)
    assert found.offloads_all
    assert_within(found)
    with Llama(smol_path) as llama:
        assert llama.params.n_gpu_layers == found.n_layer_max
        assert llama.create_completion("The capital of France is", 8).text
        after = {device.name: device.memory_free for device in _core.devices()}
    for row in found.rows:
        # A backend takes some hundred MiB of its own at its first context.
        assert before[row.device] - after[row.device] < row.used + found.margin


# Wrong input, and what must not go wrong


def test_wrong_input_is_named(tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r'^n_gpu_layers: expected a number .* "auto"'):
        LlamaParams(n_gpu_layers="all")
    with pytest.raises(ParameterError, match=r"^fit_margin_mib: -1 is less"):
        LlamaParams(fit_margin_mib=-1)
    with pytest.raises(ParameterError, match=r"^fit_margin_mib: expected an integer, not None"):
        LlamaParams(fit_margin_mib=None)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"split_mode='row'"):
        fit(tiny_path, devices=rooms(8), split_mode="row")
    with pytest.raises(ModelNotFoundError):
        fit(tmp_path / "none.gguf", devices=rooms(8))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ModelLoadError):
        fit(tmp_path / "bad.gguf", devices=rooms(8))
    with pytest.raises(ModelLoadError):
        _core.measure_memory(tmp_path / "bad.gguf", {}, {})
    with pytest.raises(ContextCreateError, match=r"n_seq_max=8 exceeds"):
        _core.measure_memory(tiny_path, {}, {"n_ctx": 256, "n_batch": 4, "n_seq_max": 8})
    with pytest.raises(ValueError, match=r"split_mode"):
        _core.measure_memory(tiny_path, {"split_mode": "row"}, {}, [("a", 1, 1)])
    with pytest.raises(ValueError, match=r"16 devices"):
        _core.measure_memory(tiny_path, {}, {}, [(f"g{i}", 1, 1) for i in range(17)])
    with pytest.raises(ValueError, match=r"n_ctx"):
        _core.common_fit(tiny_path, {}, {"n_ctx": 0}, [("a", 1, 1)], 0)
    with pytest.raises(ValueError, match=r"no device"):
        _core.common_fit(tiny_path, {}, {"n_ctx": 256}, [], 0)


def test_a_context_beyond_all_memory_is_refused_and_does_not_end_the_process(
    tiny_path: Path,
) -> None:
    """A cell takes 48 bytes of main memory even where no tensor is allocated."""
    for measured in (
        lambda: fit(tiny_path, devices=rooms(8), n_ctx=2**31 - 1),
        lambda: _core.measure_memory(tiny_path, {}, {"n_ctx": 2**31 - 1}),
    ):
        with pytest.raises(OutOfMemoryError, match=r"n_ctx=2147483647 needs 95 GiB of main memory"):
            measured()


def test_a_name_of_a_host_buffer_moves_no_bytes(smol_path: Path) -> None:
    """llama.cpp takes buffer types of one name for one."""
    expected = fit(smol_path, devices=[DeviceRoom("card", 8 * GIB)]).rows[0].model
    for name in ("CPU", "CPU_Mapped", "CPU_REPACK"):
        found = fit(smol_path, devices=[DeviceRoom(name, 8 * GIB)])
        assert found.rows[0].model == expected, name
    with pytest.raises(ValueError, match="different names"):
        _core.measure_memory(smol_path, {}, {}, [("a", GIB, GIB), ("a", GIB, GIB)])


def test_a_profile_counts_as_in_a_load(tiny_path: Path, tmp_path: Path) -> None:
    facts = {"model": identity_of(tiny_path), "machine": machine_facts(), "build": build_facts()}
    path = Profile(goal="latency", params={"n_gpu_layers": 1, "n_seq_max": 2}, **facts).save(
        tmp_path / "p.json"
    )
    found = fit(tiny_path, devices=rooms(8), profile=path)
    assert (found.n_gpu_layers, found.n_seq_max) == (1, 2)
    with pytest.raises(ParameterError, match="profile: 'fastest' is neither a file nor one of"):
        fit(tiny_path, devices=rooms(8), profile="fastest")


def test_measuring_is_quiet_frees_everything_and_runs_in_any_thread(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = _core.live_handles()
    results: list[Fit] = []

    def run() -> None:
        # More than the model was trained for: llama.cpp warns at each context.
        results.append(fit(tiny_path, devices=rooms(1.001, 1.001), n_ctx=2048))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert _core.live_handles() == before
    llama_crab.logs.flush()
    assert not [r for r in caplog.records if "n_ctx_train" in r.getMessage()]


# The command


def test_the_command_shows_the_breakdown_and_the_cards(
    large_path: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(large_path("70B"))
    assert main(["fit", path, "--ctx", "4096", "--devices", "8GiB,8GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["n_ctx", "4096", "tokens,", "1", "sequence"]
    assert any(line.split()[:2] == ["gpu1", "8192"] for line in lines)
    cells = next(line for line in lines if line.startswith("n_gpu_layers ") and "of 81  " in line)
    layers = [int(cell) for cell in cells.replace("of 81", "").split()[1:]]
    # The page's rule of thumb for a 70B Q4_K_M: 10-15, 20-25, 35-40; memory holds more than that.
    assert layers == sorted(layers)
    assert 10 <= layers[0] <= 15
    assert layers[1] >= 20
    assert 35 <= layers[2] < 81


def test_the_command_prints_json(smol_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", str(smol_path), "--json", "--device", "CUDA0:2GiB", "--device", "CUDA1:4GiB"]
    assert main([*command, "-np", "2", "-ctk", "q8_0", "-ctv", "q8_0"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["device"] for row in shown["rows"]] == ["CUDA0", "CUDA1"]
    assert shown["fits"] is True
    assert shown["n_seq_max"] == 2
    assert set(shown["cards"]) == {"8", "16", "24"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--devices", "8Q"], "devices: '8Q' is no size"),
        (["--device", "a:1GiB", "--device", "a:1GiB"], "devices: expected one or more different"),
        (["--margin", "-1"], "fit_margin_mib: -1 is less than 0"),
        (["-ngl", "many"], "invalid number of layers value: 'many'"),
    ],
)
def test_wrong_usage_is_one_line(
    options: list[str], named: str, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(tiny_path), *options]) == 2
    assert named in capsys.readouterr().err


def test_the_page_runs(smol_path: Path, run_page: Callable[..., list[str]]) -> None:
    lines = run_page("fitting.md", 1, '"model.gguf"', repr(str(smol_path)))
    assert lines[0] == "31 of 31 True"
    assert lines[1].split()[0] == "card"
    assert len(lines) == 3
