"""Memory of devices, given by hand or in words: ``8GiB``, ``CUDA0:24GB``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..params import ParameterError, require_integer

_UNITS = {
    **{"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40},
    **{"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
_MAX_BYTES = 2**60


@dataclass(frozen=True)
class DeviceRoom:
    """A device and its memory in bytes; ``free`` is all of ``total`` when it is not given.

    Raises ParameterError. Thread-safety: immutable.
    """

    name: str
    total: int
    free: int | None = None

    def __post_init__(self) -> None:
        # A name is a C string in llama.cpp.
        if not isinstance(self.name, str) or not self.name.isprintable() or not self.name:
            raise ParameterError(f"devices: expected a device's name, not {self.name!r}")
        label = f"devices[{self.name!r}]"
        total = require_integer(f"{label}.total", self.total, (0, _MAX_BYTES))
        free = total if self.free is None else self.free
        object.__setattr__(self, "total", total)
        object.__setattr__(self, "free", require_integer(f"{label}.free", free, (0, total)))

    @property
    def n_free(self) -> int:
        """Free bytes."""
        return self.total if self.free is None else self.free


def parse_size(text: str, option: str = "devices") -> int:
    """Return the bytes of ``8GiB``, ``8GB`` (10^9 each), ``8G`` (as GiB) or a plain number.

    Raises ParameterError that names `option`.
    """
    match = _SIZE.fullmatch(text)
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise ParameterError(f"{option}: {text!r} is no size such as 8GiB, 24GB or 500MiB")
    n_bytes = int(float(match[1]) * unit)
    if n_bytes > _MAX_BYTES:
        raise ParameterError(f"{option}: {text!r} is more than {_MAX_BYTES} bytes")
    return n_bytes


def parse_rooms(text: str) -> tuple[DeviceRoom, ...]:
    """Return the devices of ``8GiB,8GiB`` or ``CUDA0:24GB,CUDA1:8GB``.

    Devices without a name are called gpu0, gpu1, ... Raises ParameterError.
    """
    found = []
    for index, part in enumerate(text.split(",")):
        name, colon, size = part.rpartition(":")
        if colon and not name.strip():
            raise ParameterError(f"devices: {part!r} has no name before the colon")
        found.append(DeviceRoom(name.strip() or f"gpu{index}", parse_size(size)))
    return check_rooms(found)


def check_rooms(rooms: Sequence[DeviceRoom]) -> tuple[DeviceRoom, ...]:
    """Return `rooms` as a tuple; ParameterError where one is none, or a name is there twice."""
    if isinstance(rooms, (str, DeviceRoom)) or not isinstance(rooms, Iterable):
        raise ParameterError(f"devices: expected a sequence of DeviceRoom, not {rooms!r}")
    rooms = tuple(rooms)
    for room in rooms:
        if not isinstance(room, DeviceRoom):
            raise ParameterError(f"devices: expected DeviceRoom objects, not {room!r}")
    names = [room.name for room in rooms]
    if not rooms or len(set(names)) < len(names):
        raise ParameterError(f"devices: expected one or more different names, not {names}")
    return rooms
