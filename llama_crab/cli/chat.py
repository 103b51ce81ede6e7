"""Chat with a model in the terminal, or answer the lines of stdin one after the other."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

from ..errors import ContextLengthError, LlamaCrabError
from ..params import INT32_MAX, RANDOM_SEED
from . import loading, sampling
from .chat_history import Conversation, Exchange
from .chat_input import Interrupts, MessageReader
from .chat_screen import Screen, open_screen
from .error_line import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ..chat import ChatCompletion, ChatCompletionChunk
    from ..chat_stream import ChatStream
    from ..llama import Llama
    from ..sampling import SamplerChain

NAME = "chat"
_HELP = """\
/save FILE    write the conversation to a file
/load FILE    go on with a saved conversation
/system TEXT  set the system text; alone, show it; /system - removes it
/stats        speed, cached tokens, context and memory
/undo         take back the last message and its answer
/retry        answer the last message again
/clear        begin anew; the system text stays
/exit         end, as Ctrl-D does
Ctrl-C stops an answer. A backslash at the end of a line goes on in the next one,
and a message between \"\"\" and \"\"\" has any lines. A space before / makes it a message."""
# Of the context, what is kept free for an answer, and what is made free when that is gone: with
# both the same, each message would move the beginning, and all would be computed again.
_LEAST_ROOM, _NEW_ROOM = 1 / 8, 1 / 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Chat with a model. /help lists the commands. If stdin is no terminal, each of its lines "
        "is a message, and only the answers are printed; the first error ends it."
    )
    parser.add_argument("name", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    help_ = "of an answer (default: until it ends or the context is full)"
    parser.add_argument("-n", "--max-tokens", type=int, help=help_)
    parser.add_argument("--no-markdown", action="store_true", help="show answers as plain text")
    group = parser.add_argument_group("template")
    help_ = "a format such as chatml or llama3, or a file (default: the model's)"
    group.add_argument("--chat-template", metavar="NAME|FILE", help=help_)
    thinking = group.add_mutually_exclusive_group()
    thinking.add_argument(
        "--enable-thinking", action="store_true", default=None, help="let the model reason first"
    )
    thinking.add_argument(
        "--no-thinking",
        action="store_false",
        default=None,
        dest="enable_thinking",
        help="answer at once",
    )
    sampling.add_arguments(parser)
    loading.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.name is not None:
        if args.model is not None:
            raise argparse.ArgumentError(None, "MODEL and --model exclude each other")
        args.model = args.name
    if args.max_tokens is not None and not 1 <= args.max_tokens <= INT32_MAX:
        raise argparse.ArgumentError(None, f"--max-tokens: {args.max_tokens} is less than 1")
    params = loading.params_of(args, seed=args.seed)
    sampler = sampling.sampler_of(args)
    template = {
        name: getattr(args, name)
        for name in ("chat_template", "enable_thinking")
        if getattr(args, name) is not None
    }

    from .. import Llama
    from ..packaged import cache_dir

    with Llama.load(params) as llama:
        if args.chat_template is None and llama.model.chat_template() is None:
            raise ValueError(
                "the model has no chat template, so it is no chat model; name one with "
                "--chat-template, or use `llama-crab run`"
            )
        reader = MessageReader(cache_dir() / "chat-history")
        screen = open_screen(is_chat=reader.is_terminal, markdown=not args.no_markdown)
        chat = Chat(
            llama,
            Conversation(args.system),
            screen,
            max_tokens=args.max_tokens,
            seed=args.seed,
            template=template,
            sampler=sampler,
        )
        chat.count_prompt("Hello")  # what is wrong with a template is told before anything is typed
        if not reader.is_terminal:
            _answer_all(chat, reader)
        else:
            screen.note(f"{llama.model.desc}, {llama.n_ctx} tokens of context; /help for help")
            with closing(reader):
                _talk(chat, reader, screen)
    return 0


def _answer_all(chat: Chat, reader: MessageReader) -> None:
    """Answer all lines; what goes wrong is raised."""
    try:
        while chat.take(*reader.read()):
            pass
    except EOFError:
        pass


def _talk(chat: Chat, reader: MessageReader, screen: Screen) -> None:
    """Answer a person; what goes wrong is told."""
    # Half a character, as a key that was deleted in the middle, is no reason to end.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            text, is_command = reader.read()
            with Interrupts() as interrupts:
                if not chat.take(text, is_command, interrupts):
                    return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if reader.was_empty():
                screen.note("Ctrl-D or /exit ends the chat")
        except BrokenPipeError:
            raise
        except (LlamaCrabError, OSError, ValueError) as error:
            screen.note(f"error: {one_line(error)}")


class Chat:
    """A conversation with a model: messages are answered, commands change it.

    Thread-safety: none.
    """

    def __init__(
        self,
        llama: Llama,
        conversation: Conversation,
        screen: Screen,
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        template: Mapping[str, Any] | None = None,
        sampler: SamplerChain | None = None,
    ) -> None:
        self.conversation = conversation
        self._llama = llama
        self._screen = screen
        self._max_tokens = max_tokens
        self._seed = seed
        self._template = dict(template or {})
        self._sampler = sampler
        self._n_retries = 0
        self._last: ChatCompletion | None = None

    def take(self, text: str, is_command: bool, interrupts: Interrupts | None = None) -> bool:
        """Answer a message or obey a command; return False for the one that ends the chat.

        With `interrupts`, Ctrl-C stops an answer; without, it is raised.
        """
        if is_command:
            return self._obey(text, interrupts)
        if text.strip():
            self._n_retries = 0
            self._ask(text, interrupts)
        return True

    def count_prompt(self, user: str) -> int:
        """Return how many tokens the prompt of a message would have."""
        prompt = self._llama.format_chat(self.conversation.messages(user), **self._template)
        return len(self._llama.tokenize(prompt, add_special=False))

    def _obey(self, text: str, interrupts: Interrupts | None) -> bool:
        name, _, argument = text[1:].partition(" ")
        argument = argument.strip()
        if name == "exit":
            return False
        if name == "retry":
            self._retry(interrupts)
            return True
        commands = {
            "save": self._save,
            "load": self._load,
            "system": self._set_system,
            "stats": self._tell_stats,
            "undo": self._undo,
            "clear": self._clear,
            "help": self._help,
        }
        if name not in commands:
            raise ValueError(f"there is no command /{name:.40}; /help lists them")
        if name in ("save", "load") and not argument:
            raise ValueError(f"/{name} needs the name of a file")
        commands[name](argument)
        return True

    # Answers

    def _ask(self, text: str, interrupts: Interrupts | None) -> None:
        self._make_room(text)
        completion = self._answer(text, interrupts)
        message, reason = completion.message, completion.finish_reason
        answer, reasoning = message.content or "", message.reasoning_content
        self._last = completion
        if reason == "cancelled" and not answer and not reasoning:
            self._screen.note("stopped before the answer began; the message is not kept")
            return
        self.conversation.exchanges.append(Exchange(text, answer, reasoning, reason))
        if interrupts is not None:
            self._screen.note(_summary(completion))
        if reason == "length" and completion.usage.total_tokens >= self._llama.n_ctx - 1:
            self._screen.note(
                f"The context of {self._llama.n_ctx} tokens is full, so the answer is cut. The "
                "next message leaves out the oldest ones; /clear begins anew"
            )

    def _answer(self, text: str, interrupts: Interrupts | None) -> ChatCompletion:
        seed = None if self._seed is None else (self._seed + self._n_retries) % RANDOM_SEED
        stream = self._llama.create_chat_completion(
            self.conversation.messages(text),
            self._max_tokens,
            stream=True,
            sampler=self._sampler,
            seed=seed,
            **self._template,
        )
        self._screen.begin()
        try:
            with stream:
                try:
                    while (chunk := _next(stream, interrupts)) is not None:
                        self._show(chunk)
                except KeyboardInterrupt:
                    stream.close()
                    for chunk in stream:  # generated before it, but not shown yet
                        self._show(chunk)
                    if interrupts is None:
                        raise
                return stream.result()
        finally:
            self._screen.end()

    def _show(self, chunk: ChatCompletionChunk) -> None:
        delta = chunk.delta
        if delta.reasoning_content:
            self._screen.reasoning(delta.reasoning_content)
        if delta.content:
            self._screen.content(delta.content)

    def _make_room(self, text: str) -> None:
        """Leave out the oldest exchanges where the context is full.

        Raises `ContextLengthError` where that is not enough.
        """
        n_ctx = self._llama.n_ctx
        if self._max_tokens is None:
            least, wanted = int(n_ctx * _LEAST_ROOM), int(n_ctx * _NEW_ROOM)
        else:
            least = min(self._max_tokens, int(n_ctx * _LEAST_ROOM))
            wanted = max(least, int(n_ctx * _NEW_ROOM))
        n_prompt = self.count_prompt(text)
        if n_prompt + least > n_ctx:
            before = self.conversation.n_left_out
            while n_prompt + wanted > n_ctx and self.conversation.leave_out_oldest():
                n_prompt = self.count_prompt(text)
            n_new = self.conversation.n_left_out - before
            if n_new:
                self._screen.note(
                    f"The context of {n_ctx} tokens is full: the model no longer sees the oldest "
                    f"{self.conversation.n_left_out} messages and their answers"
                )
        if n_prompt >= n_ctx:
            raise ContextLengthError(
                f"the message needs {n_prompt} tokens (with the system text), and the context has "
                f"{n_ctx}; shorten it, or start with a larger --n-ctx"
            )

    # Commands

    def _retry(self, interrupts: Interrupts | None) -> None:
        last = self.conversation.pop()
        if last is None:
            raise ValueError("there is no message to answer again")
        n_before = len(self.conversation.exchanges)
        self._n_retries += 1
        try:
            self._ask(last.user, interrupts)
        finally:
            if len(self.conversation.exchanges) == n_before:  # there is no new answer
                self.conversation.exchanges.append(last)

    def _save(self, argument: str) -> None:
        self.conversation.save(_path(argument), self._llama.model.desc)
        self._screen.note(f"saved {_count(len(self.conversation.exchanges))} to {argument}")

    def _load(self, argument: str) -> None:
        self.conversation = Conversation.load(_path(argument))
        self._screen.note(f"loaded {_count(len(self.conversation.exchanges))} from {argument}")

    def _set_system(self, argument: str) -> None:
        if argument:
            self.conversation.system = None if argument == "-" else argument
        system = self.conversation.system
        self._screen.note("no system text" if system is None else f"system text: {system}")

    def _undo(self, argument: str) -> None:
        if self.conversation.pop() is None:
            raise ValueError("there is nothing to take back")
        self._screen.note(f"taken back; {_count(len(self.conversation.exchanges))} left")

    def _clear(self, argument: str) -> None:
        self.conversation.clear()
        self._screen.note("the conversation is empty")

    def _help(self, argument: str) -> None:
        self._screen.note(_HELP)

    def _tell_stats(self, argument: str) -> None:
        from .chat_stats import stats_text

        n_used = self.count_prompt("") if self.conversation.exchanges else 0
        self._screen.note(stats_text(self._llama, self.conversation, n_used, self._last))


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name of somebody who is not there
        raise ValueError(f"{text}: {error}") from None


def _next(stream: ChatStream, interrupts: Interrupts | None) -> ChatCompletionChunk | None:
    if interrupts is None:
        return next(stream, None)
    with interrupts.allowed():
        return next(stream, None)


def _summary(completion: ChatCompletion) -> str:
    usage, timings = completion.usage, completion.timings
    ends = {"cancelled": "stopped, ", "length": "cut, "}
    return (
        f"{ends.get(completion.finish_reason, '')}{usage.completion_tokens} tokens, "
        f"{timings.predicted_per_sec:.1f} tok/s, "
        f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached"
    )


def _count(n: int) -> str:
    return f"{n} exchange{'' if n == 1 else 's'}"
