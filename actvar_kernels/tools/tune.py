"""Time schedules, tiles, convolutions and launches on this GPU, and write the fastest to a table.

    python -m actvar_kernels.tools.tune --models d16 --out tuned.json
    ACTVAR_TUNED=tuned.json actvar sample ...

Routing is that of a router with random weights. With other routers a tile list leaves out other experts, and so another
schedule may be faster.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
import triton
from tqdm import tqdm

from actvar_kernels import add_residual_moments, expert_ffn_scatter, route_experts, subset_attention
from actvar_kernels.conv3x3 import gpu, triton_kernel
from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE
from actvar_kernels.operations.inputs import random_inputs
from actvar_kernels.operations.shapes import ACTIVE_EXPERTS, DTYPES, EXPERTS, HEAD_DIM, MODELS, last_scale
from actvar_kernels.tools.block_step import block_step, dense_block_step, scales_of_few_rows
from actvar_kernels.tools.compile_check import LineParser
from actvar_kernels.triton_backend import attention_tiles, tiles
from actvar_kernels.triton_backend.attention_tiles import using_attention_tiles
from actvar_kernels.triton_backend.conv_tiles import candidates
from actvar_kernels.triton_backend.early_launch import using_early_launch
from actvar_kernels.triton_backend.tiles import expert_ffn_candidates, using_expert_tiles
from actvar_kernels.triton_backend.tuning_table import (
    FIRST_WITH_EARLY_LAUNCH,
    SCHEDULES,
    AttentionEntry,
    ConvEntry,
    Entry,
    FewRowsEntry,
    Table,
    write_table,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none; nothing was measured")
    os.environ.pop(ENVIRONMENT_VARIABLE, None)  # of an earlier run, maybe on another GPU
    device = torch.device("cuda")
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    entries = tuple(measure(shapes(options.models, options.batches), dtype, device, milliseconds))
    sides = sorted({MODELS[model].sides[-1] for model in options.models})
    with torch.no_grad():
        convolutions = tuple(measure_convolutions(maps(sides, options.batches), dtype, device, milliseconds))
        calls = attention_calls(options.models, options.batches)
        attention = tuple(measure_attention(calls, dtype, device, milliseconds))
        launches = list(measure_launches(options.models, options.batches, dtype, device, milliseconds))
        early = early_launch_is_faster(launches)
        with using_early_launch(early):
            few_rows = tuple(measure_few_rows(options.models, options.batches, dtype, device, milliseconds))
    name, capability = torch.cuda.get_device_name(device), _capability(device)
    measured = entries, convolutions, attention, few_rows, int(early)
    write_table(Table(name, capability, triton.__version__, *measured), options.out)
    for entry in entries:
        tile = f"{entry.rows} x {entry.columns}"
        print(f"{entry.tokens:6d} x {entry.channels:4d}  {entry.schedule:9s} {tile:9s} {entry.milliseconds:8.3f} ms")
    for entry in convolutions:
        way = f"{entry.pixels} pixels" if entry.pixels else "library"
        map_size = f"{entry.images} x {entry.height} x {entry.width}"
        epilogue = "with residual" if entry.fused else ""
        print(f"{map_size} {entry.inputs:3d} -> {entry.outputs:3d}  {way:10s} {entry.milliseconds:8.3f} ms {epilogue}")
    for entry in attention:
        size = f"{entry.heads:5d} heads, {entry.queries} x {entry.keys}"
        print(f"{size}  {entry.tile_queries} x {entry.tile_keys} a tile {entry.milliseconds:8.3f} ms")
    for entry in few_rows:
        way = "5 launches" if entry.fused else "7 launches"
        print(f"{entry.rows:6d} x {entry.channels:4d}  a dense block in {way} {entry.milliseconds:8.3f} ms")
    for model, batch, late, early in launches:
        print(f"a block of {model}, batch {batch}: {late:.3f} ms, {early:.3f} ms launched early")
    print(f"{options.out}: use it by {ENVIRONMENT_VARIABLE}={options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = LineParser("python -m actvar_kernels.tools.tune", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["d16", "d30"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], help="images (default 1 8 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--out", type=Path, default=Path("tuned.json"), help="(default tuned.json)")
    return parser


def shapes(models: list[str], batches: list[int]) -> list[tuple[int, int]]:
    """Return tokens and channels of the kept rows at each model's last two scales under guidance, each once."""
    found = (
        (2 * batch * scale.keep, MODELS[model].width)
        for model in models
        for batch in batches
        for scale in MODELS[model].active_scales()
    )
    return sorted(set(found), key=lambda shape: (shape[1], shape[0]))


def measure(
    todo: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, time: Callable[[Callable], float]
) -> Iterator[Entry]:
    """Yield the fastest schedule and tiles for each number of tokens and channels.

    Args:
        todo: tokens and channels.
        dtype: float32, float16 or bfloat16.
        device: where the calls run.
        time: gives the milliseconds of a call.
    """
    for tokens, channels in tqdm(todo, desc="tune", leave=False):
        width = 4 * channels // EXPERTS
        run = _call(tokens, channels, dtype, device)
        times = {}
        for tile in expert_ffn_candidates(_capability(device), dtype, width, aligned=True):
            with using_expert_tiles(tile):
                for schedule in SCHEDULES:
                    times[tile, schedule] = time(lambda run=run, schedule=schedule: run(schedule))
        tile, schedule = min(times, key=times.__getitem__)
        name = str(dtype).removeprefix("torch.")
        yield Entry(
            name, tokens, channels, width, schedule, tile.rows, tile.down.columns, round(times[tile, schedule], 6)
        )


class ImageMap(NamedTuple):
    """Describe what a convolution reads and writes: images, their side, channels and outputs."""

    images: int
    side: int
    inputs: int
    outputs: int


def maps(sides: list[int], batches: list[int]) -> list[ImageMap]:
    """Return the maps of the official decoder's convolutions by 3x3, without those of an enlarged map, each once.

    Args:
        sides: of the last scale's tokens.
        batches: numbers of images.
    """
    layers = [(1, 640, 640), (2, 640, 320), (2, 320, 320), (4, 320, 320), (8, 320, 160), (8, 160, 160), (16, 160, 160)]
    return [ImageMap(images, side * times, *sizes) for images in batches for side in sides for times, *sizes in layers]


def measure_convolutions(
    todo: list[ImageMap], dtype: torch.dtype, device: torch.device, time: Callable[[Callable], float]
) -> Iterator[ConvEntry]:
    """Yield the fastest way to convolve each map, alone and with a residual that is measured.

    Args:
        todo: maps.
        dtype: float32, float16 or bfloat16.
        device: where the calls run.
        time: gives the milliseconds of a call.
    """
    name = str(dtype).removeprefix("torch.")
    for images, side, inputs, outputs in tqdm(todo, desc="convolutions", leave=False):

        def image(channels: int, images: int = images, side: int = side) -> torch.Tensor:
            return torch.randn(images, side, side, channels, device=device).to(dtype).permute(0, 3, 1, 2)

        x, residual, bias = image(inputs), image(outputs), torch.randn(outputs, device=device)
        weight = torch.randn(outputs, inputs, 3, 3, device=device).to(dtype)
        for fused in (False, True):
            ways = _ways(x, weight, bias, residual if fused else None)
            times = {pixels: time(run) for pixels, run in ways.items()}
            pixels = min(times, key=times.__getitem__)
            sizes = (side, side, inputs, outputs)
            yield ConvEntry(name, *sizes, int(fused), images, pixels, round(times[pixels], 6))


def _ways(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None
) -> dict[int, Callable[[], object]]:
    """Return calls that convolve, by the pixels of the tiles, 0 for PyTorch's library.

    With a residual it is added and measured, in another launch where the library convolves.
    """
    ways: dict[int, Callable[[], object]] = {0: lambda: gpu.conv3x3(x, weight, None, enlarge=False)}
    if residual is not None:
        ways[0] = lambda: add_residual_moments(residual, gpu.conv3x3(x, weight, None, enlarge=False), bias)
    for size in candidates(_capability(x.device), x.dtype, x.shape[1], weight.shape[0]):
        arguments = (None, None, False) if residual is None else (bias, residual, True)
        ways[size.pixels] = functools.partial(triton_kernel.conv3x3, x, weight, *arguments, size)
    return ways


class AttentionCall(NamedTuple):
    """Describe a call of attention: heads of all sequences, queries, cached keys, and own ones."""

    heads: int
    queries: int
    cached: int
    own: int


def attention_calls(models: list[str], batches: list[int]) -> list[AttentionCall]:
    """Return the calls at each model's last two scales under guidance, of kept tokens and of all, each once.

    A dense scale follows dense scales, so that it has more cached keys.
    """
    found = set()
    for model in models:
        before, last = MODELS[model].active_scales()
        kept = [(scale.keep, scale.cached) for scale in (before, last)]
        dense = [(before.tokens, before.cached), (last.tokens, before.cached + before.tokens)]
        heads = MODELS[model].width // HEAD_DIM
        found |= {AttentionCall(2 * batch * heads, *call, call[0]) for batch in batches for call in kept + dense}
    return sorted(found)


def measure_attention(
    todo: list[AttentionCall], dtype: torch.dtype, device: torch.device, time: Callable[[Callable], float]
) -> Iterator[AttentionEntry]:
    """Yield the fastest tiles for each call.

    Args:
        todo: calls.
        dtype: float32, float16 or bfloat16.
        device: where the calls run.
        time: gives the milliseconds of a call.
    """
    sizes = attention_tiles.candidates(_capability(device), dtype, HEAD_DIM)
    for heads, queries, cached, own in tqdm(todo, desc="attention", leave=False):

        def random(tokens: int, heads: int = heads) -> torch.Tensor:
            return torch.randn(1, heads, tokens, HEAD_DIM, device=device).to(dtype)

        q, k, v = random(queries), random(own), random(own)
        room = random(cached + own), random(cached + own)
        past = room[0][:, :, :cached], room[1][:, :, :cached]
        scale = torch.ones(heads, device=device, dtype=dtype)
        run = functools.partial(subset_attention, q, k, v, past, scale, 1.0, None, room, False)
        times = {}
        for size in sizes:
            with using_attention_tiles(size):
                times[size.queries, size.keys] = time(run)
        tile, keys = min(times, key=times.__getitem__), cached + own
        name = str(dtype).removeprefix("torch.")
        yield AttentionEntry(name, HEAD_DIM, queries, keys, heads, tile[0], tile[1], round(times[tile], 6))


class LaunchTimes(NamedTuple):
    """Hold the milliseconds of a block whose kernels are launched after, and before, the kernel ahead has ended."""

    model: str
    batch: int
    late: float
    early: float


def measure_launches(
    models: list[str],
    batches: list[int],
    dtype: torch.dtype,
    device: torch.device,
    time: Callable[[Callable], float],
) -> Iterator[LaunchTimes]:
    """Yield the times of a block of each model and batch at the last scale; none where a GPU has no early launches."""
    if _capability(device) < FIRST_WITH_EARLY_LAUNCH:
        return
    for model in models:
        for batch in batches:
            run = block_step(random_inputs(last_scale(model, batch), dtype, device))
            times = []
            for early in (False, True):
                with using_early_launch(early):
                    times.append(time(run))
            yield LaunchTimes(model, batch, *times)


def early_launch_is_faster(times: list[LaunchTimes]) -> bool:
    """Return whether early launches take less time in the geometric mean over models and batches."""
    return sum(math.log(early / late) for _, _, late, early in times) < 0


def measure_few_rows(
    models: list[str],
    batches: list[int],
    dtype: torch.dtype,
    device: torch.device,
    time: Callable[[Callable], float],
) -> Iterator[FewRowsEntry]:
    """Yield the fastest way to run a dense block of each width and number of rows, where rows are few."""
    shapes = {
        (shape.width, shape.rows * shape.tokens): shape
        for model in models
        for batch in batches
        for shape in scales_of_few_rows(model, batch)
    }
    name = str(dtype).removeprefix("torch.")
    for (width, rows), shape in tqdm(sorted(shapes.items()), desc="few rows", leave=False):
        inputs = random_inputs(shape, dtype, device)
        seven, five = (time(dense_block_step(inputs, few)) for few in (False, True))
        yield FewRowsEntry(name, width, len(inputs.ffn[1]), rows, int(five < seven), round(min(seven, five), 6))


def _call(tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> Callable[[str], torch.Tensor]:
    """Return a function that calls `expert_ffn_scatter` with random numbers under a schedule."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    rows, u, gamma = random(1, tokens, channels), random(1, tokens, channels), random(1, 1, channels)
    mask, _ = route_experts(u, random(EXPERTS, channels), random(EXPERTS), ACTIVE_EXPERTS)
    weights = random(4 * channels, channels), random(4 * channels), random(channels, 4 * channels), random(channels)
    return lambda schedule: expert_ffn_scatter(None, None, rows, u, mask, ACTIVE_EXPERTS, *weights, gamma, schedule)


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median of a call's time in a CUDA graph, so that no time of Python's is in it."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return cast(float, do_bench_cudagraph(run, return_mode="median"))


def _capability(device: torch.device) -> int:
    """Return the compute capability that kernels on a device are tuned for."""
    return tiles.architecture(torch.empty(0, device=device))


if __name__ == "__main__":
    sys.exit(main())
