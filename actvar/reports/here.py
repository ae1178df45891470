"""Time the C++ kernels against plain PyTorch on this machine, operation by operation and as whole blocks."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import actvar
from actvar.reports.one_block import last_scale_seconds
from actvar.sampling.timing import interleaved_seconds, mean_seconds
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import brgemm, choices, cpu
from actvar_kernels.operations.inputs import random_inputs
from actvar_kernels.operations.shapes import VOCABULARY, last_scale
from actvar_kernels.operations.table import BLOCK, DECODER, SAMPLING, Operation

MOST_SLOWER = 1.1
"""Largest ratio of the kernels' time to PyTorch's that is not called slower."""
SECONDS = 100.0
"""No case begins later, so that a slow machine is done in about two minutes as well."""
AT_FIRST, AGAIN = (0.3, 3, 9), (2.0, 7, 25)
"""Seconds that the measurements of a case should take, and the least and most of them; `AGAIN` before a verdict."""
SHAPES = (("fashion-mnist", 1), ("fashion-mnist", 8), ("d16", 1), ("d16", 8))
"""Models and images, which have two rows each."""
BLOCKS = (("fashion-mnist", 1), ("d16", 1))
"""Those of whole blocks, and of operations in float16."""
INT8 = "int8"
"""Blocks with weights in eight bits; the rest of them is in the dtype that PyTorch takes."""
VOCABULARIES = {"fashion-mnist": 512, "d16": VOCABULARY}
MAPS = {"fashion-mnist": (64, 16), "d16": (320, 64)}
"""Channels and side of a map in the middle of the autoencoder's decoder."""

Measurement = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """Describe what is timed.

    Attributes:
        operation: name of an operation, or `"block"`.
        model: whose sizes it has.
        batch: images.
        dtype: name of the dtype of all tensors, or `INT8`.
    """

    operation: str
    model: str
    batch: int
    dtype: str

    @property
    def plain(self) -> str:
        """Return the dtype in which PyTorch runs: the fastest with as many digits that the processor multiplies."""
        if self.dtype == INT8:
            return "bfloat16" if cpu.multiplies_bfloat16() else "float32"
        return "float32" if self.dtype == "float16" and not cpu.multiplies_float16() else self.dtype

    def prepared(self) -> tuple[dict[str, Measurement], int]:
        """Return what measures the seconds of one run by what runs it, one of `choices.RUNS`.

        The second value is the numbers of the call's first tensor, 0 for a block.
        """
        kernels, plain = choices.DTYPES.get(self.dtype), choices.DTYPES[self.plain]
        if self.operation == "block":
            block = partial(last_scale_seconds, "ActVAR", self.model, self.batch, "cpu")
            mine = partial(block, plain, INT8) if kernels is None else partial(block, kernels)
            return {"cpu": mine, "reference": partial(block, plain)}, 0
        calls = {dtype: self._call(dtype) for dtype in {kernels, plain} if dtype is not None}
        return {"cpu": calls[kernels][0], "reference": calls[plain][0]}, calls[plain][1]

    def _call(self, dtype: torch.dtype) -> tuple[Measurement, int]:
        """Return what measures a call in a dtype, and the numbers of its first tensor."""
        operation, inputs = self._operation(), self._inputs(dtype)
        arguments = next(iter(operation.arguments(*inputs).values()))
        if "top_k" in arguments:
            arguments["top_k"] = min(arguments["top_k"], VOCABULARIES[self.model] // 2)
        first = arguments.get("u", arguments.get("x", arguments.get("rows", arguments.get("q"))))
        numbers = (arguments["logits"] if first is None else first).numel()
        return partial(mean_seconds, partial(operation.call, **arguments), "cpu"), numbers

    def _operation(self) -> Operation:
        return next(found for found in (*BLOCK, *SAMPLING, *DECODER) if found.name == self.operation)

    def _inputs(self, dtype: torch.dtype) -> tuple[object, ...]:
        shape = last_scale(self.model, self.batch)
        if self._operation() in BLOCK:
            return (random_inputs(shape, dtype, "cpu"),)
        generator = torch.Generator().manual_seed(0)
        if self._operation() in DECODER:
            channels, side = MAPS[self.model]
            x = torch.randn(self.batch, channels, side, side, generator=generator)
            return x.to(dtype, memory_format=torch.channels_last), torch.ones(channels, dtype=dtype)
        logits = torch.randn(shape.rows, shape.tokens, VOCABULARIES[self.model], generator=generator).to(dtype)
        return logits, torch.zeros(1, dtype=torch.int64), torch.rand_like(logits[: self.batch])


@dataclass(frozen=True)
class Row(Case):
    """Hold what was measured of a case.

    Attributes:
        numbers: how many the first tensor has; 0 for a block.
        kernels, pytorch: milliseconds of a run, the medians.
        best: ratio of the shortest runs, which other work on the machine lengthens least.
        noise: how far the ratios of neighbouring runs lie apart, from the 20th to the 80th percentile.
    """

    numbers: int
    kernels: float
    pytorch: float
    best: float
    noise: float

    @property
    def ratio(self) -> float:
        """Return how many times as long as PyTorch the kernels take."""
        return self.kernels / self.pytorch

    @property
    def is_over(self) -> bool:
        """Return whether the kernels take more than `MOST_SLOWER` allows."""
        return self.ratio > MOST_SLOWER

    @property
    def is_slower(self) -> bool:
        """Return whether the kernels take more than `MOST_SLOWER` allows, beyond noise and at their best as well."""
        return self.is_over and self.best > MOST_SLOWER and self.differs

    @property
    def differs(self) -> bool:
        """Return whether one is faster beyond noise, and in the shortest runs as well."""
        return abs(self.ratio - 1) > self.noise and (self.ratio > 1) == (self.best > 1)

    def line(self) -> str:
        """Return one line of the report, as wide as `HEADER`."""
        mark = "slower" if self.is_slower else "slower, within noise" if self.is_over else ""
        return (
            f"{self.operation:<20}{self.model:<14}{self.batch:>5}  {self.dtype:<9}{self.kernels:>11.3f}"
            f"  {self.plain:<9}{self.pytorch:>11.3f}{self.ratio:>7.2f}{self.noise:>7.0%}  {mark}"
        ).rstrip()


HEADER = (
    f"{'operation':<20}{'shapes of':<14}{'batch':>5}  {'dtype':<9}{'kernels ms':>11}  {'against':<9}{'PyTorch ms':>11}"
    f"{'ratio':>7}{'noise':>7}"
)


def cases() -> list[Case]:
    """Return what is timed, the short ones first; bfloat16 and int8 where the processor has instructions for them."""
    dtypes = ["float32", "bfloat16"] if cpu.multiplies_bfloat16() else ["float32"]
    of_blocks = [*dtypes, "float16", INT8] if brgemm.runs(torch.int8) else [*dtypes, "float16"]
    of_shapes = [(of, dtype) for of in SHAPES for dtype in (*dtypes, *(["float16"] if of in BLOCKS else []))]
    blocks = [Case("block", *of, dtype) for of in BLOCKS for dtype in of_blocks]
    return blocks + [Case(name, *of, dtype) for of, dtype in of_shapes for name in choices.OPERATIONS]


@torch.no_grad()
def measured(todo: Sequence[Case], seconds: float = SECONDS) -> Iterator[Row]:
    """Yield a row for each case that begins before `seconds` are over; one that seems slower is measured again.

    Raises:
        BackendUnavailableError: the C++ kernels do not run here.
    """
    start = time.perf_counter()
    for case in todo:
        if time.perf_counter() - start > seconds:
            return
        runs, numbers = case.prepared()
        row = row_of(case, numbers, measure(runs, *AT_FIRST))
        yield row_of(case, numbers, measure(runs, *AGAIN)) if row.is_over else row


def measure(runs: Mapping[str, Measurement], seconds: float, least: int, most: int) -> dict[str, list[float]]:
    """Return the seconds of runs by the C++ kernels (`"cpu"`) and by plain PyTorch (`"reference"`), in turn.

    Args:
        runs: a measurement for each of the two.
        seconds: about how long to measure, if that fits.
        least, most: how many measurements each of the two gets.
    """

    def on(backend: str) -> float:
        with using_backend(backend):
            return runs[backend]()

    start = time.perf_counter()
    by_backend: dict[str, Measurement] = {backend: partial(on, backend) for backend in choices.RUNS}
    for first in by_backend.values():
        first()
    repeats = int(seconds / (time.perf_counter() - start))
    return interleaved_seconds(by_backend, min(max(repeats, least), most), warm_ups=0)


def row_of(case: Case, numbers: int, seconds: dict[str, list[float]]) -> Row:
    """Return the row of a case by its measurements, see `measure`."""
    pairs = [mine / theirs for mine, theirs in zip(seconds["cpu"], seconds["reference"], strict=True)]
    fifths = statistics.quantiles(pairs, n=5, method="inclusive")
    kernels, pytorch = (1e3 * statistics.median(seconds[name]) for name in choices.RUNS)
    best = min(seconds["cpu"]) / min(seconds["reference"])
    noise = (fifths[3] - fifths[0]) / statistics.median(pairs)
    return Row(case.operation, case.model, case.batch, case.dtype, numbers, kernels, pytorch, best, noise)


def machine() -> dict[str, Any]:
    """Return what a measurement depends on: processor, instructions, threads, versions, and what else is at work."""
    return {
        "processor": choices.processor(),
        "isa": choices.instructions(),
        "threads": torch.get_num_threads(),
        "actvar": actvar.__version__,
        "torch": torch.__version__,
        "load": load(),
    }


def load() -> float:
    """Return how many threads wanted a processor in the last minute; 0 where the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def warning(found: float) -> str:
    """Return a line for a machine whose load `found` leaves no processor to each thread of PyTorch; "" otherwise."""
    processors = os.cpu_count() or 1
    if found + torch.get_num_threads() <= processors + 0.5:
        return ""
    return f"other work is at it (load {found:.1f} on {processors} processors): expect noise and wrong verdicts"


def as_dict(row: Row) -> dict[str, object]:
    """Return a row with its ratio and verdict, for JSON."""
    return asdict(row) | {"plain": row.plain, "ratio": row.ratio, "slower": row.is_slower}


def summary(rows: Sequence[Row], todo: int) -> str:
    """Return the last line of the report; `todo` is the number of cases that there were."""
    slower, over = sum(row.is_slower for row in rows), sum(row.is_over for row in rows)
    faster = sum(row.ratio < 1 for row in rows)
    left_out = f"; {todo - len(rows)} left out after {SECONDS:.0f} s" if len(rows) < todo else ""
    within = f" ({over - slower} more within noise)" if over > slower else ""
    return f"{len(rows)} cases: kernels faster in {faster}, over 10 % slower in {slower}{within}{left_out}"


def table_of(rows: Sequence[Row]) -> choices.Table:
    """Return who runs each operation and dtype among `rows`, where PyTorch ran in that dtype as well."""

    def kind(row: Row) -> tuple[str, str]:
        return row.operation, row.dtype

    operations = sorted((row for row in rows if row.numbers and row.plain == row.dtype), key=kind)
    found = tuple(_choice(*of, list(same)) for of, same in itertools.groupby(operations, kind))
    return choices.Table(choices.processor(), choices.instructions(), torch.get_num_threads(), found)


def _choice(operation: str, dtype: str, rows: Sequence[Row]) -> choices.Choice:
    """Return what takes the least time over all `rows` of an operation; a limit only where it saves time.

    A loss of C++ within noise counts for nothing, a gain counts always, so that C++ stays where nothing is sure.
    """
    rows = sorted(rows, key=lambda row: row.numbers)
    losses = [math.log(row.ratio) if row.differs or row.ratio < 1 else 0.0 for row in rows]
    found = {0: (0.0, sum(losses))}  # by the limit: what C++ loses below it, and from it on
    for position, (before, after) in enumerate(itertools.pairwise(rows), 1):
        found[math.isqrt(before.numbers * after.numbers)] = sum(losses[:position]), sum(losses[position:])
    # the first of equals: no limit, and C++
    limit = min(found, key=lambda limit: sum(min(0.0, loss) for loss in found[limit]))
    below, above = ("reference" if loss > 0 else "cpu" for loss in found[limit])
    return choices.Choice(operation, dtype, limit, below if limit else above, above)
