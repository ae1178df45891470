"""Measure the wall-clock time of sampling: interleaved medians, seconds of the blocks, seconds of each scale."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

from actvar.families import family_of
from actvar.utils.devices import device_of
from actvar.utils.progress import progress
from actvar.utils.wrappers import unwrapped

Measured = TypeVar("Measured")
SHORTEST = 0.01
"""Seconds that are timed at once."""


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_medians(
    runs: Mapping[str, Callable[[], float]], repeats: int, describe: str = "timing", warm_ups: int = 1
) -> dict[str, float]:
    """Return the median of `interleaved_seconds` for each name, in seconds; arguments are the same."""
    seconds = interleaved_seconds(runs, repeats, describe, warm_ups)
    return {name: statistics.median(values) for name, values in seconds.items()}


def interleaved_seconds(
    runs: Mapping[str, Callable[[], Measured]],
    repeats: int,
    describe: str = "timing",
    warm_ups: int = 1,
    at_most: float = math.inf,
) -> dict[str, list[Measured]]:
    """Run each of `runs` to warm up, then all of them in turn `repeats` times.

    Args:
        runs: functions that return their own measurement in seconds, or several measurements.
        repeats: measurements of each function.
        describe: title of the progress bar.
        warm_ups: runs of each function that are not measured; 0 where all have just run.
        at_most: seconds after which no further turn would end; each function is measured at least once.

    Returns:
        the measurements of each name, in seconds.
    """
    seconds: dict[str, list[Measured]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for repeat in progress(range(-warm_ups, repeats), desc=describe, leave=False):
        turns = repeat + warm_ups
        if repeat > 0 and (time.perf_counter() - begin) * (turns + 1) / turns > at_most:
            break
        for name, run in runs.items():
            measured = run()
            if repeat >= 0:
                seconds[name].append(measured)
    return seconds


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `run()` takes, including its work on `device`."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


@contextmanager
def block_seconds(var: nn.Module) -> Iterator[dict[int, float]]:
    """Collect the seconds spent in the blocks of `var` while the context is open.

    The mapping that is given has the seconds of all blocks together by the token count of the scale.
    """
    seconds: dict[int, float] = {}
    started: list[float] = []
    device = device_of(var)

    def before(_block, _args, _kwargs):
        _synchronize(device)
        started.append(time.perf_counter())

    def after(_block, _args, _kwargs, output):
        _synchronize(device)
        tokens = output.shape[1]
        seconds[tokens] = seconds.get(tokens, 0.0) + time.perf_counter() - started.pop()

    handles = []
    for block in family_of(unwrapped(var)).blocks(unwrapped(var)):
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def step_seconds(var: nn.Module, run: Callable[[], object]) -> list[float]:
    """Return the seconds of each scale of a sample, and last those of the decoder.

    The first scale begins with the sample. A scale ends when its codes have been added to the features. Each time is
    taken after the device has done its work.

    Args:
        var: a dense or patched `actvar.models.VAR`.
        run: a function that draws one sample with `var`.
    """
    device = device_of(var)
    _synchronize(device)
    times = [time.perf_counter()]

    def lap() -> None:
        _synchronize(device)
        times.append(time.perf_counter())

    with family_of(unwrapped(var)).watch_scales(unwrapped(var), lambda *_: lap()):
        run()
    lap()
    return [end - begin for begin, end in pairwise(times)]


@torch.no_grad()
def mean_seconds(run: Callable[[], object], device: torch.device | str) -> float:
    """Return the seconds of one call, the mean of as many calls as take `SHORTEST`.

    Args:
        run: the call.
        device: where it works.
    """

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _synchronize(torch.device(device))
        return (time.perf_counter() - start) / calls

    once = timed(1)
    return once if once > SHORTEST else timed(round(SHORTEST / once) + 1)
