"""What drafts would have done to known answers: acceptance, and the least time of a policy.

Verification changes no answer, so each choice of draft lengths can be played over the same tokens.
Nothing of the engine is used here: the drafts are those of its rule, written down once more.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

N_MAX = 32
_CAP = 32
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32)
# Agreements are told apart by these lower bounds.
_CLASSES = (1, 2, 3, 4, 6, 9, 17)


@dataclass(frozen=True, slots=True)
class Draft:
    """The longest draft at one place: the context that agreed, its tokens, and the right ones."""

    agreed: int
    n: int
    n_right: int


NO_DRAFT = Draft(0, 0, 0)
# How many tokens of a draft are decoded.
Policy = Callable[[Draft], int]
# Microseconds of a step with that many tokens.
Cost = Callable[[int], float]


def latest_bigram(prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, int]:
    """Return at how many tokens the two before had occurred together, and how many they foretold.

    Foretold is what followed their latest occurrence.
    """
    follower: dict[tuple[int, int], int] = {}
    tokens = [*prompt, *answer]
    n_known = n_right = 0
    for i in range(2, len(tokens)):
        pair = (tokens[i - 2], tokens[i - 1])
        if i >= len(prompt) and pair in follower:
            n_known += 1
            n_right += follower[pair] == tokens[i]
        follower[pair] = tokens[i]
    return n_known, n_right


def drafts(
    prompt: Sequence[int], answer: Sequence[int], min_ngram: int = 1, max_ngram: int = 2
) -> list[Draft]:
    """Return the draft before each token of an answer; the first follows from the prompt's step.

    The longest agreement wins (found by n-grams up to `max_ngram`), then the most frequent next
    token, then the latest place. A copy may run over the end of what is known into itself.
    """
    tokens = [*prompt, *answer]
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    found: list[Draft] = []
    for end in range(1, len(tokens)):
        # `tokens[:end]` is known; places are those where a known token follows.
        if end > len(prompt):
            found.append(_draft(tokens, end, places, min_ngram, max_ngram))
        elif end == len(prompt):
            found.append(NO_DRAFT)
        for order in range(min_ngram, min(max_ngram, end) + 1):
            places[tuple(tokens[end - order : end])].append(end)
    return found


def _draft(
    tokens: Sequence[int],
    end: int,
    places: Mapping[tuple[int, ...], list[int]],
    min_ngram: int,
    max_ngram: int,
) -> Draft:
    for order in range(min(max_ngram, end), min_ngram - 1, -1):
        candidates = places.get(tuple(tokens[end - order : end]))
        if candidates:
            break
    else:
        return NO_DRAFT
    agreements = {at: _agreement(tokens, at, end) for at in candidates}
    longest = max(agreements.values())
    best = [at for at in candidates if agreements[at] == longest]
    counts = Counter(tokens[at] for at in best)
    at = max(best, key=lambda place: (counts[tokens[place]], place))
    n_right = 0
    copy = list(tokens[at:end])
    period = end - at
    for i in range(min(N_MAX, len(tokens) - end)):
        if copy[i % period] != tokens[end + i]:
            break
        n_right += 1
    return Draft(longest, N_MAX, n_right)


def _agreement(tokens: Sequence[int], at: int, end: int) -> int:
    n = 0
    while n < min(at, _CAP) and tokens[at - 1 - n] == tokens[end - 1 - n]:
        n += 1
    return n


@dataclass(frozen=True, slots=True)
class Replay:
    """The sums of one policy over all answers."""

    sec: float
    n_steps: int
    n_drafted: int
    n_accepted: int


def replay(answers: Sequence[Sequence[Draft]], n_seq: int, policy: Policy, cost: Cost) -> Replay:
    """Play a policy over answers that are generated `n_seq` at a time, each group to its end."""
    us = 0.0
    n_steps = n_drafted = n_accepted = 0
    for start in range(0, len(answers), n_seq):
        running = [(answer, 0) for answer in answers[start : start + n_seq] if answer]
        while running:
            n_tokens = 0
            later = []
            for answer, at in running:
                draft = answer[at]
                # The last token of an answer is decoded by nobody.
                length = min(policy(draft), draft.n, len(answer) - at - 1)
                accepted = min(length, draft.n_right)
                n_tokens += 1 + length
                n_drafted += length
                n_accepted += accepted
                if at + accepted + 1 < len(answer):
                    later.append((answer, at + accepted + 1))
            us += cost(n_tokens)
            n_steps += 1
            running = later
    return Replay(us / 1e6, n_steps, n_drafted, n_accepted)


def bounds(answers: Sequence[Sequence[Draft]], n_seq: int, cost: Cost) -> dict[str, float]:
    """Return the tokens/s, as a ratio to no drafts, that choices of lengths reach at most.

    ``fixed``: one length for all. ``by_agreement``: one for each class of agreement, chosen in
    hindsight: what acceptance and costs allow to who cannot foresee, and looks at each sequence by
    itself. ``foreseen``: only tokens that will be accepted, up to the best limit.
    """

    def sec(policy: Policy) -> float:
        return replay(answers, n_seq, policy, cost).sec

    plain = sec(lambda _: 0)
    fixed = {length: sec(lambda _, length=length: length) for length in LENGTHS}
    foreseen = min(sec(lambda draft, limit=limit: min(draft.n_right, limit)) for limit in LENGTHS)
    best_length = min(fixed, key=fixed.__getitem__)
    # One class after the other gets its best length, from the best of many beginnings.
    starts = [[0] * i + [n] * (len(_CLASSES) - i) for i in range(len(_CLASSES)) for n in LENGTHS]
    least, lengths = min((sec(_by_class(start)), start) for start in starts)
    improved = True
    while improved:
        improved = False
        for i, length in itertools.product(range(len(_CLASSES)), LENGTHS):
            other = [*lengths[:i], length, *lengths[i + 1 :]]
            spent = sec(_by_class(other))
            if spent < least * 0.9999:
                least, lengths, improved = spent, other, True
    return {
        "fixed": round(plain / fixed[best_length], 4),
        "fixed_length": best_length,
        "by_agreement": round(plain / least, 4),
        "foreseen": round(plain / foreseen, 4),
    }


def _by_class(lengths: Sequence[int]) -> Policy:
    return lambda draft: lengths[bisect_right(_CLASSES, draft.agreed) - 1] if draft.n else 0
