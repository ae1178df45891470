"""Call all operations with tensors as they come in the last scales of VAR and Infinity, for `compile_check`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from actvar_kernels.backend import why_not_in_eight_bits
from actvar_kernels.constants import FORMATS
from actvar_kernels.conv3x3.codes import add_codes
from actvar_kernels.conv3x3.triton_kernel import conv3x3 as triton_conv3x3
from actvar_kernels.linear.few_rows import linear_residual, norm_linear
from actvar_kernels.linear.linears import linears
from actvar_kernels.linear.op import linear
from actvar_kernels.operations import table
from actvar_kernels.operations.inputs import BlockInputs, empty_inputs
from actvar_kernels.operations.shapes import INFINITY, INFINITY_HEAD_DIM, MODELS, VOCABULARY, BlockShape
from actvar_kernels.operations.table import Call, Operation, expert_ffn_scatter_arguments
from actvar_kernels.residual_norm.op import add_normalize, add_normalize_route
from actvar_kernels.residual_norm.reference import Gated
from actvar_kernels.rotary.op import rotate_heads
from actvar_kernels.token_select.op import normalize_modulate, select_tokens
from actvar_kernels.tools.block_step import scales_of_few_rows
from actvar_kernels.triton_backend.attention_tiles import AttentionTiles, using_attention_tiles
from actvar_kernels.triton_backend.attention_tiles import candidates as attention_candidates
from actvar_kernels.triton_backend.conv_tiles import candidates as conv_candidates
from actvar_kernels.triton_backend.early_launch import using_early_launch
from actvar_kernels.triton_backend.row_form import RowForm
from actvar_kernels.triton_backend.tiles import ExpertTiles, architecture, expert_ffn_candidates, using_expert_tiles
from actvar_kernels.triton_backend.tuning_table import FIRST_WITH_EARLY_LAUNCH, SCHEDULES

CODE_SIZE = 32
"""Channels of the official autoencoder's codes."""
Cases = Iterator[tuple[str, Call]]


def cases(model: str, batch: int, dtype: torch.dtype) -> Cases:
    """Yield name and call of every operation, with tensors on the device "cuda"."""
    if model in INFINITY:
        yield from _infinity_cases(model, batch, dtype)
        return
    before, last = (BlockShape(2 * batch, *scale, MODELS[model].width) for scale in MODELS[model].active_scales())
    for shape in (before, last):
        inputs = empty_inputs(shape, dtype, "cuda")
        yield from _calls(table.BLOCK, inputs)
        yield from _eight_bit_cases(inputs)
    yield from _early_cases([*_calls(table.BLOCK, inputs), *_eight_bit_cases(inputs)], inputs, batch)
    yield from _few_rows_cases(model, batch, dtype)
    yield "linears of the conditions", functools.partial(_all_modulations, inputs.u)
    yield from _tuned_cases(inputs, dtype)
    yield from _sampling_cases(batch, last.tokens)
    yield "add_codes of a scale", functools.partial(_codes_added, batch, MODELS[model].sides, dtype)
    yield from _decoder_cases(batch, MODELS[model].sides[-1], dtype)


def _infinity_cases(model: str, batch: int, dtype: torch.dtype) -> Cases:
    """Yield the calls of its blocks at the last scale, 64x64 tokens.

    Queries and keys are normalised before attention, and cross-attention reads every sum before the FFN does.
    """
    sizes = INFINITY[model]
    shape = BlockShape(2 * batch, *sizes.active_scales()[1], sizes.width, head_dim=INFINITY_HEAD_DIM)
    inputs = empty_inputs(shape, dtype, "cuda", stream=torch.float32)
    found: list[tuple[str, Call]] = []
    for operation in table.BLOCK:
        without: Any = {} if operation.call is rotate_heads else {"head_scale": None}
        normed = replace(inputs, **without)
        found += ((name, call) for name, call in operation.calls(normed).items() if "fused residual" not in name)
    found += _eight_bit_cases(inputs)
    yield from found
    yield from _early_cases(found, inputs, batch)


def _few_rows_cases(model: str, batch: int, dtype: torch.dtype) -> Cases:
    """Yield the linear layers of a dense block with the norm ahead or the residual behind, for fewest and most rows."""
    shapes = scales_of_few_rows(model, batch)
    for shape in (*shapes[:1], *shapes[-1:]):
        inputs = empty_inputs(shape, dtype, "cuda")
        gamma, _, _, scale, _, shift = inputs.modulation
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs.ffn
        C, rows, onto = shape.width, shape.rows * shape.tokens, Gated(inputs.rows, gamma)
        hidden = inputs.u.new_empty(*inputs.u.shape[:2], 4 * C)
        x, into, out_of = (inputs.x, scale, shift), (fc1_weight[: 3 * C], fc1_bias[: 3 * C]), (fc1_weight[:C], fc2_bias)
        calls = [
            ("norm_linear", functools.partial(norm_linear, *x, *into)),
            ("norm_linear with GELU", functools.partial(norm_linear, *x, fc1_weight, fc1_bias, with_gelu=True)),
            ("linear_residual", functools.partial(linear_residual, inputs.u, *out_of, onto)),
            ("linear_residual behind the FFN", functools.partial(linear_residual, hidden, fc2_weight, fc2_bias, onto)),
        ]
        named = [(f"{name} of {rows} rows", call) for name, call in calls]
        yield from named
        yield from _early_cases(named, inputs, batch)


def _early_cases(calls: Iterable[tuple[str, Call]], inputs: BlockInputs, batch: int) -> Cases:
    """Yield calls of a block at batch 1 as they are launched early, where the GPU can do that."""
    if batch > 1 or architecture(inputs.u) < FIRST_WITH_EARLY_LAUNCH:
        return

    def run(call: Call) -> None:
        with using_early_launch(True):
            call()

    for name, call in calls:
        yield f"{name} launched early", functools.partial(run, call)


def _eight_bit_cases(inputs: BlockInputs) -> Cases:
    """Yield the products of a block in each format of eight bits that the GPU has, and norms that write such rows."""
    for name, quantized in FORMATS.items():
        if why_not_in_eight_bits(quantized, inputs.u.device) is None:
            yield from _cases_in(name, quantized, inputs)


def _cases_in(format_name: str, quantized: torch.dtype, inputs: BlockInputs) -> Cases:
    """Yield the products of a block in one format of eight bits, and norms that write such rows."""
    C, form = inputs.shape.width, RowForm(inputs.u.dtype, quantized)
    for operation in table.BLOCK:
        if operation.call in (add_normalize, add_normalize_route, select_tokens):
            for label, arguments in operation.arguments(inputs).items():
                call = functools.partial(operation.call, **arguments, form=form)
                yield f"{operation.name} {label} in {format_name}", call
    _, _, scale, _, shift, _ = inputs.modulation
    call = functools.partial(normalize_modulate, inputs.rows, scale, shift, form=form)
    yield f"normalize_modulate in {format_name}", call
    for outputs in (3 * C, C):
        weight, bias = inputs.u.new_empty(outputs, C), inputs.u.new_empty(outputs)
        call = functools.partial(linear, inputs.u, weight, bias, quantized)
        yield f"linear in {format_name}, {outputs} outputs", call
    for name, arguments in expert_ffn_scatter_arguments(inputs).items():
        if "tile_list" not in name:
            call = functools.partial(table.expert_ffn_scatter, **arguments, quantized=quantized)
            yield f"expert_ffn_scatter {name} in {format_name}", call


def _all_modulations(u: torch.Tensor) -> torch.Tensor:
    """Return AdaLN of all blocks, of which there is one for 64 channels, for rows like `u` `[R, K, C]`."""
    C = u.shape[-1]
    layers = [(u.new_empty(6 * C, C), u.new_empty(6 * C)) for _ in range(C // 64)]
    return linears(u.new_empty(len(u), C), *zip(*layers, strict=True))


def _codes_added(B: int, sides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the next input of a sample after its last but one scale; the quantizer is in float32."""
    empty = functools.partial(torch.empty, device="cuda")
    layers = empty(VOCABULARY, CODE_SIZE), empty(CODE_SIZE, CODE_SIZE, 3, 3), empty(CODE_SIZE)
    tokens = empty(B, sides[-2] ** 2, dtype=torch.int64)
    return add_codes(empty(B, CODE_SIZE, sides[-1], sides[-1]), tokens, *layers, 0.5, sides[-1], dtype)


def _calls(operations: tuple[Operation, ...], *inputs: object) -> Cases:
    for operation in operations:
        yield from operation.calls(*inputs).items()


def _tuned_cases(inputs: BlockInputs, dtype: torch.dtype) -> Cases:
    """Yield calls with all tiles that `actvar_kernels.tools.tune` may choose."""
    arguments = expert_ffn_scatter_arguments(inputs)["of all tokens"]

    def run(tile: ExpertTiles, schedule: str) -> None:
        with using_expert_tiles(tile):
            table.expert_ffn_scatter(**arguments, schedule=schedule)

    width = 4 * inputs.shape.width // inputs.shape.num_experts
    for tile in expert_ffn_candidates(architecture(inputs.u), dtype, width, aligned=True):
        for schedule in SCHEDULES:
            name = f"expert_ffn_scatter {schedule}, tiles of {tile.rows} x {tile.down.columns}"
            yield name, functools.partial(run, tile, schedule)

    def attend(tile: AttentionTiles, call: Call) -> None:
        with using_attention_tiles(tile):
            call()

    calls = dict(_calls(table.BLOCK, inputs))
    for tile in attention_candidates(architecture(inputs.u), dtype, inputs.shape.head_dim)[1:]:
        for label in ("with room", "without QK norm"):
            name, call = f"{label}, tiles of {tile.queries} x {tile.keys}", calls[f"subset_attention {label}"]
            yield f"subset_attention {name}", functools.partial(attend, tile, call)


def _sampling_cases(B: int, L: int) -> Cases:
    logits = torch.empty(2 * B, L, VOCABULARY, device="cuda")
    seed = torch.empty(1, dtype=torch.int64, device="cuda")
    noise = torch.empty(B, L, VOCABULARY, device="cuda")
    yield from _calls(table.SAMPLING, logits, seed, noise)


def _decoder_cases(B: int, side: int, dtype: torch.dtype) -> Cases:
    """Yield calls with the widths of the official autoencoder, each at the largest image that has it."""
    for C, scale in ((640, 2), (320, 8), (160, 16)):
        x = torch.empty(B, scale * side, scale * side, C, dtype=dtype, device="cuda").permute(0, 3, 1, 2)
        yield from _calls(table.DECODER, x, torch.empty(C, device="cuda"))
        weight, bias = torch.empty(C, C, 3, 3, device="cuda"), torch.empty(C, device="cuda")
        for tiles in conv_candidates(architecture(x), dtype, C, C):
            for name, arguments in (("", (bias, None, False)), (" with a residual", (bias, x, True))):
                call = functools.partial(triton_conv3x3, x, weight, *arguments, tiles)
                yield f"conv3x3 of {C} channels, tiles of {tiles.pixels}{name}", call
