"""Sequences of the KV cache outside of it: in host memory, and as files."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import StateError
from .radix_tree import RadixTree
from .snapshot_file import SUFFIX, read_file, read_snapshot, read_start, write_into, write_snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Snapshot", "SnapshotStore", "read_snapshot", "write_snapshot"]

_TOKEN = 4  # bytes of an int32


@dataclass(slots=True, eq=False)
class Snapshot:
    """The state of one sequence: in memory (`data`) or on disk (`path`); neither once dropped."""

    tokens: bytes
    """The ids, int32 little-endian."""
    n_bytes: int
    """Exact size of the state data."""
    data: bytes | None = None
    path: Path | None = None
    used: int = 0
    """When it was last used: nanoseconds since the epoch, no two the same in a store."""
    pins: int = 0
    """While it is above 0, the store does not evict it."""
    namespace: str = ""

    @property
    def n_tokens(self) -> int:
        """Length of the sequence."""
        return len(self.tokens) // _TOKEN


class _Tier:
    """The snapshots in one kind of memory. `used` and `budget` are bytes of state data."""

    __slots__ = ("budget", "held", "used")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held: dict[Snapshot, None] = {}
        self.used = 0

    def add(self, snapshot: Snapshot) -> None:
        self.held[snapshot] = None
        self.used += snapshot.n_bytes

    def remove(self, snapshot: Snapshot) -> None:
        del self.held[snapshot]
        self.used -= snapshot.n_bytes

    def can_hold(self, n_bytes: int) -> bool:
        """Whether there is room, or would be without all that is not pinned."""
        return n_bytes <= self.budget - sum(held.n_bytes for held in self.held if held.pins)

    def victims(self, n_bytes: int) -> Iterator[Snapshot]:
        """Yield what the caller must remove for `n_bytes` more, least recently used first."""
        while self.used + n_bytes > self.budget:
            yield min((held for held in self.held if not held.pins), key=lambda held: held.used)


class SnapshotStore:
    """Keeps states of sequences within a budget of memory, and older ones within one of disk.

    A state is in one tier at a time. The least recently used goes from memory to disk when there is
    a folder, and from disk to nothing. At the start the folder's files with the same `key` are
    taken over; their data is checked when it is loaded. Files of another `key` are left alone and
    do not count. Processes may share a folder: each counts the files that it knows of, and a file
    that another one has removed is lost.

    Parameters
    ----------
    key
        What all states depend on, by name; values that JSON has.
    ram_bytes, disk_bytes
        Budgets, in bytes of state data. With 0 for `disk_bytes` the folder is not touched.
    folder
        Where the files go; made when it is needed.

    Raises
    ------
    ValueError
        A budget is negative.
    TypeError
        `key` holds what JSON has not.

    Thread-safety: none.
    """

    def __init__(
        self,
        key: Mapping[str, Any],
        ram_bytes: int,
        folder: Path | None = None,
        disk_bytes: int = 0,
    ) -> None:
        if ram_bytes < 0 or disk_bytes < 0:
            raise ValueError(f"negative budget: ram_bytes={ram_bytes}, disk_bytes={disk_bytes}")
        self._key: dict[str, Any] = json.loads(json.dumps(dict(key)))
        self._ram = _Tier(ram_bytes)
        self._disk = _Tier(disk_bytes if folder is not None else 0)
        self._folder = folder if disk_bytes else None
        self._trees: dict[str, RadixTree[Snapshot]] = {}
        self._clock = 0
        self._n_changes = 0
        self._disk_failed = False
        if self._folder is not None:
            self._adopt(self._folder)

    @property
    def ram_used(self) -> int:
        """Bytes of state data in memory."""
        return self._ram.used

    @property
    def ram_free(self) -> int:
        """Bytes of state data that memory takes before something has to leave it."""
        return self._ram.budget - self._ram.used

    @property
    def disk_used(self) -> int:
        """Bytes of state data on disk."""
        return self._disk.used

    @property
    def n_ram(self) -> int:
        """States in memory."""
        return len(self._ram.held)

    @property
    def n_disk(self) -> int:
        """States on disk."""
        return len(self._disk.held)

    def put(self, tokens: bytes, data: bytes, namespace: str = "") -> Snapshot | None:
        """Keep a state; return None when no tier has room for it beside what is pinned.

        It replaces a state of exactly these tokens, unless that one is pinned: then that one stays
        and is returned. A disk that cannot be written is logged once, and what should go there is
        dropped. Raises `ValueError` when `tokens` or `data` are empty or `tokens` not whole ids.
        """
        if not tokens or len(tokens) % _TOKEN or not data:
            raise ValueError(
                f"a state needs whole tokens of {_TOKEN} bytes and data, "
                f"not {len(tokens)} and {len(data)} bytes"
            )
        old = self._find(tokens, namespace)
        if old is not None and old.pins:
            self.touch(old)
            return old
        tier = next((tier for tier in (self._ram, self._disk) if tier.can_hold(len(data))), None)
        if tier is None:
            return None
        if old is not None:
            self.drop(old)
        snapshot = Snapshot(
            tokens, len(data), data, used=self._tick(time.time_ns()), namespace=namespace
        )
        if tier is self._ram:
            for victim in tier.victims(len(data)):
                if self._move_to_disk(victim):
                    tier.remove(victim)
                else:
                    self.drop(victim)
            tier.add(snapshot)
        elif not self._move_to_disk(snapshot):
            return None
        self._index(snapshot)
        return snapshot

    def load(self, snapshot: Snapshot) -> bytes | None:
        """Return the data; None when it was dropped, or is now, as its file is lost or damaged."""
        path = snapshot.path
        if path is None:
            return snapshot.data
        try:
            tokens, data = read_file(path, self._key, snapshot.namespace)
            if tokens != snapshot.tokens or len(data) != snapshot.n_bytes:
                raise StateError(f"{path} is damaged: it holds another state")
        except (OSError, StateError) as error:
            # What cannot be read now may be sound: then the file stays.
            lose = self.drop if isinstance(error, StateError) else self._forget
            lose(snapshot)
            _warn(f"a saved state is lost: {error}")
            return None
        return data

    def matches(self, tokens: bytes, namespace: str = "") -> Iterator[tuple[int, Snapshot]]:
        """Yield ``(n_common, snapshot)`` for all that begin like `tokens`, the longest match first.

        `n_common` counts tokens and is at least 1. The store may change between two items, as by
        a `load` that fails: what is gone does not come.
        """
        given: set[Snapshot] = set()
        n_changes = None
        while n_changes != self._n_changes and namespace in self._trees:
            n_changes = self._n_changes
            for n_common, snapshot in self._trees[namespace].matches(tokens):
                if snapshot not in given:
                    given.add(snapshot)
                    yield n_common, snapshot
                    if n_changes != self._n_changes:
                        break

    def touch(self, snapshot: Snapshot) -> None:
        """Note that `snapshot` was used just now."""
        snapshot.used = self._tick(time.time_ns())
        _set_time(snapshot)

    def pin(self, snapshot: Snapshot) -> None:
        """Keep `snapshot` from being evicted until `unpin` was called as often."""
        snapshot.pins += 1

    def unpin(self, snapshot: Snapshot) -> None:
        """Take a pin back. Raises `ValueError` when there is none."""
        if not snapshot.pins:
            raise ValueError("the snapshot is not pinned")
        snapshot.pins -= 1

    def drop(self, snapshot: Snapshot) -> None:
        """Forget `snapshot`, pinned or not, and remove its file. Idempotent."""
        path = snapshot.path
        self._forget(snapshot)
        if path is not None:
            self._unlink(path)

    def close(self) -> None:
        """Forget everything and keep nothing from now on; the files stay. Idempotent."""
        for snapshot in (*self._ram.held, *self._disk.held):
            self._forget(snapshot)
        self._ram.budget = self._disk.budget = 0

    def _adopt(self, folder: Path) -> None:
        """Take over the folder's files of this key, and remove the oldest beyond the budget."""
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
        except FileNotFoundError:
            return
        except OSError as error:
            self._report(error)
            return
        found = []
        for path in paths:
            try:
                header, tokens = read_start(path)
                used = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            except (OSError, StateError) as error:
                _warn(f"a saved state is ignored: {error}")
                continue
            if tokens and header.difference(self._key, header.namespace) is None:
                n_bytes, namespace = header.n_data_bytes, header.namespace
                found.append(Snapshot(tokens, n_bytes, None, path, used, 0, namespace))
        for snapshot in sorted(found, key=lambda snapshot: snapshot.used):
            snapshot.used = self._tick(snapshot.used)
            old = self._find(snapshot.tokens, snapshot.namespace)
            if old is not None:
                self.drop(old)
            if not self._disk.can_hold(snapshot.n_bytes):
                self.drop(snapshot)
                continue
            for victim in self._disk.victims(snapshot.n_bytes):
                self.drop(victim)
            self._disk.add(snapshot)
            self._index(snapshot)

    def _move_to_disk(self, snapshot: Snapshot) -> bool:
        """Write the data to a file, for which others may have to go; return whether it is there."""
        data = snapshot.data
        if self._folder is None or data is None or not self._disk.can_hold(snapshot.n_bytes):
            return False
        for victim in self._disk.victims(snapshot.n_bytes):
            self.drop(victim)
        try:
            path = write_into(
                self._folder, self._key, snapshot.tokens, data, namespace=snapshot.namespace
            )
        except OSError as error:
            self._report(error)
            return False
        self._disk_failed = False
        snapshot.path, snapshot.data = path, None
        _set_time(snapshot)
        self._disk.add(snapshot)
        return True

    def _find(self, tokens: bytes, namespace: str) -> Snapshot | None:
        """Return the state of exactly these tokens: if there is one, it is the first match."""
        for _, snapshot in self.matches(tokens, namespace):
            return snapshot if snapshot.tokens == tokens else None
        return None

    def _index(self, snapshot: Snapshot) -> None:
        tree = self._trees.setdefault(snapshot.namespace, RadixTree())
        tree.insert(snapshot.tokens, snapshot)
        self._n_changes += 1

    def _forget(self, snapshot: Snapshot) -> None:
        snapshot.data = snapshot.path = None
        tiers = [tier for tier in (self._ram, self._disk) if snapshot in tier.held]
        for tier in tiers:
            tier.remove(snapshot)
        if tiers:
            tree = self._trees[snapshot.namespace]
            tree.remove(snapshot.tokens, snapshot)
            if not tree:
                del self._trees[snapshot.namespace]
            self._n_changes += 1

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError) -> None:
        """Log that the disk fails: once, until something could be written again."""
        if not self._disk_failed:
            self._disk_failed = True
            _warn(f"states cannot be kept on disk: {error}")

    def _tick(self, now: int) -> int:
        """Return `now` (ns), or a little more: what comes later must look later."""
        self._clock = max(self._clock + 1, now)
        return self._clock


def _set_time(snapshot: Snapshot) -> None:
    """Let the file tell when it was last used; a later store goes by it."""
    if snapshot.path is not None:
        with contextlib.suppress(OSError):
            os.utime(snapshot.path, ns=(snapshot.used, snapshot.used))


def _warn(message: str) -> None:
    import logging  # not at import time: most programs never get here

    logging.getLogger("llama_crab").warning(message)
