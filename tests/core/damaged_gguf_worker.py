"""Load damaged copies of a GGUF one after the other; run by test_damaged_gguf in a process.

usage: damaged_gguf_worker.py FOLDER FIRST LAST GGUF [GGUF ...]

Mutation i depends on i alone. Before each one the line ``begin i what`` is printed, after it
``end i outcome``, so that whoever reads knows the culprit when this process dies.
"""

from __future__ import annotations

import math
import random
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from llama_crab import _core
from llama_crab.errors import LlamaCrabError

TIME_LIMIT_SEC = 30
ADDRESS_SPACE = 6 << 30

# GGUF value types: struct format of the scalars; 8 is a string, 9 an array.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9

INTEGERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 63, 100, 127, 128, 255, 256, 511, 512, 513, 1000, 4096),
    *(65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1),
    *(1 << 63, (1 << 64) - 1, (1 << 64) - 31, (1 << 62) + 1),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-38, 1e38, float("inf"), float("-inf"), float("nan"), 1e-5)


@dataclass
class Spot:
    """A number in the file: where it is, how it is written, what it means."""

    at: int
    form: str
    what: str


@dataclass
class Layout:
    """The places of a GGUF that are worth damaging."""

    structure: list[Spot] = field(default_factory=list)  # counts, lengths, types, dims, offsets
    values: list[Spot] = field(default_factory=list)  # scalar metadata
    elements: list[Spot] = field(default_factory=list)  # entries of arrays of numbers
    keys: list[tuple[int, int]] = field(default_factory=list)  # [start, end) of whole pairs
    tensors: list[tuple[int, int]] = field(default_factory=list)  # the same of tensor infos
    end: int = 0  # of everything before the tensor data


def read_layout(data: bytes) -> Layout:
    """Walk the header, the metadata and the tensor infos of an undamaged GGUF."""
    found = Layout()
    at = 4

    def number(form: str, what: str, spots: list[Spot]) -> int:
        nonlocal at
        spots.append(Spot(at, form, what))
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return int(value) if value == value else 0

    def text(what: str) -> str:
        nonlocal at
        n = number("Q", f"length of {what}", found.structure)
        at += n
        return data[at - n : at].decode()

    def value(kind: int, key: str, spots: list[Spot]) -> None:
        if kind == STRING:
            text(key)
        else:
            number(SCALARS[kind], key, spots)

    number("I", "version", found.structure)
    n_tensors = number("Q", "n_tensors", found.structure)
    n_kv = number("Q", "n_kv", found.structure)
    for _ in range(n_kv):
        start = at
        key = text("key")
        kind = number("I", f"type of {key}", found.structure)
        if kind == ARRAY:
            kind = number("I", f"element type of {key}", found.structure)
            for _ in range(number("Q", f"length of {key}", found.structure)):
                value(kind, f"element of {key}", found.elements)
        else:
            value(kind, key, found.values)
        found.keys.append((start, at))
    for _ in range(n_tensors):
        start = at
        name = text("tensor name")
        for _ in range(number("I", f"n_dims of {name}", found.structure)):
            number("Q", f"dimension of {name}", found.structure)
        number("I", f"type of {name}", found.structure)
        number("Q", f"offset of {name}", found.structure)
        found.tensors.append((start, at))
    found.end = at
    # Lengths of the many strings inside arrays would crowd out the rest.
    inside = [spot for spot in found.structure if "length of element" in spot.what]
    found.structure = [spot for spot in found.structure if spot not in inside] + inside[::40]
    return found


def _write(data: bytearray, spot: Spot, rng: random.Random) -> str:
    size = struct.calcsize("<" + spot.form)
    if spot.form in "fd":
        new: float | int = rng.choice(FLOATS)
        struct.pack_into("<" + spot.form, data, spot.at, new)
    else:
        old = int.from_bytes(data[spot.at : spot.at + size], "little")
        new = rng.choice((*INTEGERS, old + 1, old - 1, old * 2, old // 2, old + 8)) % (
            1 << 8 * size
        )
        data[spot.at : spot.at + size] = new.to_bytes(size, "little")
    return f"{spot.what} = {new}"


def truncate(data: bytearray, layout: Layout, rng: random.Random) -> str:
    at = rng.randrange(layout.end + 64) if rng.random() < 0.8 else rng.randrange(len(data))
    del data[at:]
    return f"truncated at {at}"


def flip(data: bytearray, layout: Layout, rng: random.Random) -> str:
    places = sorted(rng.randrange(layout.end) for _ in range(rng.choice((1, 1, 2, 4, 16))))
    for at in places:
        data[at] ^= 1 << rng.randrange(8)
    return f"flipped at {places}"


def set_structure(data: bytearray, layout: Layout, rng: random.Random) -> str:
    return _write(data, rng.choice(layout.structure), rng)


def set_value(data: bytearray, layout: Layout, rng: random.Random) -> str:
    return _write(data, rng.choice(layout.values), rng)


def set_two_values(data: bytearray, layout: Layout, rng: random.Random) -> str:
    return ", ".join(_write(data, spot, rng) for spot in rng.sample(layout.values, 2))


def set_element(data: bytearray, layout: Layout, rng: random.Random) -> str:
    return _write(data, rng.choice(layout.elements), rng)


def retype(data: bytearray, layout: Layout, rng: random.Random) -> str:
    """Write an integer's type as another type of the same width."""
    spots = [s for s in layout.structure if s.what.startswith(("type of", "element type"))]
    spot = rng.choice(spots)
    new = rng.randrange(14) if rng.random() < 0.8 else rng.randrange(48)
    struct.pack_into("<I", data, spot.at, new)
    return f"{spot.what} = {new}"


def change_type(data: bytearray, layout: Layout, rng: random.Random) -> str:
    """Give a tensor another type and move all that follow, so that the file stays consistent."""
    chosen = rng.randrange(len(layout.tensors))
    what = ""
    offset = 0
    for index, (start, _) in enumerate(layout.tensors):
        (n_name,) = struct.unpack_from("<Q", data, start)
        (n_dims,) = struct.unpack_from("<I", data, start + 8 + n_name)
        dims = struct.unpack_from(f"<{n_dims}Q", data, start + 12 + n_name)
        type_at = start + 12 + n_name + 8 * n_dims
        if index == chosen:
            kind = rng.choice(list(GGML_QUANT_SIZES))
            struct.pack_into("<I", data, type_at, kind)
            what = f"type of {data[start + 8 : start + 8 + n_name].decode()} = {kind.name}"
        (number,) = struct.unpack_from("<I", data, type_at)
        struct.pack_into("<Q", data, type_at + 4, offset)
        per_block, block_bytes = GGML_QUANT_SIZES[number]
        n_bytes = math.prod(dims) // per_block * block_bytes
        offset += n_bytes + -n_bytes % 32
    data += bytes(max(0, layout.end + -layout.end % 32 + offset - len(data)))
    return what


def drop(data: bytearray, layout: Layout, rng: random.Random) -> str:
    """Take out a key or a tensor and keep the file consistent otherwise."""
    if rng.random() < 0.7:
        count_at, (start, end) = 16, rng.choice(layout.keys)
    else:
        count_at, (start, end) = 8, rng.choice(layout.tensors)
    gone = end - start
    # The freed bytes go to the padding before the tensor data, which must stay where it was.
    pad = -layout.end % 32
    data[layout.end : layout.end] = bytes((layout.end + pad) - (layout.end - gone) - pad)
    del data[start:end]
    (count,) = struct.unpack_from("<Q", data, count_at)
    struct.pack_into("<Q", data, count_at, count - 1)
    return f"dropped {bytes(data[start + 8 : start + 40])!r} at {start}"


def erase(data: bytearray, layout: Layout, rng: random.Random) -> str:
    start = rng.randrange(layout.end)
    n = rng.choice((1, 4, 8, 64, 512))
    data[start : start + n] = bytes([rng.choice((0, 255))]) * n
    return f"{n} bytes erased at {start}"


KINDS: tuple[Callable[[bytearray, Layout, random.Random], str], ...] = (
    *(truncate, flip, flip, set_structure, set_structure, set_value, set_value, set_value),
    *(set_two_values, set_element, retype, change_type, drop, erase),
)


def mutate(i: int, data: bytes, layout: Layout) -> tuple[bytearray, str]:
    """Return damaged bytes and what was done to them."""
    rng = random.Random(i)
    kind = rng.choice(KINDS)
    damaged = bytearray(data)
    return damaged, f"{kind.__name__}: {kind(damaged, layout, rng)}"


def use(path: Path) -> str:
    """Load the file and generate 4 tokens; return how it ended."""
    try:
        with _core.Model(path) as model:
            vocab = model.vocab
            assert model.metadata
            model.chat_template()
            repr((model, vocab.bos, vocab.eot, vocab.fim_pre, vocab.nl, vocab.suppress_tokens))
            tokens = vocab.tokenize("Hello <s> wörld 🦀", True, True)[:16]
            vocab.detokenize(tokens, False, True)
            for token in range(len(vocab)):
                vocab.piece(token, True)
            with (
                _core.Context(
                    model, n_ctx=64, n_batch=16, n_outputs_max=1, n_threads=1, n_threads_batch=1
                ) as context,
                _core.Batch(16) as batch,
                _core.Sampler.greedy() as sampler,
            ):
                pos = 0
                for _ in range(4):
                    batch.clear()
                    batch.extend(tokens or [0], pos, 0, "last")
                    pos += len(batch)
                    context.decode(batch)
                    tokens = [sampler.sample(context)]
    except LlamaCrabError as error:
        return type(error).__name__
    return "works"


def main() -> None:
    folder, first, last, *sources = sys.argv[1:]
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:
        pass
    bases = [(data, read_layout(data)) for data in (Path(s).read_bytes() for s in sources)]
    for i in range(int(first), int(last)):
        damaged, what = mutate(i, *bases[i % len(bases)])
        path = Path(folder, f"damaged-{i}.gguf")
        path.write_bytes(damaged)
        print("begin", i, what, flush=True)
        if hasattr(signal, "alarm"):
            signal.alarm(TIME_LIMIT_SEC)  # kills: an endless loop in C sees no Python handler
        outcome = use(path)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print("end", i, outcome, flush=True)
        path.unlink()


if __name__ == "__main__":
    main()
