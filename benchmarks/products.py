"""Time the products that a CPU has for linear layers and experts: `python -m benchmarks.products`.

In bfloat16 this package's kernels, PyTorch's small products (`brgemm`), PyTorch's layers on weights that oneDNN packed,
and plain layers; then products of bytes, quantized on the way. Experts are 16, of which tokens choose 12 at random, or
all. The table is in milliseconds, medians in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from actvar.sampling.timing import interleaved_seconds, seconds_of
from actvar_kernels.cpu_backend import brgemm, cpu
from actvar_kernels.expert_ffn import cpu_brgemm, cpu_kernel
from actvar_kernels.expert_ffn.weights import FFNWeights
from actvar_kernels.linear import cpu_brgemm as linear_brgemm
from actvar_kernels.linear import cpu_kernel as linear_kernel
from actvar_kernels.operations.shapes import SIZES
from benchmarks import results

ROWS = (2, 8, 32, 128, 338, 512)
EXPERTS, ACTIVE = 16, 12
CALLS = 4  # of one measurement, with weights of their own, as blocks have


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m benchmarks.products", description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="d16")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    if cpu.why_unavailable() is not None:
        parser.error(f"it measures C++ kernels, which do not run here: {cpu.why_unavailable()}")
    width = SIZES[options.model].width
    print(f"{results.processor()}, {torch.get_num_threads()} threads, {brgemm.description()}")
    for title, ways_of in ((f"{width} -> {3 * width}", layers), (f"FFN, {width} wide", ffns)):
        print(f"\n| {title}, ms by rows | " + " | ".join(map(str, options.rows)) + " |")
        print("|---" * (len(options.rows) + 1) + "|")
        columns = [medians(ways_of(width, rows), options.repeats, f"{title}, {rows} rows") for rows in options.rows]
        for way in columns[0]:
            print(f"| {way} | " + " | ".join(f"{1e3 * column[way]:.2f}" for column in columns) + " |")


@torch.no_grad()
def medians(ways: dict[str, Callable], repeats: int, title: str) -> dict[str, float]:
    """Return the median seconds of a call by way."""

    def timed(way: Callable) -> Callable[[], float]:
        return lambda: seconds_of(way, torch.device("cpu")) / CALLS

    found = interleaved_seconds({name: timed(way) for name, way in ways.items()}, repeats, title)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def layers(width: int, rows: int) -> dict[str, Callable]:
    """Return ways to run `CALLS` layers of queries, keys and values on `rows` rows in bfloat16."""
    x, bias = _normal(rows, width), _normal(3 * width)
    weights = [_normal(3 * width, width) for _ in range(CALLS)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights] if _packs() else []
    ways: dict[str, Callable] = {"plain PyTorch": lambda: [F.linear(x, weight, bias) for weight in weights]}
    if packed:
        ways["oneDNN, packed"] = lambda: [
            torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") for weight in packed
        ]
    ways["this package's"] = lambda: [linear_kernel.linear(x, weight, bias) for weight in weights]
    for name, int8 in _by_pytorch():
        ways[name] = lambda int8=int8: [linear_brgemm.linear(x, weight, bias, int8) for weight in weights]
    return ways


def ffns(width: int, rows: int) -> dict[str, Callable]:
    """Return ways to run `CALLS` FFNs on `rows` rows in bfloat16, with all experts and with some."""
    u, hidden = _normal(rows, width), 4 * width
    some = torch.rand(rows, EXPERTS).argsort(dim=1) < ACTIVE
    masks = {"": torch.ones_like(some), f", {ACTIVE} of {EXPERTS}": some}
    weights = [
        FFNWeights(_normal(hidden, width), _normal(hidden), _normal(width, hidden), _normal(width))
        for _ in range(CALLS)
    ]
    ways: dict[str, Callable] = {"plain PyTorch": lambda: [_plain(u, each) for each in weights]}
    for suffix, mask in masks.items():
        ways[f"this package's{suffix}"] = lambda mask=mask: [cpu_kernel.expert_ffn(u, mask, *each) for each in weights]
        for name, int8 in _by_pytorch():
            skips = mask is some
            ways[name + suffix] = lambda mask=mask, int8=int8, skips=skips: [
                cpu_brgemm.expert_ffn(u, mask, each, int8, skips) for each in weights
            ]
    return ways


def _plain(u: torch.Tensor, weights: FFNWeights) -> torch.Tensor:
    hidden = F.gelu(F.linear(u, weights.fc1_weight, weights.fc1_bias), approximate="tanh")
    return F.linear(hidden, weights.fc2_weight, weights.fc2_bias)


def _by_pytorch() -> Sequence[tuple[str, bool]]:
    """Return the names of PyTorch's products that run here, and whether they are of bytes."""
    kinds = (("PyTorch's, bfloat16", False, torch.bfloat16), ("PyTorch's, int8", True, torch.int8))
    return [(name, int8) for name, int8, dtype in kinds if brgemm.runs(dtype)]


def _packs() -> bool:
    """Return whether oneDNN packs bfloat16 here."""
    return cpu.multiplies_bfloat16() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _normal(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()


if __name__ == "__main__":
    main()
