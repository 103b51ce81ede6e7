"""What the machine offers, which settings suit it, and what they measure."""

from .probe import (
    ThreadChoice,
    available_memory,
    default_n_threads,
    physical_cores,
    thread_choice,
    total_memory,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .bed import Bed
    from .profile import Profile
    from .samples import Comparison, Samples, compare
    from .tuner import TuneReport, tune

# Every `Llama` asks for the threads; what measures is for those who measure.
_LATER = {
    "Bed": "bed",
    "Comparison": "samples",
    "Profile": "profile",
    "Samples": "samples",
    "TuneReport": "tuner",
    "compare": "samples",
    "tune": "tuner",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "Bed",
    "Comparison",
    "Profile",
    "Samples",
    "ThreadChoice",
    "TuneReport",
    "available_memory",
    "compare",
    "default_n_threads",
    "physical_cores",
    "thread_choice",
    "total_memory",
    "tune",
]
