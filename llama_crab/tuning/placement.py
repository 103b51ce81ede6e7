"""Which layers go to which device: a search that measures memory and knows nothing of llama.cpp.

llama.cpp offloads the last layers of a model; the output layer counts as one and comes first. It
gives each device a slice, in order, so devices are filled from the last to the first. What a
device needs grows with its layers, and with the tokens of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Layers on devices.

    ``split`` is the number of layers per device, None for llama.cpp's own choice, which follows
    free memory. ``n_host_experts`` layers, counted from the first one of the model, keep their
    experts in host memory.
    """

    n_gpu_layers: int
    n_ctx: int
    split: tuple[int, ...] | None = None
    n_host_experts: int = 0


class DeviceTooSmallError(Exception):
    """A device cannot take part: even without a layer it needs more memory than there is."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Placement:
    """The search for one model and one set of devices.

    ``measure(layout)`` returns the bytes that each device needs, ``rooms`` are the bytes it may
    use. ``n_layer_max`` layers are everything; ``n_expert_layers`` of them, 0 for a dense model,
    may leave their experts behind. With ``own_split`` the split is given and stays.
    """

    def __init__(
        self,
        measure: Callable[[Layout], Sequence[int]],
        rooms: Sequence[int],
        n_layer_max: int,
        *,
        n_expert_layers: int = 0,
        own_split: bool = False,
    ) -> None:
        self._measure = measure
        self._rooms = tuple(rooms)
        self._n_layer_max = n_layer_max
        self._n_expert_layers = n_expert_layers
        self._splits = len(self._rooms) > 1 and not own_split
        self._known: dict[Layout, tuple[int, ...]] = {}

    def choose(self, n_ctx: int, n_ctx_min: int, step: int) -> Layout:
        """Return the best layout that fits; it may have no layers.

        The context shrinks, by multiples of `step` tokens and not below `n_ctx_min`, only where
        that lets everything fit: it would buy few layers otherwise. Raises DeviceTooSmallError.
        """
        whole = self._whole(n_ctx)
        if whole is not None:
            return whole
        if n_ctx_min < n_ctx and self._whole(n_ctx_min) is not None:
            return self._longest(n_ctx_min, n_ctx, step)
        if self._n_expert_layers == 0:
            return self._fill(n_ctx, 0)
        return self._spread_experts(n_ctx)

    def fits(self, layout: Layout) -> bool:
        """Return whether no device needs more than it may use."""
        return all(used <= room for used, room in zip(self._used(layout), self._rooms, strict=True))

    def _used(self, layout: Layout) -> tuple[int, ...]:
        if layout not in self._known:
            self._known[layout] = tuple(self._measure(layout))
        return self._known[layout]

    def _whole(self, n_ctx: int, n_host_experts: int = 0) -> Layout | None:
        """Return a layout of all layers, or None where they do not fit."""
        layout = Layout(self._n_layer_max, n_ctx, None, n_host_experts)
        if self.fits(layout):
            return layout
        # A split by memory may miss by a layer what a split by need does not. Filling costs more,
        # so it is tried only where the devices together have the memory.
        if self._splits and sum(self._used(layout)) <= sum(self._rooms):
            layout = self._fill(n_ctx, n_host_experts)
            if layout.n_gpu_layers == self._n_layer_max:
                return layout
        return None

    def _longest(self, low: int, high: int, step: int) -> Layout:
        """Return the whole model with the longest context from `low`, which fits, below `high`."""
        best = self._whole(low)
        n_low, n_high = 0, -(-(high - low) // step)
        while n_high - n_low > 1:
            middle = (n_low + n_high) // 2
            layout = self._whole(low + middle * step)
            if layout is None:
                n_high = middle
            else:
                n_low, best = middle, layout
        assert best is not None
        return best

    def _spread_experts(self, n_ctx: int) -> Layout:
        """Offload everything but experts first: they are most of the weights, and idle most."""
        low, high = 0, self._n_expert_layers
        best = self._whole(n_ctx, high)
        if best is None:
            return self._fill(n_ctx, high)
        while high - low > 1:
            middle = (low + high) // 2
            layout = self._whole(n_ctx, middle)
            if layout is None:
                low = middle
            else:
                high, best = middle, layout
        return best

    def _fill(self, n_ctx: int, n_host_experts: int) -> Layout:
        """Give each device, from the last to the first, as many layers as it holds."""
        counts = [0] * (len(self._rooms) if self._splits else 1)

        def layout_of(counts: Sequence[int]) -> Layout:
            split = tuple(counts) if self._splits and any(counts) else None
            return Layout(sum(counts), n_ctx, split, n_host_experts)

        for index in reversed(range(len(counts))):
            left = self._n_layer_max - sum(counts)

            def with_layers(n: int, index: int = index) -> Layout:
                return layout_of([*counts[:index], n, *counts[index + 1 :]])

            counts[index] = self._most(left, with_layers, index if self._splits else None)
        # Layers on one device can change what another one needs, so the result is checked as a
        # whole, and gives way where it has to.
        while not self.fits(layout_of(counts)):
            used = self._used(layout_of(counts))
            over = [i for i, need in enumerate(used) if need > self._rooms[i]]
            given = over if self._splits else [0]
            given = [i for i in given if counts[i] > 0] or [
                i for i, count in enumerate(counts) if count > 0
            ]
            if not given:
                raise DeviceTooSmallError(over[0])
            counts[given[0]] -= 1
        return layout_of(counts)

    def _most(self, high: int, with_layers: Callable[[int], Layout], index: int | None) -> int:
        """Return the most layers, up to `high`, with which device `index` (None: each) fits."""

        def excess(n: int) -> int:
            pairs = list(zip(self._used(with_layers(n)), self._rooms, strict=True))
            return max(used - room for used, room in (pairs if index is None else [pairs[index]]))

        over_high = excess(high)
        if over_high <= 0:
            return high
        low, over_low = 0, excess(0)
        if over_low > 0:
            used = self._used(with_layers(0))
            needs = [used[i] - room for i, room in enumerate(self._rooms)]
            raise DeviceTooSmallError(needs.index(max(needs)) if index is None else index)
        by_halves = False
        while high - low > 1:
            # Layers are much alike, so a straight line is a good guess; halving bounds the rest.
            share = 0.5 if by_halves else -over_low / (over_high - over_low)
            n = low + min(max(int((high - low) * share), 1), high - low - 1)
            over = excess(n)
            if over > 0:
                high, over_high = n, over
            else:
                low, over_low = n, over
            by_halves = not by_halves
        return low
