"""The one generation loop: `Scheduler.step`, and the `Engine` that lets threads share it."""

from .engine import Engine
from .request import Request, Sequence
from .scheduler import Scheduler

__all__ = ["Engine", "Request", "Scheduler", "Sequence"]
