"""Time whole models with random weights on a GPU: a sample as a CUDA graph and eagerly, and every scale's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import nn

from actvar import ActVARConfig, Execution, GraphedSampling
from actvar.config import DENSE
from actvar.models.public_code import public_classes, public_twin
from actvar.patching.patch import patched_silently
from actvar.sparse.block import ActVARBlock
from actvar_kernels.backend import why_not_in_eight_bits
from actvar_kernels.constants import FORMATS
from actvar_kernels.triton_backend.early_launch import using_early_launch
from benchmarks.sampling import autocast, model

EXECUTION = Execution(sampler="fast", decoder_dtype="bfloat16", cuda_graph=False)  # `GraphedSampling` has its own
CONFIGS = {"dense": DENSE, "ActVAR": ActVARConfig()}
SAMPLING = dict(cfg=1.5, top_k=900, top_p=0.96)
QUANTILES = [0.2, 0.5, 0.8]


def model_times(name: str, batch: int, public_folder: Path | None) -> Iterator[dict]:
    """Yield one row per way to sample: milliseconds (20th, 50th, 80th percentile), weights in bfloat16, with decoder.

    `graph_is_eager` says whether a graph gives the images of eager sampling, bit for bit. The public code keeps its
    weights in float32 and runs under autocast to bfloat16, as its demo does to float16.
    """
    from triton.testing import do_bench

    var, _ = model(name, device="cuda")
    labels = torch.arange(batch, device="cuda")

    def row(way: str, **measured: object) -> dict:
        return {"model": name, "batch": batch, "way": way, **measured}

    def drawn(var: nn.Module) -> torch.Tensor:
        return var.autoregressive_infer_cfg(batch, labels, g_seed=0, **SAMPLING)

    def eager(var: nn.Module) -> list[float]:
        return do_bench(lambda: drawn(var), quantiles=QUANTILES, rep=1000)

    if public_folder is not None:
        with autocast(public_twin(var, public_classes(public_folder)), torch.bfloat16) as public:
            yield row("public code", sample_eager_ms=eager(public))
        del public
    var.to(torch.bfloat16)
    for (suffix, (execution, early)), (label, config) in product(_ways().items(), CONFIGS.items()):
        with patched_silently(var, config, None, execution), using_early_launch(early):
            of_eager = eager(var)
            with recorded_blocks(var) as events:
                sample = GraphedSampling(var, **SAMPLING)
                of_graph = do_bench(lambda sample=sample: sample(labels, 0), quantiles=QUANTILES, rep=500)
                blocks = [
                    block_times(lambda sample=sample: sample(labels, 0), events, var.patch_nums) for _ in range(7)
                ]
                kernels = kernel_times(lambda sample=sample: sample(labels, 0))
                is_eager = torch.equal(sample(labels, 0), drawn(var))
                del sample
            times = dict(sample_eager_ms=of_eager, sample_graph_ms=of_graph, blocks_graph_ms=blocks, kernels=kernels)
            yield row(label + suffix, graph_is_eager=is_eager, **times)


def _ways() -> dict[str, tuple[Execution, bool]]:
    """Return suffixes of the ways that the GPU has, how each is run, and whether kernels are launched early."""
    device = torch.device("cuda")
    ways = {"": (EXECUTION, False)}
    if torch.cuda.get_device_capability() >= (9, 0):
        ways[", early launches"] = EXECUTION, True
    for name, dtype in FORMATS.items():
        if why_not_in_eight_bits(dtype, device) is None:
            ways[f", {name}"] = replace(EXECUTION, weights=name), False
    return ways | {", cuDNN benchmark": (replace(EXECUTION, cudnn_benchmark=True), False)}


@contextmanager
def recorded_blocks(var: nn.Module) -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """Record CUDA events around the blocks of every scale that runs, also within a graph."""
    first, last = var.blocks[0], var.blocks[-1]
    forward = ActVARBlock.forward
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(block, *args, **kwargs):
        if block is first:
            events.append(tuple(torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)))
            events[-1][0].record()
        output = forward(block, *args, **kwargs)
        if block is last:
            events[-1][1].record()
        return output

    ActVARBlock.forward = timed  # on the class: a graph takes no model with a method of its own
    try:
        yield events
    finally:
        ActVARBlock.forward = forward


def block_times(run: Callable[[], object], events: list[tuple], sides: Sequence[int]) -> dict[str, float]:
    """Return milliseconds of all blocks of a run by the scale's side; `events` end with those of its graph."""
    run()
    torch.cuda.synchronize()
    of_run = events[-len(sides) :]
    return {str(side): start.elapsed_time(end) for side, (start, end) in zip(sides, of_run, strict=True)}


def kernel_times(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Return launches and milliseconds of every kernel of a run, by name, longest first."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        run()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches, milliseconds = found.get(event.name, (0, 0.0))
            found[event.name] = launches + 1, milliseconds + 1e-3 * event.device_time
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
