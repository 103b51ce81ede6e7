"""A radix tree over token ids: who shares the longest beginning with a prompt."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

V = TypeVar("V", bound=Hashable)

_TOKEN = 4  # bytes of an int32


class _Node(Generic[V]):
    """A place in the tree, and the run of tokens (bytes) that leads to it from its parent."""

    __slots__ = ("children", "run", "values")

    def __init__(self, run: bytes) -> None:
        self.run = run
        self.children: dict[bytes, _Node[V]] = {}  # by the first token of their runs
        self.values: dict[V, None] = {}  # a set that keeps its order


class RadixTree(Generic[V]):
    """Maps sequences of token ids to values, and finds what has a beginning in common.

    A key is the ids as int32, 4 bytes each: ``array("i", ids).tobytes()``. So two runs are compared
    by one memcmp. A key may have several values; values are told apart by hash and equality, which
    are identity unless their class says otherwise.

    To insert, to remove and to find the first match cost a few comparisons of the key's bytes and
    one step per node on its path, however many values there are.

    Every method that takes a key raises `ValueError` when it is not whole tokens.

    Thread-safety: none.
    """

    __slots__ = ("_n_bytes", "_n_nodes", "_n_values", "_root")

    def __init__(self) -> None:
        self._root: _Node[V] = _Node(b"")
        self._n_values = 0
        self._n_nodes = 0
        self._n_bytes = 0

    def __len__(self) -> int:
        return self._n_values

    @property
    def n_tokens(self) -> int:
        """Tokens held: what several keys begin with is there once."""
        return self._n_bytes // _TOKEN

    @property
    def n_nodes(self) -> int:
        """Nodes besides the root: where a key with a value ends, and where keys part."""
        return self._n_nodes

    def insert(self, key: bytes, value: V) -> None:
        """Add `value` under `key`; does nothing when it is there."""
        _require_whole_tokens(key)
        node, at = self._root, 0
        while at < len(key):
            first = key[at : at + _TOKEN]
            child = node.children.get(first)
            if child is None:
                child = _Node(key[at:])
                node.children[first] = child
                self._n_nodes += 1
                self._n_bytes += len(child.run)
                at = len(key)
            else:
                n_common = _n_common(key, at, child.run)
                if n_common < len(child.run):
                    child = self._split(node, child, n_common)
                at += n_common
            node = child
        if value not in node.values:
            node.values[value] = None
            self._n_values += 1

    def remove(self, key: bytes, value: V) -> None:
        """Take `value` away from `key`. Raises `KeyError` when it is not there."""
        _require_whole_tokens(key)
        grandparent = parent = node = self._root
        at = 0
        while at < len(key):
            child = node.children.get(key[at : at + _TOKEN])
            if child is None or not key.startswith(child.run, at):
                raise KeyError(value)
            grandparent, parent, node = parent, node, child
            at += len(child.run)
        del node.values[value]
        self._n_values -= 1
        if node is not self._root and not node.values and not node.children:
            del parent.children[node.run[:_TOKEN]]
            self._n_nodes -= 1
            self._n_bytes -= len(node.run)
            parent, node = grandparent, parent
        if node is not self._root and not node.values and len(node.children) == 1:
            self._merge(parent, node)

    def matches(self, key: bytes) -> Iterator[tuple[int, V]]:
        """Yield ``(n_common, value)`` for all that begin like `key`, the longest match first.

        `n_common` counts tokens and is at least 1. Values of one node come in the order in which
        they were inserted. The tree must not change while the iterator is in use.
        """
        _require_whole_tokens(key)
        path: list[tuple[_Node[V], _Node[V], int]] = []
        node, at = self._root, 0
        while child := node.children.get(key[at : at + _TOKEN]):
            path.append((node, child, at))
            n_common = _n_common(key, at, child.run)
            node, at = child, at + n_common
            if n_common < len(child.run):
                break
        if at > 0:
            for value in _values_from(node):
                yield at // _TOKEN, value
        for node, taken, at in reversed(path):
            if at == 0:
                return
            for value in node.values:
                yield at // _TOKEN, value
            for child in node.children.values():
                if child is not taken:
                    for value in _values_from(child):
                        yield at // _TOKEN, value

    def _split(self, parent: _Node[V], node: _Node[V], at: int) -> _Node[V]:
        """Put a node into the run of `node`, `at` bytes behind `parent`; return it."""
        middle: _Node[V] = _Node(node.run[:at])
        node.run = node.run[at:]
        middle.children[node.run[:_TOKEN]] = node
        parent.children[middle.run[:_TOKEN]] = middle
        self._n_nodes += 1
        return middle

    def _merge(self, parent: _Node[V], node: _Node[V]) -> None:
        """Replace `node` by its only child."""
        (child,) = node.children.values()
        child.run = node.run + child.run
        parent.children[child.run[:_TOKEN]] = child
        self._n_nodes -= 1


def _values_from(node: _Node[V]) -> Iterator[V]:
    """Yield the values of a node and of all below it, without recursion: paths may be long."""
    yield from node.values
    pending = [iter(node.children.values())]
    while pending:
        child = next(pending[-1], None)
        if child is None:
            pending.pop()
        else:
            yield from child.values
            pending.append(iter(child.children.values()))


def _n_common(key: bytes, at: int, run: bytes) -> int:
    """Return how many bytes of `run` stand in `key` from `at` on; whole tokens only."""
    if key.startswith(run, at):
        return len(run)
    # Tokens before `same` are equal, the first difference is at `most` or before.
    same, most = 0, min(len(run), len(key) - at) // _TOKEN
    while same < most:
        middle = (same + most + 1) // 2
        if key.startswith(run[_TOKEN * same : _TOKEN * middle], at + _TOKEN * same):
            same = middle
        else:
            most = middle - 1
    return _TOKEN * same


def _require_whole_tokens(key: bytes) -> None:
    if len(key) % _TOKEN:
        raise ValueError(f"a key of {len(key)} bytes is not whole tokens of {_TOKEN} bytes")
