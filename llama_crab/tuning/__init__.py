"""What the machine offers and which settings suit it."""

from .probe import (
    ThreadChoice,
    available_memory,
    default_n_threads,
    physical_cores,
    thread_choice,
    total_memory,
)

__all__ = [
    "ThreadChoice",
    "available_memory",
    "default_n_threads",
    "physical_cores",
    "thread_choice",
    "total_memory",
]
