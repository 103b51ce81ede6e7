"""What /stats tells: speed, cache, context and memory."""

from __future__ import annotations

import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..chat import ChatCompletion
    from ..llama import Llama
    from ..timings import CompletionTimings
    from .chat_history import Conversation

_MIB = 1 << 20


def stats_text(
    llama: Llama, conversation: Conversation, n_used: int, last: ChatCompletion | None
) -> str:
    """Return several lines about the conversation, the last answer (None before the first), memory.

    `n_used` is how many tokens the conversation has as it would be sent.
    """
    rows = [("exchanges", _exchanges(conversation))]
    if last is not None:
        timings, usage = last.timings, last.usage
        n_new = timings.prompt_n - timings.cached_n
        rows += [
            ("prefill", f"{n_new} tokens, {timings.prompt_per_sec:.1f} tok/s"),
            ("cached", f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens"),
            (
                "generated",
                f"{timings.predicted_n} tokens, {timings.predicted_per_sec:.1f} tok/s, "
                f"first after {timings.first_token_sec:.3f} s",
            ),
        ]
        if timings.draft_n:
            rows.append(("drafts", _drafts(llama, timings)))
    share = 100 * n_used / llama.n_ctx
    rows.append(("context", f"{n_used} of {llama.n_ctx} tokens ({share:.0f} %)"))
    memory = [f"weights {llama.model.size / _MIB:.0f} MiB"]
    resident = _resident_bytes()
    if resident:
        memory.append(f"process {resident / _MIB:.0f} MiB")
    memory.append(f"prefix cache {llama.stats()['ram_bytes'] / _MIB:.0f} MiB")
    rows.append(("memory", ", ".join(memory)))
    return "\n".join(f"{label:<10}{value}" for label, value in rows)


def _drafts(llama: Llama, timings: CompletionTimings) -> str:
    held, tried = timings.draft_accepted_n, timings.draft_n
    gain = llama.perf.speculative_gain
    return (
        f"{held} of {tried} tokens accepted ({100 * held / tried:.0f} %); "
        f"all answers {gain:.2f} times as fast as without"
    )


def _exchanges(conversation: Conversation) -> str:
    n_left_out = conversation.n_left_out
    more = f", the oldest {n_left_out} left out" if n_left_out else ""
    return f"{len(conversation.exchanges)}{more}"


def _resident_bytes() -> int:
    """Return what the process has in memory, or had at most; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
