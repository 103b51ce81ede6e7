"""A model on the bench: raw decodes of random tokens, as llama-bench does them."""

from __future__ import annotations

import random
import time
import weakref
from types import TracebackType

from .. import _core, logs
from ..errors import ClosedError, ContextLengthError, OutOfMemoryError
from ..llama import Llama, offloads, open_model, resolve_params
from ..params import INT32_MAX, LlamaParams, ParameterError, require_integer
from ..vector_methods import cannot_generate
from .probe import available_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array

# Bits per value of each cache type, its block's scale included.
_CACHE_BITS = {
    **{"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5},
    **{"q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5},
}
_SEED = 0
# ggml's threads look for work for about 0.1 to 0.3 s after a graph before they sleep.
_SETTLE_SEC, _SETTLE_STEP_SEC, _QUIET = 0.6, 0.01, 0.2


class Bed:
    """A loaded model with a context to measure on; no sampling, no text.

    ``weights_of`` shares the weights of another bed where the model fields of both agree. A bed
    that has not been used last waits until the threads of the other one are asleep.

    Raises what `Llama` raises; `OutOfMemoryError` also for a KV cache larger than the memory that
    is free now, and `ParameterError` for a model that only embeds.
    Thread-safety: none; beds of one process must take turns, or they measure each other.
    """

    def __init__(self, params: LlamaParams, *, weights_of: Bed | None = None) -> None:
        self._context: _core.Context | None = None
        self._batch: _core.Batch | None = None
        self._llama: Llama | None = None
        if params.profile is not None:
            from .profile import apply_profile

            params = apply_profile(params)
        if weights_of is not None and weights_of.shares_weights(params):
            self._weights: _Weights | None = weights_of._open_weights().share()
        else:
            self._weights = _Weights(params)
        try:
            # Which layers are where was decided when the weights were loaded.
            params = params.replace(**self._weights.fields)
            # First, or the defaults of an embedder are what its error is about.
            if params.embeddings or (params.embeddings is None and cannot_generate(self.model)):
                raise ParameterError("model: it embeds texts and does not generate")
            self.params = resolve_params(params, self.model)
            """The parameters with all defaults filled in."""
            self._open_context()
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> _core.Model:
        """The core's model."""
        return self._open_weights().model

    @property
    def context(self) -> _core.Context:
        """The context of the raw decodes; it closes that of `llama`."""
        return self._open_context()

    @property
    def llama(self) -> Llama:
        """The facade over the same weights and parameters; it closes `context`."""
        weights = self._open_weights()
        if self._llama is None:
            self._close_context()
            self._refuse_beyond_available()
            self._llama = Llama._load_on(weights.model, self.params)
        _settle(self)
        return self._llama

    def shares_weights(self, params: LlamaParams) -> bool:
        """Return whether a bed with `params` would use the weights of this one."""
        return self._open_weights().key == _weights_key(params)

    def prefill(self, n_prompt: int, depth: int = 0) -> float:
        """Return the seconds that `n_prompt` tokens take behind `depth` others, in full batches."""
        context = self._at_depth(depth, n_prompt)
        tokens = self._random_tokens(n_prompt)
        began = time.perf_counter()
        self._decode_run(context, tokens, depth, 0)
        context.synchronize()
        return time.perf_counter() - began

    def generate(self, n_gen: int, depth: int = 0) -> float:
        """Return the seconds that `n_gen` tokens take behind `depth` others, one by one."""
        return self.parallel(1, n_gen, depth)

    def prefill_generate(self, n_prompt: int, n_gen: int, depth: int = 0) -> float:
        """Return the seconds of a prefill and the generation that follows it."""
        require_integer("n_gen", n_gen, (1, INT32_MAX))
        context = self._at_depth(depth, n_prompt + n_gen)
        tokens, generated = self._random_tokens(n_prompt), self._random_tokens(n_gen)
        began = time.perf_counter()
        self._decode_run(context, tokens, depth, 0)
        context.synchronize()
        self._decode_steps(context, [generated], depth + n_prompt)
        return time.perf_counter() - began

    def parallel(self, n_seq: int, n_gen: int, depth: int = 0) -> float:
        """Return the seconds that `n_gen` steps of `n_seq` sequences take, each behind `depth`."""
        context = self._at_depth(depth, n_gen, n_seq)
        columns = [self._random_tokens(n_gen) for _ in range(n_seq)]
        began = time.perf_counter()
        self._decode_steps(context, columns, depth)
        return time.perf_counter() - began

    def rest(self) -> None:
        """Free the context and keep the weights; the next use makes the context again."""
        self._close_context()
        self._close_llama()

    @property
    def resting(self) -> bool:
        """Whether there is no context now."""
        return self._context is None and self._llama is None

    def abort(self) -> None:
        """Make a raw decode that is running end with `DecodeAborted`. From any thread."""
        context = self._context
        if context is not None:
            context.abort()

    def close(self) -> None:
        """Free the context, and the weights when no other bed uses them. Idempotent."""
        self._close_context()
        self._close_llama()
        if self._weights is not None:
            self._weights.release()
            self._weights = None

    def __enter__(self) -> Bed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._weights is None:
            return "<Bed closed>"
        return f"<Bed {self.model.desc!r} n_ctx={self.params.n_ctx}>"

    def _open_weights(self) -> _Weights:
        if self._weights is None:
            raise ClosedError("the bed is closed")
        return self._weights

    def _open_context(self) -> _core.Context:
        weights = self._open_weights()
        if self._context is None:
            self._close_llama()
            self._refuse_beyond_available()
            try:
                self._context = _core.Context(weights.model, **self.params.context_params())
            finally:
                logs.flush()
            self._batch = _core.Batch(max(self._context.n_batch, self._context.n_seq_max))
            self._random = random.Random(_SEED)
            # A cut cannot bring back the cells of a window or an earlier recurrent state.
            model = weights.model
            self._can_cut = not (model.is_recurrent or model.is_hybrid or model.n_swa > 0)
            self._held: tuple[int, int] = (0, 0)
            self._states: list[bytes] = []
        return self._context

    def _close_context(self) -> None:
        if self._batch is not None:
            self._batch.close()
        if self._context is not None:
            self._context.close()
        self._batch = self._context = None

    def _close_llama(self) -> None:
        if self._llama is not None:
            self._llama.close()
        self._llama = None

    def _refuse_beyond_available(self) -> None:
        """Refuse a KV cache that would push this machine into swap, or have it kill the process."""
        needed, room = kv_bytes(self.model, self.params), available_memory()
        if room and needed > room:
            raise OutOfMemoryError(
                f"n_ctx={self.params.n_ctx} needs about {needed / 2**30:.1f} GiB for its KV cache, "
                f"{room / 2**30:.1f} GiB are available"
            )

    def _random_tokens(self, n: int) -> array[int]:
        from array import array

        n_vocab = self.model.vocab.n_tokens
        return array("i", [self._random.randrange(n_vocab) for _ in range(n)])

    def _at_depth(self, depth: int, n_more: int, n_seq: int = 1) -> _core.Context:
        """Return the context with `depth` tokens in each of `n_seq` sequences and nothing else."""
        require_integer("depth", depth, (0, INT32_MAX))
        require_integer("n_tokens", n_more, (1, INT32_MAX))
        context = self._open_context()
        require_integer("n_seq", n_seq, (1, context.n_seq_max))
        room = context.n_ctx // n_seq if context.kv_unified else context.n_ctx_seq
        if depth + n_more > room:
            raise ContextLengthError(
                f"{depth} + {n_more} tokens exceed the {room} that a sequence has"
            )
        _settle(self)
        if self._held != (n_seq, depth) or not self._back_to(context, n_seq, depth):
            self._held = (0, 0)
            self._fill(context, n_seq, depth)
            self._held = (n_seq, depth)
        return context

    def _back_to(self, context: _core.Context, n_seq: int, depth: int) -> bool:
        memory = context.memory
        if depth == 0:
            memory.clear(False)
            return True
        if self._can_cut:
            return all(memory.seq_rm(i, depth, -1) for i in range(n_seq))
        memory.clear(False)
        for i, state in enumerate(self._states):
            context.state_set(state, i)
        return True

    def _fill(self, context: _core.Context, n_seq: int, depth: int) -> None:
        context.memory.clear(False)
        self._states.clear()
        if depth == 0:
            return
        for i in range(n_seq):
            self._decode_run(context, self._random_tokens(depth), 0, i)
        context.synchronize()
        if not self._can_cut:
            self._states.extend(context.state_get(i) for i in range(n_seq))

    def _decode_run(self, context: _core.Context, tokens: array[int], pos: int, seq: int) -> None:
        batch, n_batch = self._batch, context.n_batch
        assert batch is not None
        for start in range(0, len(tokens), n_batch):
            batch.clear()
            batch.extend(tokens[start : start + n_batch], pos + start, seq, "last")
            context.decode(batch)

    def _decode_steps(self, context: _core.Context, columns: list[array[int]], pos: int) -> None:
        batch = self._batch
        assert batch is not None
        for at, row in enumerate(zip(*columns, strict=True), pos):
            batch.clear()
            for seq, token in enumerate(row):
                batch.add(token, at, (seq,), True)
            context.decode(batch)
            context.synchronize()


class _Weights:
    """A model that several beds use; the last one frees it."""

    def __init__(self, params: LlamaParams) -> None:
        self.model, fitted = open_model(params)
        self.fields = fitted.model_params()
        self.key = _weights_key(params)
        self._n_users = 1

    def share(self) -> _Weights:
        self._n_users += 1
        return self

    def release(self) -> None:
        self._n_users -= 1
        if self._n_users == 0:
            self.model.vocab.close()
            self.model.close()


def _weights_key(params: LlamaParams) -> object:
    from ..hub import resolve_model

    return (str(resolve_model(params.model)), params.model_params())


def kv_bytes(model: _core.Model, params: LlamaParams) -> int:
    """Return about how many bytes of host memory the KV cache of resolved `params` takes.

    0 where that is not known: on a GPU, with a sliding window, with a recurrent state.
    `_core.measure_memory` knows it for these, too, but reads the file's metadata again, which takes
    0.1 to 0.9 s for each context.
    """
    if model.is_recurrent or model.is_hybrid or (model.n_swa > 0 and params.swa_full is False):
        return 0
    if offloads(params) and params.offload_kqv is not False:
        return 0
    metadata = model.metadata
    arch = metadata.get("general.architecture", "")
    head = model.n_embd // max(1, model.n_head)
    bits = 0.0
    parts = [("key_length", params.type_k), ("value_length", params.type_v)]
    if f"{arch}.attention.key_length_mla" in metadata:
        parts.pop()  # values are a part of the keys
    for name, kind in parts:
        width = int(metadata.get(f"{arch}.attention.{name}", head))
        bits += width * _CACHE_BITS[kind or "f16"]
    n_ctx = params.n_ctx or model.n_ctx_train
    return int(n_ctx * model.n_layer * model.n_head_kv * bits / 8)


_last_used: weakref.ref[Bed] | None = None


def _settle(bed: Bed) -> None:
    """Wait until no thread of another bed still looks for work; it would take a core from us."""
    global _last_used
    if _last_used is not None and _last_used() is bed:
        return
    _last_used = weakref.ref(bed)
    end = time.monotonic() + _SETTLE_SEC
    while time.monotonic() < end:
        began, used = time.monotonic(), time.process_time()
        time.sleep(_SETTLE_STEP_SEC)
        if time.process_time() - used < _QUIET * (time.monotonic() - began):
            return
