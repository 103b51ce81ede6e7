"""Snapshot files: they give back what was written, or say what is wrong."""

from __future__ import annotations

import errno
import json
import os
import struct
from array import array
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from llama_crab.engine.snapshots import read_snapshot, write_snapshot
from llama_crab.errors import StateError

KEY: dict[str, Any] = {"model": "tiny", "n_ctx": 512, "adapters": [["a", 0.5]], "flash": True}


def key(*ids: int) -> bytes:
    return array("i", ids).tobytes()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("n_tokens", [0, 1, 1000])
@pytest.mark.parametrize("n_bytes", [0, 1, 100_000])
def test_a_file_gives_back_what_was_written(tmp_path: Path, n_tokens: int, n_bytes: int) -> None:
    path = tmp_path / "state"
    tokens, data = key(*range(n_tokens)), os.urandom(n_bytes)
    write_snapshot(path, KEY, tokens, data)
    assert read_snapshot(path, dict(reversed(KEY.items()))) == (tokens, data)
    assert files(tmp_path) == {"state"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "state", KEY, key(1), b"x")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def small_file(folder: Path) -> tuple[Path, bytes]:
    path = folder / "state"
    write_snapshot(path, KEY, key(1, 2, 3), b"the state", namespace="n")
    return path, path.read_bytes()


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path, whole = small_file(tmp_path)
    for at in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(whole)
            changed[at] ^= mask
            path.write_bytes(changed)
            with pytest.raises(StateError, match=r"damaged|no snapshot|truncated|of version"):
                read_snapshot(path, KEY, namespace="n")
    path.write_bytes(whole)
    assert read_snapshot(path, KEY, namespace="n") == (key(1, 2, 3), b"the state")


def test_every_missing_or_added_byte_is_noticed(tmp_path: Path) -> None:
    path, whole = small_file(tmp_path)
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(StateError, match="no snapshot" if n < 8 else "truncated"):
            read_snapshot(path, KEY, namespace="n")
    path.write_bytes(whole + b"x")
    with pytest.raises(StateError, match="1 bytes too many"):
        read_snapshot(path, KEY, namespace="n")


HEAD = struct.Struct("<8sII32s")


def forge(header: object, rest: bytes = b"", n_header: int | None = None) -> bytes:
    """Return a file whose header is well checksummed, whatever it says."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    digest = blake2b(encoded, digest_size=32).digest()
    n_header = len(encoded) if n_header is None else n_header
    return HEAD.pack(b"\x89KVSNAP\n", 1, n_header, digest) + encoded + rest


def fields(**changes: object) -> dict[str, object]:
    empty = blake2b(b"", digest_size=32).hexdigest()
    header: dict[str, object] = {
        "key": KEY, "namespace": "", "n_token_bytes": 0, "n_data_bytes": 0,
        "tokens_digest": empty, "data_digest": empty,
    }  # fmt: skip
    return header | changes


def test_a_forged_header_cannot_ask_for_memory_or_break_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(forge(fields()))
    assert read_snapshot(path, KEY) == (b"", b"")
    for content in (
        forge(fields(), n_header=0xFFFFFFFF),
        forge(fields(n_data_bytes=1 << 62)),
        forge(fields(n_token_bytes=1 << 62)),
        forge(fields(n_token_bytes=-(1 << 62), n_data_bytes=1 << 62)),
        forge(fields(n_token_bytes=8, n_data_bytes=-8)),
        forge(fields(n_token_bytes=2), b"xx"),
        forge(fields(n_data_bytes=0.0)),
        forge(fields(key=[])),
        forge(fields(namespace=[])),
        forge(fields(more=1)),
        forge({"key": KEY}),
        forge([]),
        forge(b"\xff"),
        forge(b"[" * 100_000),
        HEAD.pack(b"\x89KVSNAP\n", 2, 0, bytes(32)),
    ):
        path.write_bytes(content)
        with pytest.raises(StateError, match=r"damaged|truncated|of version 2"):
            read_snapshot(path, KEY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "huge"}, r'model is "tiny" in the file and "huge" here'),
        ({"n_ctx": 1024, "model": "huge"}, r'model is "tiny" in the file and "huge" here'),
        (
            {"adapters": [["a", 1.0]]},
            r'adapters is \[\["a",0.5\]\] in the file and \[\["a",1.0\]\]',
        ),
        ({"flash": 1}, r"flash is true in the file and 1 here"),
        ({"new": None}, r"new is absent in the file and null here"),
    ],
)
def test_another_key_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_snapshot(tmp_path / "state", KEY, key(1), b"x")
    with pytest.raises(StateError, match=message):
        read_snapshot(tmp_path / "state", KEY | changes)


def test_a_missing_field_and_another_namespace_are_named(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_snapshot(path, KEY, key(1), b"x", namespace="one")
    with pytest.raises(StateError, match='model is "tiny" in the file and absent here'):
        read_snapshot(path, {name: KEY[name] for name in KEY if name != "model"}, namespace="one")
    with pytest.raises(StateError, match='namespace is "one" in the file and "" here'):
        read_snapshot(path, KEY)


def test_what_is_no_file_or_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_snapshot(tmp_path / "none", KEY)
    with pytest.raises(StateError, match="cannot be read"):
        read_snapshot(tmp_path, KEY)
    (tmp_path / "text").write_text("something else, and longer than any head of a snapshot is")
    with pytest.raises(StateError, match="is no snapshot"):
        read_snapshot(tmp_path / "text", KEY)


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing_and_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    path, whole = small_file(tmp_path)

    def fail(*_: object) -> None:
        assert len(files(tmp_path)) == 2
        raise error

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        write_snapshot(path, KEY, key(9), b"new")
    assert files(tmp_path) == {"state"}
    assert path.read_bytes() == whole


def test_what_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_snapshot(tmp_path / "state", {"model": b"bytes"}, key(1), b"x")
    with pytest.raises(ValueError, match="impossible sizes"):
        write_snapshot(tmp_path / "state", KEY, b"abc", b"x")
    assert files(tmp_path) == set()
