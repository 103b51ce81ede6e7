"""The part of the compat `Llama` that works on tokens and on the state they leave."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ... import _core
from ...errors import StateError
from ...session import Session
from .notices import NotSupportedError, refuse, warn_once

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ...llama import Llama as CrabLlama


_NOT_KEPT = (
    "rows of logits are not kept; create_completion(logprobs=) gives the best ones, with "
    "echo=True also those of the prompt, and a logits_processor gets each row whole"
)


class _NotKeptError(NotSupportedError, AttributeError):
    """A member that is not there: hasattr() says so, too."""


@dataclass(frozen=True)
class LlamaState:
    """What `Llama.save_state` returns: tokens, and what the model has computed of them.

    ``llama_state`` is checked against the model when it is loaded. Thread-safety: immutable.
    """

    input_ids: tuple[int, ...]
    n_tokens: int
    llama_state: bytes
    llama_state_size: int
    seed: int


class StateMethods:
    """Methods on tokens. The current ones are those of the last completion, `eval` or `generate`.

    Thread-safety: one thread at a time.
    """

    _vocab: _core.Vocab
    _tokens: list[int]
    _session: Session | None
    _seed: int
    # Of each request: the adapters.
    _options: dict[str, Any]

    if TYPE_CHECKING:

        @property
        def crab(self) -> CrabLlama:
            """The `llama_crab.Llama` that does the work."""

        def _request_options(self, given: Mapping[str, Any]) -> dict[str, Any]: ...

        def set_seed(self, seed: int | None) -> None:
            """Set what the seeds of requests without one are drawn from."""

    @property
    def n_tokens(self) -> int:
        """The number of current tokens."""
        return len(self._tokens)

    @property
    def input_ids(self) -> list[int]:
        """The current tokens."""
        return list(self._tokens)

    @property
    def eval_tokens(self) -> deque[int]:
        """The current tokens."""
        return deque(self._tokens)

    @property
    def scores(self) -> NoReturn:
        """Refused: rows of logits are not kept."""
        raise _NotKeptError(f"scores: {_NOT_KEPT}")

    @property
    def eval_logits(self) -> NoReturn:
        """Refused: rows of logits are not kept."""
        raise _NotKeptError(f"eval_logits: {_NOT_KEPT}")

    @staticmethod
    def logits_to_logprobs(logits: Any, axis: int = -1) -> npt.NDArray[np.single]:
        """Return the log-probabilities of logits, float32 of the same shape."""
        import numpy as np

        rows = np.asarray(logits, np.single)
        most = rows.max(axis, keepdims=True)
        rows = rows - np.where(np.isfinite(most), most, np.single(0))
        with np.errstate(divide="ignore"):
            total: npt.NDArray[np.single] = np.log(np.exp(rows).sum(axis, keepdims=True))
        return rows - total

    @staticmethod
    def longest_token_prefix(a: Sequence[int], b: Sequence[int]) -> int:
        """Return how many tokens two sequences have in common at their beginning."""
        differ = (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
        return next(differ, min(len(a), len(b)))

    def reset(self) -> None:
        """Begin anew with no tokens. What was computed of the old ones stays in the cache."""
        self._tokens = []

    def eval(self, tokens: Sequence[int]) -> None:
        """Append `tokens` to the current ones and compute them, so that what follows is quick."""
        self._tokens = [*self._tokens, *tokens]
        self.crab.create_completion(self._tokens, 0, **self._options)

    def sample(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: tokens are sampled where they are computed; see `generate`."""
        refuse("sample", "use generate(), which computes and samples in one step")

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        grammar: Any = None,
    ) -> Iterator[int]:
        """Yield the tokens that follow `tokens`, an EOS last when the model ends.

        Without `reset` they follow the current tokens and these. Ends also when the context is
        full. What is sent into the generator is refused. Raises as `create_completion`.
        """
        given = {**locals(), "temperature": temp, "seed": None}
        if not penalize_nl:
            warn_once("penalize_nl", "llama.cpp has no use for it any more")
        ended: list[bool] = []
        if stopping_criteria:
            criteria = stopping_criteria if callable(stopping_criteria) else None
            several = [criteria] if criteria is not None else list(stopping_criteria)

            def watched(ids: Any, logits: Any) -> bool:
                if any(criterion(ids, logits) for criterion in several):
                    ended.append(True)
                return bool(ended)

            given["stopping_criteria"] = watched
        options = self._request_options(given)
        ids = list(tokens) if reset else [*self._tokens, *tokens]
        self._tokens = list(ids)
        with self.crab.create_completion(ids, None, stream=True, **options) as chunks:
            for chunk in chunks:
                for token in chunk.tokens:
                    self._tokens.append(token)
                    if (yield token) is not None:
                        refuse("generate", "tokens cannot be sent into it; start another one")
                if chunk.finish_reason == "stop" and not ended and self._vocab.eos is not None:
                    yield self._vocab.eos

    def save_state(self) -> LlamaState:
        """Return the current tokens with the model's state after them.

        What of it is not in memory is computed first. Raises `StateError` without tokens.
        """
        if not self._tokens:
            raise StateError("save_state: there are no tokens; complete or eval() something first")
        self.eval(())
        with self._session_of(self._tokens) as session, tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            session.save(path)
            data = path.read_bytes()
        return LlamaState(tuple(self._tokens), len(self._tokens), data, len(data), self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Make the tokens of `state` the current ones; completions that begin so are quick.

        Raises `StateError` for a state of another model or other adapters.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            path.write_bytes(state.llama_state)
            session = self.crab.load_session(path, **self._options)
        if self._session is not None:
            self._session.close()
        # As long as it is kept, the prefix cache gives up its content last.
        self._session = session
        self._tokens = list(state.input_ids)
        self.set_seed(state.seed)

    def _session_of(self, tokens: Sequence[int]) -> Session:
        session = self.crab.session()
        options = {"max_tokens": 0, "session": session, **self._options}
        self.crab.create_completion(list(tokens), **options)
        return session
