"""Ctrl-C in the middle of a decode that takes long."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..errors import DecodeAborted


@contextmanager
def abort_on_interrupt(abort: Callable[[], object]) -> Iterator[None]:
    """Call `abort`, in a thread, as soon as SIGINT arrives; without it Python waits for the decode.

    Python's own handler runs as ever, afterwards. Does nothing outside of the main thread, which
    gets no signals, and on Windows, where signals are told by sockets only.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, abort), daemon=True)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)


def raise_interrupt(error: DecodeAborted) -> NoReturn:
    """Raise KeyboardInterrupt for a decode that the watcher has aborted, and only once.

    Python's handler has not run yet: it would raise its own one later, anywhere.
    """
    time.sleep(0)
    raise KeyboardInterrupt from error


def _watch(reader: int, abort: Callable[[], object]) -> None:
    while data := os.read(reader, 64):
        if signal.SIGINT in data:
            abort()
