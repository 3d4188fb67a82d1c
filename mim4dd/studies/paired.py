"""Differences of two series of accuracies, paired by seed, and how sure they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences of accuracies.

    Attributes:
        mean: from -1 to 1.
        margin: half the width of the 95 % t-interval; None for a single pair.
        count: number of pairs.
    """

    mean: float
    margin: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The two ends of the 95 % interval."""
        return None if self.margin is None else (self.mean - self.margin, self.mean + self.margin)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0, that is p < 0.05 in a paired t-test."""
        return self.margin is not None and abs(self.mean) > self.margin

    def facts(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {"mean": self.mean, "interval": self.interval, "confidence": CONFIDENCE, "pairs": self.count}

    def __str__(self) -> str:
        text = f"{100 * self.mean:+.2f}"
        if self.interval is None:
            return text
        low, high = self.interval
        return f"{text} [{100 * low:+.2f}, {100 * high:+.2f}]"


def paired_difference(ours: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Return ours - base over the seeds that both have; None if there is none.

    The interval is mean ± t(0.975, n-1) s / sqrt(n) with s the sample standard deviation of n differences.
    """
    differences = [ours[seed] - base[seed] for seed in ours if seed in base]
    if not differences:
        return None
    n = len(differences)
    if n == 1:
        return Difference(differences[0], None, 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Difference(
        statistics.fmean(differences), quantile * statistics.stdev(differences) / math.sqrt(n), n
    )
