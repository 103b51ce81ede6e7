"""`Llama` as llama-cpp-python has it, over our `Llama`."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from ... import _core
from ...errors import ContextLengthError
from ...llama import Llama as CrabLlama
from ...params import ParameterError
from .arguments import REMOVED, load_params, random_seed
from .constants import (
    LLAMA_ATTENTION_TYPE_UNSPECIFIED,
    LLAMA_DEFAULT_SEED,
    LLAMA_POOLING_TYPE_UNSPECIFIED,
    LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
    LLAMA_SPLIT_MODE_LAYER,
    NAMES,
)
from .embeddings import EmbeddingMethods
from .generation import request_options, token_limit
from .llama_cache import BaseLlamaCache
from .llama_tokenizer import LlamaTokenizer
from .notices import refuse, warn_once
from .pretrained import fetch
from .shapes import chunk_dicts, completion_dict
from .state import StateMethods

if TYPE_CHECKING:
    from .llama_types import (
        CreateChatCompletionResponse,
        CreateChatCompletionStreamResponse,
        CreateCompletionResponse,
        CreateCompletionStreamResponse,
    )


class Llama(EmbeddingMethods, StateMethods):
    """A model with llama-cpp-python's constructor arguments, methods and dictionaries.

    Arguments without a meaning here warn once per process (`LlamaCppCompatWarning`); unknown ones
    are a TypeError. `llama_params` are fields of `LlamaParams`, which win: ``n_seq_max`` and what
    else llama-cpp-python has no argument for. ``crab`` is the `llama_crab.Llama` that does the
    work. docs/moving-from-llama-cpp-python.md lists the differences.

    Raises `ParameterError` (a ValueError, also for a missing file), `ModelLoadError`,
    `ContextCreateError`, `NotSupportedError`. Thread-safety: any thread may call any method.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        split_mode: int = LLAMA_SPLIT_MODE_LAYER,
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: Mapping[str, bool | int | float | str] | None = None,
        seed: int = LLAMA_DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | None = LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
        pooling_type: int = LLAMA_POOLING_TYPE_UNSPECIFIED,
        attention_type: int = LLAMA_ATTENTION_TYPE_UNSPECIFIED,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool | None = None,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: str | None = None,
        lora_scale: float = 1.0,
        lora_path: str | None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: Any = None,
        draft_model: Any = None,
        tokenizer: Any = None,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        llama_params: Mapping[str, Any] | None = None,
        **removed: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "removed")}
        for name in removed:
            if name not in REMOVED:
                raise TypeError(f"Llama.__init__() got an unexpected keyword argument {name!r}")
        params = load_params({**given, **removed}, llama_params)
        self.model_path = os.fspath(model_path)
        self.verbose = verbose
        self.last_n_tokens_size = last_n_tokens_size
        self.spm_infill = spm_infill
        self.chat_format = chat_format
        self.chat_handler = chat_handler
        self.draft_model = draft_model
        self.lora_path = lora_path
        self.lora_scale = lora_scale
        self.cache: BaseLlamaCache | None = None
        self._crab: CrabLlama | None = None
        self._options: dict[str, Any] = {}
        if vocab_only:
            self._model = _core.Model(self.model_path, vocab_only=True)
            self._vocab = self._model.vocab
        else:
            # llama-cpp-python takes paths only; a repository's name has a method of its own.
            if not os.path.exists(self.model_path):
                raise ParameterError(f"model_path: there is no file {self.model_path}")
            self._crab = CrabLlama.load(params)
            self._model = self._crab.model
            self._vocab = self._model.vocab
            params = self._crab.params
        self.metadata = self._model.metadata
        self.model_params = SimpleNamespace(**params.model_params())
        self.context_params = SimpleNamespace(**{**params.context_params(), "n_ctx": self.n_ctx()})
        self.n_batch = params.n_batch or given["n_batch"]
        self._tokens: list[int] = []
        self._session = None
        self.set_seed(seed)
        if lora_path is not None:
            self._options["lora"] = {self.crab.load_lora(lora_path): float(lora_scale)}

    @property
    def crab(self) -> CrabLlama:
        """The `llama_crab.Llama` that does the work. Raises `NotSupportedError` of a vocabulary."""
        if self._crab is None:
            refuse("vocab_only", "the model was loaded without its weights")
        return self._crab

    def create_completion(
        self,
        prompt: str | Sequence[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        grammar: Any = None,
        logit_bias: Mapping[Any, float] | None = None,
    ) -> CreateCompletionResponse | Iterator[CreateCompletionStreamResponse]:
        """Return a ``text_completion`` dictionary, or an iterator of them with `stream`.

        `max_tokens` of None or not above 0 means as many as the context holds. The arguments are
        llama-cpp-python's; a stream starts when it is first asked for a piece.

        Raises `ContextLengthError` for a prompt that fills the context, else as
        `llama_crab.Llama.create_completion`.
        """
        given = locals()
        crab = self.crab
        options = self._request_options(given)
        name = self.model_path if model is None else model
        text = prompt if isinstance(prompt, str) else self._text(prompt)
        ids = self._prompt_ids(prompt, suffix)
        if logprobs is not None:
            options["logprobs"] = logprobs
        n_most = token_limit(max_tokens)
        bos = self._vocab.bos
        if stream:
            if echo:
                warn_once("echo", "not in a stream, as in llama-cpp-python")
            return self._stream(ids, n_most, options, name, text)
        if echo and suffix is not None:
            refuse("echo", "not together with suffix")
        completion = crab.create_completion(ids, n_most, echo=echo, **options)
        self._tokens = [*ids, *completion.tokens]
        return completion_dict(completion, name, text, bos, echo)

    __call__ = create_completion

    def _stream(
        self, ids: list[int], max_tokens: int | None, options: dict[str, Any], name: str, text: str
    ) -> Iterator[Any]:
        with self.crab.create_completion(ids, max_tokens, stream=True, **options) as chunks:
            yield from chunk_dicts(chunks, name, text, self._vocab.bos)
            self._tokens = [*ids, *chunks.result().tokens]

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        functions: Sequence[Mapping[str, Any]] | None = None,
        function_call: str | Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Any = None,
        grammar: Any = None,
        logit_bias: Mapping[Any, float] | None = None,
        logprobs: bool | int | None = None,
        top_logprobs: int | None = None,
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]:
        """Return a ``chat.completion`` dictionary, or an iterator of its chunks with `stream`.

        `chat_handler`, or a handler registered under the `chat_format`, is called where there is
        one. Raises what `llama_crab.Llama.create_chat_completion` raises.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        from .chat import complete_chat
        from .llama_chat_format import registered_handler

        handler = self.chat_handler or registered_handler(self.chat_format)
        found: CreateChatCompletionResponse = (
            complete_chat(self, given) if handler is None else handler(llama=self, **given)
        )
        return found

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """Return the same as objects of the openai package. Raises ImportError without it."""
        from openai.types.chat import ChatCompletion, ChatCompletionChunk

        answer: Any = self.create_chat_completion(*args, **kwargs)
        if kwargs.get("stream", False):
            return (ChatCompletionChunk(**chunk) for chunk in answer)
        return ChatCompletion(**answer)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Llama:
        """Load a model of a Hugging Face repository; `filename` may be a pattern such as *Q8_0*.

        All parts of a split model are fetched. Raises ImportError without huggingface_hub,
        `ModelNotFoundError` when not exactly one file fits.
        """
        if local_dir_use_symlinks != "auto":
            warn_once("local_dir_use_symlinks", "huggingface_hub has no use for it any more")
        path = fetch(repo_id, filename, additional_files or (), local_dir, cache_dir)
        return cls(path, **kwargs)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return the token ids of UTF-8 bytes; `special` reads special tokens in the text."""
        return self._vocab.tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of `tokens`; control tokens only with `special`.

        A space that the tokenizer puts in front of a text is dropped behind a leading BOS.
        """
        data = b"".join(self._vocab.piece(token, special) for token in tokens)
        starts = len(tokens) > 0 and tokens[0] == self._vocab.bos
        return data[1:] if starts and data[:1] == b" " else data

    def tokenizer(self) -> LlamaTokenizer:
        """Return the model's tokenizer."""
        return LlamaTokenizer(self)

    def token_bos(self) -> int:
        """Return the BOS token, -1 where there is none."""
        return -1 if self._vocab.bos is None else self._vocab.bos

    def token_eos(self) -> int:
        """Return the EOS token, -1 where there is none."""
        return -1 if self._vocab.eos is None else self._vocab.eos

    def token_nl(self) -> int:
        """Return the token of a newline, -1 where there is none."""
        return -1 if self._vocab.nl is None else self._vocab.nl

    @property
    def n_threads(self) -> int:
        """Threads that generate."""
        return self.crab.context.n_threads

    @property
    def n_threads_batch(self) -> int:
        """Threads that compute prompts."""
        return self.crab.context.n_threads_batch

    def n_ctx(self) -> int:
        """Return the number of tokens that the context holds."""
        return self._model.n_ctx_train if self._crab is None else self._crab.context.n_ctx

    def n_embd(self) -> int:
        """Return the width of the model's embeddings."""
        return self._model.n_embd

    def n_vocab(self) -> int:
        """Return the number of tokens in the vocabulary."""
        return self._vocab.n_tokens

    def pooling_type(self) -> int:
        """Return a ``LLAMA_POOLING_TYPE_*`` number."""
        names = {name: number for number, name in NAMES["pooling_type"].items()}
        return names[self.crab.context.pooling_type]

    def set_seed(self, seed: int | None) -> None:
        """Set what the seeds of requests without one are drawn from; -1 and None: the system."""
        own = random_seed(seed)
        self._seed = LLAMA_DEFAULT_SEED if own is None else own
        self._seeds = None if own is None else random.Random(own)

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Accept a cache. Prefixes are reused without one, so that it warns, once."""
        if cache is not None:
            warn_once(
                "set_cache",
                "prefixes are always reused; llama_params takes cache_ram_mib, cache_dir and "
                "cache_disk_mib",
            )
        self.cache = cache

    def close(self) -> None:
        """Free the model. Idempotent."""
        if self._session is not None:
            self._session.close()
        if self._crab is not None:
            self._crab.close()
        else:
            self._vocab.close()
            self._model.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Llama cannot be pickled: give the other process the arguments instead")

    def __repr__(self) -> str:
        return f"<llama_crab.compat.llama_cpp.Llama {self.model_path!r}>"

    def _request_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        last_n = self.last_n_tokens_size
        last_n = self.n_ctx() if last_n < 0 else last_n
        seed = None if self._seeds is None else self._seeds.getrandbits(32)
        return {**self._options, **request_options(given, self._vocab, last_n, seed)}

    def _prompt_ids(self, prompt: str | Sequence[int], suffix: str | None) -> list[int]:
        vocab, n_ctx = self._vocab, self.n_ctx()
        ids = vocab.tokenize(prompt, True, True) if isinstance(prompt, str) else list(prompt)
        if suffix is not None:
            ids = self._infill(ids, suffix)
        if not ids and vocab.bos is not None:
            ids = [vocab.bos]
        if len(ids) >= n_ctx:
            raise ContextLengthError(
                f"Requested tokens ({len(ids)}) exceed context window of {n_ctx}"
            )
        return ids

    def _infill(self, ids: list[int], suffix: str) -> list[int]:
        vocab = self._vocab
        if vocab.fim_pre is None or vocab.fim_suf is None or vocab.fim_mid is None:
            raise ParameterError("suffix: the model has no fill-in-the-middle tokens")
        n_bos = int(ids[:1] == [vocab.bos])
        first, before = ids[:n_bos], [vocab.fim_pre, *ids[n_bos:]]
        after = [vocab.fim_suf, *vocab.tokenize(suffix, False, False)]
        pieces = (after, before) if self.spm_infill else (before, after)
        return [*first, *pieces[0], *pieces[1], vocab.fim_mid]

    def _text(self, tokens: Sequence[int]) -> str:
        return self.detokenize(tokens, special=True).decode("utf-8", "ignore")
