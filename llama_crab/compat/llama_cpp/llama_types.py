"""The shapes of the dictionaries that this face returns, under llama-cpp-python's names."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class EmbeddingUsage(TypedDict):
    """Tokens of an embedding request."""

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """One text's embedding; a list per token with pooling ``none``."""

    index: int
    object: str
    embedding: list[float] | list[list[float]]


class CreateEmbeddingResponse(TypedDict):
    """What `Llama.create_embedding` returns."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class CompletionLogprobs(TypedDict):
    """Log-probabilities (natural log) as parallel lists."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    """An answer, or a piece of it; ``"cancelled"`` when the model was closed meanwhile."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "cancelled"] | None


class CompletionUsage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CreateCompletionResponse(TypedDict):
    """What `Llama.create_completion` returns; a stream's pieces have no ``usage``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[CompletionUsage]


class ChatCompletionResponseFunctionCall(TypedDict):
    """The older form of a tool call."""

    name: str
    arguments: str


class ChatCompletionMessageToolCall(TypedDict):
    """A tool that the model calls; ``function.arguments`` is JSON text."""

    id: str
    type: Literal["function"]
    function: ChatCompletionResponseFunctionCall


class ChatCompletionResponseMessage(TypedDict):
    """The model's message."""

    content: str | None
    role: Literal["assistant"]
    tool_calls: NotRequired[list[ChatCompletionMessageToolCall]]
    function_call: NotRequired[ChatCompletionResponseFunctionCall]


class ChatCompletionTopLogprobToken(TypedDict):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionLogprobToken(ChatCompletionTopLogprobToken):
    """A token with those that could have come in its place."""

    top_logprobs: list[ChatCompletionTopLogprobToken]


class ChatCompletionLogprobs(TypedDict):
    """Log-probabilities (natural log) of an answer's tokens."""

    content: list[ChatCompletionLogprobToken] | None
    refusal: list[ChatCompletionLogprobToken] | None


class ChatCompletionResponseChoice(TypedDict):
    """An answer."""

    index: int
    message: ChatCompletionResponseMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: str | None


class CreateChatCompletionResponse(TypedDict):
    """What `Llama.create_chat_completion` returns."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: CompletionUsage


class ChatCompletionStreamResponseChoice(TypedDict):
    """A piece of an answer; ``delta`` has what is new of the message."""

    index: int
    delta: dict[str, Any]
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"] | None
    logprobs: NotRequired[ChatCompletionLogprobs | None]


class CreateChatCompletionStreamResponse(TypedDict):
    """What a stream of `Llama.create_chat_completion` gives."""

    id: str
    model: str
    object: Literal["chat.completion.chunk"]
    created: int
    choices: list[ChatCompletionStreamResponseChoice]


CreateCompletionStreamResponse = CreateCompletionResponse
Completion = CreateCompletionResponse
CompletionChunk = CreateCompletionResponse
ChatCompletion = CreateChatCompletionResponse
ChatCompletionChunk = CreateChatCompletionStreamResponse
ChatCompletionStreamResponse = CreateChatCompletionStreamResponse
ChatCompletionMessage = ChatCompletionResponseMessage
ChatCompletionChoice = ChatCompletionResponseChoice
EmbeddingData = Embedding
