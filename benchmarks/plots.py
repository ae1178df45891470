"""Draw every plot of every device, from `benchmarks/results/*.csv` and nothing else: `python -m benchmarks.plots`."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from actvar.utils.files import replacing
from actvar_kernels.tools.compile_check import LineParser
from benchmarks import components, results
from benchmarks.results import Result

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = LineParser("python -m benchmarks.plots", description=__doc__.split(":")[0])
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the CSVs")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the PNGs")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.csv"))
    if not files:
        parser.error(f"expected CSVs in {options.results}, found none; make bench writes one")
    options.out.mkdir(parents=True, exist_ok=True)
    for file in files:
        for path in save_plots(results.read(file), file.stem, options.out):
            print(path)
    return 0


def save_plots(rows: Sequence[Result], device: str, folder: Path) -> list[Path]:
    """Write the PNGs for which there are rows; return them."""
    drawn = {
        "throughput": throughput(rows),
        "speedup": speedup(rows),
        "steps": steps(rows),
        "quality": quality(rows),
    }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            path = folder / f"bench-{device}-{name}.png"
            figure.suptitle(device, fontsize=10)
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=110)
            written.append(path)
    return written


def throughput(rows: Iterable[Result]) -> Figure | None:
    """Draw images per second of whole samples over the batch, a panel per model and dtype."""
    samples = _grouped(
        (row for row in rows if (row.operation, row.metric) == ("whole sample", "ms")),
        lambda row: (row.model, row.dtype),
    )
    if not samples:
        return None
    figure, panels = _panels(len(samples))
    for axes, ((model, dtype), of_model) in zip(panels, samples.items(), strict=True):
        for provider, of_provider in _grouped(of_model, lambda row: row.provider).items():
            points = sorted(of_provider, key=lambda row: row.batch)
            low, middle, high = (
                [1e3 * row.batch / getattr(row, name) for row in points] for name in ("p80", "p50", "p20")
            )
            _line(axes, [row.batch for row in points], low, middle, high, provider)
        axes.set(xlabel="batch", ylabel="images per second", xscale="log", ylim=(0, None))
        axes.set_xticks(sorted({row.batch for row in of_model}), sorted({row.batch for row in of_model}))
        axes.minorticks_off()
        axes.set_title(f"{model}, {dtype}", fontsize=9)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    return figure


def speedup(rows: Sequence[Result]) -> Figure | None:
    """Draw how many times as fast ActVAR is as the accelerated dense model, and the experts as the dense FFN.

    Every panel is by rate, with the ceiling that the FLOPs set.
    """
    panels = [*_model_speedups(rows), *_expert_speedups(rows)]
    if not panels:
        return None
    figure, drawn = _panels(len(panels))
    for axes, (title, lines, ceiling) in zip(drawn, panels, strict=True):
        for label, points in lines.items():
            _line(axes, *zip(*sorted(points), strict=True), label)
        rates, gains = zip(*sorted(ceiling), strict=True)
        axes.plot(rates, gains, "k--", linewidth=1, label="ceiling by FLOPs")
        axes.axhline(1, color="0.8", linewidth=0.8, zorder=0)
        axes.set(xlabel="rate of tokens and experts", ylabel="times as fast", yscale="log")
        axes.set_title(title, fontsize=9)
        axes.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", "1", "2", "4", "8", "16"])
        axes.minorticks_off()
        axes.legend(fontsize=7)
    return figure


def _model_speedups(rows: Iterable[Result]) -> list[tuple[str, dict, list]]:
    prefix = "scaling rate: "
    scaled = {
        (row.operation.removeprefix(prefix), row.metric, row.provider, row.rate, row.model, row.batch): row
        for row in rows
        if row.operation.startswith(prefix)
    }
    panels = []
    for operation in ("all blocks", "blocks, last two"):
        points, ceiling, title = [], [], ""
        for (name, metric, provider, rate, model, batch), row in scaled.items():
            if (name, metric, provider) == (operation, "ms", "ActVAR"):
                shape = rate, model, batch
                dense = scaled[(operation, "ms", "accelerated", *shape)]
                points.append((rate, *_ratio(dense, row)))
                flops = [scaled[(operation, "GFLOP", way, *shape)].p50 for way in ("accelerated", "ActVAR")]
                ceiling.append((rate, flops[0] / flops[1]))
                title = f"{operation}, {model}, batch {batch}"
        if points:
            panels.append((title, {"ActVAR over accelerated": points}, ceiling))
    return panels


def _expert_speedups(rows: Iterable[Result]) -> list[tuple[str, dict, list]]:
    """Return panels: the fastest dense FFN of all tokens over every way to run the experts of the kept ones."""
    operations = ("dense_ffn", "expert_ffn_scatter dense")
    panels = []
    shapes = _grouped((r for r in rows if r.operation in operations), lambda row: (row.model, row.batch, row.dtype))
    for (model, batch, dtype), of_shape in shapes.items():
        dense = [row for row in of_shape if row.operation == "dense_ffn"]
        sparse = [row for row in of_shape if row.operation != "dense_ffn"]
        rates = {row.rate for row in sparse}
        if not dense or len(rates) < 2:
            continue
        best, lines = min(dense, key=lambda row: row.p50), defaultdict(list)
        for row in sparse:
            lines[row.provider].append((row.rate, *_ratio(best, row)))
        ceiling = [(rate, 1 / rate**2) for rate in rates]
        panels.append((f"experts, {model}, batch {batch}, {dtype}", dict(lines), ceiling))
    return panels


def _ratio(slow: Result, fast: Result) -> tuple[float, float, float]:
    """Return how much faster: the medians' ratio between those of opposite percentiles."""
    return slow.p20 / fast.p80, slow.p50 / fast.p50, slow.p80 / fast.p20


def steps(rows: Iterable[Result]) -> Figure | None:
    """Draw time per step stacked by component: a row per model and dtype at its largest batch, a panel per way."""
    shapes = _grouped(
        (row for row in rows if row.step and row.metric == "ms"), lambda row: (row.model, row.dtype, row.batch)
    )
    largest = {(model, dtype): batch for model, dtype, batch in sorted(shapes)}
    if not largest:
        return None
    width = max(len({row.provider for row in shapes[(*of, batch)]}) for of, batch in largest.items())
    figure = Figure(figsize=(3.2 * width, 3 * len(largest)), layout="constrained")
    grid = figure.subplots(len(largest), width, sharey="row", squeeze=False)
    for line, ((model, dtype), batch) in zip(grid, largest.items(), strict=True):
        ways = _grouped(shapes[model, dtype, batch], lambda row: row.provider)
        for axes, (way, of_way) in zip(line, ways.items(), strict=False):
            times: list[dict[str, float]] = [{} for _ in range(max(row.step for row in of_way))]
            for row in of_way:
                times[row.step - 1][row.operation] = 1e-3 * row.p50
            components.stacked(axes, times)
            axes.set_title(f"{way}: {model}, batch {batch}, {dtype}", fontsize=8)
        for axes in line[len(ways) :]:
            axes.remove()
        line[0].set_ylabel("milliseconds")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def quality(rows: Sequence[Result]) -> Figure | None:
    """Draw FID over the time of a sample, for providers that have both."""

    def shape(row: Result) -> tuple:
        return row.provider, row.model, row.operation

    fids = {shape(row): row for row in rows if row.metric == "FID"}
    times = _grouped((row for row in rows if row.metric == "ms"), shape)
    if not fids.keys() & times.keys():
        return None
    figure, (axes,) = _panels(1)
    figure.set_size_inches(9, 5)
    for number, of in enumerate(sorted(fids.keys() & times.keys())):
        time = min(times[of], key=lambda row: row.p50 / row.batch)
        marker = "osD^vPX*"[number // 10 % 8]  # there are ten colours
        axes.plot(time.p50 / time.batch, fids[of].p50, marker, label=", ".join(of[:2]))
    axes.set(xlabel="milliseconds an image", ylabel="FID", xlim=(0, None), yscale="log")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def _line(axes, x: Sequence, low: Sequence, middle: Sequence, high: Sequence, label: str) -> None:
    """Draw medians with the range of the 20th to the 80th percentile."""
    drawn = axes.plot(x, middle, "o-", markersize=3, linewidth=1.2, label=label)
    axes.fill_between(x, low, high, color=drawn[0].get_color(), alpha=0.15, linewidth=0)


def _panels(count: int) -> tuple[Figure, list]:
    columns = min(count, 3)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _grouped(rows: Iterable[Result], key: Callable[[Result], object]) -> dict:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


if __name__ == "__main__":
    sys.exit(main())
