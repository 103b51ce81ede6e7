"""SnapshotStore: it finds, keeps to its budgets, and outlives what happens to its files."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama_crab.engine.snapshots import Snapshot, SnapshotStore, write_snapshot

KEY: dict[str, Any] = {"model": "tiny", "n_ctx": 512, "adapters": [["a", 0.5]], "flash": True}
OTHER = {**KEY, "n_ctx": 1024}
GiB = 1 << 30


def key(*ids: int) -> bytes:
    return array("i", ids).tobytes()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def held(store: SnapshotStore, *ids: int, namespace: str = "") -> list[tuple[int, tuple[int, ...]]]:
    """Return the matches as ids."""
    found = store.matches(key(*ids), namespace)
    return [(n, tuple(array("i", snapshot.tokens))) for n, snapshot in found]


def put(store: SnapshotStore, *ids: int, n: int = 10, namespace: str = "") -> Snapshot:
    """Put a state of `n` bytes that only these ids have."""
    snapshot = store.put(key(*ids), state(ids, n), namespace)
    assert snapshot is not None
    return snapshot


def state(ids: tuple[int, ...], n: int) -> bytes:
    return (key(*ids) * n)[:n]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what gives the messages logged since it was last asked."""

    def take() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        assert all(record.name == "llama_crab" for record in caplog.records)
        caplog.clear()
        return messages

    return take


# The store in memory


def test_states_are_found_by_their_beginning() -> None:
    store = SnapshotStore(KEY, GiB)
    longer, shorter = put(store, 1, 2, 3, n=5), put(store, 1, 2, n=7)
    assert held(store, 1, 2, 3, 4) == [(3, (1, 2, 3)), (2, (1, 2))]
    assert held(store, 1, 2) == [(2, (1, 2)), (2, (1, 2, 3))]
    assert held(store, 2) == []
    assert store.load(longer) == state((1, 2, 3), 5)
    assert (longer.n_tokens, longer.n_bytes) == (3, 5)
    assert (store.n_ram, store.ram_used, store.n_disk, store.disk_used) == (2, 12, 0, 0)
    store.drop(shorter)
    store.drop(shorter)
    assert store.load(shorter) is None
    assert held(store, 1, 2) == [(2, (1, 2, 3))]
    assert (store.n_ram, store.ram_used) == (1, 5)


def test_the_same_tokens_are_kept_once() -> None:
    store = SnapshotStore(KEY, GiB)
    old, new = put(store, 1, 2, n=100), put(store, 1, 2, n=30)
    assert [snapshot for _, snapshot in store.matches(key(1, 2))] == [new]
    assert store.load(old) is None
    assert (store.n_ram, store.ram_used) == (1, 30)
    store.pin(new)
    used = new.used
    assert store.put(key(1, 2), b"y" * 50) is new
    assert new.used > used
    assert store.load(new) == state((1, 2), 30)


def test_the_least_recently_used_goes_first() -> None:
    store = SnapshotStore(KEY, 30)
    one, two, three = (put(store, ids) for ids in (1, 2, 3))
    store.touch(one)
    put(store, 4)
    assert [store.load(s) is None for s in (one, two, three)] == [False, True, False]
    put(store, 5)
    assert [store.load(s) is None for s in (one, two, three)] == [False, True, True]
    assert store.ram_used == 30


@pytest.mark.parametrize("step", [0, -1])
def test_recency_survives_a_clock_that_stands_or_goes_back(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    times = count(10**18, step)
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    store = SnapshotStore(KEY, 30)
    snapshots = [put(store, at) for at in range(3)]
    store.touch(snapshots[0])
    put(store, 3)
    assert [store.load(s) is None for s in snapshots] == [False, True, False]


def test_what_is_too_large_is_refused_and_changes_nothing() -> None:
    store = SnapshotStore(KEY, 30)
    one = put(store, 1, n=30)
    assert store.put(key(2), bytes(31)) is None
    assert store.put(key(1), bytes(31)) is None
    assert store.load(one) is not None
    assert store.ram_used == 30
    assert SnapshotStore(KEY, 0).put(key(1), b"x") is None


def test_pins_hold_and_count() -> None:
    store = SnapshotStore(KEY, 30)
    one, two = put(store, 1), put(store, 2)
    store.pin(one)
    store.pin(one)
    assert store.put(key(3), bytes(21)) is None
    assert store.load(two) is not None
    put(store, 3, n=20)
    assert (store.load(one), store.load(two)) == (state((1,), 10), None)
    store.unpin(one)
    assert store.put(key(3), bytes(21)) is None
    store.unpin(one)
    put(store, 3, n=21)
    assert store.load(one) is None
    with pytest.raises(ValueError, match="not pinned"):
        store.unpin(one)


def test_namespaces_do_not_see_each_other(tmp_path: Path) -> None:
    store = SnapshotStore(KEY, 10, tmp_path, GiB)
    one, two = put(store, 1, 2, namespace="one"), put(store, 1, 2, namespace="two")
    for current in (store, SnapshotStore(KEY, 10, tmp_path, GiB)):
        assert held(current, 1, 2, namespace="one") == [(2, (1, 2))]
        assert held(current, 1, 2) == []
    assert [snapshot for _, snapshot in store.matches(key(1), "one")] == [one]
    store.drop(one)
    assert held(store, 1, namespace="one") == []
    assert [snapshot for _, snapshot in store.matches(key(1), "two")] == [two]


def test_the_store_may_change_while_matches_are_read() -> None:
    store = SnapshotStore(KEY, GiB)
    snapshots = [put(store, 1, 2, last) for last in range(5)]
    put(store, 1, 3)
    seen = []
    for _, snapshot in store.matches(key(1, 2, 4)):
        seen.append(tuple(array("i", snapshot.tokens)))
        store.drop(snapshots[2])
        if len(seen) == 3:
            store.drop(snapshot)
    assert seen == [(1, 2, 4), (1, 2, 0), (1, 2, 1), (1, 2, 3), (1, 3)]
    assert store.n_ram == 4


@pytest.mark.parametrize(("tokens", "data"), [(b"", b"x"), (b"abc", b"x"), (key(1), b"")])
def test_nonsense_is_refused(tokens: bytes, data: bytes) -> None:
    store = SnapshotStore(KEY, 100)
    with pytest.raises(ValueError, match="whole tokens of 4 bytes and data"):
        store.put(tokens, data)
    assert store.n_ram == 0
    for budgets in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="negative budget"):
            SnapshotStore(KEY, budgets[0], None, budgets[1])
    with pytest.raises(TypeError):
        SnapshotStore({"model": b"bytes"}, 1)


# The store on disk


def test_states_go_from_memory_to_disk_and_come_back_in_a_new_store(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "when needed"
    store = SnapshotStore(KEY, 20, folder, 20)
    assert not folder.parent.exists()
    snapshots = [put(store, at) for at in range(5)]
    assert (store.n_ram, store.ram_used, store.n_disk, store.disk_used) == (2, 20, 2, 20)
    assert [s.data is not None for s in snapshots] == [False, False, False, True, True]
    assert [s.path is not None for s in snapshots] == [False, True, True, False, False]
    assert len(files(folder)) == 2
    expected = [None, *(state((at,), 10) for at in range(1, 5))]
    assert [store.load(snapshot) for snapshot in snapshots] == expected
    store.close()
    store.close()
    assert store.put(key(1), b"x") is None
    assert (store.n_ram, store.n_disk, held(store, 1), len(files(folder))) == (0, 0, [], 2)

    again = SnapshotStore(KEY, 20, folder, 20)
    assert (again.n_ram, again.ram_used, again.n_disk, again.disk_used) == (0, 0, 2, 20)
    for at in (1, 2):
        ((n, snapshot),) = again.matches(key(at, 7))
        assert (n, again.load(snapshot)) == (1, state((at,), 10))
        assert (snapshot.data, again.n_ram) == (None, 0)


def test_what_does_not_fit_memory_goes_to_disk_at_once(tmp_path: Path) -> None:
    store = SnapshotStore(KEY, 20, tmp_path, 100)
    small, large = put(store, 1, n=20), put(store, 2, n=21)
    assert (small.path, large.data) == (None, None)
    assert (store.ram_used, store.disk_used) == (20, 21)
    assert store.load(large) == state((2,), 21)
    # A state too large for the disk is not written, and nothing has to go for it.
    large_ram = SnapshotStore(KEY, 200, tmp_path, 100)
    put(large_ram, 3, n=150)
    put(large_ram, 4, n=150)
    assert (large_ram.n_ram, held(large_ram, 3), large_ram.disk_used) == (1, [], 21)


def test_recency_outlives_the_store(tmp_path: Path) -> None:
    store = SnapshotStore(KEY, 0, tmp_path, 100)
    snapshots = [put(store, at) for at in range(4)]
    store.touch(snapshots[0])
    again = SnapshotStore(KEY, 0, tmp_path, 20)
    assert (held(again, 0), held(again, 3)) == ([(1, (0,))], [(1, (3,))])
    assert (again.n_disk, again.disk_used, len(files(tmp_path))) == (2, 20, 2)
    put(again, 5)
    assert (held(again, 0), held(again, 3)) == ([(1, (0,))], [])
    # Nothing has to go for a file that is too large by itself.
    put(SnapshotStore(KEY, 0, tmp_path, 100), 6, n=21)
    last = SnapshotStore(KEY, 0, tmp_path, 20)
    assert (held(last, 0), held(last, 5), held(last, 6)) == ([(1, (0,))], [(1, (5,))], [])
    assert len(files(tmp_path)) == 2


def test_spilled_states_keep_their_age(tmp_path: Path) -> None:
    store = SnapshotStore(KEY, 10, tmp_path, 20)
    one, two = put(store, 1), put(store, 2)
    store.touch(one)
    put(store, 3)
    # The second was written last, but used before the first.
    copy = Path(shutil.copytree(tmp_path, tmp_path.with_name("copy")))
    later = SnapshotStore(KEY, 0, copy, 10)
    assert (held(later, 1), held(later, 2)) == ([(1, (1,))], [])
    put(store, 4)
    assert (store.load(one), store.load(two)) == (state((1,), 10), None)


def test_pins_hold_on_disk(tmp_path: Path) -> None:
    store = SnapshotStore(KEY, 10, tmp_path, 20)
    pinned = put(store, 1, n=15)
    store.pin(pinned)
    put(store, 2)
    put(store, 3)
    # There was no room for the second beside what is pinned.
    assert (held(store, 2), store.n_disk, store.disk_used) == ([], 1, 15)
    assert store.put(key(4), bytes(11)) is None
    assert store.load(pinned) == state((1,), 15)
    store.unpin(pinned)
    put(store, 4, n=11)
    assert (store.load(pinned), store.disk_used) == (None, 11)


def test_files_that_another_process_removes_are_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    store = SnapshotStore(KEY, 0, tmp_path, 100)
    gone, other = put(store, 1), put(store, 2)
    assert gone.path is not None
    gone.path.unlink()
    store.drop(gone)
    # Between the listing and the reading of a start.
    listed = [tmp_path / "gone.snapshot", other.path]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listed))
    assert held(SnapshotStore(KEY, 0, tmp_path, 100), 2) == [(1, (2,))]
    assert warnings() == []


def test_files_of_others_are_left_alone(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    put(SnapshotStore(OTHER, 0, tmp_path, 1000), 1, n=1000)
    write_snapshot(tmp_path / "of a user", KEY, key(1), b"x" * 500)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    store = SnapshotStore(KEY, 0, tmp_path, 10)
    assert (store.n_disk, store.disk_used, held(store, 1)) == (0, 0, [])
    put(store, 1)
    put(store, 2)
    assert {path: path.read_bytes() for path in before} == before
    assert len(files(tmp_path)) == 3
    assert held(SnapshotStore(OTHER, 0, tmp_path, 1000), 1) == [(1, (1,))]
    assert SnapshotStore(KEY, 10, tmp_path, 0).n_disk == 0
    assert len(files(tmp_path)) == 3
    assert warnings() == []


def test_of_two_files_of_the_same_tokens_the_newer_stays(tmp_path: Path) -> None:
    for data, seconds in ((b"old", 1000), (b"new!", 2000), (b"older", 500)):
        write_snapshot(tmp_path / f"{seconds}.snapshot", KEY, key(1), data)
        os.utime(tmp_path / f"{seconds}.snapshot", (seconds, seconds))
    store = SnapshotStore(KEY, 0, tmp_path, 100)
    ((_, snapshot),) = store.matches(key(1))
    assert (store.load(snapshot), store.disk_used) == (b"new!", 4)
    assert files(tmp_path) == {"2000.snapshot"}


def test_stores_that_share_a_folder_do_not_collide(tmp_path: Path) -> None:
    one, two = (SnapshotStore(KEY, 0, tmp_path, 100) for _ in range(2))
    first, second = one.put(key(1), b"one"), two.put(key(1), b"two")
    assert first is not None
    assert second is not None
    assert (one.load(first), two.load(second)) == (b"one", b"two")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    write_snapshot(path, KEY, key(7, 8), b"a sound state of other tokens")


@pytest.mark.parametrize("harm", [damage, swap, Path.unlink])
def test_a_lost_file_is_told_once_and_others_are_unaffected(
    tmp_path: Path, warnings: Callable[[], list[str]], harm: Callable[[Path], None]
) -> None:
    store = SnapshotStore(KEY, 0, tmp_path, 100)
    one, two = put(store, 1, 2), put(store, 1, 3)
    assert one.path is not None
    name = one.path.name
    harm(one.path)
    loaded = [(snapshot, store.load(snapshot)) for _, snapshot in store.matches(key(1, 2))]
    assert loaded == [(one, None), (two, state((1, 3), 10))]
    assert store.load(one) is None
    (warning,) = warnings()
    assert "a saved state is lost" in warning
    assert name in warning
    assert (store.n_disk, store.disk_used, len(files(tmp_path))) == (1, 10, 1)


def test_damaged_files_are_ignored_at_the_start(
    tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    store = SnapshotStore(KEY, 0, tmp_path, 100)
    sound, damaged = put(store, 1), put(store, 2)
    assert damaged.path is not None
    damaged.path.write_bytes(damaged.path.read_bytes()[:-1])
    (tmp_path / "text.snapshot").write_text("no snapshot")
    (tmp_path / "folder.snapshot").mkdir()
    again = SnapshotStore(KEY, 0, tmp_path, 100)
    assert (again.n_disk, held(again, 1), held(again, 2)) == (1, [(1, (1,))], [])
    told = warnings()
    assert len(told) == 3
    for name in (damaged.path.name, "text.snapshot", "folder.snapshot"):
        assert sum(name in message for message in told) == 1
    assert len(files(tmp_path)) == 4
    assert store.load(sound) is not None


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_once_until_it_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    store = SnapshotStore(KEY, 10, tmp_path, 100)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full_disk)
            put(store, 1)
            put(store, 2)
            put(store, 3)
            assert store.put(key(4), bytes(11)) is None
        (warning,) = warnings()
        assert "cannot be kept on disk" in warning
        assert os.strerror(errno.ENOSPC) in warning
        assert (store.n_ram, store.n_disk, store.disk_used, files(tmp_path)) == (1, 0, 0, set())
        assert held(store, 3) == [(1, (3,))]
        put(store, 5)
        assert (store.n_disk, len(files(tmp_path))) == (1, 1)
        store.drop(next(store.matches(key(3)))[1])


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    put(SnapshotStore(KEY, 0, tmp_path, 100), 1)
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # Modes do not stop root.
    read_only_open = os.open

    def open_to_read(path: str, flags: int, *args: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            refuse()
        return read_only_open(path, flags, *args)

    monkeypatch.setattr(os, "open", open_to_read)
    for name in ("unlink", "utime", "replace"):
        monkeypatch.setattr(os, name, refuse)
    store = SnapshotStore(KEY, 10, tmp_path, 100)
    ((_, snapshot),) = store.matches(key(1))
    store.touch(snapshot)
    assert store.load(snapshot) == state((1,), 10)
    put(store, 2)
    put(store, 3)
    put(store, 4)
    assert (store.n_ram, store.n_disk) == (1, 1)
    store.drop(snapshot)
    assert (store.n_disk, store.disk_used) == (0, 0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content
    assert len(warnings()) == 1


def test_a_folder_that_cannot_be(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        store = SnapshotStore(KEY, 10, folder, 100)
        put(store, 1)
        put(store, 2)
        put(store, 3)
        assert (store.n_ram, store.n_disk, held(store, 3)) == (1, 0, [(1, (3,))])
        assert len(warnings()) == 1


class Held:
    """One state as the model has it."""

    def __init__(self, ids: tuple[int, ...], namespace: str, data: bytes, tier: str) -> None:
        self.ids = ids
        self.namespace = namespace
        self.data = data
        self.tier = tier
        self.n_pins = 0


class StoreMachine(RuleBasedStateMachine):
    """The store beside a list of its states, least recently used first."""

    budgets: ClassVar = {"ram": 20, "disk": 30}

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model: list[Held] = []
        self.open()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def open(self) -> None:
        self.store = SnapshotStore(KEY, self.budgets["ram"], self.folder, self.budgets["disk"])

    def snapshot(self, held: Held) -> Snapshot:
        found = self.store.matches(key(*held.ids), held.namespace)
        return next(snapshot for _, snapshot in found if snapshot.tokens == key(*held.ids))

    def room(self, tier: str, n: int) -> bool:
        pinned = sum(len(h.data) for h in self.model if h.tier == tier and h.n_pins)
        return pinned + n <= self.budgets[tier]

    def make_room(self, tier: str, n: int) -> None:
        while sum(len(h.data) for h in self.model if h.tier == tier) + n > self.budgets[tier]:
            victim = next(h for h in self.model if h.tier == tier and not h.n_pins)
            if tier == "ram" and self.room("disk", len(victim.data)):
                self.make_room("disk", len(victim.data))
                victim.tier = "disk"
            else:
                self.model.remove(victim)

    def use(self, held: Held) -> None:
        self.model.remove(held)
        self.model.append(held)

    @rule(
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple),
        namespace=st.sampled_from(["", "lora"]),
        data=st.binary(min_size=1, max_size=33),
    )
    def put(self, ids: tuple[int, ...], namespace: str, data: bytes) -> None:
        snapshot = self.store.put(key(*ids), data, namespace)
        old = next((h for h in self.model if (h.ids, h.namespace) == (ids, namespace)), None)
        if old is not None and old.n_pins:
            assert snapshot is self.snapshot(old)
            self.use(old)
            return
        tier = next((tier for tier in self.budgets if self.room(tier, len(data))), None)
        assert (snapshot is None) == (tier is None)
        if tier is not None:
            if old is not None:
                self.model.remove(old)
            self.make_room(tier, len(data))
            self.model.append(Held(ids, namespace, data, tier))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), what=st.sampled_from(["touch", "pin", "unpin", "drop", "damage"]))
    def change(self, data: st.DataObject, what: str) -> None:
        held = data.draw(st.sampled_from(self.model))
        snapshot = self.snapshot(held)
        if what == "touch":
            self.store.touch(snapshot)
            self.use(held)
        elif what == "pin":
            self.store.pin(snapshot)
            held.n_pins += 1
        elif what == "unpin" and held.n_pins:
            self.store.unpin(snapshot)
            held.n_pins -= 1
        elif what == "drop":
            self.store.drop(snapshot)
            self.model.remove(held)
        elif what == "damage" and snapshot.path is not None:
            damage(snapshot.path)
            assert self.store.load(snapshot) is None
            self.model.remove(held)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()
        self.model = [held for held in self.model if held.tier == "disk"]
        for held in self.model:
            held.n_pins = 0

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        sizes = {t: [len(h.data) for h in self.model if h.tier == t] for t in self.budgets}
        assert (self.store.n_ram, self.store.n_disk) == (len(sizes["ram"]), len(sizes["disk"]))
        assert (self.store.ram_used, self.store.disk_used) == (
            sum(sizes["ram"]),
            sum(sizes["disk"]),
        )
        assert self.store.ram_used <= self.budgets["ram"]
        assert self.store.disk_used <= self.budgets["disk"]
        paths = set()
        for held in self.model:
            snapshot = self.snapshot(held)
            assert self.store.load(snapshot) == held.data
            assert (snapshot.path is None) == (held.tier == "ram")
            paths.add(snapshot.path)
        assert files(self.folder) == {path.name for path in paths if path is not None}


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
