"""An evaluation as a table, as JSON and as a plot of quality against time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from actvar.evaluate.quality import METRICS
from actvar.evaluate.run import Evaluation, Result
from actvar.evaluate.texts import TextEvaluation
from actvar.utils.pictures import COLOURS, new_figure, save_figure, save_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE = "dense"
TITLES = {
    "fid": "FID",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
    "agreement": "wanted class",
    "fid_lite0": "FID Lite0",
    "distance_lite0": "distance Lite0",
    "psnr": "PSNR",
    "ssim": "SSIM",
}
PLOTTED = ("psnr", "ssim", "distance_lite0")
"""Metrics that are plotted where there is no FID."""


@dataclass(frozen=True)
class Mean:
    """The mean of some values, and half of its 95 % interval by Student's t; None for fewer than two values."""

    mean: float
    interval: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return the mean of one value or more."""
        if len(values) < 2:
            return cls(values[0], None)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error)

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if self.interval is None else f"{self.mean:.3g} ± {self.interval:.2g}"


@dataclass(frozen=True)
class Report:
    """Results and their settings.

    Args:
        results: one per method.
        how: the settings.
        maps: height and width of every scale's token map.
    """

    results: Sequence[Result]
    how: Evaluation | TextEvaluation
    maps: Sequence[tuple[int, int]]

    def as_dict(self) -> dict[str, object]:
        """Return the results JSON-compatible.

        Every method has the means of the metrics over the seeds, and all values by seed. `seconds` per image are the
        median of the timed batches, and `flops` per image those of the transformer alone. `kl` and `kl_drawn` are by
        scale. `interval` is half of the 95 % interval of each metric, and `minus_dense` has mean and interval of the
        paired differences.
        """
        return {
            "settings": self.how.settings(),
            "methods": {result.name: self._entry(result) for result in self.results},
        }

    def _entry(self, result: Result) -> dict[str, object]:
        means, differences = self.means(result), self.differences(result)
        sides = [f"{height}x{width}" for height, width in self.maps]
        return {
            **{name: mean.mean for name, mean in means.items()},
            "seconds": statistics.median(result.seconds),
            "flops": result.flops,
            **{name: dict(zip(sides, values, strict=True)) for name, values in result.divergences.items()},
            "interval": {name: mean.interval for name, mean in means.items()},
            "minus_dense": {name: asdict(mean) for name, mean in differences.items()},
            "by_seed": result.quality,
            "seconds_of_batches": result.seconds,
        }

    def means(self, result: Result) -> dict[str, Mean]:
        """Return the mean of each metric over the seeds; without images there is none."""
        return {name: Mean.of([metrics[name] for metrics in result.quality]) for name in self.metrics()}

    def metrics(self) -> list[str]:
        """Return the names of the metrics that all results have."""
        return [name for name in METRICS if all(of.quality and name in of.quality[0] for of in self.results)]

    def differences(self, result: Result) -> dict[str, Mean]:
        """Return each metric less that of `dense` with the same seed, for the seeds of both; none without `dense`."""
        dense = next((other for other in self.results if other.name == DENSE), None)
        if dense is None or dense is result:
            return {}
        pairs = list(zip(result.quality, dense.quality, strict=False))
        return {name: Mean.of([own[name] - base[name] for own, base in pairs]) for name in self.metrics()}

    def save_csv(self, path: Path) -> Path:
        """Write a row per method: milliseconds and GFLOP per image, metrics, differences to dense, and KL by scale.

        A metric's interval and its difference to `dense` with that interval stand in columns of their own, empty where
        there is none.

        Args:
            path: the file.

        Returns:
            The path.
        """
        rows: list[dict[str, object]] = []
        for result in self.results:
            row: dict[str, object] = {"method": result.name, "ms": 1e3 * statistics.median(result.seconds)}
            row |= {"gflop": result.flops / 1e9, "seeds": len(result.quality)}
            for suffix, means in (("", self.means(result)), ("_minus_dense", self.differences(result))):
                for name in self.metrics():
                    mean = means.get(name)
                    row[name + suffix] = None if mean is None else mean.mean
                    row[f"{name}{suffix}_interval"] = None if mean is None else mean.interval
            drawn = result.divergences.get("kl_drawn", ())
            row |= {f"kl_{h}x{w}": kl for (h, w), kl in zip(self.maps, drawn, strict=False)}
            rows.append(row)
        return save_table(path, [*rows[0]], [[*row.values()] for row in rows])

    def table(self) -> str:
        """Return aligned text with a row per method."""
        has_kl = any(result.divergences for result in self.results)
        titles = ["", "ms / image", "GFLOP / image"]
        titles += [TITLES[name] for name in self.metrics()]
        titles += ["FID - dense"] if "fid" in self.metrics() else []
        titles += [f"KL {height}x{width}" for height, width in self.maps[-2:]] if has_kl else []
        rows = [titles, *(self._row(result, has_kl) for result in self.results)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
        return "\n".join(
            row[0].ljust(widths[0])
            + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )

    def _row(self, result: Result, has_kl: bool) -> list[str]:
        cells = [result.name, f"{1e3 * statistics.median(result.seconds):.2f}", f"{result.flops / 1e9:.3f}"]
        means = self.means(result)
        cells += [str(mean) for mean in means.values()]
        if "fid" in means:
            cells.append(str(self.differences(result).get("fid", "")))
        if has_kl:
            cells += ["-" if kl is None else f"{kl:.3f}" for kl in result.divergences["kl_drawn"][-2:]]
        return cells


def save_quality_plot(report: Report, path: Path) -> Path:
    """Plot each FID with its 95 % interval over the time per image; a line joins the settings of one method.

    Without FID the distances to the dense images are plotted.

    Args:
        report: the results.
        path: the PNG.

    Returns:
        The path.

    Raises:
        ValueError: an evaluation without images.
    """
    names = [name for name in report.metrics() if name.startswith("fid")]
    names = names or [name for name in PLOTTED if name in report.metrics()]
    if not names:
        raise ValueError("expected an evaluation with images to plot")
    figure = new_figure(8.5 * len(names), 5.5)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _plot_metric(axes, report, name)
    return save_figure(figure, path)


def _plot_metric(axes: Axes, report: Report, name: str) -> None:
    """Plot one metric over the time per image.

    Args:
        axes: to draw in.
        report: the results.
        name: of the metric.
    """
    groups: dict[str, list[tuple[float, Mean, str]]] = {}
    for result in report.results:
        group, _, amount = result.name.partition("@")
        point = (1e3 * statistics.median(result.seconds), report.means(result)[name], amount)
        groups.setdefault(group, []).append(point)
    markers = "osD^v<>Ph*Xp"
    for index, (group, points) in enumerate(groups.items()):
        points.sort(key=lambda point: point[0])
        times, means, amounts = zip(*points, strict=True)
        axes.errorbar(
            times,
            [mean.mean for mean in means],
            [mean.interval or 0 for mean in means],
            color=COLOURS[index % len(COLOURS)],
            marker=markers[index % len(markers)],
            markersize=5,
            linewidth=1,
            capsize=2,
            label=group,
        )
        for time, mean, amount in zip(times, means, amounts, strict=True):
            axes.annotate(amount, (time, mean.mean), xytext=(4, 4), textcoords="offset points", fontsize=6)
    axes.set(xlabel="milliseconds per image", ylabel=f"{TITLES[name]} of {report.how.num} images")
    if name.startswith("fid"):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        decades = (1, 10, 100, 1000)
        ticks = [tick for decade in decades for tick in np.multiply((1, 2, 3, 5), decade) if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.grid(color="0.92")
    axes.legend(fontsize=7, ncols=2)
