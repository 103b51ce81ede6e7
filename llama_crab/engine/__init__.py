"""The one generation loop: `Scheduler.step`, and the `Engine` that lets threads share it."""

from .embedding import EmbeddingRequest, EmbeddingScheduler
from .engine import Engine
from .request import Request, Sequence
from .scheduler import Scheduler

__all__ = ["EmbeddingRequest", "EmbeddingScheduler", "Engine", "Request", "Scheduler", "Sequence"]
