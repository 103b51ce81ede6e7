"""Where a new sequence gets the beginning of its prompt from, so that it is not computed again."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .. import _core
from ..errors import StateError
from .radix_tree import RadixTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .request import Request
    from .snapshots import Snapshot, SnapshotStore

# Fewer tokens are computed again before anything is copied, waited for or moved.
MIN_SHARED = 32
# How often what was saved is expected to be used.
_USE_OF_SAVED = 0.25
_FORGET_COST = 0.99


@dataclass(slots=True)
class Placement:
    """The slot for a sequence, and what its first tokens come from.

    `n_keep` tokens are those in memory of slot `source` (-1: of `slot` itself). Or the sequence
    waits for slot `leader` to prefill the first `n_shared`.
    """

    slot: int
    source: int = -1
    n_keep: int = 0
    leader: int = -1
    n_shared: int = -1

    @property
    def n_reused(self) -> int:
        """Tokens that take no new cells of a unified cache."""
        return self.n_shared if self.leader >= 0 else self.n_keep


@dataclass(slots=True, eq=False)
class Claim:
    """A conversation whose content is given up last, and its snapshots that are pinned for it."""

    adapters: int
    key: bytes
    snapshots: list[Snapshot] = field(default_factory=list)


class PrefixCache:
    """Radix trees over what the slots hold, and the snapshots of what had to leave them.

    A prompt shares the cells of whichever slot, running or idle, has the same beginning: by
    reference in a unified cache, by copying the slot's stream otherwise. What an idle slot holds
    when it is needed for something else goes to the snapshots.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self, stepper: _core.Stepper, store: SnapshotStore | None) -> None:
        self._stepper = stepper
        self._store = store
        self._trees: dict[int, RadixTree[int]] = {}
        self._keys: list[tuple[int, bytes] | None] = [None] * stepper.n_slots
        self._used = [0] * stepper.n_slots
        self._clock = 0
        self._claims: dict[int, RadixTree[Claim]] = {}
        self.namespaces: dict[int, str] = {0: ""}
        """What tells LoRA sets apart in the snapshots, by index of the set."""
        self._save_us = 0.0  # per token, smoothed
        self.n_restored = 0
        self.n_saved = 0

    def place(
        self,
        ids: array[int],
        adapters: int,
        free: Iterable[int],
        *,
        reuse: bool = True,
        snapshots: bool = True,
    ) -> Placement:
        """Choose a slot among `free` for a prompt; a snapshot may be put into it on the way.

        With `reuse` off nothing of what is there is used, and nothing of it is waited for; with
        `snapshots` off only what is in the slots.
        """
        free = sorted(free)
        if not reuse:
            return Placement(self._target(free))
        limit = len(ids) - 1
        best, best_n, leader, led_n = -1, 0, -1, 0
        tree = self._trees.get(adapters)
        for n_common, slot in tree.matches(ids.tobytes()) if tree else ():
            n_common = min(n_common, limit)  # the last prompt token is always decoded
            if n_common <= best_n:
                break
            n = self._stepper.reusable_prefix(slot, ids, adapters)
            if n > best_n and (n >= MIN_SHARED or slot in free):
                best, best_n = slot, n
            if n_common > led_n and self._will_have(slot, n_common):
                leader, led_n = slot, n_common
        if led_n >= best_n + MIN_SHARED:
            return Placement(self._target(free), leader=leader, n_shared=led_n)
        restored = self._restore(ids, adapters, free, best, best_n) if snapshots else None
        if restored is not None:
            return restored
        covers = best in free and (
            2 * best_n > self._n_held(best) or self._asks_again(best, best_n)
        )
        if covers and best_n < self._n_held(best) and len(free) > 1 and self._claim(best):
            covers = (
                best_n < MIN_SHARED
            )  # the rest belongs to a conversation: a fork goes beside it
        if covers or [best] == free:
            if best_n < self._n_held(best):
                self._save(best)
            return Placement(best, n_keep=best_n)
        if best >= 0 and best_n >= MIN_SHARED:
            return Placement(self._target(free, but=best), source=best, n_keep=best_n)
        return Placement(self._target(free))

    def hold(self, slot: int, ids: array[int], adapters: int) -> None:
        """Note what `slot` has, or will have in memory, and that it was used just now."""
        self.forget(slot)
        key = ids.tobytes()
        self._trees.setdefault(adapters, RadixTree()).insert(key, slot)
        self._keys[slot] = (adapters, key)
        self._clock += 1
        self._used[slot] = self._clock

    def keep(self, slot: int) -> None:
        """Note that `slot` has come to rest: it holds what of its tokens is in memory."""
        n_past = self._stepper.progress(slot)[2]
        known = self._keys[slot]
        adapters = known[0] if known else 0
        if n_past == 0:
            self.forget(slot)
        else:
            self.hold(slot, array("i", self._stepper.tokens(slot)[:n_past]), adapters)

    def forget(self, slot: int) -> None:
        """Note that `slot` holds nothing any more."""
        # In this order: what a signal leaves half done must not fail the next time. An entry that
        # is left in a tree is harmless, because the slot is asked what it holds.
        known, self._keys[slot] = self._keys[slot], None
        self._used[slot] = 0
        if known is not None:
            adapters, key = known
            self._trees[adapters].remove(key, slot)

    def empty(self, slot: int) -> None:
        """Remove what an idle slot holds from memory."""
        self._stepper.clear(slot)
        self.forget(slot)

    def evict(self, idle: Iterable[int], but: int = -1) -> bool:
        """Remove the least recently used content from memory; return False if there is none."""
        held = [slot for slot in idle if slot != but and self._n_held(slot) > 0]
        if not held:
            return False
        slot = min(held, key=lambda slot: (self._claim(slot) is not None, self._used[slot]))
        self._save(slot)
        self.empty(slot)
        return True

    def takes_checkpoint(self, request: Request) -> bool:
        """Whether the state at the end of a prompt is wanted: it cannot be cut to it later."""
        return (
            not self._stepper.can_cut
            and self._store is not None
            and request.cache_prompt
            and len(request.prompt) > MIN_SHARED
        )

    def checkpoint(self, slot: int, request: Request) -> None:
        """Take a snapshot of a running slot, if it is at the end of its prompt."""
        ids = request.prompt[:-1]
        if self._n_held(slot) == len(ids):
            self._put(slot, array("i", ids).tobytes(), request.adapters)

    def protect(self, ids: array[int], adapters: int) -> Claim:
        """Have the content of a conversation leave its slot, and the snapshots, after all other."""
        claim = Claim(adapters, ids.tobytes())
        if claim.key:
            self._claims.setdefault(adapters, RadixTree()).insert(claim.key, claim)
        return claim

    def unprotect(self, claim: Claim) -> None:
        """Take `protect` back."""
        if claim.key:
            self._claims[claim.adapters].remove(claim.key, claim)
        for snapshot in claim.snapshots:
            if self._store is not None and snapshot.pins:
                self._store.unpin(snapshot)

    def adopt(self, ids: array[int], state: bytes, adapters: int, free: list[int]) -> None:
        """Put a state that came from elsewhere into a slot, or else among the snapshots.

        Raises `StateError` when it does not fit the context.
        """
        if free:
            slot = self._target(free)
            if self._has_cells(len(ids), slot, free, -1) and self._stepper.restore(
                slot, ids, state, adapters
            ):
                self.hold(slot, ids, adapters)
                return
        if self._store is not None:
            self._store.put(ids.tobytes(), state, self.namespaces[adapters])

    def stats(self) -> Mapping[str, Any]:
        """Return exact counts: cells, and bytes and entries of each tier."""
        store = self._store
        return {
            "n_cells": self._stepper.context.n_ctx,
            "n_cells_used": self._stepper.n_cells_used,
            "n_slots_held": sum(key is not None for key in self._keys),
            "ram_bytes": store.ram_used if store else 0,
            "ram_entries": store.n_ram if store else 0,
            "disk_bytes": store.disk_used if store else 0,
            "disk_entries": store.n_disk if store else 0,
            "n_saved": self.n_saved,
            "n_restored": self.n_restored,
        }

    def _asks_again(self, slot: int, n: int) -> bool:
        """Whether `n` tokens are all that `slot` was asked: what follows is but an old answer."""
        return 0 < self._stepper.progress(slot)[0] <= n + 1

    def _n_held(self, slot: int) -> int:
        return self._stepper.progress(slot)[2]

    def _will_have(self, slot: int, n: int) -> bool:
        """Whether `slot` is about to have `n` tokens of its prompt in memory that it has not."""
        n_prompt, _, n_past, _ = self._stepper.progress(slot)
        return self._stepper.is_active(slot) and n_past < n <= n_prompt

    def _target(self, free: list[int], but: int = -1) -> int:
        """Return the slot whose content is least missed: an empty one, else the oldest.

        Low numbers first: with a stream per sequence only neighbours share a micro-batch.
        """
        slots = [slot for slot in free if slot != but]

        def value(slot: int) -> tuple[bool, bool, int, int]:
            return self._n_held(slot) > 0, self._claim(slot) is not None, self._used[slot], slot

        slot = min(slots, key=value)
        self._save(slot)
        return slot

    def _claim(self, slot: int) -> Claim | None:
        """Return a conversation that has all that `slot` holds."""
        known = self._keys[slot]
        if known is None or known[0] not in self._claims:
            return None
        for n_common, claim in self._claims[known[0]].matches(known[1]):
            return claim if n_common >= self._n_held(slot) else None
        return None

    def _save(self, slot: int) -> None:
        """Let the snapshots have what an idle slot holds, unless another slot has it as well."""
        known = self._keys[slot]
        n_held = self._n_held(slot)
        if self._store is None or known is None or n_held < MIN_SHARED:
            return
        if self._claim(slot) is None and not self._saving_pays():
            return
        adapters, key = known
        for n_common, other in self._trees[adapters].matches(key):
            if n_common < n_held:
                break
            if other != slot and self._n_held(other) >= n_held and self._stepper.can_cut:
                return
        snapshot, claim = self._put(slot, key, adapters), self._claim(slot)
        if snapshot is not None and claim is not None and snapshot not in claim.snapshots:
            self._store.pin(snapshot)
            claim.snapshots.append(snapshot)

    def _saving_pays(self) -> bool:
        """Whether to save a token takes less than to compute it takes, times the chance of its use.

        Measured as it happens: it does not on a GPU whose cache is in many pieces.
        """
        prompt_us = self._stepper.prompt_us
        pays = not prompt_us or self._save_us < _USE_OF_SAVED * prompt_us
        if not pays:
            self._save_us *= _FORGET_COST  # so that it is measured again some time
        return pays

    def _put(self, slot: int, key: bytes, adapters: int) -> Snapshot | None:
        store, namespace = self._store, self.namespaces[adapters]
        if store is None:
            return None
        for _, snapshot in store.matches(key, namespace):
            if snapshot.tokens == key:
                store.touch(snapshot)
                return snapshot
            break
        begin_us = _core.time_us()
        state = self._stepper.save(slot)
        if state is None:
            return None
        save_us = (_core.time_us() - begin_us) / self._n_held(slot)
        self._save_us = 0.5 * (self._save_us + save_us) if self._save_us else save_us
        saved = store.put(key, state, namespace)
        self.n_saved += saved is not None
        return saved

    def _restore(
        self, ids: array[int], adapters: int, free: list[int], best: int, best_n: int
    ) -> Placement | None:
        """Put the snapshot that has most of the prompt into a slot, if that is worth it."""
        store = self._store
        if store is None:
            return None
        for n_common, snapshot in store.matches(ids.tobytes(), self.namespaces[adapters]):
            n_common = min(n_common, len(ids) - 1)
            if n_common < best_n + MIN_SHARED:
                return None
            if not self._stepper.can_cut_saved and n_common < snapshot.n_tokens:
                continue
            state = store.load(snapshot)
            if state is None:
                return self.place(ids, adapters, free)  # it was damaged, and is gone
            in_ram = snapshot.path is None and not snapshot.pins
            if in_ram and self._stepper.can_cut_saved and store.ram_free < len(state):
                store.drop(snapshot)  # it changes places with what the slot holds
            store.pin(snapshot)
            slot = self._target(free, but=best if len(free) > 1 else -1)
            store.unpin(snapshot)
            if self._has_cells(snapshot.n_tokens, slot, free, best):
                n_keep = self._load(snapshot, state, slot, ids, adapters)
                if n_keep > best_n:
                    return Placement(slot, n_keep=n_keep)
            # It did not help, and may have cost what was there.
            return self.place(ids, adapters, free, snapshots=False)
        return None

    def _has_cells(self, n: int, slot: int, free: list[int], best: int) -> bool:
        """Make room for `n` cells in `slot`, where all sequences share one cache."""
        context = self._stepper.context
        if not context.kv_unified:
            return True
        self.empty(slot)
        while self._stepper.n_cells_used + n > context.n_ctx:
            if not self.evict([other for other in free if other != slot], but=best):
                return False
        return True

    def _load(
        self, snapshot: Snapshot, state: bytes, slot: int, ids: array[int], adapters: int
    ) -> int:
        """Put a snapshot into a slot; return how many tokens of the prompt it gives."""
        assert self._store is not None
        tokens = array("i", snapshot.tokens)
        try:
            if not self._stepper.restore(slot, tokens, state, adapters):
                return 0
        except StateError:
            self._store.drop(snapshot)
            self.forget(slot)
            return 0
        self._store.touch(snapshot)
        self.hold(slot, tokens, adapters)
        self.n_restored += 1
        return self._stepper.reusable_prefix(slot, ids, adapters)
