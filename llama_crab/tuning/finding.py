"""What a check says, and what all of them say together."""

from __future__ import annotations

from dataclasses import asdict, dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    Severity = Literal["ok", "advice", "problem"]

SEVERITIES = ("problem", "advice", "ok")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    ``severity`` is ``"problem"`` (something is wrong and costs much), ``"advice"`` (worth trying)
    or ``"ok"``; ``symptom`` what one notices, ``evidence`` what was seen or measured, ``fix`` what
    to change. An ``"ok"`` has evidence only.
    """

    name: str
    severity: Severity
    symptom: str = ""
    evidence: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, the gravest first. A check that cannot tell leaves none."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that need an answer."""
        return self._of("problem")

    @property
    def advice(self) -> tuple[Finding, ...]:
        """The findings that are worth a try."""
        return self._of("advice")

    @property
    def passed(self) -> tuple[Finding, ...]:
        """The checks that found nothing."""
        return self._of("ok")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        counts = {severity: len(self._of(severity)) for severity in SEVERITIES}
        return {"counts": counts, "findings": [asdict(finding) for finding in self.findings]}

    def _of(self, severity: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)


def passed(name: str, evidence: str) -> Finding:
    """Return the finding of a check that found nothing."""
    return Finding(name, "ok", evidence=evidence)
