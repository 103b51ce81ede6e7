"""The exception tree.

Every exception raised on purpose derives from `LlamaCrabError` and from the builtin that fits,
so that ``except OSError`` around a load or ``except ValueError`` around an argument works too.
"""

from __future__ import annotations


class LlamaCrabError(Exception):
    """Base of all errors of this package.

    ``log`` holds the last error lines that llama.cpp printed in the failing call, oldest first:
    most failures of the C library are a NULL plus a log line.
    """

    def __init__(self, message: str = "", *, log: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.log = log

    def __str__(self) -> str:
        message = str(self.args[0]) if self.args else ""
        return "\n  ".join((message, *self.log)) if self.log else message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(
    cls: type[LlamaCrabError], args: tuple[object, ...], state: dict[str, object]
) -> LlamaCrabError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ModelNotFoundError(LlamaCrabError, FileNotFoundError):
    """The model file, repository or quantisation does not exist."""


class ModelLoadError(LlamaCrabError, OSError):
    """The file exists but is no model that llama.cpp can load."""


class ModelLoadCancelled(ModelLoadError):
    """The progress callback returned False."""


class DownloadError(LlamaCrabError, OSError):
    """A model could not be fetched."""


class BackendUnavailableError(LlamaCrabError, RuntimeError):
    """The asked-for device or backend cannot serve."""


class ContextCreateError(LlamaCrabError, RuntimeError):
    """llama.cpp refused to create the context."""


class OutOfMemoryError(ContextCreateError, MemoryError):
    """The context does not fit in memory."""


class ContextBusyError(LlamaCrabError, RuntimeError):
    """Another thread is inside a call on this context."""


class ContextLengthError(LlamaCrabError, ValueError):
    """The prompt does not fit in the context."""


class ClosedError(LlamaCrabError, ValueError):
    """The object was closed."""


class ForkedProcessError(LlamaCrabError, RuntimeError):
    """The object belongs to the parent process and cannot be used after a fork."""


class DecodeError(LlamaCrabError, RuntimeError):
    """``llama_decode`` or ``llama_encode`` failed; ``code`` is its return value."""

    code: int = 0


class KVCacheFullError(DecodeError):
    """No KV slot for the batch was found (``llama_decode`` returned 1)."""


class DecodeAborted(DecodeError):
    """The call was aborted from another thread (``llama_decode`` returned 2)."""


class RequestTimeoutError(LlamaCrabError, TimeoutError):
    """A request was not done within its `timeout`."""


class InvalidTokenError(LlamaCrabError, ValueError):
    """A token id is outside the vocabulary."""


class InvalidBatchError(LlamaCrabError, ValueError):
    """A batch is too large, empty, or names an unknown sequence or position."""


class TokenizeError(LlamaCrabError, ValueError):
    """The text cannot be tokenised."""


class SamplerError(LlamaCrabError, ValueError):
    """A sampler was built, chained or used in a way that llama.cpp does not allow."""


class GrammarError(SamplerError):
    """The grammar does not parse."""


class StateError(LlamaCrabError, ValueError):
    """A saved state does not fit this context, or is damaged."""


class AdapterError(LlamaCrabError, ValueError):
    """A LoRA adapter cannot be loaded or applied."""


class DraftModelError(LlamaCrabError, ValueError):
    """A model cannot draft for the target: another vocabulary, or a memory that cannot be cut."""


class SchemaError(LlamaCrabError, ValueError):
    """A JSON schema asks for what cannot be guaranteed, or is no JSON schema.

    ``keyword`` is what it is about, ``path`` where it stands, as a JSON pointer (``#/items``).
    """

    keyword: str = ""
    path: str = ""

    @classmethod
    def at(cls, keyword: str, path: str, reason: str) -> SchemaError:
        """Return the error of a keyword at a place."""
        error = cls(f"{keyword!r} at {path}: {reason}")
        error.keyword, error.path = keyword, path
        return error


class RegexError(LlamaCrabError, ValueError):
    """A regular expression has a construct that cannot be generated.

    ``construct`` names it, ``position`` is where it begins, in characters of ``pattern``.
    """

    pattern: str = ""
    construct: str = ""
    position: int = 0

    @classmethod
    def at(cls, pattern: str, construct: str, position: int) -> RegexError:
        """Return the error of a construct at a position."""
        shown = pattern if len(pattern) <= 80 else pattern[:79] + "…"
        error = cls(f"regular expression {shown!r}: {construct} at position {position}")
        error.pattern, error.construct, error.position = pattern, construct, position
        return error


class StructuredOutputError(LlamaCrabError, ValueError):
    """A complete answer does not validate against its type; ``text`` is the answer.

    The type's own validators ask for more than a grammar can say. The validator's error is its
    ``__cause__``.
    """

    text: str = ""


class ChatTemplateError(LlamaCrabError, ValueError):
    """A chat template does not parse, or refuses the conversation it is given."""


class ChatParseError(LlamaCrabError, ValueError):
    """An output is not in the format that its chat template asks of the model.

    ``text`` is the answer as the model wrote it, "" where it is not known.
    """

    text: str = ""


class ToolError(LlamaCrabError, ValueError):
    """A tool cannot be called as asked, or its result cannot be told; ``tool`` is its name.

    The arguments are no JSON object or do not validate, the tool has no function, or a function
    that is asynchronous is called without waiting. What the function itself raises is not wrapped.
    """

    tool: str = ""

    @classmethod
    def of(cls, tool: str, reason: str) -> ToolError:
        """Return the error of a tool."""
        error = cls(f"tool {tool!r:.80}: {reason}")
        error.tool = tool
        return error
