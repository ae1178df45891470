"""Time cases whose names come on standard input; `benchmarks.against` runs each commit's own copy of this module.

    python -m benchmarks.against_worker SUBSET

The docstring of `benchmarks/against.py` describes the lines that are read and written. Lines and names of cases must
stay as they are: `benchmarks.against` compares a case with the one of the same name in another commit.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TextIO

import torch
from torch import nn

from actvar import accelerate, load_pretrained
from actvar.models import build_vae_var
from actvar.reports.one_block import WAYS, last_scale_seconds
from actvar.sampling.timing import mean_seconds
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.operations.inputs import random_inputs
from actvar_kernels.operations.shapes import last_scale
from benchmarks.operations import operations

SHAPES = {
    "quick": [("fashion-mnist", 1)],
    "cpu": [("fashion-mnist", 16), ("d16", 1)],
    "all": [("fashion-mnist", 16), ("d16", 1), ("d16", 4), ("d30", 1)],
}
BLOCKS = {"quick": [], "cpu": [("d16", 1)], "all": [("d16", 1), ("d30", 1)]}
DECODERS = {
    "quick": [("fashion-mnist", 1)],
    "cpu": [("fashion-mnist", 16), ("official", 1)],
    "all": [("fashion-mnist", 16), ("official", 1), ("official", 4)],
}

Measurement = Callable[[], float]
"""Run a case once or more often, and return the seconds of one run."""


def main() -> None:
    """Print the names of the cases, then the seconds of each one asked for."""
    answers = _own_stdout()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = cases(sys.argv[1], device)
    print(json.dumps(list(known)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(known[line.strip()]()), file=answers, flush=True)


def _own_stdout() -> TextIO:
    """Return standard output for the answers alone; what else is printed goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def cases(subset: str, device: str) -> dict[str, Measurement]:
    """Return the cases of a subset by name: operations, whole blocks, decoders and samples of the bundled model."""
    found: dict[str, Measurement] = {}
    for dtype in dtypes(device):
        suffix = "" if dtype == torch.float32 else ", bf16"
        for model, batch in SHAPES[subset]:
            shape = last_scale(model, batch)
            for operation, run in operations(random_inputs(shape, dtype, device)).items():
                found[f"{operation}, {model} batch {batch}{suffix}"] = partial(mean_seconds, run, device)
        for model, batch in BLOCKS[subset]:
            for way in WAYS:
                measure = partial(last_scale_seconds, way, model, batch, device, dtype)
                found[f"block, {way}, {model} batch {batch}{suffix}"] = measure
        for model, batch in DECODERS[subset]:
            run = partial(decode, model, batch, device, dtype)
            found[f"decoder, {model} batch {batch}{suffix}"] = partial(mean_seconds, run, device)
        for batch in (1, 16):
            for way in WAYS:
                run = partial(sample, way, batch, device, dtype)
                found[f"sample, {way}, fashion-mnist batch {batch}{suffix}"] = partial(mean_seconds, run, device)
    return found


def dtypes(device: str) -> list[torch.dtype]:
    """Return the types to time, without bfloat16 where the processor has no instructions for its products."""
    if device == "cpu" and not cpu.multiplies_bfloat16():
        print("left out: cases in bf16, which this processor has no instructions for", file=sys.stderr)
        return [torch.float32]
    return [torch.float32, torch.bfloat16]


def sample(way: str, batch: int, device: str, dtype: torch.dtype) -> None:
    """Draw images with the bundled model."""
    labels = torch.arange(batch, device=device) % 10
    bundled(way, device, dtype).autoregressive_infer_cfg(batch, labels, g_seed=0)


@functools.cache
def bundled(way: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Load the bundled model: dense, accelerated, or patched with its adapter."""
    _, var = load_pretrained("fashion-mnist", adapter="paper" if way == "ActVAR" else None, device=device, dtype=dtype)
    return accelerate(var) if way == "accelerated" else var


def decode(model: str, batch: int, device: str, dtype: torch.dtype) -> None:
    """Decode the features of some images."""
    vae, features = decoder(model, batch, device, dtype)
    vae.fhat_to_img(features)


@functools.cache
def decoder(model: str, batch: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """Return an autoencoder, the bundled one or one of the official size, and features `[batch, Cvae, side, side]`."""
    if model == "official":  # the autoencoder does not depend on the transformer's size
        vae, var = build_vae_var(depth=1, width=64)
    else:
        vae, var = load_pretrained(model)
    features = torch.randn(batch, vae.Cvae, *2 * var.patch_nums[-1:], generator=torch.Generator().manual_seed(0))
    return vae.to(device, dtype), features.to(device, dtype)


if __name__ == "__main__":
    main()
