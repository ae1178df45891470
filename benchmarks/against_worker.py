"""Time cases whose names come on standard input; `benchmarks.against` runs each commit's own copy of this module.

    python -m benchmarks.against_worker SUBSET

The docstring of `benchmarks/against.py` describes the lines that are read and written. They must stay as they are, and
so must the names of the cases: `benchmarks.against` compares a case with the one of the same name in another commit.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TextIO

import torch
from torch import nn

from actvar import ActVARConfig, accelerate, load_pretrained
from actvar.models import build_vae_var
from actvar.patching.patch import patch_silently
from actvar.sampling.timing import seconds_of
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.operations.inputs import random_inputs
from benchmarks.operations import SIZES, last_scale, operations

SHORTEST = 0.01  # seconds that are timed at once
WAYS = ("dense", "accelerated", "ActVAR")
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
                found[f"{operation}, {model} batch {batch}{suffix}"] = partial(seconds, run, device)
        for model, batch in BLOCKS[subset]:
            for way in WAYS:
                measure = partial(last_scale_seconds, way, model, batch, device, dtype)
                found[f"block, {way}, {model} batch {batch}{suffix}"] = measure
        for model, batch in DECODERS[subset]:
            run = partial(decode, model, batch, device, dtype)
            found[f"decoder, {model} batch {batch}{suffix}"] = partial(seconds, run, device)
        for batch in (1, 16):
            for way in WAYS:
                run = partial(sample, way, batch, device, dtype)
                found[f"sample, {way}, fashion-mnist batch {batch}{suffix}"] = partial(seconds, run, device)
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


@torch.no_grad()
def last_scale_seconds(way: str, model: str, batch: int, device: str, dtype: torch.dtype) -> float:
    """Return the seconds of one block at the last scale, after all scales before it have filled its K/V cache."""
    var = one_block(way, model, device, dtype)
    modulation, maps = scales(model, batch, device, dtype)
    block = var.blocks[0]
    block.attn.kv_caching(True)
    try:
        for tokens in maps[:-1]:
            block(tokens.clone(), modulation, None)
        last = maps[-1].clone()
        return seconds_of(lambda: block(last, modulation, None), last.device)
    finally:
        block.attn.kv_caching(False)


@functools.cache
def one_block(way: str, model: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Build a transformer of one block of an official width, with random weights and the smallest autoencoder."""
    width, sides = SIZES[model]
    small = dict(V=64, ch=32, ch_mult=(1,), num_res_blocks=1, num_classes=10)
    _, var = build_vae_var(depth=1, width=width, patch_nums=sides, **small)
    var.to(device, dtype)
    if way == "accelerated":
        accelerate(var)
    elif way == "ActVAR":
        patch_silently(var, ActVARConfig())
    return var


@functools.cache
def scales(model: str, batch: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what a block gets: the condition `[2 batch, C]`, and random tokens `[2 batch, side^2, C]` by scale."""
    width, sides = SIZES[model]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return normal(2 * batch, width), [normal(2 * batch, side * side, width) for side in sides]


@torch.no_grad()
def seconds(run: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, the mean of as many calls as take `SHORTEST`."""

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
