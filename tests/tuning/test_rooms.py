"""Memory in words."""

from __future__ import annotations

import pytest

from llama_crab import ParameterError
from llama_crab.tuning.rooms import DeviceRoom, check_rooms, parse_rooms, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        *(("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("8g", 8 * 2**30), ("500 MiB", 500 * 2**20)),
        *(("1.5GiB", 3 * 2**29), ("4096", 4096), ("0", 0), (".5k", 512)),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "8Q", "-1GiB", "1e3", "8GiB GiB", "99999999TiB"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ParameterError, match=r"^--device: "):
        parse_size(text, "--device")


def test_devices_without_a_name_get_one() -> None:
    assert parse_rooms("1GiB, CUDA1:2GiB") == (
        DeviceRoom("gpu0", 2**30),
        DeviceRoom("CUDA1", 2**31, 2**31),
    )


@pytest.mark.parametrize("text", ["", "1GiB,", ":1GiB", "a:1GiB,a:2GiB"])
def test_wrong_devices_are_refused(text: str) -> None:
    with pytest.raises(ParameterError, match=r"^devices: "):
        parse_rooms(text)


def test_a_room_is_checked() -> None:
    with pytest.raises(ParameterError, match=r"free: 2 is more than 1"):
        DeviceRoom("gpu", 1, 2)
    with pytest.raises(ParameterError, match=r"total: expected an integer"):
        DeviceRoom("gpu", 1.5)  # type: ignore[arg-type]
    for name in ("", "a\0b", "\udc80", 3):
        with pytest.raises(ParameterError, match=r"name"):
            DeviceRoom(name, 1)  # type: ignore[arg-type]
    for wrong in ([8], 8, "8GiB", DeviceRoom("gpu", 1)):
        with pytest.raises(ParameterError, match=r"^devices: expected .*DeviceRoom"):
            check_rooms(wrong)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"one or more"):
        check_rooms([])
