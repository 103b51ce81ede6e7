"""Thinking before an answer: how long it may take, and grammars that let it come first."""

from __future__ import annotations

from collections.abc import Sequence

from . import _core
from .errors import ChatParseError
from .params import INT32_MAX, ParameterError, require_integer

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class ReasoningBudget:
    """A logits processor that ends thinking after `n_tokens` of it, by the tag of the template.

    Thinking begins in the prompt, or as the first text of the answer. Thread-safety: immutable.
    """

    def __init__(
        self, vocab: _core.Vocab, prompt: _core.ChatPrompt, n_prompt: int, n_tokens: int
    ) -> None:
        self._vocab = vocab
        self._n_prompt = n_prompt
        self._n_tokens = n_tokens
        self._start = prompt.thinking_start_tag
        self._ends = prompt.thinking_end_tags
        self._is_open = is_thinking(prompt)
        self._forced = vocab.tokenize(self._ends[0], False, True)
        n_start = len(vocab.tokenize(self._start, False, True))
        # Behind it, thinking has ended or never begun. Other pieces may spell the tag, and white
        # space come before it.
        self._n_last = n_tokens + len(self._forced) + 4 * n_start + 4

    def __call__(self, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        """Leave only the next token of the end tag, where thinking has taken too long."""
        n = len(tokens) - self._n_prompt
        if not self._n_tokens <= n <= self._n_last:
            return
        pieces = [self._vocab.piece(int(token), True) for token in tokens[self._n_prompt :]]
        n_start = 0 if self._is_open else self._n_until_open(pieces)
        if n_start is None:
            return
        thought = b"".join(pieces[n_start:]).decode("utf-8", "replace")
        n_over = len(pieces) - n_start - self._n_tokens
        if 0 <= n_over < len(self._forced) and not any(end in thought for end in self._ends):
            token = self._forced[n_over]
            kept = logits[token]
            logits[:] = float("-inf")
            logits[token] = kept if kept > float("-inf") else 0.0

    def _n_until_open(self, pieces: Sequence[bytes]) -> int | None:
        text = ""
        for n, piece in enumerate(pieces, 1):
            text = (text + piece.decode("utf-8", "replace")).lstrip()
            if text.startswith(self._start):
                return n
            if not self._start.startswith(text):
                break
        return None


def limit_reasoning(
    n_tokens: int, vocab: _core.Vocab, prompt: _core.ChatPrompt, n_prompt: int
) -> ReasoningBudget:
    """Return the processor. Raises `ParameterError` where the template does not mark thinking."""
    require_integer("reasoning_budget", n_tokens, (0, INT32_MAX))
    if not prompt.thinking_start_tag or not prompt.thinking_end_tags:
        raise ParameterError(
            "reasoning_budget: the chat template has no tags around thinking, so it cannot be ended"
        )
    return ReasoningBudget(vocab, prompt, n_prompt, n_tokens)


def is_thinking(prompt: _core.ChatPrompt) -> bool:
    """Return whether the prompt ends inside of thinking."""
    start = prompt.thinking_start_tag
    at = prompt.generation_prompt.rfind(start) if start else -1
    rest = prompt.generation_prompt[at + len(start) :]
    return at >= 0 and not any(end in rest for end in prompt.thinking_end_tags)


def opening(prompt: _core.ChatPrompt) -> tuple[str, str, list[str]]:
    """Return what a grammar must know of a prompt; see `FusedSampler`."""
    return prompt.generation_prompt, prompt.thinking_start_tag, prompt.thinking_end_tags


def thinks_first(prompt: _core.ChatPrompt) -> bool:
    """Return whether thinking may come before content that stands in the answer as it is."""
    if not prompt.supports_thinking or not prompt.thinking_end_tags:
        return False
    start = "" if is_thinking(prompt) else prompt.thinking_start_tag
    return _reads_content(prompt, f"{start}a{prompt.thinking_end_tags[0]}")


def takes_form(prompt: _core.ChatPrompt) -> bool:
    """Return whether content stands in the answer as it is, behind thinking or without any."""
    return thinks_first(prompt) or (not is_thinking(prompt) and _reads_content(prompt, ""))


def _reads_content(prompt: _core.ChatPrompt, before: str) -> bool:
    text = '{"a": 1}'
    try:
        return bool(prompt.parse(before + text)["content"].strip() == text)
    except ChatParseError:
        return False


def after_thinking(gbnf: str, prompt: _core.ChatPrompt) -> str:
    """Return a grammar of answers that `gbnf` allows, with thinking before them."""
    end = prompt.thinking_end_tags[0]
    states = _until(end)
    thinking = '"" chat-thinking-0 [ \\t\\r\\n]{0,4}'
    if not is_thinking(prompt):
        thinking = f"([\\n]? {_literal(prompt.thinking_start_tag)} {thinking})?"
    return "\n".join(
        (
            f"root ::= {thinking} chat-answer",
            *(f"chat-thinking-{i} ::= {rule}" for i, rule in enumerate(states)),
            _renamed(gbnf),
        )
    )


def _until(tag: str) -> list[str]:
    """Return the rules of a text up to a tag's first end: one for each beginning of the tag."""
    letters = sorted(set(tag))
    rules = []
    for n in range(len(tag)):
        ways = []
        for letter in letters:
            read = tag[:n] + letter
            longest = next(k for k in range(n + 1, -1, -1) if read.endswith(tag[:k]))
            after = "" if longest == len(tag) else f" chat-thinking-{longest}"
            ways.append(f"{_literal(letter)}{after}")
        others = "".join([f"\\x{ord(letter):02X}" for letter in letters if ord(letter) < 128])
        wide = "".join([letter for letter in letters if ord(letter) >= 128])
        ways.append(f"[^{others}{wide}] chat-thinking-0")
        rules.append(" | ".join(ways))
    return rules


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _renamed(gbnf: str) -> str:
    """Return a grammar whose root has another name, outside of literals, classes and comments."""
    found: list[str] = []
    at = 0
    n = len(gbnf)
    while at < n:
        char = gbnf[at]
        begin = at
        at += 1
        if char in '"[':
            close = '"' if char == '"' else "]"
            while at < n and gbnf[at] != close:
                at += 2 if gbnf[at] == "\\" else 1
            at += 1
        elif char == "#":
            while at < n and gbnf[at] != "\n":
                at += 1
        elif char.isalnum() or char == "-":
            while at < n and (gbnf[at].isalnum() or gbnf[at] == "-"):
                at += 1
            if gbnf[begin:at] == "root":
                found.append("chat-answer")
                continue
        found.append(gbnf[begin:at])
    return "".join(found)
