"""Regular expressions and choices: walks against `re.fullmatch`, and what is refused."""

from __future__ import annotations

import json
import random
import re

import pytest
from walks import Walker

from llama_crab.errors import RegexError, SchemaError
from llama_crab.params import ParameterError
from llama_crab.structured import StructuredOutput, structured_output
from llama_crab.structured.automaton import both, emit, of_lengths, of_node, of_others
from llama_crab.structured.gbnf import Rules
from llama_crab.structured.json_grammar import schema_to_gbnf
from llama_crab.structured.json_text import plain
from llama_crab.structured.regex import parse_regex

PATTERNS = (
    r"", r"abc", r"a|b|", r"(a|bc)*d+", r"[a-z]{2,5}", r"\d{3}-\d{4}", r"[^a-z\d]{1,3}",
    r"\w+@\w+\.(com|org)", r"(?:x|yz){0,3}", r"\$\d+(\.\d{2})?", r"[\w.-]+", r"\s*\S+\s?",
    r".{0,4}", r"a.c", r"\D\W\S", r"[^\d\s]{2}", r"[\D]{2}[^\W]{2}", r"é+ü?", r"[β-ω]{1,4}",
    r"[\u4e00-\u4eff]{2}", r"\x41\u0042\t\n\\\.", r"(?P<year>\d{4})", r"a{3}b{2,}c{0,2}",
    r"(a*)*b", r"((a|b)+?c)??", r"[\]\-]", r"[a\-z]", r"[-a]", r"[a-]", r"}",
    r"]", r"^abc$", r"^a|b$", r"(^a$)|(^b$)", r"^(?:x|y)$", r"(a|)(b|)", r"[\b]", r"\0?a",
    r"(0|[1-9]\d{0,2})(,\d{3})*", r"(foo|foobar|fo)(bar)?", r"\"[^\"\\]*\"", r"[^\n]{1,600}",
    r"😀{2}[😀-😅]", r"\/\-\#\ ", r"x{0}y", r"a{700,1300}",
)  # fmt: skip
ALPHABET = 'abcdxyz0123456789 -.,@$\n\t\\"éβω一😀_fo'


def gbnf_of(pattern: str) -> str:
    found = structured_output(regex=pattern)
    assert found is not None
    return found.gbnf


@pytest.mark.parametrize("pattern", PATTERNS)
def test_walks_match_and_others_do_not_pass(walker: Walker, pattern: str) -> None:
    gbnf = gbnf_of(pattern)
    rng = random.Random(0)
    found = [walker.text(gbnf, seed, n_free=20) for seed in range(20)]
    for text in found:
        assert re.fullmatch(pattern, text), (pattern, text)
    mutants = []
    for text in found:
        i = rng.randrange(len(text) + 1)
        mutants.append(text[:i] + rng.choice(ALPHABET) + text[i + 1 :])
        mutants.append(text[:i] + text[i + rng.randint(0, 2) :])
    mutants += ["".join(rng.choices(ALPHABET, k=rng.randint(0, 6))) for _ in range(200)]
    for text in mutants:
        if "\0" in text or not re.fullmatch(pattern, text):
            assert not walker.accepts(gbnf, text), (pattern, text)
        elif text.isascii() and "\x0b" not in text:
            # Of other characters, Python's classes hold more than ECMAScript's.
            assert walker.accepts(gbnf, text), (pattern, text)


# What stands for itself, in a group, repeated; or one of two.
def _random_pattern(rng: random.Random, depth: int = 3) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.4:
        atoms = ("a", "b", "[ab]", "[^a]", ".", r"\d", r"\w", "é", r"\.")
        return rng.choice(atoms)
    if kind < 0.6:
        return _random_pattern(rng, depth - 1) + _random_pattern(rng, depth - 1)
    if kind < 0.8:
        return f"({_random_pattern(rng, depth - 1)}|{_random_pattern(rng, depth - 1)})"
    mark = rng.choice(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "+?"])
    return f"(?:{_random_pattern(rng, depth - 1)}){mark}"


def test_random_patterns(walker: Walker) -> None:
    rng = random.Random(1)
    n_accepted = n_refused = 0
    for _ in range(150):
        pattern = _random_pattern(rng)
        gbnf = gbnf_of(pattern)
        for seed in range(4):
            assert re.fullmatch(pattern, walker.text(gbnf, seed, n_free=10)), pattern
        for _ in range(30):
            text = "".join(rng.choices("ab1.é_-", k=rng.randint(0, 5)))
            passes = walker.accepts(gbnf, text)
            assert passes == bool(re.fullmatch(pattern, text, re.ASCII)), (pattern, text)
            n_accepted += passes
            n_refused += not passes
    assert min(n_accepted, n_refused) > 300


@pytest.mark.parametrize("pattern", [each for each in PATTERNS if "700" not in each])
def test_an_automaton_matches_what_its_pattern_does(walker: Walker, pattern: str) -> None:
    """Also cut to lengths, and without some texts."""
    node = parse_regex(pattern, whole=True)
    rules = Rules()
    excluded = {"abc", "a", "b", "", "ab", "é"}
    automaton = both(both(of_node(node), of_lengths(0, 6)), of_others(excluded))
    root = rules.add([emit(automaton, rules, plain)])
    if not rules.is_possible(root):
        return
    gbnf = rules.to_gbnf(root)
    for seed in range(10):
        text = walker.text(gbnf, seed, n_free=20)
        assert re.fullmatch(pattern, text), (pattern, text)
        assert len(text) <= 6
        assert text not in excluded
    for text in excluded:
        assert not walker.accepts(gbnf, text)


@pytest.mark.parametrize(
    ("pattern", "construct", "position"),
    [
        (r"a(?=b)", "a lookahead", 1),
        (r"a(?!b)", "a negative lookahead", 1),
        (r"(?<=a)b", "a lookbehind", 0),
        (r"x(?<!a)b", "a negative lookbehind", 1),
        (r"(a)\1", "a back reference", 3),
        (r"(?P<n>a)(?P=n)", "a back reference", 8),
        (r"\k<n>", "a back reference", 0),
        (r"(?i)a", "inline flags", 0),
        (r"(?>a)", "an atomic group", 0),
        (r"(?#note)", "a comment", 0),
        (r"ab\b", "a word boundary", 2),
        (r"\p{L}", "a Unicode property", 0),
        (r"a*+", "a possessive quantifier", 1),
        (r"a**", "a quantifier after a quantifier", 2),
        (r"*a", "a quantifier with nothing to repeat", 0),
        (r"a{,3}", "a quantifier without a minimum, which ECMAScript lacks", 1),
        (r"a{3,1}", "a maximum below its minimum", 1),
        (r"a{999999}", "more than 250000 repetitions", 1),
        (r"a{x", "a '{' that begins no quantifier; write \\{", 1),
        (r"a^b", "an anchor that is not at an end of the pattern", 1),
        (r"(a$)b", "an anchor that is not at an end of the pattern", 2),
        (r"^*", "a quantified anchor", 0),
        (r"(a", "a group that does not end", 0),
        (r"a)", "an unmatched ')'", 1),
        (r"[a", "a class that does not end", 0),
        (r"[]a]", "a ']' first in a class; write \\]", 1),
        (r"[b-a]", "a range that is the wrong way round", 1),
        (r"[a-\d]", "a range of classes", 1),
        (r"[[:alpha:]]", "a POSIX class", 1),
        (r"\q", "the escape \\q", 0),
        (r"\x4", "the escape \\x without 2 hex digits", 0),
        ("a\\", "a backslash at the end", 1),
        ("(" * 200 + ")" * 200, "more than 100 nested groups", 100),
    ],
)
def test_what_has_no_grammar_is_refused(pattern: str, construct: str, position: int) -> None:
    with pytest.raises(RegexError) as caught:
        structured_output(regex=pattern)
    assert (caught.value.construct, caught.value.position) == (construct, position)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(SchemaError, match=re.escape(construct)) as in_schema:
        schema_to_gbnf({"items": {"pattern": pattern}})
    assert (in_schema.value.keyword, in_schema.value.path) == ("pattern", "#/items")


def test_a_pattern_of_a_schema_matches_anywhere_and_inside_json(walker: Walker) -> None:
    """Where JSON escapes a character, its escape counts as that one character."""
    for pattern in (r'^[\\"\n\x01]{2}$', r"[^a]", r"\\", "^\t+$", r"é$", r"^😀.", r"a|^b|c$"):
        gbnf = schema_to_gbnf({"type": "string", "pattern": pattern})
        for seed in range(20):
            assert re.search(pattern, json.loads(walker.text(gbnf, seed, n_free=10)))
        for text in (
            '\\"',
            "\n\x01",
            "a",
            "aa",
            "b\\c",
            "\t\t",
            "xé",
            "éx",
            "😀!",
            "",
            "\x7f",
            "bc",
        ):
            document = json.dumps(text, ensure_ascii=False)
            expected = bool(re.search(pattern, text))
            assert walker.accepts(gbnf, document) == expected, (pattern, text)


def of_choices(*choices: str) -> StructuredOutput:
    found = structured_output(choices=choices)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "choices",
    [
        ("yes", "no"),
        ("a", "ab", "abc", "b"),
        ("", "x"),
        ('quo"te', "back\\slash", "new\nline", "tab\t", "[a-z]", "é", "日本語", "😀", "root ::="),
        tuple(f"item {n}" for n in range(3000)),
        tuple("a" * n for n in range(1, 300)),
        ("x" * 5000, "x" * 4999 + "y"),
    ],
)
def test_exactly_one_choice_is_made(walker: Walker, choices: tuple[str, ...]) -> None:
    output = of_choices(*choices)
    for seed in range(10):
        text = walker.text(output.gbnf, seed, n_free=10, n_most=6000)
        assert text in choices
        assert output.read(text) == (text, None, False)
    rng = random.Random(0)
    for choice in rng.sample(choices, min(len(choices), 20)):
        assert walker.accepts(output.gbnf, choice)
        for other in (choice + "!", choice[:-1], "!" + choice):
            assert walker.accepts(output.gbnf, other) == (other in choices)
    # Each of a set that begins alike can be the whole answer.
    assert output.read("item") == (None, None, True)


def test_wrong_choices_are_refused() -> None:
    for wrong, message in (
        ([], "there is none"), ("yes", "several strings"), ([1], "expected strings"),
        (["a\0"], "NUL"), (["\ud800"], "surrogate"), (7, "several strings"),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=message):
            structured_output(choices=wrong)  # type: ignore[arg-type]
