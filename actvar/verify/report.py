"""The comparisons of a verification, and their report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        check: the group, such as the name of an operation or `"removal"`.
        dtype: of the model's weights.
        backend: that was compared.
        what: the compared value, such as `"output"` or `"tokens"`.
        error: largest difference, or the number of elements that differ.
        tolerance: largest error that passes.
        block: number of the block, or None.
        scale: number of the scale, or None.
    """

    check: str
    dtype: str
    backend: str
    what: str
    error: float
    tolerance: float = 0.0
    block: int | None = None
    scale: int | None = None

    @property
    def passed(self) -> bool:
        """Return whether the error is within the tolerance."""
        return self.error <= self.tolerance < math.inf

    @property
    def excess(self) -> float:
        """Return the error as a multiple of the tolerance, infinite where that is no number."""
        if self.error == 0:
            return 0.0
        return self.error / self.tolerance if self.tolerance > 0 and math.isfinite(self.error) else math.inf

    def __str__(self) -> str:
        place = [f"{name} {value}" for name in ("block", "scale") if (value := getattr(self, name)) is not None]
        where = ", ".join([*place, self.check, self.what])
        return f"{where} ({self.dtype}, {self.backend}): error {self.error:.3g}, tolerance {self.tolerance:.3g}"


@dataclass(frozen=True)
class Report:
    """Every comparison, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[Check]:
        """Return the comparisons that did not pass."""
        return [check for check in self.checks if not check.passed]

    def table(self) -> str:
        """Return aligned text with a line per check, dtype and backend that has the worst comparison."""
        lines = [
            f"{'check':<25}{'dtype':<10}{'backend':<11}{'compared':>8}  {'result':<8}{'error':>11}{'tolerance':>11}"
        ]
        groups: dict[tuple[str, str, str], list[Check]] = {}
        for check in self.checks:
            groups.setdefault((check.check, check.dtype, check.backend), []).append(check)
        for (name, dtype, backend), members in groups.items():
            worst = max(members, key=lambda check: check.excess)
            result = "ok" if all(check.passed for check in members) else "FAILED"
            numbers = f"{worst.error:>11.2g}{worst.tolerance:>11.2g}" if worst.error else f"{'exact':>11}"
            lines.append(f"{name:<25}{dtype:<10}{backend:<11}{len(members):>8}  {result:<8}{numbers}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return one line, with the first failure if there is any."""
        if not self.failures:
            return f"ok: {len(self.checks)} comparisons"
        return f"FAILED: {len(self.failures)} of {len(self.checks)} comparisons; first {self.failures[0]}"

    def as_dict(self) -> dict[str, object]:
        """Return the comparisons JSON-compatible; numbers that are not finite become strings."""

        def plain(value: object) -> object:
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        checks = [{k: plain(v) for k, v in asdict(c).items()} | {"passed": c.passed} for c in self.checks]
        return {"passed": not self.failures, "summary": self.summary(), "checks": checks}
