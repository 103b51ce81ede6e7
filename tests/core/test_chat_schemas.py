"""Schemas of tools that llama-common's converter would follow for ever, or complain about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_crab import _core
from llama_crab.errors import ChatTemplateError
from llama_crab.sampling import SamplerChain

TEMPLATES = Path(__file__).resolve().parents[2] / "third_party/llama.cpp/models/templates"
USER = json.dumps([{"role": "user", "content": "Go"}])
TEXT = {"type": "string"}

Schema = dict[str, Any]


def properties(**fields: Schema) -> Schema:
    return {"type": "object", "properties": fields}


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def chain(n: int) -> Schema:
    """Return a schema of little depth, of which each definition leads to the next."""
    defs = {f"a{i}": properties(x=ref(f"a{i + 1}")) for i in range(n)}
    return {**properties(x=ref("a0")), "$defs": {**defs, f"a{n}": TEXT}}


def doubled(n: int) -> Schema:
    """Return a schema of which each definition has two ways to the next."""
    defs: Schema = {f"a{i}": {"anyOf": [ref(f"a{i + 1}")] * 2} for i in range(n)}
    return {**properties(x=ref("a0")), "$defs": {**defs, f"a{n}": {"type": "integer"}}}


def lists(n: int) -> Schema:
    """Return a schema that stands for 2 to the n ones."""
    schema: Schema = {"type": "integer"}
    for _ in range(n):
        schema = {"type": ["array", "array"], "items": schema}
    return properties(x=schema)


def recursive(*more: Schema) -> Schema:
    node = properties(name=TEXT, child={"allOf": [ref("Node"), *more]})
    return {**properties(root=ref("Node")), "$defs": {"Node": node}}


def swapped(entry: Schema) -> Schema:
    return {**properties(x=entry), "$defs": {"a": ref("b"), "b": ref("a")}}


# What is refused, and a part of the reason.
REFUSED = {
    "a circle through allOf": (recursive(properties(z=TEXT)), "circle"),
    "a circle of references in allOf": (swapped({"allOf": [ref("a"), ref("a")]}), "circle"),
    "a circle of references": (swapped(ref("a")), "circle"),
    "a long chain": (chain(5000), "100 levels"),
    "a union of many ways": (doubled(40), "too large"),
    "lists of types": (lists(30), "too large"),
    "a long name": (properties(**{"é" * 20_000: TEXT}), "in a row"),
    "many properties": (properties(**{f"p{i}": TEXT for i in range(2000)}), "properties"),
}
# What is taken: all at the edge of what is not.
TAKEN = {
    "a recursive type": recursive(),
    "a chain": chain(45),
    "a name": properties(**{"é" * 99: TEXT}),
    "a union": doubled(8),
}

RENDER = """
import sys, threading
from llama_crab import _core
from llama_crab.errors import ChatTemplateError
model = _core.Model(sys.argv[1], vocab_only=True)
templates = _core.ChatTemplates(model, open(sys.argv[2], encoding="utf-8").read())
tools = sys.stdin.read()
def work():
    try:
        prompt = templates.render('[{"role": "user", "content": "Go"}]', tools=tools, now=0)
        print("taken", len(prompt.grammar) > 0)
    except ChatTemplateError as error:
        print(error)
threading.stack_size(512 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def tools_of(parameters: Schema) -> str:
    function = {"name": "find", "description": "Find.", "parameters": parameters}
    return json.dumps([{"type": "function", "function": function}])


def rendered(smol_path: Path, parameters: Schema, name: str = "Qwen-Qwen3-0.6B") -> str:
    """Return what a small thread of another process says of a tool."""
    path = TEMPLATES / f"{name}.jinja"
    done = subprocess.run(
        [sys.executable, "-c", RENDER, str(smol_path), str(path)],
        input=tools_of(parameters),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def templates_of(model: _core.Model, name: str) -> _core.ChatTemplates:
    return _core.ChatTemplates(model, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize("reason", REFUSED)
def test_a_schema_without_an_end_is_refused(smol_path: Path, reason: str) -> None:
    schema, part = REFUSED[reason]
    told = rendered(smol_path, schema)
    assert "tools: the parameters of find: " in told
    assert part in told


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "Qwen3-Coder", "MiniMax-M3"])
@pytest.mark.parametrize("kind", TAKEN)
def test_a_schema_with_an_end_is_taken(smol_path: Path, kind: str, name: str) -> None:
    assert rendered(smol_path, TAKEN[kind], name) == "taken True"


def test_the_form_of_an_answer_is_looked_at_too(smol: _core.Model) -> None:
    templates = templates_of(smol, "Qwen-Qwen3-0.6B")
    schema = swapped({"allOf": [ref("a"), ref("a")]})
    with pytest.raises(ChatTemplateError, match=r"json_schema: .*circle"):
        templates.render(USER, json_schema=json.dumps(schema), now=0)


def allows(model: _core.Model, grammar: str, text: str) -> bool:
    sampler = SamplerChain().grammar(grammar).compile(model, 0)
    try:
        for token in model.vocab.tokenize(text, False, False):
            sampler.accept(token)
    except Exception:
        return False
    return True


def test_a_recursive_type_is_held(smol: _core.Model) -> None:
    """As pydantic 1 writes one: a reference within an allOf."""
    templates = templates_of(smol, "Qwen-Qwen2.5-7B-Instruct")
    prompt = templates.render(USER, tools=tools_of(recursive()), tool_choice="required", now=0)
    call = '<tool_call>\n{"name": "find", "arguments": {"root": %s}}\n</tool_call>'
    call = prompt.generation_prompt + call
    assert allows(smol, prompt.grammar, call % '{"name": "a", "child": {"child": {"name": "b"}}}')
    assert not allows(smol, prompt.grammar, call % '{"name": "a", "child": {"other": 1}}')


# Those that a grammar holds, and those that it takes for any string.
PATTERNS = {
    "^[a-z]+(?:-[0-9]{2,3})?$": True,
    r"^a\.b\[c\]$": True,
    "^(yes|no)$": True,
    "^a{3}.*$": True,
    "[a-z]+": False,
    r"^\d{4}$": False,
    r"^[\w.]+$": False,
    "^(?=a).b$": False,
    "^a$|^b$": False,
    "^a{1,2,3}$": False,
    "^a{x}$": False,
    "^a]$": False,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_held_or_passed_over_in_silence(
    smol: _core.Model, capfd: pytest.CaptureFixture[str], pattern: str
) -> None:
    """The template shows it either way, and what a pattern is called is no pattern."""
    templates = templates_of(smol, "Qwen-Qwen3-0.6B")
    schema = properties(code={"type": "string", "pattern": pattern}, pattern={"pattern": pattern})
    prompt = templates.render(USER, tools=tools_of(schema), now=0)
    assert capfd.readouterr() == ("", "")
    assert prompt.text.count(json.dumps(pattern, ensure_ascii=False)) == 2
    for name in ("code", "pattern"):
        (rule,) = rules(prompt.grammar, f"{name}-kv")
        assert (" string" in rule) is not PATTERNS[pattern], rule


def rules(grammar: str, end: str) -> list[str]:
    return [line for line in grammar.splitlines() if line.split(" ::= ")[0].endswith(end)]


def test_templates_show_the_tools_as_they_were_given(smol: _core.Model) -> None:
    """Also where a special token in them makes a second render necessary."""
    name = {"allOf": [{"type": "string", "description": "Not <|im_end|>."}], "title": "Name"}
    schema = properties(name=name)
    for template in ("Qwen-Qwen3-0.6B", "Qwen3-Coder", "meta-llama-Llama-3.1-8B-Instruct"):
        templates = templates_of(smol, template)
        prompt = templates.render(USER, tools=tools_of(schema), now=0)
        assert "allOf" in prompt.text, template
        assert "<|im_end|>." in prompt.text
        end = smol.vocab.tokenize("<|im_end|>", False, True)
        assert len(end) == 1
        plain = templates.render(USER, tools=tools_of(properties(name=TEXT)), now=0)
        count = templates.tokenize(prompt).count(end[0])
        assert count == templates.tokenize(plain).count(end[0])
