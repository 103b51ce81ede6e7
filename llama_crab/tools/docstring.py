"""What a docstring says: its text, and what it says of each parameter."""

from __future__ import annotations

import re
from inspect import cleandoc

_UNDERLINED = re.compile(r"-{3,}\s*")
# The sections of parameters in either style, in lower case.
_PARAMETERS = frozenset(
    {"parameters", "other parameters", "args", "arguments", "keyword args", "keyword arguments"}
)
# Google's sections that hold no parameters.
_OTHERS = frozenset(
    {"returns", "return", "yields", "yield", "raises", "example", "examples", "note", "notes"}
    | {"warning", "warnings", "warns", "see also", "references", "todo", "attributes"}
)
# Named, because a line may also begin with a role, such as :func:`f`.
_REST_FIELD = re.compile(
    r":(param|parameter|arg|argument|key|keyword|type|returns?|rtype|raises?|yields?|var)"
    r"(?:\s+([^:]*))?:\s*(.*)"
)
# Google: name, perhaps a type in parentheses, colon. Numpy: names, perhaps colon and type.
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\(.*?\))?\s*:\s*(.*)")
_NUMPY_ENTRY = re.compile(r"(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?")


def parse_docstring(docstring: str | None) -> tuple[str, dict[str, str]]:
    """Return the text before all sections, and the descriptions of parameters by name."""
    lines = cleandoc(docstring or "").splitlines()
    texts: dict[str, list[str]] = {}
    begin = _next_section(lines, 0)
    head = lines[:begin]
    while begin < len(lines):
        end = _next_section(lines, begin + 1)
        title = lines[begin].strip().rstrip(":").lower()
        if _REST_FIELD.fullmatch(lines[begin]):
            _read_rest(lines[begin:end], texts)
        elif begin + 1 < len(lines) and _UNDERLINED.fullmatch(lines[begin + 1]):
            if title in _PARAMETERS:
                _read_entries(lines[begin + 2 : end], _NUMPY_ENTRY, texts)
        elif title in _PARAMETERS:
            _read_entries(lines[begin + 1 : end], _GOOGLE_ENTRY, texts)
        begin = end
    return _joined(head, keep_paragraphs=True), {
        name: _joined(text) for name, text in texts.items()
    }


def _next_section(lines: list[str], begin: int) -> int:
    for i in range(begin, len(lines)):
        line = lines[i]
        if line.startswith(" ") or not line:
            continue
        is_underlined = i + 1 < len(lines) and _UNDERLINED.fullmatch(lines[i + 1])
        is_google = line.rstrip().endswith(":") and line.rstrip()[:-1].lower() in (
            _PARAMETERS | _OTHERS
        )
        if is_underlined or is_google or _REST_FIELD.fullmatch(line):
            return i
    return len(lines)


def _read_entries(lines: list[str], entry: re.Pattern[str], texts: dict[str, list[str]]) -> None:
    """Read entries that begin at the section's own indentation, with deeper lines behind each."""
    filled = [line for line in lines if line.strip()]
    indent = min([len(line) - len(line.lstrip()) for line in filled], default=0)
    here: list[list[str]] = []
    for line in filled:
        match = entry.fullmatch(line[indent:])
        if line[indent] != " " and match:
            here = [texts.setdefault(name.strip(" *"), []) for name in match[1].split(",")]
            rest = match[2] if entry is _GOOGLE_ENTRY else ""
        else:
            rest = line
        for text in here:
            text.append(rest)


def _read_rest(lines: list[str], texts: dict[str, list[str]]) -> None:
    match = _REST_FIELD.fullmatch(lines[0])
    assert match
    if match[1] in ("param", "parameter", "arg", "argument", "key", "keyword") and match[2]:
        # ":param int days:" has the type in front.
        texts[match[2].split()[-1].strip("*")] = [match[3], *lines[1:]]


def _joined(lines: list[str], *, keep_paragraphs: bool = False) -> str:
    paragraphs = "\n".join(lines).split("\n\n")
    texts = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return ("\n\n" if keep_paragraphs else " ").join(filter(None, texts))
