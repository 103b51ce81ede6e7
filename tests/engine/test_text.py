"""TextStream: the text of an answer does not depend on how its bytes were cut into tokens."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_crab.engine.text import TextStream

MULTILINGUAL = "Größe, 東京タワー, Привет, שלום, नमस्ते, 👩‍👩‍👧 🇩🇪 café\u0301 ∑x²\n\tend"


def stream(
    pieces: Iterable[bytes], stops: tuple[str, ...] = (), include_stop: bool = False
) -> tuple[str, str | None, int]:
    """Return what a stream gives for these pieces: text, stop string, bytes of the answer."""
    text = TextStream(stops, include_stop)
    given_out = [text.push(piece) for piece in pieces]
    return "".join([*given_out, text.flush()]), text.stop, text.end


def reference(
    data: bytes, stops: tuple[str, ...], include_stop: bool
) -> tuple[str, str | None, int]:
    """Look at every beginning of the whole, shortest first, until one ends in a stop string."""
    for end in range(1, len(data) + 1):
        met = [stop for stop in stops if data[:end].endswith(stop.encode())]
        if met:
            stop = max(met, key=lambda stop: len(stop.encode()))
            kept = data[:end] if include_stop else data[: end - len(stop.encode())]
            return kept.decode("utf-8", "replace"), stop, len(kept)
    return data.decode("utf-8", "replace"), None, len(data)


def cut(data: bytes, *places: int) -> list[bytes]:
    bounds = [0, *sorted(places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("stops", [(), ("\0never",), ("ç", "😱")])
def test_no_character_is_broken_at_any_split(stops: tuple[str, ...]) -> None:
    data = MULTILINGUAL.encode()
    whole = (MULTILINGUAL, None, len(data))
    assert stream([data[i : i + 1] for i in range(len(data))], stops) == whole
    for place in range(len(data) + 1):
        assert stream(cut(data, place), stops) == whole


def test_half_a_character_waits_and_is_never_guessed() -> None:
    text = TextStream(())
    assert [text.push(bytes([byte])) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    assert stream([b"a\xff", b"b\xe2", b"\x82c"])[0] == "a�b�c"
    assert stream([b"\xe2\x82"])[0] == "�"
    assert stream([b"\xf0\x9f", b"STOP"], ("STOP",))[:2] == ("�", "STOP")


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("stop", ["STOP", "。終", "👩‍👩‍👧", "\n\n", "aab"])
def test_a_stop_string_is_found_at_every_pair_of_splits(stop: str, include_stop: bool) -> None:
    before, after = "SSTO\naa日本👩‍", "aab STOP\n\n rest"
    data = (before + stop + after).encode()
    expected = reference(data, (stop,), include_stop)
    assert expected[1] == stop
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            assert stream(cut(data, first, second), (stop,), include_stop) == expected


def test_of_several_stops_the_one_complete_first_wins() -> None:
    data = b"one two three"
    assert stream([data], ("three", "two")) == ("one ", "two", 4)
    assert stream([data], ("two", "three")) == ("one ", "two", 4)
    # The longest of those that end together; a longer one that would end later does not count.
    assert stream([b"ne", b" tw", b"o"], ("o", " two", "two")) == ("ne", " two", 2)
    assert stream([b"ne", b" tw", b"o"], ("two", " two")) == ("ne", " two", 2)
    for pieces in [[b"xab"], [b"xa", b"b"]]:
        assert stream(pieces, ("ab", "a")) == ("x", "a", 1)


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    text = TextStream(("END", "##"))
    assert text.push(b"a E") == "a "
    assert text.push(b"N") == ""
    assert text.push(b"T#") == "ENT"
    assert text.push(b" x") == "# x"
    assert text.push(b" EN") == " "
    assert text.flush() == "EN"
    assert text.stop is None
    assert text.end == len("a ENT# x EN")


def test_nothing_comes_after_a_stop_string() -> None:
    text = TextStream(("x",))
    assert text.push(b"axb") == "a"
    assert (text.push(b"more"), text.flush()) == ("", "")
    assert (text.stop, text.end) == ("x", 1)


fragments = st.one_of(
    st.sampled_from(["a", "b", "ab", "é", "日", "😀", "\n"]).map(str.encode),
    st.sampled_from([b"\xff", b"\xc3", b"\xe6\x97", b"\xf0\x9f\x98", b"\xa5", b"\x80"]),
)
texts = st.lists(fragments, max_size=14).map(b"".join)
stop_strings = st.lists(
    st.text(st.sampled_from("abé日😀\n"), min_size=1, max_size=4), max_size=4, unique=True
).map(tuple)


@given(texts, stop_strings, st.booleans(), st.data())
@example(b"abab", ("b", "abab"), False, None)
def test_every_split_gives_the_reference_of_the_whole(
    data: bytes, stops: tuple[str, ...], include_stop: bool, draw: st.DataObject | None
) -> None:
    expected = reference(data, stops, include_stop)
    assert stream([data], stops, include_stop) == expected
    assert stream([data[i : i + 1] for i in range(len(data))], stops, include_stop) == expected
    for place in range(len(data)):
        assert stream(cut(data, place), stops, include_stop) == expected
    if draw is not None:
        places = draw.draw(st.lists(st.integers(0, len(data)), max_size=6))
        assert stream(cut(data, *places), stops, include_stop) == expected


@given(texts, stop_strings)
def test_all_that_is_certain_is_given_at_once(data: bytes, stops: tuple[str, ...]) -> None:
    text = TextStream(stops)
    out = ""
    for n, byte in enumerate(data, start=1):
        out += text.push(bytes([byte]))
        if text.stop is not None:
            return
        seen = data[:n]
        held = max(
            (
                k
                for stop in stops
                for k in range(len(stop.encode()))
                if seen.endswith(stop.encode()[:k])
            ),
            default=0,
        )
        certain = seen[: n - held]
        assert out == codecs.utf_8_decode(certain, "replace", False)[0]
        assert text.end == len(certain)
