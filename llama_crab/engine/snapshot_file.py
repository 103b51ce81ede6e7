"""The file format of a snapshot: one sequence's tokens and state, checksummed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, BinaryIO

from ..errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

# A file: this head, the header (JSON of `Header`), the tokens, the data.
_HEAD = struct.Struct("<8sII32s")  # magic, version, bytes of the header, its checksum
_MAGIC = b"\x89KVSNAP\n"
_VERSION = 1
_TOKEN = 4  # bytes of an int32
SUFFIX = ".snapshot"
"""What the names end with that `write_into` gives."""


@dataclass(slots=True)
class Header:
    """What a file says about itself."""

    key: dict[str, Any]
    namespace: str
    n_token_bytes: int
    n_data_bytes: int
    tokens_digest: str
    data_digest: str

    def __post_init__(self) -> None:
        # They may come from a file that something else wrote.
        types = [type(getattr(self, field.name)) for field in fields(self)]
        if types != [dict, str, int, int, str, str]:
            raise TypeError("a field has the wrong type")
        if min(self.n_token_bytes, self.n_data_bytes) < 0 or self.n_token_bytes % _TOKEN:
            raise ValueError(f"impossible sizes: {self.n_token_bytes}, {self.n_data_bytes} bytes")

    def difference(self, key: Mapping[str, Any], namespace: str) -> str | None:
        """Say what is the first field that is not as asked for; None when all are."""
        for name in (*key, *self.key):
            there, here = (
                _json(some[name]) if name in some else "absent" for some in (self.key, key)
            )
            if there != here:
                return f"{name} is {there} in the file and {here} here"
        if self.namespace != namespace:
            return f"namespace is {_json(self.namespace)} in the file and {_json(namespace)} here"
        return None


def write_snapshot(
    path: Path, key: Mapping[str, Any], tokens: bytes, data: bytes, *, namespace: str = ""
) -> None:
    """Write a state to a file that is there whole or not at all, and readable by its owner only.

    Parameters
    ----------
    path
        The file; an older one is replaced.
    key
        What the state depends on, by name; values that JSON has.
    tokens
        The ids, int32 little-endian.
    data
        The state.
    namespace
        What it depends on besides: the adapters, where `key` does not have them.

    Raises
    ------
    OSError
        The file cannot be written. An older one is intact.
    TypeError
        `key` holds what JSON has not.
    ValueError
        `tokens` are not whole ids.
    """
    _write(path, _encode(key, tokens, data, namespace), tokens, data, durable=True)


def write_into(
    folder: Path, key: Mapping[str, Any], tokens: bytes, data: bytes, *, namespace: str = ""
) -> Path:
    """Write a state to a folder, made if need be, and return the file.

    Its name depends on all that is in it: processes that write different states do not collide.
    A power failure may lose it, for which its checksums are there: a cache does not wait for disks.
    Raises as `write_snapshot`.
    """
    start = _encode(key, tokens, data, namespace)
    name = hashlib.blake2b(start + tokens, digest_size=16).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name + SUFFIX)
    _write(path, start, tokens, data, durable=False)
    return path


def read_snapshot(
    path: Path, key: Mapping[str, Any], *, namespace: str = ""
) -> tuple[bytes, bytes]:
    """Return the tokens and the data of a file that `write_snapshot` made with the same key.

    Raises `FileNotFoundError`, or `StateError` when the file is no snapshot, is truncated or
    damaged, is of another version or made for another key or namespace, or cannot be read.
    """
    try:
        return read_file(path, key, namespace)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error}") from error


def read_file(path: Path, key: Mapping[str, Any], namespace: str) -> tuple[bytes, bytes]:
    """Do what `read_snapshot` does, but let any `OSError` through."""
    with path.open("rb") as file:
        header, tokens = _read_start(file, path)
        difference = header.difference(key, namespace)
        if difference is not None:
            raise StateError(f"{path} was made for another model or context: {difference}")
        data = file.read(header.n_data_bytes)
    if _digest(data).hex() != header.data_digest:
        raise StateError(f"{path} is damaged: the checksum of its data is wrong")
    return tokens, data


def read_start(path: Path) -> tuple[Header, bytes]:
    """Return the header and the tokens of a file, whatever its key; the data is not looked at.

    Raises `OSError`, or `StateError` as `read_snapshot`.
    """
    with path.open("rb") as file:
        return _read_start(file, path)


def _encode(key: Mapping[str, Any], tokens: bytes, data: bytes, namespace: str) -> bytes:
    """Return what a file has before its tokens."""
    header = Header(
        dict(key), namespace, len(tokens), len(data), _digest(tokens).hex(), _digest(data).hex()
    )
    encoded = _json(asdict(header)).encode()
    return _HEAD.pack(_MAGIC, _VERSION, len(encoded), _digest(encoded)) + encoded


def _write(path: Path, start: bytes, tokens: bytes, data: bytes, *, durable: bool) -> None:
    temporary = path.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb", opener=_open_private) as file:
            for part in (start, tokens, data):
                file.write(part)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read_start(file: BinaryIO, path: Path) -> tuple[Header, bytes]:
    """Return the header and the tokens, checked; leave the file at the data."""
    n_left = os.fstat(file.fileno()).st_size - _HEAD.size
    head = file.read(_HEAD.size)
    if not head.startswith(_MAGIC):
        raise StateError(f"{path} is no snapshot")
    if n_left < 0:
        raise StateError(f"{path} is truncated")
    _, version, n_header, digest = _HEAD.unpack(head)
    if version != _VERSION:
        raise StateError(f"{path} is of version {version}; this is version {_VERSION}")
    n_left -= n_header
    if n_left < 0:
        raise StateError(f"{path} is truncated")
    encoded = file.read(n_header)
    if _digest(encoded) != digest:
        raise StateError(f"{path} is damaged: the checksum of its header is wrong")
    try:
        header = Header(**json.loads(encoded))
        n_left -= header.n_token_bytes + header.n_data_bytes
    except (ValueError, TypeError, RecursionError) as error:
        raise StateError(f"{path} is damaged: its header does not parse") from error
    if n_left < 0:
        raise StateError(f"{path} is truncated")
    if n_left > 0:
        raise StateError(f"{path} is damaged: {n_left} bytes too many")
    tokens = file.read(header.n_token_bytes)
    if _digest(tokens).hex() != header.tokens_digest:
        raise StateError(f"{path} is damaged: the checksum of its tokens is wrong")
    return header, tokens


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
