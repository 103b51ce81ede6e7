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
    from .bench_compare import compare_reports
    from .bench_report import BenchReport, BenchRow
    from .bench_run import bench
    from .doctor import examine
    from .finding import Diagnosis, Finding
    from .profile import Profile
    from .samples import Comparison, Samples, compare
    from .tuner import TuneReport, tune

# Every `Llama` asks for the threads; what measures is for those who measure.
_LATER = {
    "Bed": "bed",
    "BenchReport": "bench_report",
    "BenchRow": "bench_report",
    "bench": "bench_run",
    "compare_reports": "bench_compare",
    "Comparison": "samples",
    "Diagnosis": "finding",
    "Finding": "finding",
    "Profile": "profile",
    "Samples": "samples",
    "TuneReport": "tuner",
    "compare": "samples",
    "examine": "doctor",
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
    "BenchReport",
    "BenchRow",
    "Comparison",
    "Diagnosis",
    "Finding",
    "Profile",
    "Samples",
    "ThreadChoice",
    "TuneReport",
    "available_memory",
    "bench",
    "compare",
    "compare_reports",
    "default_n_threads",
    "examine",
    "physical_cores",
    "thread_choice",
    "total_memory",
    "tune",
]
