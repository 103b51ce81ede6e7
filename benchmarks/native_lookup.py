"""llama.cpp's own speculation without a draft model: llama-lookup and llama-speculative-simple.

One process answers one prompt, and says itself how long the decoding took after the prompt.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from side_by_side import GPU_LAYERS, N_THREADS, Native

PROGRAMS = ("llama-lookup", "llama-speculative-simple", "llama-quantize")

_DECODED = re.compile(r"decoded\s+(\d+) tokens in\s+([\d.]+) seconds")
_DRAFTED = re.compile(r"n_drafted\s*=\s*(\d+)")
_ACCEPTED = re.compile(r"n_accept\s*=\s*(\d+)")


@dataclass(frozen=True, slots=True)
class NativeSetting:
    """A program and its fixed setting; no drafts at 0.

    llama-lookup drafts what followed n-grams of 1 to 4 tokens, where that is clear enough.
    llama-speculative-simple copies what followed the latest match of `n_match` (``ngram-simple``).
    """

    program: Literal["llama-lookup", "llama-speculative-simple"]
    n_draft: int
    n_match: int = 0

    @property
    def name(self) -> str:
        return ":".join(str(part) for part in (self.program, self.n_match, self.n_draft) if part)

    def flags(self) -> list[str]:
        if self.program == "llama-lookup":
            return ["--spec-draft-n-max", str(self.n_draft)]
        return [
            *("--spec-type", "ngram-simple", "--spec-ngram-simple-min-hits", "1"),
            *("--spec-ngram-simple-size-n", str(self.n_match)),
            *("--spec-ngram-simple-size-m", str(self.n_draft)),
        ]


@dataclass(frozen=True, slots=True)
class NativeAnswer:
    """What a program says of one answer; `n_tokens` of them, the prompt's next token included."""

    n_tokens: int
    sec: float
    n_drafted: int
    n_accepted: int


class NativeLookup:
    """The programs on one model, greedy, until the model ends or `n_tokens`."""

    def __init__(self, native: Native, model: Path, *, n_ctx: int, n_tokens: int) -> None:
        for program in PROGRAMS:
            if not (native.folder / program).exists():
                pytest.exit(f"{program} is missing: run `make native-speculation`", returncode=2)
        self._native, self._model = native, model
        self._n_ctx = n_ctx
        self._n_predict = n_tokens - 1  # they end when they have more

    def answer(self, prompt: str, setting: NativeSetting) -> NativeAnswer:
        """Answer one prompt in a process of its own."""
        with tempfile.TemporaryDirectory(prefix="native-lookup-") as folder:
            command = [
                str(self._native.folder / setting.program),
                *("-m", str(self._model), "-c", str(self._n_ctx), "-n", str(self._n_predict)),
                *("-t", str(N_THREADS), "-ngl", str(GPU_LAYERS), "-fa", "on"),
                *("--samplers", "top_k", "--top-k", "1", "--no-escape", "-p", prompt),
                *setting.flags(),
            ]
            # llama-lookup writes what it has learned; each answer begins without.
            if setting.program == "llama-lookup":
                command += ["-lcd", str(Path(folder) / "learned")]
            done = subprocess.run(
                command, check=True, stdin=subprocess.DEVNULL, capture_output=True, cwd=folder
            )
        said = (done.stdout + done.stderr).decode(errors="replace")
        n_tokens, sec = _last(_DECODED, said).groups()
        n_drafted, n_accepted = (int(_last(kind, said)[1]) for kind in (_DRAFTED, _ACCEPTED))
        return NativeAnswer(int(n_tokens), float(sec), n_drafted, n_accepted)


def _last(pattern: re.Pattern[str], said: str) -> re.Match[str]:
    # The text of the answer comes first, and may hold anything.
    found = list(pattern.finditer(said))
    if not found:
        raise RuntimeError(f"no {pattern.pattern!r} in:\n{said[-2000:]}")
    return found[-1]
