"""How long a completion took: `CompletionTimings`."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class CompletionTimings:
    """Counts and wall times of one completion; all times in seconds.

    Attributes
    ----------
    prompt_n
        Prompt tokens, those taken from the KV cache included.
    prompt_sec
        From the start of the prefill to the logits from which the first token is sampled.
    predicted_n
        Generated tokens, over all choices.
    predicted_sec
        The decode loop: from the moment the first token is available to the end.
    total_sec
        The whole call, tokenising and waiting included.
    cached_n
        Prompt tokens that needed no prefill because an earlier call left them in the KV cache.
    first_token_sec
        From the start of the call to the first token; 0.0 when none was generated.
    sample_sec
        Choosing tokens: the part of ``prompt_sec + predicted_sec`` spent in the sampler chain.
    load_sec
        Loading the model, paid once and before ``total_sec``.
    draft_n
        Tokens proposed by speculative decoding.
    draft_accepted_n
        Of those, the ones the model confirmed.

    Thread-safety: immutable.
    """

    prompt_n: int = 0
    prompt_sec: float = 0.0
    predicted_n: int = 0
    predicted_sec: float = 0.0
    total_sec: float = 0.0
    cached_n: int = 0
    first_token_sec: float = 0.0
    sample_sec: float = 0.0
    load_sec: float = 0.0
    draft_n: int = 0
    draft_accepted_n: int = 0

    @property
    def prompt_per_sec(self) -> float:
        """Prefilled tokens per second: ``(prompt_n - cached_n) / prompt_sec``; 0.0 without time."""
        return _rate(self.prompt_n - self.cached_n, self.prompt_sec)

    @property
    def predicted_per_sec(self) -> float:
        """Generated tokens per second: ``predicted_n / predicted_sec``; 0.0 without time.

        The first token's decode belongs to the prefill, so an answer of a few tokens reads high.
        """
        return _rate(self.predicted_n, self.predicted_sec)

    def to_dict(self) -> dict[str, int | float]:
        """Return all fields and the two rates, by name."""
        values: dict[str, int | float] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["prompt_per_sec"] = self.prompt_per_sec
        values["predicted_per_sec"] = self.predicted_per_sec
        return values

    def __str__(self) -> str:
        cached = f", {self.cached_n} cached" if self.cached_n else ""
        drafts = f", drafts {self.draft_accepted_n}/{self.draft_n} accepted" if self.draft_n else ""
        return (
            f"prompt    {self.prompt_n:6d} tokens {self.prompt_sec:8.3f} s"
            f" {self.prompt_per_sec:9.1f} tok/s{cached}\n"
            f"generated {self.predicted_n:6d} tokens {self.predicted_sec:8.3f} s"
            f" {self.predicted_per_sec:9.1f} tok/s, first token {self.first_token_sec:.3f} s,"
            f" total {self.total_sec:.3f} s{drafts}"
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0.0 else 0.0
