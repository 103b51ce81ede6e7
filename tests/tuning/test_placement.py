"""The search alone, on made-up costs: what it chooses is the largest layout that fits."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from llama_crab.tuning.placement import DeviceTooSmallError, Layout, Placement

WEIGHTS, EXPERTS, KV, OUTPUT, COMPUTE = 100, 700, 0.01, 300, 50


def cost(n_layer: int, n_devices: int, *, experts: bool = False) -> Callable[[Layout], list[int]]:
    """Return a measure of a model of `n_layer` layers and an output layer."""

    def measure(layout: Layout) -> list[int]:
        counts: Sequence[int] = layout.split or ()
        if not counts:  # in equal shares, which is what llama.cpp does on equal devices
            share, more = divmod(layout.n_gpu_layers, n_devices)
            counts = [share + (i < more) for i in range(n_devices)]
        used = []
        layer = n_layer + 1 - layout.n_gpu_layers
        for count in counts:
            need = float(COMPUTE)
            for _ in range(count):
                if layer == n_layer:
                    need += OUTPUT
                else:
                    need += WEIGHTS + KV * layout.n_ctx
                    if experts and layer >= layout.n_host_experts:
                        need += EXPERTS
                layer += 1
            used.append(int(need))
        return used

    return measure


def placed(rooms: Sequence[int], n_layer: int = 30, *, experts: bool = False) -> Layout:
    measure = cost(n_layer, len(rooms), experts=experts)
    placement = Placement(measure, rooms, n_layer + 1, n_expert_layers=n_layer if experts else 0)
    layout = placement.choose(4096, 2048, 256)
    assert all(used <= room for used, room in zip(measure(layout), rooms, strict=True))
    return layout


def test_one_device_gets_exactly_what_fits() -> None:
    measure = cost(30, 1)
    for room in range(50, 5000, 37):
        layout = placed([room])
        if layout.n_gpu_layers < 31:
            assert layout.n_ctx == 4096
            assert measure(Layout(layout.n_gpu_layers + 1, 4096))[0] > room
            assert measure(Layout(31, 2048))[0] > room
        elif layout.n_ctx < 4096:
            assert layout.n_ctx >= 2048
            assert measure(Layout(31, layout.n_ctx + 256))[0] > room


def test_more_memory_never_gives_fewer_layers() -> None:
    rng = random.Random(0)
    for _ in range(50):
        rooms = [rng.randrange(50, 3000) for _ in range(rng.randrange(1, 4))]
        before = placed(rooms)
        rooms[rng.randrange(len(rooms))] += rng.randrange(0, 1000)
        after = placed(rooms)
        assert after.n_gpu_layers >= before.n_gpu_layers


def test_unequal_devices_are_filled_by_need() -> None:
    layout = placed([5000, 500])
    assert layout.n_gpu_layers == 31
    assert layout.split is not None
    assert layout.split[0] > 25


def test_experts_leave_before_layers_do() -> None:
    measure = cost(30, 1, experts=True)
    whole = measure(Layout(31, 4096))[0]
    assert placed([whole], experts=True) == Layout(31, 4096)
    n_host = []
    for room in range(measure(Layout(31, 4096, None, 30))[0], measure(Layout(31, 2048))[0], 531):
        layout = placed([room], experts=True)
        assert layout.n_gpu_layers == 31
        assert measure(Layout(31, 4096, None, layout.n_host_experts - 1))[0] > room
        n_host.append(layout.n_host_experts)
    assert n_host == sorted(n_host, reverse=True)
    # Less than all of the dense layers: no expert stays on a device.
    layout = placed([2000], experts=True)
    assert 0 < layout.n_gpu_layers < 31
    assert layout.n_host_experts == 30


def test_experts_are_spread_over_two_devices() -> None:
    layout = placed([9000, 9000], experts=True)
    assert layout.n_gpu_layers == 31
    assert 0 < layout.n_host_experts < 30
    with_one_more = Layout(31, 4096, layout.split, layout.n_host_experts - 1)
    assert sum(cost(30, 2, experts=True)(with_one_more)) > 17000


def test_a_device_that_cannot_serve_is_named() -> None:
    with pytest.raises(DeviceTooSmallError) as caught:
        placed([3000, 40])
    assert caught.value.index == 1


def test_costs_that_jump_do_not_break_the_promise() -> None:
    """Compute buffers are no straight line: some layouts need more than larger ones."""
    rng = random.Random(1)
    for _ in range(100):
        jumps = [rng.randrange(0, 400) for _ in range(32)]
        room = rng.randrange(450, 5000)

        def measure(layout: Layout, jumps: list[int] = jumps) -> list[int]:
            return [cost(30, 1)(layout)[0] + jumps[layout.n_gpu_layers]]

        layout = Placement(measure, [room], 31).choose(4096, 4096, 256)
        assert measure(layout)[0] <= room
