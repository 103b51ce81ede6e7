"""NgramCache: counts as a plain dictionary has them, bounded; files that are whole or refused."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_crab import _core, errors

KEY = 0xFEDC_BA98_7654_3210
N_VOCAB = 1000
HEADER, ENTRY, TRAILER = 32, 16, 8


class Oracle:
    """A dictionary without bound: for each n-gram its two most frequent next tokens."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, ...], list[list[int]]] = {}

    def learn(self, tokens: list[int], begin: int, end: int) -> None:
        for i in range(begin, end):
            for order in (2, 3, 4):
                if order <= i and tokens[i] >= 0:
                    self.see(self.seen.setdefault(tuple(tokens[i - order : i]), []), tokens[i])

    @staticmethod
    def see(pairs: list[list[int]], token: int) -> None:
        """Count a token; the first of `pairs` is the one to draft, a third wears the second out."""
        at = next((i for i, (known, _) in enumerate(pairs) if known == token), None)
        if at is None:
            if len(pairs) == 2 and pairs[1][1] > 0:
                pairs[1][1] -= 1
                return
            del pairs[1:]
            pairs.append([token, 0])
            at = len(pairs) - 1
        if pairs[at][1] == 255:
            for pair in pairs:
                pair[1] //= 2
        pairs[at][1] += 1
        if at == 1 and pairs[1][1] >= pairs[0][1]:
            pairs.reverse()

    def draft(self, tokens: list[int], n_max: int) -> tuple[list[int], int]:
        known = list(tokens)
        first = 0
        for _ in range(n_max):
            ends = ((n, tuple(known[len(known) - n :])) for n in (4, 3, 2) if n <= len(known))
            order, end = next((some for some in ends if some[1] in self.seen), (0, ()))
            if not order:
                break
            first = first or order
            known.append(self.seen[end][0][0])
        return known[len(tokens) :], first


TEXTS = st.lists(st.integers(-1, 3) | st.integers(0, N_VOCAB - 1), max_size=60)


@given(learned=st.lists(TEXTS, max_size=8), asked=TEXTS, n_max=st.integers(0, 12), data=st.data())
@settings(max_examples=400, deadline=None)
def test_drafts_are_those_of_a_dictionary(
    learned: list[list[int]], asked: list[int], n_max: int, data: st.DataObject
) -> None:
    cache, oracle = _core.NgramCache(65_536), Oracle()
    for tokens in learned:
        begin = data.draw(st.integers(0, len(tokens)))
        end = data.draw(st.integers(begin, len(tokens)))
        cache.learn(tokens, begin, end)
        oracle.learn(tokens, begin, end)
    assert cache.n_ngrams == len(oracle.seen)
    for tokens in (asked, *learned):
        for n in range(len(tokens) + 1):
            assert cache.draft(tokens[:n], n_max) == oracle.draft(tokens[:n], n_max)


def test_counts_neither_overflow_nor_stick() -> None:
    """Also where two continuations stay equally frequent for long."""
    cache, oracle = _core.NgramCache(64), Oracle()
    for i in range(3000):
        for tokens in ([1, 2, 3 + i % 2], [7, 8, 9], [7, 8, 10 + i % 3]):
            cache.learn(tokens)
            oracle.learn(tokens, 0, 3)
        for end in ([1, 2], [7, 8]):
            assert cache.draft(end, 1) == oracle.draft(end, 1)
    for _ in range(256):
        cache.learn([7, 8, 11])
    assert cache.draft([7, 8], 1) == ([11], 2)


def test_a_whole_answer_is_told_again_until_it_ends() -> None:
    answer = list(range(100, 200))
    cache = _core.NgramCache(1 << 12)
    cache.learn([1, 2, 3, 4, *answer], 4)
    assert cache.draft([9, 3, 4], 500) == (answer, 2)
    assert cache.draft([1, 2, 3, 4], 10) == (answer[:10], 4)
    # What comes before `begin` is context and not learned.
    assert cache.draft([1, 2], 1) == ([], 0)


def test_it_is_bounded_and_forgets_what_is_not_seen_again() -> None:
    cache = _core.NgramCache(1 << 10)
    assert cache.capacity == 1 << 10
    often = list(range(500, 540))
    for _ in range(20):
        cache.learn(often)
    # A flood of n-grams that are seen once: three times what there is room for.
    for i in range(30):
        cache.learn(list(range(1_000 + i * 40, 1_000 + i * 40 + 40)))
        assert cache.n_ngrams <= cache.capacity
    known = sum(cache.draft(often[i : i + 4], 1)[0] == often[i + 4 : i + 5] for i in range(36))
    assert known >= 30
    # In the end all of it has given way.
    for i in range(2_000):
        cache.learn(list(range(10_000 + i * 40, 10_000 + i * 40 + 40)))
    assert cache.n_ngrams <= cache.capacity
    assert sum(cache.draft(often[i : i + 4], 1)[1] == 4 for i in range(36)) <= 3
    latest = list(range(10_000 + 1_999 * 40, 10_000 + 2_000 * 40))
    assert sum(cache.draft(latest[i : i + 4], 1)[1] == 4 for i in range(36)) >= 18


def test_the_smallest_cache_works() -> None:
    cache = _core.NgramCache(1)
    assert (cache.capacity, cache.n_ngrams) == (4, 0)
    cache.learn(list(range(50)))
    assert cache.n_ngrams == 4


# Files.


def sample_cache(capacity: int = 1 << 12) -> _core.NgramCache:
    cache = _core.NgramCache(capacity)
    for i in range(30):
        cache.learn([(i * 7 + j * j) % N_VOCAB for j in range(60)])
        cache.learn([1, 2, 3, 4, 5 + i % 3])
    return cache


def drafts(cache: _core.NgramCache) -> list[tuple[list[int], int]]:
    ends = [[(i * 7 + j * j) % N_VOCAB for j in range(20)] for i in range(30)]
    return [cache.draft(end, 8) for end in (*ends, [1, 2, 3, 4], [3, 4], [999, 998])]


def test_a_loaded_file_drafts_the_same_and_learns_on(tmp_path: Path) -> None:
    cache, path = sample_cache(), tmp_path / "x.ngrams"
    cache.save(path, KEY)
    loaded = _core.NgramCache(1 << 12)
    loaded.learn([5, 6, 7, 8])
    loaded.load(path, KEY, N_VOCAB)
    assert loaded.draft([5, 6], 1) == cache.draft([5, 6], 1)
    assert drafts(loaded) == drafts(cache)
    assert loaded.n_ngrams == cache.n_ngrams
    for each in (cache, loaded):
        each.learn([1, 2, 3, 4, 6, 9, 9])
    cache.save(path, KEY)
    loaded.save(str(tmp_path / "y.ngrams"), KEY)
    assert path.read_bytes() == (tmp_path / "y.ngrams").read_bytes()


def test_a_file_of_another_capacity(tmp_path: Path) -> None:
    cache, path = sample_cache(), tmp_path / "x.ngrams"
    cache.save(path, KEY)
    larger = _core.NgramCache(1 << 16)
    larger.load(path, KEY, N_VOCAB)
    assert drafts(larger) == drafts(cache)
    smaller = _core.NgramCache(256)
    smaller.load(path, KEY, N_VOCAB)
    assert 200 < smaller.n_ngrams <= 256
    # The most frequent stay.
    assert smaller.draft([1, 2, 3, 4], 1) == cache.draft([1, 2, 3, 4], 1)


def test_the_format_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Written out here by hand, with the hash of [1, 2] and FNV-1a in Python."""
    cache, path = _core.NgramCache(64), tmp_path / "x.ngrams"
    for token in (3, 3, 300):
        cache.learn([1, 2, token])
    cache.save(path, KEY)
    mask = (1 << 64) - 1
    value = (2 * 0x9FB21C651E98DF25) & mask
    for token in (2, 1):
        value = ((value ^ token) * 0x9E3779B97F4A7C15) & mask
        value ^= value >> 29
    value = ((value * 0xD6E8FEB86659FD93) & mask) >> 16
    data = b"\x89NGRAMS\n"
    data += b"".join(n.to_bytes(size, "little") for n, size in ((1, 4), (16, 4), (KEY, 8), (1, 8)))
    data += value.to_bytes(6, "little") + bytes([2, 1])
    data += (3).to_bytes(4, "little") + (300).to_bytes(4, "little")
    assert path.read_bytes() == data + checksum(data)


def checksum(data: bytes) -> bytes:
    total = 0xCBF29CE484222325
    for byte in data:
        total = ((total ^ byte) * 0x100000001B3) & ((1 << 64) - 1)
    return total.to_bytes(8, "little")


def refused(data: bytes, folder: Path, match: str, key: int = KEY) -> None:
    """Assert that a file is refused and nothing has changed."""
    path = folder / "bad.ngrams"
    path.write_bytes(data)
    cache = _core.NgramCache(64)
    cache.learn([1, 2, 3])
    with pytest.raises(errors.StateError, match=match) as caught:
        cache.load(path, key, N_VOCAB)
    assert str(path) in str(caught.value)
    assert cache.draft([1, 2], 2) == ([3], 2)
    assert cache.n_ngrams == 1


def small_file(folder: Path) -> bytes:
    cache, path = _core.NgramCache(64), folder / "small.ngrams"
    cache.learn(list(range(10)))
    cache.save(path, KEY)
    return path.read_bytes()


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    data = small_file(tmp_path)
    assert len(data) == HEADER + 21 * ENTRY + TRAILER
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            refused(bytes(damaged), tmp_path, "cannot be used: it")


def test_every_truncation_and_any_addition_is_noticed(tmp_path: Path) -> None:
    data = small_file(tmp_path)
    for n in range(len(data)):
        refused(data[:n], tmp_path, "no file of n-grams" if n < HEADER else "truncated")
    refused(data + b"\0", tmp_path, "truncated or damaged")
    refused(data + data, tmp_path, "truncated or damaged")


@given(data=st.binary(max_size=200), at=st.integers(0, 400), whole=st.booleans())
@settings(max_examples=200, deadline=None)
def test_hostile_bytes_behind_a_right_checksum(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int, whole: bool
) -> None:
    """What comes of it never leaves the vocabulary."""
    folder = tmp_path_factory.mktemp("hostile")
    good = small_file(folder)[:-TRAILER]
    at = min(at, len(good))
    made = good[:at] + data + (good[at + len(data) :] if whole else b"")
    path = folder / "bad.ngrams"
    path.write_bytes(made + checksum(made))
    cache = _core.NgramCache(64)
    try:
        cache.load(path, KEY, N_VOCAB)
    except errors.StateError:
        assert cache.n_ngrams == 0
        return
    for i in range(9):
        assert all(0 <= token < N_VOCAB for token in cache.draft([i, i + 1], 50)[0])
    cache.learn(list(range(30)))


def signed(data: bytes, at: int, new: bytes) -> bytes:
    made = data[:at] + new + data[at + len(new) : -TRAILER]
    return made + checksum(made)


def test_foreign_files_are_told_apart(tmp_path: Path) -> None:
    data = small_file(tmp_path)
    refused(data, tmp_path, "another vocabulary", key=KEY + 1)
    refused(signed(data, 0, b"GGUF"), tmp_path, "no file of n-grams")
    refused(signed(data, 8, b"\x02"), tmp_path, "another version")
    refused(signed(data, 12, b"\x18"), tmp_path, "another version")
    # Numbers of entries whose size overflows, or that nobody could hold.
    for n in (1 << 60, (1 << 64) - 1, 1 << 29, 22, 20):
        refused(signed(data, 24, n.to_bytes(8, "little")), tmp_path, "truncated or damaged")
    first = HEADER + 8
    for token in (-1, -2, N_VOCAB, 1 << 30):
        token_bytes = token.to_bytes(4, "little", signed=True)
        refused(signed(data, first, token_bytes), tmp_path, "damaged")
    refused(signed(data, first + 4, b"\xfe\xff\xff\xff"), tmp_path, "damaged")
    refused(signed(data, HEADER + 7, b"\x09"), tmp_path, "damaged")
    refused(b"", tmp_path, "no file of n-grams")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    cache = _core.NgramCache(64)
    with pytest.raises(FileNotFoundError) as caught:
        cache.load(tmp_path / "absent", KEY, N_VOCAB)
    assert caught.value.filename == str(tmp_path / "absent")
    with pytest.raises(errors.StateError, match="no regular file"):
        cache.load(tmp_path, KEY, N_VOCAB)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(errors.StateError, match="no regular file"):
            cache.load(tmp_path / "pipe", KEY, N_VOCAB)
    with pytest.raises(ValueError, match="null byte"):
        cache.load("a\0b", KEY, N_VOCAB)


def test_what_cannot_be_written_leaves_no_trace(tmp_path: Path) -> None:
    cache = sample_cache()
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "absent" / "x", KEY)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        cache.save(tmp_path / "file" / "x", KEY)
    # A folder, or a device that root could replace, is not replaced.
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        cache.save(tmp_path / "folder", KEY)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders have other rights there")
def test_an_unwritable_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        # Rights do not hold root back; /proc does.
        folder = Path("/proc/self")
        if not folder.exists():
            pytest.skip("root, and no /proc")
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    with pytest.raises(OSError, match=str(folder)) as caught:
        sample_cache().save(folder / "x.ngrams", KEY)
    assert caught.value.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)


FULL_DISK = """
import errno, os, resource, sys
from llama_crab import _core
path = sys.argv[1]
cache = _core.NgramCache(1 << 12)
cache.learn([1, 2, 3])
cache.save(path, 1)
cache.learn(list(range(1000)))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    cache.save(path, 1)
except OSError as error:
    assert error.errno == errno.EFBIG, error
else:
    raise SystemExit("it was written")
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
again = _core.NgramCache(1 << 12)
again.load(path, 1, 10)
assert again.draft([1, 2], 1) == ([3], 2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a file's size there")
def test_a_disk_that_is_full_leaves_the_older_file(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "x.ngrams"], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="rights are no mode there")
def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "x.ngrams"
    path.write_text("old")
    path.chmod(0o644)
    sample_cache().save(os.fsencode(path), KEY)
    assert path.stat().st_mode & 0o777 == 0o600


WRITER = """
import sys
from llama_crab import _core
path, start = sys.argv[1], int(sys.argv[2])
cache = _core.NgramCache(1 << 14)
cache.learn(list(range(start, start + 1000)))
for _ in range(40):
    cache.save(path, 7)
"""


def test_concurrent_writers_leave_one_whole_file(tmp_path: Path) -> None:
    """Processes and threads; readers in between see one of the files, never a mixture."""
    path = tmp_path / "x.ngrams"
    caches = {start: _core.NgramCache(1 << 14) for start in (0, 2000, 4000)}
    for start, cache in caches.items():
        cache.learn(list(range(start, start + 1000)))
    caches[0].save(path, 7)
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, str(start)]) for start in (2000, 4000)
    ]
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(40):
                caches[0].save(path, 7)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    n_read = 0
    while any(process.poll() is None for process in processes) or n_read < 20:
        seen = _core.NgramCache(1 << 14)
        seen.load(path, 7, 5000)
        known = {start for start in caches if seen.draft([start, start + 1], 1)[1]}
        assert len(known) == 1
        assert seen.n_ngrams == caches[known.pop()].n_ngrams
        n_read += 1
    for thread in threads:
        thread.join()
    assert not failures
    assert [process.wait() for process in processes] == [0, 0]
    assert os.listdir(tmp_path) == ["x.ngrams"]


def test_threads_learn_draft_save_and_load_at_once(tmp_path: Path) -> None:
    cache, path = sample_cache(), tmp_path / "x.ngrams"
    cache.save(path, KEY)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for j in range(60):
                cache.learn([(i * 31 + j * k) % N_VOCAB for k in range(300)])
                drafted, order = cache.draft([1, 2, 3, 4], 8)
                assert order in (0, 2, 3, 4)
                assert all(0 <= token < N_VOCAB for token in drafted)
                assert cache.n_ngrams <= cache.capacity
                if j % 10 == i:
                    cache.save(path, KEY)
                    cache.load(path, KEY, N_VOCAB)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_refused() -> None:
    """Another thread may have held the lock."""
    code = """
import os
from llama_crab import _core, errors
cache = _core.NgramCache(64)
child = os.fork()
if child == 0:
    try:
        cache.draft([1, 2], 1)
    except errors.ForkedProcessError:
        _core.NgramCache(64).learn([1, 2, 3])
        os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize(
    ("capacity", "error"),
    [(0, ValueError), (-4, ValueError), ((1 << 28) + 1, ValueError), ("8", TypeError)],
)
def test_impossible_capacities_are_refused(capacity: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        _core.NgramCache(capacity)


def test_impossible_calls_are_refused(tmp_path: Path) -> None:
    cache = _core.NgramCache(64)
    for begin, end in ((-1, 2), (0, 4), (3, 2), (4, 4)):
        with pytest.raises(ValueError, match="outside"):
            cache.learn([1, 2, 3], begin, end)
    with pytest.raises(errors.InvalidTokenError):
        cache.learn([1, 1 << 31])
    for n_max in (-1, 65_537):
        with pytest.raises(ValueError, match="n_max"):
            cache.draft([1], n_max)
    for n_vocab in (0, -1, 1 << 31):
        with pytest.raises(ValueError, match="n_vocab"):
            cache.load(tmp_path / "x", KEY, n_vocab)
    for key in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            cache.save(tmp_path / "x", key)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(cache)
    assert cache.n_ngrams == 0
