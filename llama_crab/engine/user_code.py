"""Python code of users inside the loop: logits processors and drafters."""

from __future__ import annotations

from .request import Request, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._core import Stepper
    from .drafting import Drafters
    from .processors import Processors


class UserCode:
    """What `Stepper.step` calls back, made when a request asks for it.

    Thread-safety: none; the scheduler's.
    """

    def __init__(self, stepper: Stepper, running: dict[int, Sequence]) -> None:
        self._stepper = stepper
        self._running = running
        self.processors: Processors | None = None
        self.drafters: Drafters | None = None

    def prepare(self, request: Request) -> None:
        """Make what `request` needs."""
        if request.logits_processors and self.processors is None:
            from .processors import Processors

            self.processors = Processors(self._stepper, self._running)
        if request.drafter is not None and self.drafters is None:
            from .drafting import Drafters

            self.drafters = Drafters(self._stepper, self._running)

    def take_failed(self) -> dict[Sequence, Exception]:
        """Return the sequences whose drafter has raised since the last call, with the errors."""
        if self.drafters is None or not self.drafters.failed:
            return {}
        failed, self.drafters.failed = self.drafters.failed, {}
        return failed
