"""Measure everything that needs a GPU, in one command and one file: `python -m benchmarks.gpu --json gpu.json`.

Numerics of every operation against a float64 run, in three types; CUDA graphs against eager; a block with and without
early launches; dense blocks of few rows in 5 and in 7 launches; whole models with the table of their kernels; the
decoder's convolutions by shape; tiles of attention; times of the operations. Operations need only torch and Triton; the
others also what the package depends on. The file is written after every row. What does not begin within `--seconds` is
left out, from the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from actvar_kernels import linear, set_backend
from actvar_kernels.backend import why_not_in_eight_bits
from actvar_kernels.constants import FORMATS
from actvar_kernels.operations.inputs import random_inputs
from actvar_kernels.operations.shapes import BlockShape, last_scale
from actvar_kernels.tools.block_step import block_step, dense_block_step, scales_of_few_rows
from actvar_kernels.triton_backend.attention_tiles import candidates, using_attention_tiles
from actvar_kernels.triton_backend.early_launch import using_early_launch
from actvar_kernels.triton_backend.tiles import architecture
from benchmarks.operations import allowed_error, operations

SECTIONS = ("numerics", "graphs", "launches", "few_rows", "models", "convolutions", "attention", "times")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REPLAYS = 20
"""Runs of a block in a row, so that launches of one run meet those of the next."""
MOST_APART = 0.1
"""Most that layers in fp8 may differ from the reference, as a part of the reference's own error.

The tensor cores of sm_90 keep about 14 bits of a sum (DeepSeek-V3 Technical Report, 2024, section 3.3.2).
"""
ODD = BlockShape(rows=2, tokens=77, keep=53, cached=19, width=192, num_experts=8, active=5)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="the one file to keep")
    parser.add_argument("--models", nargs="+", default=["d16", "d30"], help="sizes to time")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--public-var", type=Path, help="clone of the public VAR code, to be sampled as well")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts (default all)")
    parser.add_argument("--seconds", type=float, default=480, help="after which nothing more begins (default 480)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none; without one use make test and make compile-check")

    sections: dict[str, Callable[[], Iterable[dict]]] = {
        "numerics": lambda: chain(numerics(), eight_bit_numerics()),
        "graphs": graphs,
        "launches": lambda: launches(options.models, options.batches),
        "few_rows": lambda: few_rows(options.models, options.batches),
        "models": lambda: models(options.models, options.batches, options.public_var),
        "convolutions": lambda: decoder_convolutions(options.batches),
        "attention": lambda: attention(options.models, options.batches),
        "times": lambda: times(options.models, options.batches),
    }
    report: dict[str, Any] = {"machine": machine(), **{name: [] for name in SECTIONS}}
    measure({name: sections[name] for name in SECTIONS if name in options.only}, report, options.json, options.seconds)
    failures = [row for name in SECTIONS for row in report[name] if not row.get("passed", True)]
    print(f"{len(failures)} failures; everything is in {options.json}")
    return 1 if failures else 0


def measure(
    sections: Mapping[str, Callable[[], Iterable[dict]]], report: dict[str, Any], path: Path, seconds: float
) -> None:
    """Add the rows of `sections` to `report`, print them, and write the report to `path` after each.

    After `seconds` no row begins any more; the report then says under "left_out" where it ended.
    """
    end = time.monotonic() + seconds
    for name, rows in sections.items():
        print(f"== {name}", flush=True)
        remaining = iter(rows())
        while True:
            if time.monotonic() > end:
                report["left_out"] = f"from {name} on, after {len(report[name])} rows of it"
                print(f"{report['left_out']}: no time was left", flush=True)
                save(report, path)
                return
            row = next(remaining, None)
            if row is None:
                break
            report[name].append(show(row))
            save(report, path)


def machine() -> dict[str, object]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": revision,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def on(backend: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return a clone of the result of `run` on a backend."""
    set_backend(backend)
    try:
        return run().clone()
    finally:
        set_backend("auto")


@torch.no_grad()
def numerics() -> Iterator[dict]:
    """Yield the largest error of each operation against the reference in float64, beside the reference's own."""
    for label, shape in {"odd": ODD, "d16": last_scale("d16", 2)}.items():
        for dtype in DTYPES:
            inputs = random_inputs(shape, dtype, "cuda")
            exact = operations(inputs.to(torch.float64))
            for name, run in operations(inputs).items():
                truth = on("reference", exact[name])
                error, allowed = (
                    (on(backend, run).double() - truth).abs().max().item() for backend in ("triton", "reference")
                )
                limit = allowed_error(allowed, dtype)
                row = {
                    "shape": label,
                    "dtype": str(dtype).removeprefix("torch."),
                    "operation": name,
                    "error": error,
                    "reference_error": allowed,
                    "passed": error <= limit,
                }
                yield row


@torch.no_grad()
def eight_bit_numerics() -> Iterator[dict]:
    """Yield how far layers in eight bits are from the reference, in the formats that the GPU has.

    No number of int8 may differ. The reference rounds its sums of fp8 once, and a GPU in every step.
    """
    for T, C, D in ((77, 192, 576), (512, 1024, 3072), (2048, 4096, 1024), (3, 33, 7)):
        for dtype in DTYPES:
            x, weight, bias = (torch.randn(size, device="cuda").to(dtype) for size in ((T, C), (D, C), (D,)))
            x[0], x[1, 1], x[2, 2] = 0, torch.inf, torch.nan
            exact = F.linear(x[3:].double(), weight.double(), bias.double())
            of_case = {"shape": f"{T} x {C} x {D}", "dtype": str(dtype).removeprefix("torch.")}
            for name, quantized in FORMATS.items():
                if why_not_in_eight_bits(quantized, x.device) is None:
                    run = functools.partial(linear, x, weight, bias, quantized)
                    found, due = (on(backend, run).double() for backend in ("triton", "reference"))
                    differing = int(((found != due) & ~(found.isnan() & due.isnan())).sum())
                    error, own = (found - due)[3:].norm().item(), (due[3:] - exact).norm().item()
                    passed = differing == 0 if quantized == torch.int8 else error <= MOST_APART * own
                    row = {"operation": f"linear, {name}", "differing": differing, "error": error}
                    yield of_case | row | {"reference_error": own, "passed": passed}


@torch.no_grad()
def graphs() -> Iterator[dict]:
    """Capture every operation in a CUDA graph and replay it: bit for bit what the eager call gives."""
    shape = last_scale("d16", 2)
    for name, run in operations(random_inputs(shape, torch.bfloat16, "cuda")).items():
        expected = on("triton", run)
        replay, captured = captured_call(run)
        replay()
        yield {"operation": name, "passed": torch.equal(captured, expected)}


@torch.no_grad()
def launches(names: list[str], batches: list[int]) -> Iterator[dict]:
    """Yield milliseconds of a block in a CUDA graph with kernels launched late and early.

    A row passes if both give the same bits, as whatever is written and read at the wrong time would change them.
    """
    if torch.cuda.get_device_capability() < (9, 0):
        yield {"skipped": "programmatic dependent launch: needs sm_90 or newer"}
        return
    for model in names:
        for batch in batches:
            inputs = random_inputs(last_scale(model, batch), torch.bfloat16, "cuda")
            before, run = inputs.x.clone(), block_step(inputs)
            row, results = {"model": model, "batch": batch}, []
            for label, early in (("late", False), ("early", True)):
                with using_early_launch(early):
                    replay, captured = captured_call(run)
                    inputs.x.copy_(before)
                    for _ in range(REPLAYS):
                        replay()
                    results.append(captured.clone())
                    row[f"{label}_ms"] = milliseconds("triton", run)
                inputs.x.copy_(before)
            yield row | {"passed": torch.equal(*results)}


@torch.no_grad()
def few_rows(names: list[str], batches: list[int]) -> Iterator[dict]:
    """Yield milliseconds of dense blocks of few rows in 7 and in 5 launches, and how far the latter are from float64.

    A row passes if the error is that of PyTorch's plain code, and a replayed CUDA graph gives the bits of the eager
    call. On sm_90 and newer both are timed launched early as well.
    """
    early_ways = (False, True) if torch.cuda.get_device_capability() >= (9, 0) else (False,)
    for model in names:
        for batch in batches:
            for shape in scales_of_few_rows(model, batch):
                inputs = random_inputs(shape, torch.bfloat16, "cuda")
                truth = on("reference", dense_block_step(inputs.to(torch.float64), few=True))
                run = dense_block_step(inputs, few=True)
                found, plain = on("triton", run), on("reference", run)
                error, allowed = ((result.double() - truth).abs().max().item() for result in (found, plain))
                row = {"model": model, "batch": batch, "side": math.isqrt(shape.tokens), "error": error}
                passed = error <= allowed_error(allowed, torch.bfloat16)
                for early in early_ways:
                    with using_early_launch(early):
                        replay, captured = captured_call(run)
                        replay()
                        passed &= torch.equal(captured, found)
                        for launches, few in ((7, False), (5, True)):
                            name = f"{launches}{' early' if early else ''}_ms"
                            row[name] = milliseconds("triton", dense_block_step(inputs, few))
                yield row | {"reference_error": allowed, "passed": passed}


@torch.no_grad()
def attention(names: list[str], batches: list[int]) -> Iterator[dict]:
    """Yield milliseconds of attention by queries and keys of a tile, which `actvar_kernels.tools.tune` chooses from."""
    for model in names:
        for batch in batches:
            shape = last_scale(model, batch)
            inputs = random_inputs(shape, torch.bfloat16, "cuda")
            run = operations(inputs)["subset_attention"]
            for size in candidates(architecture(inputs.x), torch.bfloat16, shape.head_dim):
                with using_attention_tiles(size):
                    row = {"model": model, "batch": batch, "queries": size.queries, "keys": size.keys}
                    yield row | {"triton_ms": milliseconds("triton", run)}


def captured_call(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Return a function that replays `run` on the Triton backend as a CUDA graph, and the tensor its result is in."""
    set_backend("triton")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
    finally:
        set_backend("auto")
    return graph.replay, captured


@torch.no_grad()
def times(names: list[str], batches: list[int]) -> Iterator[dict]:
    """Yield milliseconds of each operation in bfloat16, as replayed CUDA graphs: percentiles 20, 50 and 80."""
    for model in names:
        for batch in batches:
            shape = last_scale(model, batch)
            for name, run in operations(random_inputs(shape, torch.bfloat16, "cuda")).items():
                row = {"model": model, "batch": batch, "operation": name}
                for backend in ("triton", "reference"):
                    row[f"{backend}_ms"] = milliseconds(backend, run)
                yield row


def milliseconds(backend: str, run: Callable[[], torch.Tensor]) -> list[float]:
    """Return percentiles 20, 50 and 80 of a call's time in a CUDA graph, so that no time of Python's is in them."""
    from triton.testing import do_bench_cudagraph

    set_backend(backend)
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            return do_bench_cudagraph(run, quantiles=[0.2, 0.5, 0.8])
    finally:
        set_backend("auto")


@torch.no_grad()
def models(names: list[str], batches: list[int], public: Path | None) -> Iterator[dict]:
    """Time samples of models with random weights: the public code, dense and ActVAR, these on the kernels."""
    try:
        from benchmarks.gpu_models import model_times
    except ImportError as error:
        yield {"skipped": f"{type(error).__name__}: {error}"}
        return
    for model in names:
        for batch in reversed(batches):
            yield from model_times(model, batch, public)


def decoder_convolutions(batches: list[int]) -> Iterator[dict]:
    """Time the convolutions of the official decoder, each by itself."""
    try:
        from benchmarks.gpu_convolutions import convolutions
    except ImportError as error:
        yield {"skipped": f"{type(error).__name__}: {error}"}
        return
    yield from convolutions(batches)


def show(row: dict) -> dict:
    print(json.dumps({name: value for name, value in row.items() if name != "kernels"}), flush=True)
    return row


def save(report: dict, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
