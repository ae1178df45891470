"""Run the expert FFN in two or three launches.

The last one makes the output, with its residual, of the hidden units `[T, D]`. There are two schedules, see
`docs/kernels/expert_ffn.md`: `"tile_list"` sorts the tokens and skips experts that no row of a tile wants, `"dense"`
runs all of them.
"""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from actvar_kernels.expert_ffn.triton_sort import sort_by_experts
from actvar_kernels.expert_ffn.weights import FFNWeights
from actvar_kernels.linear.products import gelu_linear
from actvar_kernels.residual_norm.reference import Residual
from actvar_kernels.triton_backend import tiles
from actvar_kernels.triton_backend.early_launch import begin, early_launch
from actvar_kernels.triton_backend.products import add_product, gelu, load_columns, row_pointers, store_product
from actvar_kernels.triton_backend.tuned_choices import tuned_expert_ffn


def expert_ffn(u: torch.Tensor, mask: torch.Tensor, weights: FFNWeights) -> torch.Tensor:
    """Return what `reference.expert_ffn` does.

    Args:
        u: `[..., C]`, float32, float16 or bfloat16.
        mask: `[..., N]` bool, N <= 32.
        weights: in u's dtype.
    """
    out = u.new_empty(u.shape)
    one, u, mask = (t.reshape(1, -1, t.shape[-1]) for t in (out, u, mask))
    _launch(one, None, None, u, mask, weights, None, "auto")
    return out


def expert_ffn_scatter(
    out: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor | Residual,
    u: torch.Tensor,
    mask: torch.Tensor,
    weights: FFNWeights,
    gamma: torch.Tensor,
    schedule: str,
) -> None:
    """Write `rows + gamma * expert_ffn(u)` to `out[r, index[r, j]]`, or to `out[r, j]` without an index.

    Args:
        out: `[R, L, C]`, floating-point, any strides with contiguous channels; rows that the index does not name are
            left alone.
        index: `[R, K]` int64, or None.
        rows: `[R, K, C]`, floating-point; or the `Residual` that gives them, whose x may be `out`.
        u: `[R, K, C]`, float32, float16 or bfloat16.
        mask: `[R, K, N]` bool, N <= 32.
        weights: in u's dtype.
        gamma: `[R, 1, C]`, floating-point.
        schedule: as in `op.expert_ffn_scatter`.
    """
    index = None if index is None else index.contiguous()
    _launch(out, index, rows, u, mask, weights, gamma, schedule)


def _launch(
    out: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor | Residual | None,
    u: torch.Tensor,
    mask: torch.Tensor,
    weights: FFNWeights,
    gamma: torch.Tensor | None,
    schedule: str,
) -> None:
    """Launch the kernels; without `rows` and `gamma` there is no residual."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    if not fc1_weight.dtype == fc2_weight.dtype == u.dtype:
        raise TypeError(f"fc1_weight, fc2_weight: expected u's {u.dtype}, got {fc1_weight.dtype}, {fc2_weight.dtype}")
    rows, update, gate = rows if isinstance(rows, Residual) else (rows, None, None)
    update = None if update is None else update.contiguous()
    rows, gamma, gate = (t if t is None or t.stride(2) == 1 else t.contiguous() for t in (rows, gamma, gate))
    R, tokens, C = u.shape
    u, mask = u.reshape(-1, C).contiguous(), mask.reshape(R * tokens, -1).contiguous().view(torch.uint8)
    fc1_weight, fc2_weight = fc1_weight.contiguous(), fc2_weight.contiguous()
    (T, N), D = mask.shape, fc1_weight.shape[0]
    arch = tiles.architecture(u)
    measured = tuned_expert_ffn(u, D // N)
    if schedule == "auto":
        schedule = "dense" if measured is None else measured.schedule
    aligned = all(_aligned(t) for t in (u, fc1_weight, fc2_weight))
    size = None if measured is None else (measured.rows, measured.columns)
    tile = tiles.expert_ffn_tiles(arch, u.dtype, T, C, D // N, aligned, tiles.multiprocessors(u), size)
    up, down = tile.up, tile.down
    if schedule == "dense":
        order = choice = None
        hidden = gelu_linear(u, fc1_weight, fc1_bias)  # takes less time than tiles that skip nothing
    else:
        order, choice = sort_by_experts(mask)
        hidden = u.new_empty(T, D)

    def matrix(tensor: torch.Tensor, *block: int) -> torch.Tensor | TensorDescriptor | None:
        """Return what the kernels read tiles of a matrix by; None for tiles without columns."""
        if 0 in block:
            return None
        return TensorDescriptor.from_tensor(tensor, list(block)) if tile.descriptors else tensor

    shared = dict(
        C=C,
        WIDTH=D // N,
        EXPERTS=N,
        DESCRIPTORS=tile.descriptors,
        BLOCK_T=tile.rows,
    )
    row_tiles = triton.cdiv(T, tile.rows)
    if order is not None:
        _up[(N * triton.cdiv(D // N, up.columns + up.tail), row_tiles)](
            u,
            matrix(fc1_weight, up.columns, up.depth),
            matrix(fc1_weight, up.tail, up.depth),
            fc1_bias,
            choice,
            order,
            matrix(hidden, tile.rows, up.columns),
            matrix(hidden, tile.rows, up.tail),
            T,
            **shared,
            BLOCK_H=up.columns,
            TAIL_H=up.tail,
            BLOCK_C=up.depth,
            num_warps=up.warps,
            enable_fp_fusion=True,
            num_stages=up.stages,
            **tiles.most_registers(up.registers),
            **early_launch(u),
        )
    _down[(triton.cdiv(C, down.columns), row_tiles)](
        hidden if order is None else matrix(hidden, tile.rows, down.depth),
        matrix(fc2_weight, down.columns, down.depth),
        fc2_bias,
        mask if order is None else None,
        choice,
        order,
        rows,
        update,
        gate,
        gamma,
        index,
        out,
        (1, 1) if rows is None else rows.stride()[:2],
        1 if gate is None else gate.stride(0),
        1 if gamma is None else gamma.stride(0),
        out.stride(),
        tokens,
        T,
        **shared,
        BLOCK_C=down.columns,
        BLOCK_H=down.depth,
        PARTS=tile.parts,
        num_warps=down.warps,
        enable_fp_fusion=True,
        num_stages=down.stages,
        **early_launch(u),
    )


def _aligned(tensor: torch.Tensor) -> bool:
    """Return whether a tensor descriptor can be made of a matrix.

    Its rows must begin at multiples of 16 bytes.
    """
    size = tensor.element_size()
    return tensor.storage_offset() * size % 16 == 0 and tensor.stride(0) * size % 16 == 0


@triton.jit(do_not_specialize=["T"])
def _up(
    u_ptr,
    w1_ptr,
    w1_tail_ptr,
    b1_ptr,
    choice_ptr,
    order_ptr,
    h_ptr,
    h_tail_ptr,
    T,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TAIL_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute `BLOCK_H + TAIL_H` hidden units of one expert for one tile of rows.

    Neighbouring programs share the rows.
    """
    begin(PDL)
    per_expert: tl.constexpr = (WIDTH + BLOCK_H + TAIL_H - 1) // (BLOCK_H + TAIL_H)
    expert = tl.program_id(0) // per_expert
    unit = tl.program_id(0) % per_expert * (BLOCK_H + TAIL_H)
    first = tl.program_id(1) * BLOCK_T
    row = first + tl.arange(0, BLOCK_T)
    if (_tile_experts(choice_ptr, first, T, BLOCK_T) >> expert) & 1 != 0:
        u_rows = row_pointers(u_ptr, tl.load(order_ptr + row, mask=row < T, other=0), C, BLOCK_C)
        if not DESCRIPTORS:
            w1_rows = row_pointers(
                w1_ptr, expert * WIDTH + tl.minimum(unit + tl.arange(0, BLOCK_H), WIDTH - 1), C, BLOCK_C
            )
            if TAIL_H:
                tail_unit = unit + BLOCK_H + tl.arange(0, TAIL_H)
                w1_tail_rows = row_pointers(w1_tail_ptr, expert * WIDTH + tl.minimum(tail_unit, WIDTH - 1), C, BLOCK_C)
        acc = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        if TAIL_H:
            tail = tl.zeros((BLOCK_T, TAIL_H), tl.float32)
        for k in range(0, C, BLOCK_C):
            u = load_columns(u_rows, k, C, BLOCK_C)
            if DESCRIPTORS:
                w1 = w1_ptr.load([expert * WIDTH + unit, k])
            else:
                w1 = load_columns(w1_rows, k, C, BLOCK_C)
            acc = add_product(acc, u, w1)
            if TAIL_H:
                if DESCRIPTORS:
                    w1_tail = w1_tail_ptr.load([expert * WIDTH + unit + BLOCK_H, k])
                else:
                    w1_tail = load_columns(w1_tail_rows, k, C, BLOCK_C)
                tail = add_product(tail, u, w1_tail)
        on = (tl.load(choice_ptr + row, mask=row < T, other=0) >> expert) & 1 != 0
        _store_hidden(h_ptr, acc, b1_ptr, on, first, expert, unit, T, WIDTH, EXPERTS, DESCRIPTORS)
        if TAIL_H:
            _store_hidden(h_tail_ptr, tail, b1_ptr, on, first, expert, unit + BLOCK_H, T, WIDTH, EXPERTS, DESCRIPTORS)


@triton.jit
def _tile_experts(choice_ptr, first, T, BLOCK_T: tl.constexpr):
    """Return the experts that any row of a tile wants, as bits."""
    row = first + tl.arange(0, BLOCK_T)
    return tl.reduce_or(tl.load(choice_ptr + row, mask=row < T, other=0), 0)


@triton.jit
def _store_hidden(
    h_ptr,
    acc,
    b1_ptr,
    on,
    first,
    expert,
    unit,
    T,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Store hidden units after bias and GELU, and zeros where a row is not `on`."""
    column = unit + tl.arange(0, acc.shape[1])
    x = acc + tl.load(b1_ptr + expert * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    hidden = tl.where(on[:, None], gelu(x), 0.0)
    if DESCRIPTORS:
        h_ptr.store([first, expert * WIDTH + unit], hidden.to(h_ptr.dtype))
    else:
        row = first + tl.arange(0, acc.shape[0])
        h_ptrs = row_pointers(h_ptr + expert * WIDTH + unit, row, EXPERTS * WIDTH, acc.shape[1])
        tl.store(h_ptrs, hidden.to(h_ptr.dtype.element_ty), mask=(row < T)[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["tokens", "T"])
def _down(
    h_ptr,
    w2_ptr,
    b2_ptr,
    mask_ptr,
    choice_ptr,
    order_ptr,
    rows_ptr,
    update_ptr,
    gate_ptr,
    gamma_ptr,
    index_ptr,
    out_ptr,
    rows_strides,
    gate_stride,
    gamma_stride,
    out_strides,
    tokens,
    T,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum over the hidden units of a tile of rows, for some output channels, and add the residual.

    With a mask the hidden units of all experts are given, and those that a row did not choose are read as zeros.
    Without one the rows are in the order of the sort, which has zeros there.
    """
    begin(PDL)
    steps: tl.constexpr = (WIDTH + BLOCK_H - 1) // BLOCK_H
    channel = tl.program_id(0) * BLOCK_C
    first = tl.program_id(1) * BLOCK_T
    row = first + tl.arange(0, BLOCK_T)
    if mask_ptr is not None:
        experts = EXPERTS
        chosen = _chosen(mask_ptr, row, T, EXPERTS)
    else:
        live = _tile_experts(choice_ptr, first, T, BLOCK_T)
        experts = tl.sum((live >> tl.arange(0, 32)) & 1, 0)
    if mask_ptr is not None or not DESCRIPTORS:
        h_rows = row_pointers(h_ptr, tl.minimum(row, T - 1), EXPERTS * WIDTH, BLOCK_H)
    if not DESCRIPTORS:
        w2_rows = row_pointers(w2_ptr, tl.minimum(channel + tl.arange(0, BLOCK_C), C - 1), EXPERTS * WIDTH, BLOCK_H)

    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i in range(0, experts * steps):
        step = i % steps
        if mask_ptr is not None:
            expert = i // steps
            unit = step * BLOCK_H + tl.arange(0, BLOCK_H)
            on = ((chosen >> expert) & 1 != 0)[:, None] & (unit < WIDTH)[None, :]
            h = tl.load(h_rows + expert * WIDTH + step * BLOCK_H, mask=on, other=0.0)
        else:
            expert = _lowest_bit(live)
            live = tl.where(step == steps - 1, live & (live - 1), live)
            if DESCRIPTORS:
                h = h_ptr.load([first, expert * WIDTH + step * BLOCK_H])
            else:
                h = load_columns(h_rows + expert * WIDTH, step * BLOCK_H, WIDTH, BLOCK_H)
        if DESCRIPTORS:
            w2 = w2_ptr.load([channel, expert * WIDTH + step * BLOCK_H])
        else:
            w2 = load_columns(w2_rows + expert * WIDTH, step * BLOCK_H, WIDTH, BLOCK_H)
        acc = add_product(acc, h, w2)

    if order_ptr is not None:
        row = tl.load(order_ptr + row, mask=row < T, other=T)
    places = (rows_ptr, update_ptr, gate_ptr, gamma_ptr, index_ptr, out_ptr)
    strides = (rows_strides, gate_stride, gamma_stride, out_strides)
    store_product(acc, row, row < T, channel, b2_ptr, *places, *strides, tokens, C, PARTS)


@triton.jit
def _chosen(mask_ptr, row, T, EXPERTS: tl.constexpr):
    """Return the experts that each of some rows chose, as bits, expert 0 the lowest."""
    chosen = tl.zeros(row.shape, tl.int32)
    for expert in tl.static_range(EXPERTS):
        on = tl.load(mask_ptr + row * EXPERTS + expert, mask=row < T, other=0)
        chosen |= on.to(tl.int32) << expert
    return chosen


@triton.jit
def _lowest_bit(bits):
    """Return the position of the lowest bit that is set: the exponent of that bit as a float."""
    lowest = (bits & -bits).to(tl.uint32, bitcast=True).to(tl.float32)
    return (lowest.to(tl.int32, bitcast=True) >> 23) - 127
