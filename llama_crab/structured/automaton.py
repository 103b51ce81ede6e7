"""Deterministic automata over characters, for what no single pattern says: several at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .charset import EVERY, CharSet, complement, holds, intersection, union
from .gbnf import Item, Rules
from .json_text import Speller
from .regex import Alt, Chars, Node, Repeat, Seq

_MOST_STATES = 10_000

Moves = list[tuple[CharSet, int]]


class TooLargeError(ValueError):
    """An automaton would have more states than are worth it."""


class Automaton(NamedTuple):
    """States from 0, the start; each one's moves, of which no two share a character."""

    moves: list[Moves]
    accepting: list[bool]


def of_lengths(least: int, most: int | None) -> Automaton:
    """Return the automaton of all texts of `least` to `most` characters."""
    last = least if most is None else most
    _check(last)
    moves: list[Moves] = [[(EVERY, state + 1)] for state in range(last)]
    moves.append([] if most is not None else [(EVERY, last)])
    return Automaton(moves, [state >= least for state in range(last + 1)])


def of_others(texts: Iterable[str]) -> Automaton:
    """Return the automaton of all texts but these."""
    children: list[dict[int, int]] = [{}]
    excluded = [False]
    for text in texts:
        state = 0
        for char in text:
            following = children[state].get(ord(char))
            if following is None:
                following = children[state][ord(char)] = len(children)
                children.append({})
                excluded.append(False)
            state = following
        excluded[state] = True
    anything = len(children)
    moves: list[Moves] = []
    for branches in children:
        taken = union([(code, code) for code in branches])
        known: Moves = [(((code, code),), to) for code, to in branches.items()]
        moves.append([*known, (complement(taken), anything)])
    moves.append([(EVERY, anything)])
    return Automaton(moves, [*(not hit for hit in excluded), True])


def of_node(node: Node) -> Automaton:
    """Return the automaton of a pattern. Raises `TooLargeError`."""
    steps = _Steps()
    end = steps.add(node, 0)
    start = steps.closure([0])
    states = {start: 0}
    todo = [start]
    moves: list[Moves] = []
    for state in todo:
        _check(len(states))
        here: Moves = []
        for chars, targets in _apart([step for at in state for step in steps.moves[at]]):
            after = steps.closure(targets)
            if after not in states:
                states[after] = len(states)
                todo.append(after)
            here.append((chars, states[after]))
        moves.append(_joined(here))
    return Automaton(moves, [end in state for state in todo])


def both(one: Automaton, other: Automaton) -> Automaton:
    """Return the automaton of the texts that both match. Raises `TooLargeError`."""
    states = {(0, 0): 0}
    todo = [(0, 0)]
    moves: list[Moves] = []
    for first, second in todo:
        _check(len(states))
        here: Moves = []
        for chars, to in one.moves[first]:
            for others, other_to in other.moves[second]:
                shared = intersection(chars, others)
                if shared:
                    pair = (to, other_to)
                    if pair not in states:
                        states[pair] = len(states)
                        todo.append(pair)
                    here.append((shared, states[pair]))
        moves.append(_joined(here))
    return Automaton(moves, [one.accepting[a] and other.accepting[b] for a, b in todo])


def matches(node: Node, text: str) -> bool:
    """Tell whether a pattern matches all of a text, in time that grows with its length only.

    Raises `TooLargeError`.
    """
    steps = _Steps()
    end = steps.add(node, 0)
    states = steps.closure([0])
    for char in text:
        moves = [step for state in states for step in steps.moves[state]]
        states = steps.closure([to for chars, to in moves if holds(chars, ord(char))])
    return end in states


def is_empty(automaton: Automaton) -> bool:
    """Tell whether no text matches."""
    return not _alive(automaton)[0]


def emit(automaton: Automaton, rules: Rules, spell: Speller) -> tuple[Item, ...]:
    """Return items that match what the automaton does: a rule per state."""
    alive = _alive(automaton)
    names = [rules.reserve() for _ in automaton.moves]
    for state, moves in enumerate(automaton.moves):
        body: list[tuple[Item, ...]] = []
        for chars, to in moves:
            if alive[to]:
                is_end = automaton.accepting[to] and not automaton.moves[to]
                body.append((*spell(rules, chars), *(() if is_end else (names[to],))))
        if automaton.accepting[state]:
            body.append(())
        rules.define(names[state], body)
    return (names[0],)


class _Steps:
    """A pattern as an automaton that may be in many states at once."""

    def __init__(self) -> None:
        self.moves: list[list[tuple[CharSet, int]]] = [[]]
        self._free: list[list[int]] = [[]]  # steps that take no character

    def _state(self) -> int:
        _check(len(self.moves))
        self.moves.append([])
        self._free.append([])
        return len(self.moves) - 1

    def add(self, node: Node, begin: int) -> int:
        """Add what matches `node` from `begin` on; return where it ends."""
        if isinstance(node, Chars):
            end = self._state()
            self.moves[begin].append((node.chars, end))
            return end
        if isinstance(node, Seq):
            for part in node.parts:
                begin = self.add(part, begin)
            return begin
        if isinstance(node, Alt):
            end = self._state()
            for option in node.options:
                first = self._state()
                self._free[begin].append(first)
                self._free[self.add(option, first)].append(end)
            return end
        assert isinstance(node, Repeat)
        for _ in range(node.least):
            begin = self.add(node.node, begin)
        end = self._state()
        if node.most is None:
            again = self._state()
            self._free[begin].append(again)
            self._free[self.add(node.node, again)].append(again)
            self._free[again].append(end)
            return end
        for _ in range(node.most - node.least):
            self._free[begin].append(end)
            begin = self.add(node.node, begin)
        self._free[begin].append(end)
        return end

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        found = set(states)
        todo = list(found)
        while todo:
            for state in self._free[todo.pop()]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)


def _apart(steps: list[tuple[CharSet, int]]) -> list[tuple[CharSet, frozenset[int]]]:
    """Return sets that share nothing, each with all targets that its characters lead to."""
    bounds = sorted({edge for chars, _ in steps for low, high in chars for edge in (low, high + 1)})
    if not bounds:
        return []
    index = {edge: i for i, edge in enumerate(bounds)}
    targets: list[set[int]] = [set() for _ in bounds]
    for chars, to in steps:
        for low, high in chars:
            for i in range(index[low], index[high + 1]):
                targets[i].add(to)
    found: dict[frozenset[int], list[tuple[int, int]]] = {}
    for i in range(len(bounds) - 1):
        if targets[i]:
            found.setdefault(frozenset(targets[i]), []).append((bounds[i], bounds[i + 1] - 1))
    return [(union(ranges), to) for to, ranges in found.items()]


def _joined(moves: Moves) -> Moves:
    """Return one move per target."""
    found: dict[int, list[CharSet]] = {}
    for chars, to in moves:
        found.setdefault(to, []).append(chars)
    return [(union(*sets), to) for to, sets in found.items()]


def _alive(automaton: Automaton) -> list[bool]:
    """Tell of each state whether a match can still come of it."""
    before: list[list[int]] = [[] for _ in automaton.moves]
    for state, moves in enumerate(automaton.moves):
        for _, to in moves:
            before[to].append(state)
    alive = list(automaton.accepting)
    todo = [state for state, accepts in enumerate(alive) if accepts]
    while todo:
        for state in before[todo.pop()]:
            if not alive[state]:
                alive[state] = True
                todo.append(state)
    return alive


def _check(n_states: int) -> None:
    if n_states > _MOST_STATES:
        raise TooLargeError(f"more than {_MOST_STATES} states")
