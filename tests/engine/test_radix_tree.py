"""RadixTree: what shares a beginning, against a plain list of keys."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_crab.engine.radix_tree import RadixTree


class Value:
    """Something that is equal to nothing but itself."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name or object.__repr__(self)


def key(*ids: int) -> bytes:
    return array("i", ids).tobytes()


def n_common(one: Sequence[int], other: Sequence[int]) -> int:
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n


def found(tree: RadixTree[Value], *ids: int) -> list[tuple[int, str]]:
    return [(n, value.name) for n, value in tree.matches(key(*ids))]


def test_the_longest_match_comes_first_then_each_shallower_one() -> None:
    tree: RadixTree[Value] = RadixTree()
    for name, ids in {
        "abcd": (1, 2, 3, 4), "abce": (1, 2, 3, 5), "ab": (1, 2), "x": (9,), "aby": (1, 2, 7),
    }.items():  # fmt: skip
        tree.insert(key(*ids), Value(name))
    assert found(tree, 1, 2, 3, 5, 6) == [(4, "abce"), (3, "abcd"), (2, "ab"), (2, "aby")]
    assert found(tree, 1, 2, 3) == [(3, "abcd"), (3, "abce"), (2, "ab"), (2, "aby")]
    assert found(tree, 1) == [(1, "ab"), (1, "abcd"), (1, "abce"), (1, "aby")]
    assert found(tree, 1, 3) == found(tree, 1)
    assert found(tree, 9, 1) == [(1, "x")]
    assert found(tree, 3) == []
    assert found(tree) == []


def test_a_key_may_end_inside_a_run_and_split_it() -> None:
    tree: RadixTree[Value] = RadixTree()
    long, short = Value("long"), Value("short")
    tree.insert(key(1, 2, 3, 4), long)
    assert (tree.n_nodes, tree.n_tokens) == (1, 4)
    tree.insert(key(1, 2), short)
    assert (tree.n_nodes, tree.n_tokens) == (2, 4)
    assert found(tree, 1, 2, 3) == [(3, "long"), (2, "short")]
    tree.remove(key(1, 2), short)
    assert (tree.n_nodes, tree.n_tokens) == (1, 4)
    assert found(tree, 1, 2, 3) == [(3, "long")]


def test_values_of_one_key_keep_their_order_and_count_once() -> None:
    tree: RadixTree[Value] = RadixTree()
    values = [Value(name) for name in "cab"]
    for value in (*values, values[0]):
        tree.insert(key(5, 6), value)
    assert len(tree) == 3
    assert found(tree, 5, 6) == [(2, "c"), (2, "a"), (2, "b")]
    tree.remove(key(5, 6), values[1])
    assert found(tree, 5, 6) == [(2, "c"), (2, "b")]


def test_runs_are_cut_between_tokens_though_bytes_agree_further() -> None:
    tree: RadixTree[Value] = RadixTree()
    tree.insert(key(7, 0x01020304), Value("a"))
    # The second ids share their first three bytes in memory.
    tree.insert(key(7, 0x7F020304), Value("b"))
    assert (tree.n_nodes, tree.n_tokens) == (3, 3)
    assert found(tree, 7, 0x7F020304) == [(2, "b"), (1, "a")]
    # Bytes agree at an odd place only.
    assert found(tree, 0x0304, 7) == []


def test_what_is_not_there_cannot_be_removed() -> None:
    tree: RadixTree[Value] = RadixTree()
    value = Value()
    tree.insert(key(1, 2, 3), value)
    for ids in [(), (1,), (1, 2), (1, 2, 3, 4), (1, 2, 4), (2,)]:
        with pytest.raises(KeyError):
            tree.remove(key(*ids), value)
    with pytest.raises(KeyError):
        tree.remove(key(1, 2, 3), Value())
    assert (len(tree), tree.n_nodes, tree.n_tokens) == (1, 1, 3)


def test_the_empty_key_matches_nothing() -> None:
    tree: RadixTree[Value] = RadixTree()
    value = Value()
    tree.insert(b"", value)
    tree.insert(key(1), Value("one"))
    assert found(tree, 1) == [(1, "one")]
    assert len(tree) == 2
    tree.remove(b"", value)
    assert len(tree) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_key_is_whole_tokens(size: int) -> None:
    tree: RadixTree[Value] = RadixTree()
    for call in (
        lambda: tree.insert(bytes(size), Value()),
        lambda: tree.remove(bytes(size), Value()),
        lambda: next(tree.matches(bytes(size))),
    ):
        with pytest.raises(ValueError, match="whole tokens"):
            call()


def test_a_path_longer_than_the_recursion_limit() -> None:
    tree: RadixTree[Value] = RadixTree()
    n = sys.getrecursionlimit() + 100
    values = [Value() for _ in range(n)]
    ids = key(*range(n))
    for at, value in enumerate(values, start=1):
        tree.insert(ids[: 4 * at], value)
    assert [value for _, value in tree.matches(key(0))] == values
    assert [value for _, value in tree.matches(ids)] == values[::-1]


def n_lines(work: Callable[[], object]) -> int:
    """Return how many lines of Python `work` runs."""
    count = 0

    def trace(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_work_grows_neither_with_the_values_nor_with_the_tokens() -> None:
    def lines(n_values: int, n_tokens: int) -> int:
        tree: RadixTree[Value] = RadixTree()
        head = [*range(n_tokens)]
        for last in range(n_values):
            tree.insert(key(*head, -1, last), Value())
        value = Value()
        ours = key(*head[:-1], -2, -3)

        def work() -> None:
            tree.insert(ours, value)
            next(tree.matches(ours))
            next(tree.matches(key(*head)))
            tree.remove(ours, value)

        return n_lines(work)

    few = lines(n_values=10, n_tokens=2)
    assert lines(n_values=2000, n_tokens=2) == few
    # Where the runs part is found by halving.
    assert lines(n_values=10, n_tokens=2**15) - few < 15 * 15


ids = st.lists(st.integers(0, 2), max_size=7).map(tuple)
steps = st.lists(st.tuples(st.sampled_from(["insert", "insert", "remove"]), ids), max_size=40)


def check(tree: RadixTree[Value], model: list[tuple[tuple[int, ...], Value]]) -> None:
    """Compare with the model: what is held, and in how many nodes a compressed tree holds it."""
    keys = {ids for ids, _ in model}
    prefixes = {ids[:n] for ids in keys for n in range(1, len(ids) + 1)}
    n_next = Counter(prefix[:-1] for prefix in prefixes)
    assert len(tree) == len(model)
    assert tree.n_tokens == len(prefixes)
    assert tree.n_nodes == sum(prefix in keys or n_next[prefix] != 1 for prefix in prefixes)


@given(steps, st.lists(ids, min_size=1, max_size=4), st.randoms())
def test_against_a_list_of_keys(
    steps: list[tuple[str, tuple[int, ...]]], queries: list[tuple[int, ...]], random: Any
) -> None:
    tree: RadixTree[Value] = RadixTree()
    model: list[tuple[tuple[int, ...], Value]] = []
    for what, ids in steps:
        if what == "insert":
            model.append((ids, Value()))
            tree.insert(key(*ids), model[-1][1])
        elif model:
            gone, value = model.pop(random.randrange(len(model)))
            tree.remove(key(*gone), value)
            with pytest.raises(KeyError):
                tree.remove(key(*gone), value)
        check(tree, model)
    for query in queries:
        expected = Counter((n_common(query, ids), value) for ids, value in model)
        matches = list(tree.matches(key(*query)))
        assert Counter(matches) == Counter({hit: n for hit, n in expected.items() if hit[0] > 0})
        assert all(one[0] >= other[0] for one, other in pairwise(matches))
        of_one_key = [value for _, value in matches if (query, value) in model]
        assert of_one_key == [value for ids, value in model if ids == query and query]
        # A key that is there exactly is first, before longer ones that share as much.
        assert [value for _, value in matches[: len(of_one_key)]] == of_one_key
    random.shuffle(model)
    while model:
        gone, value = model.pop()
        tree.remove(key(*gone), value)
        check(tree, model)
    assert (len(tree), tree.n_nodes, tree.n_tokens) == (0, 0, 0)
