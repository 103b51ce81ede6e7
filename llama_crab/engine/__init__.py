"""The one generation loop: `Scheduler.step`."""

from .request import Request, Sequence
from .scheduler import Scheduler

__all__ = ["Request", "Scheduler", "Sequence"]
