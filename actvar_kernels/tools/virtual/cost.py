"""Estimate what a Triton launch moves and computes, from its arguments: the model behind the predicted times.

A kernel without an entry in `COSTS` reads or writes every tensor argument once and has no matrix product. Bytes are
those of main memory: what neighbouring programs read again is taken to come from the cache. FLOPs are what is executed,
tiles that are only partly filled included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from actvar_kernels.operations.shapes import ACTIVE_EXPERTS, EXPERTS
from actvar_kernels.tools.virtual.records import TensorInfo

Arguments = Mapping[str, Any]
# Share of the (tile, expert) blocks that run, given the tokens and the rows of a tile.
Share = Callable[[int, int], float]

# Executed per (token, program) of `_sort_rows`, per number that `_select` gathers, per guided logit of `_sample`, and
# for its guidance, per number of `_channel_moments`: read off the machine code that Triton makes for sm_90. The logit's
# is 80 outside the loops and 5.7 in each of about 16 passes (`benchmarks/sampler_passes.py`).
SORT_INSTRUCTIONS = 160
GATHER_INSTRUCTIONS = 11.9
SAMPLE_INSTRUCTIONS, GUIDE_INSTRUCTIONS = 171, 6
MOMENTS_INSTRUCTIONS = 6
AVERAGE_INSTRUCTIONS = 8  # per number of a window; assumed
RESIDUAL_INSTRUCTIONS = 6  # of `_add_and_measure`, beside those of the moments; assumed


class Cost(NamedTuple):
    """Describe the work of one launch.

    Attributes:
        bytes: bytes through memory.
        flops: FLOPs that are executed, 2 a multiply-add, on operands of `dtype`.
        dtype: of the operands, or None without any.
        running: share of the programs that have anything to do.
        tile: rows and columns of the result that a program of a matrix product computes.
        attention: whether products wait for a softmax, so that they run at a lower rate.
        instructions: instructions that are executed, summed over threads. With 0 every thread executes the machine code
            once, as it does where there is no loop.
    """

    bytes: int
    flops: int = 0
    dtype: torch.dtype | None = None
    running: float = 1.0
    tile: tuple[int, int] | None = None
    attention: bool = False
    instructions: int = 0


def triton_cost(name: str, arguments: Arguments, share: Share = lambda tokens, rows: 1.0) -> Cost:
    """Return the cost of one launch.

    Args:
        name: of the kernel.
        arguments: of the launch, by name.
        share: share of the (tile, expert) blocks that run, given the tokens and the rows of a tile.
    """
    if name in COSTS:
        return COSTS[name](arguments, share)
    return Cost(_bytes(arguments))


def _bytes(arguments: Arguments, *without: str) -> int:
    """Return the bytes of every tensor argument, once, except those named in `without`."""
    tensors = (value for name, value in arguments.items() if name not in without)
    return sum(value.bytes for value in tensors if isinstance(value, TensorInfo))


def _select(a: Arguments, _share: Share) -> Cost:
    (R, length, C), in_place = a["x_ptr"].shape, a["base_ptr"] is None
    slots = a["keep"] if in_place else length
    moved = slots + (0 if in_place else length - a["keep"])
    others = _bytes(a, "x_ptr", "base_ptr")
    return Cost(others + moved * a["x_ptr"].bytes // length, instructions=round(GATHER_INSTRUCTIONS * R * slots * C))


def _add_route(a: Arguments, _share: Share) -> Cost:
    rows = a["u_ptr"]
    read = a["x_ptr"].bytes * rows.shape[1] // a["x_ptr"].shape[1]
    return Cost(_bytes(a, "x_ptr") + read, *_router_product(a))


def _route(a: Arguments, _share: Share) -> Cost:
    return Cost(_bytes(a), *_router_product(a))


def _router_product(a: Arguments) -> tuple[int, torch.dtype]:
    """Return FLOPs and dtype of a router's products: those of three parts of a weight, or of float32 numbers."""
    products = 2 * math.prod(a["u_ptr"].shape) * a["EXPERTS"]
    if not a["SPLITS"]:
        return products, torch.float32
    return products * (1 if a["weight_ptr"].dtype == torch.bfloat16 else 3), torch.bfloat16


def _scatter(a: Arguments, _share: Share) -> Cost:
    return Cost(_bytes(a, "base_ptr") + a["rows_ptr"].bytes)


def _attention(a: Arguments, _share: Share) -> Cost:
    q, v = a["q_ptr"], a["v_ptr"]
    R, H, _, d = q.shape
    row = R * H * d * v.dtype.itemsize
    own = 2 * a["own"] * row
    queries = math.ceil(a["queries"] / a["BLOCK_Q"]) * a["BLOCK_Q"]
    keys = math.ceil(a["cached"] / a["BLOCK_K"]) * a["BLOCK_K"] + math.ceil(a["own"] / a["BLOCK_OWN"]) * a["BLOCK_OWN"]
    mask = a["mask_ptr"].bytes if a["mask_ptr"] is not None else 0
    bytes_moved = q.bytes + a["out_ptr"].bytes + 2 * a["cached"] * row + own * (2 if a["APPEND"] else 1) + mask
    return Cost(bytes_moved, 4 * R * H * d * queries * keys, v.dtype, attention=True)


def _sort(a: Arguments, _share: Share) -> Cost:
    programs = math.ceil(a["T"] / a["BLOCK_T"])
    return Cost(_bytes(a), instructions=SORT_INSTRUCTIONS * a["T"] * programs)


def _sample(a: Arguments, _share: Share) -> Cost:
    logits = math.prod(a["tokens_ptr"].shape) * a["logits_ptr"].shape[2]
    return Cost(_bytes(a), instructions=(SAMPLE_INSTRUCTIONS + GUIDE_INSTRUCTIONS * a["GUIDED"]) * logits)


def _channel_moments(a: Arguments, _share: Share) -> Cost:
    return Cost(_bytes(a), instructions=MOMENTS_INSTRUCTIONS * math.prod(a["x_ptr"].shape))


def _add_and_measure(a: Arguments, _share: Share) -> Cost:
    each = MOMENTS_INSTRUCTIONS + RESIDUAL_INSTRUCTIONS
    return Cost(_bytes(a), instructions=each * math.prod(a["x_ptr"].shape))


def _up(a: Arguments, share: Share) -> Cost:
    run, rows = _run(a, share)
    hidden, weight = a["h_ptr"], a["w1_ptr"]
    unwritten = round((1 - run) * hidden.bytes)
    flops = round(2 * rows * weight.shape[0] * weight.shape[1] * run)
    tile = (a["BLOCK_T"], a["BLOCK_H"] + a["TAIL_H"])
    return Cost(_bytes(a, "h_tail_ptr", "w1_tail_ptr") - unwritten, flops, weight.dtype, run, tile)


def _down(a: Arguments, share: Share) -> Cost:
    run, rows = _run(a, share)
    hidden, weight = a["h_ptr"], a["w2_ptr"]
    of_rows = (a[name] for name in ("out_ptr", "rows_ptr") if a[name] is not None)
    read = run * hidden.bytes if a["mask_ptr"] is None else hidden.bytes * ACTIVE_EXPERTS / EXPERTS
    moved = _bytes(a, "h_ptr", "out_ptr", "rows_ptr") + round(read)
    moved += sum(a["T"] * a["C"] * tensor.dtype.itemsize for tensor in of_rows)
    flops = round(2 * rows * weight.shape[0] * weight.shape[1] * run)
    return Cost(moved, flops, weight.dtype, tile=(a["BLOCK_T"], a["BLOCK_C"]))


def _multiply_bytes(a: Arguments, _share: Share) -> Cost:
    rows = math.ceil(a["T"] / a["BLOCK_T"]) * a["BLOCK_T"]
    of_rows = (a[name] for name in ("out_ptr", "rows_ptr") if a[name] is not None)
    moved = _bytes(a, "out_ptr", "rows_ptr") + sum(a["T"] * a["D"] * tensor.dtype.itemsize for tensor in of_rows)
    return Cost(moved, 2 * rows * a["C"] * a["D"], a["values_ptr"].dtype, tile=(a["BLOCK_T"], a["BLOCK_D"]))


def _conv3x3(a: Arguments, _share: Share) -> Cost:
    images, outputs, height, width = a["out_ptr"].shape
    pixels = math.ceil(height * width / a["BLOCK_P"]) * a["BLOCK_P"]
    columns = a["BLOCK_D"] + a["TAIL_D"]
    flops = 2 * 9 * images * pixels * math.ceil(outputs / columns) * columns * a["C"]
    return Cost(_bytes(a, "taps_tail"), flops, a["out_ptr"].dtype, tile=(a["BLOCK_P"], columns))


def _linears(a: Arguments, _share: Share) -> Cost:
    weights, biases, x = a["weights"], a["biases"], a["x_ptr"]
    rows = math.ceil(a["R"] / a["BLOCK_R"]) * a["BLOCK_R"]
    moved = _bytes(a) + sum(tensor.bytes for tensor in (*weights, *biases))
    return Cost(moved, 2 * rows * sum(map(math.prod, (weight.shape for weight in weights))), x.dtype)


def _few_rows(a: Arguments, _share: Share) -> Cost:
    weight, rows = a["weight_ptr"], math.ceil(a["T"] / a["BLOCK_T"]) * a["BLOCK_T"]
    return Cost(_bytes(a), 2 * rows * math.prod(weight.shape), weight.dtype)


def _enlarge(a: Arguments, _share: Share) -> Cost:
    codebook = a["codebook_ptr"]
    looked_up = math.prod(a["tokens_ptr"].shape) * a["C"] * codebook.dtype.itemsize
    return Cost(_bytes(a, "codebook_ptr") + looked_up)


def _convolve_and_add(a: Arguments, _share: Share) -> Cost:
    places = math.ceil(a["SIDE"] ** 2 / a["PLACES"]) * a["PLACES"] * a["features_ptr"].shape[0]
    moved = _bytes(a) + a["features_ptr"].bytes
    return Cost(moved, 2 * 9 * places * a["BLOCK_C"] ** 2, torch.float32, tile=(a["PLACES"], a["BLOCK_C"]))


def _average(a: Arguments, _share: Share) -> Cost:
    return Cost(_bytes(a), instructions=AVERAGE_INSTRUCTIONS * a["WINDOW"] ** 2 * math.prod(a["out_ptr"].shape))


def _run(a: Arguments, share: Share) -> tuple[float, int]:
    """Return the share of the (tile, expert) blocks that run, and the rows of all tiles."""
    rows = math.ceil(a["T"] / a["BLOCK_T"]) * a["BLOCK_T"]
    if a["order_ptr"] is None:
        return 1.0, rows
    return share(a["T"], a["BLOCK_T"]), rows


COSTS: dict[str, Callable[[Arguments, Share], Cost]] = {
    "_select": _select,
    "_add_normalize_route": _add_route,
    "_route_experts": _route,
    "_scatter_rows": _scatter,
    "_attention": _attention,
    "_sort_rows": _sort,
    "_sample": _sample,
    "_channel_moments": _channel_moments,
    "_add_and_measure": _add_and_measure,
    "_up": _up,
    "_down": _down,
    "_multiply_bytes": _multiply_bytes,
    "_conv3x3": _conv3x3,
    "_linears": _linears,
    "_norm_linear": _few_rows,
    "_linear_residual": _few_rows,
    "_enlarge": _enlarge,
    "_convolve_and_add": _convolve_and_add,
    "_average": _average,
}
