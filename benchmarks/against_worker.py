"""Times cases whose names come on standard input; what `benchmarks.against` runs in both commits.

It takes nothing but what every commit has: the public functions of `actvar` and `actvar_kernels`.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from actvar import accelerate, load_pretrained
from benchmarks.operations import BlockShape, block_inputs, operations

SHORTEST = 0.01  # seconds that are timed at once
SHAPES = {
    "quick": [("fashion-mnist", 1)],
    "cpu": [("fashion-mnist", 16), ("d16", 1)],
    "all": [("fashion-mnist", 16), ("d16", 1), ("d16", 4), ("d30", 1)],
}


def main() -> None:
    """Print the names of the cases, then the seconds of each one asked for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = cases(sys.argv[1], device)
    print(json.dumps(list(known)), flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds(known[line.strip()], device)), flush=True)


def cases(subset: str, device: str) -> dict[str, Callable[[], object]]:
    """By name: every operation of the block, and samples of the bundled model."""
    found = {}
    for model, batch in SHAPES[subset]:
        shape = BlockShape.last_scale(model, batch)
        for operation, run in operations(shape, block_inputs(shape, torch.float32, device)).items():
            found[f"{operation}, {model} batch {batch}"] = run
    for batch in (1, 16):
        for way in ("dense", "accelerated", "ActVAR"):
            found[f"sample, {way}, fashion-mnist batch {batch}"] = partial(sample, way, batch, device)
    return found


def sample(way: str, batch: int, device: str) -> None:
    """Images of the bundled model."""
    labels = torch.arange(batch, device=device) % 10
    loaded(way, device).autoregressive_infer_cfg(batch, labels, g_seed=0)


@functools.cache
def loaded(way: str, device: str) -> torch.nn.Module:
    """The bundled model, dense, accelerated or with its adapter."""
    _, var = load_pretrained("fashion-mnist", adapter="paper" if way == "ActVAR" else None, device=device)
    return accelerate(var) if way == "accelerated" else var


@torch.no_grad()
def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, of as many as take `SHORTEST`."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    once = timed(1)
    return once if once > SHORTEST else timed(round(SHORTEST / once) + 1)


if __name__ == "__main__":
    main()
