"""The FFN as experts: hidden units cut into equal groups, of which each token uses a few."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import (
    MOST_SEQUENCES,
    backend_of,
    kernel_backends,
    needs_operator,
    needs_torch,
    wants_gradient,
)
from actvar_kernels.checks import expect_count, expect_index, expect_one_device, expect_shape, expect_tensor
from actvar_kernels.constants import MAX_EXPERTS
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.expert_ffn import cpu_kernel, reference
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.residual_norm.reference import Residual
from actvar_kernels.scatter.op import scatter_rows

SCHEDULES = ("auto", "dense", "tile_list")

_MOST_TOKENS = 64 * MOST_SEQUENCES
"""Of the Triton backend: the smallest tiles have 64."""
_LIMITS = f"float32, float16 and bfloat16, a bool mask of up to {MAX_EXPERTS} experts, {_MOST_TOKENS} tokens"


def expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    """Sum of the chosen experts' outputs (Eq. 4): `fc2_bias + sum_e mask_e gelu_tanh(u W1_e^T + b1_e) W2_e^T`.

    Expert e owns the e-th of N equal groups of the D hidden units. With every expert on it is the dense FFN.

    Args:
        u: `[..., C]`.
        mask: `[..., N]`: bool, or float gates that multiply the experts' outputs (training).
        active: experts that are on per token; what the FLOP count of a call is based on.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: `[D, C]`, `[D]`, `[C, D]`, `[C]`.

    On Triton it is three launches, for float32, float16 and bfloat16, bool masks and up to 32 experts. On the CPU a C++
    kernel runs the chosen experts only, for float32 and bfloat16, bool masks and even C. It keeps a packed copy of the
    weights, which is made anew when their versions, addresses or dtypes change; after changes that PyTorch does not
    count (through `.data`, by fused optimizers) call `actvar.refresh` on their module.

    Raises:
        ValueError: shapes or devices that do not fit, or N that does not divide D.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    active = _expect_ffn(u, mask, active, *weights)
    return _ffn(_backend("expert_ffn", u, mask, *weights), u, mask, active, *weights)


def _ffn(backend, u, mask, active, *weights) -> torch.Tensor:
    if backend == "reference" and (wants_gradient(u, mask, *weights) or needs_torch(u, mask, *weights)):
        return reference.expert_ffn(u, mask, *weights)
    if backend == "triton" or torch.compiler.is_compiling():
        u, *weights = _as_autocast(u, *weights)
    elif backend == "cpu":
        (u,) = _as_autocast(u)  # the kernel converts weights when it packs them
    if backend == "reference" or needs_operator(u, *weights):
        return torch.ops.actvar_kernels.expert_ffn(u, mask, active, *weights)
    return _run_ffn(backend, u, mask, active, *weights)


def expert_ffn_scatter(
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor | Residual,
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    gamma: torch.Tensor,
    schedule: str = "auto",
) -> torch.Tensor:
    """`expert_ffn` with its residual: `rest` with `rest[r, index[r, j]] = rows[r, j] + gamma[r] * expert_ffn(u)[r, j]`.

    Args:
        rest, index: as in `scatter_rows`; both None when every row was kept: the result is `[R, K, C]`.
        rows: the kept rows before the FFN, `[R, K, C]`, or what they are the sum of: `add_normalize_route(...,
            deferred=True).rows`, whose x may be `rest`.
        u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias: as in `expert_ffn`, `[R, K, ...]`.
        gamma: AdaLN gate of the branch, `[R, 1, C]`.
        schedule: one of `SCHEDULES`, for the Triton backend. `"dense"` runs every expert and masks, `"tile_list"` skips
            experts that no row of a tile of sorted tokens wants; both are equal but for rounding. `"auto"` takes what
            a table of `actvar_kernels.tools.tune` says, without one `"dense"`, which an H100 was faster with at every
            size.

    On Triton it is three launches, and `rest` is written to and returned, as on the CPU in C++.

    Raises:
        TypeError: an index that is not int64.
        ValueError: shapes or devices that do not fit, N that does not divide D, an unknown schedule.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    if schedule not in SCHEDULES:
        hint = "; it was removed, use 'dense' or 'tile_list'" if schedule == "snap" else ""
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}{hint}")
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    active = _expect_ffn(u, mask, active, *weights)
    expect_shape("u", u, (None, None, None))
    R, K, C = u.shape
    x, update, gate = rows if isinstance(rows, Residual) else (rows, None, None)
    if update is None:
        expect_shape("rows", x, (R, K, C))
        parts = (x, gamma)
    else:
        expect_shape("rows.x", x, (R, K if index is None else None, C))
        expect_shape("rows.update", update, (R, K, C))
        expect_shape("rows.gamma", gate, (R, 1, C))
        parts = (x, update, gate, gamma)
    expect_shape("gamma", gamma, (R, 1, C))
    if index is not None:
        expect_index(index, (R, K))
        expect_shape("rest", rest, (R, None, C))
        parts = (rest, *parts)
    expect_one_device(u, index, *parts)
    backend = _backend("expert_ffn_scatter", u, mask, *weights, *parts)
    if backend != "triton" or wants_gradient(u, *weights, *parts):  # what writes in place has no gradient
        rows = x if update is None else rows.rows(index)
        return scatter_rows(rest, index, rows, _ffn(backend, u, mask, active, *weights), gamma)
    u, *weights = _as_autocast(u, *weights)
    if index is not None:
        out = rest if rest.stride(2) == 1 else rest.contiguous()
    else:
        dtype = torch.promote_types(x.dtype, torch.promote_types(gamma.dtype, u.dtype))
        out = x.new_empty(R, K, C, dtype=dtype)
    run = torch.ops.actvar_kernels.expert_ffn_scatter if needs_operator(out) else _run_scatter
    run(out, index, x, update, gate, u, mask, active, *weights, gamma, schedule)
    return out


def _expect_ffn(u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> int:
    expect_tensor("u", u)
    expect_shape("fc1_weight", fc1_weight, (None, None))
    D, C = fc1_weight.shape
    expect_shape("u", u, (*u.shape[:-1], C))
    expect_shape("fc1_bias", fc1_bias, (D,))
    expect_shape("fc2_weight", fc2_weight, (C, D))
    expect_shape("fc2_bias", fc2_bias, (C,))
    expect_shape("mask", mask, (*u.shape[:-1], None))
    if D % mask.shape[-1]:
        raise ValueError(f"mask: expected a number of experts that divides the hidden size {D}, got {mask.shape[-1]}")
    expect_one_device(u, mask, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return expect_count("active", active, mask.shape[-1])


def _backend(operation: str, u: torch.Tensor, mask: torch.Tensor, *others: torch.Tensor) -> str:
    experts = mask.shape[-1]
    fits = mask.dtype == torch.bool and experts <= MAX_EXPERTS and mask.numel() <= experts * _MOST_TOKENS
    supported = kernel_backends(u, *others, fits=fits)

    def why_not_in_cpp() -> str | None:
        dtype, weights_dtype = cpu.computed_dtype(u), others[0].dtype
        same = torch.is_autocast_enabled("cpu") or weights_dtype == dtype
        if dtype not in cpu.DTYPES or not same or mask.dtype != torch.bool or u.shape[-1] % 2:
            found = f"{dtype}, weights in {weights_dtype}, a mask in {mask.dtype} and width {u.shape[-1]}"
            return f"it takes float32 and bfloat16, weights alike, a bool mask and an even width, got {found}"
        return cpu.why_not()

    return backend_of(operation, u, mask, *others, supported=supported, limits=_LIMITS, why_not_in_cpp=why_not_in_cpp)


def _as_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What autocast does to the operands of a linear layer; neither the compiler nor a kernel sees autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _run_ffn(backend, u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> torch.Tensor:
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if backend == "reference":
        return reference.expert_ffn(u, mask, *weights)
    if backend == "cpu":
        return cpu_kernel.expert_ffn(u, mask, *weights)
    from actvar_kernels.expert_ffn import triton_kernel

    return triton_kernel.expert_ffn(u, mask, active, *weights)


def _run_scatter(
    out, index, rows, update, gate, u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, schedule
) -> None:
    arguments = (u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, schedule)
    tensors = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, out, rows, gamma)
    if _backend("expert_ffn_scatter", u, mask, *tensors) != "triton":
        rows = rows if update is None else Residual(rows, update, gate).rows(index)
        update = expert_ffn(u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        out.copy_(scatter_rows(out, index, rows, update, gamma))
    else:
        from actvar_kernels.expert_ffn import triton_kernel

        triton_kernel.expert_ffn_scatter(out, index, rows, update, gate, *arguments)


@torch.library.custom_op("actvar_kernels::expert_ffn", mutates_args=())
def _expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _run_ffn(_backend("expert_ffn", u, mask, *weights), u, mask, active, *weights)


@_expert_ffn.register_fake
def _(u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    return u.new_empty(u.shape, dtype=cpu.computed_dtype(u))


register_reference_gradient(_expert_ffn, lambda u, mask, active, *weights: reference.expert_ffn(u, mask, *weights))


@torch.library.custom_op("actvar_kernels::expert_ffn_scatter", mutates_args=("out",))
def _expert_ffn_scatter(
    out: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    gamma: torch.Tensor,
    schedule: str,
) -> None:
    """With `update` and `gate` the rows are x, and these three a `Residual`."""
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _run_scatter(out, index, rows, update, gate, u, mask, active, *weights, gamma, schedule)


@_expert_ffn_scatter.register_fake
def _(*_):
    return None


def expert_ffn_flops(u_shape, mask_shape, active, fc1_shape, *_shapes, **_kwargs) -> int:
    """FLOPs of one `expert_ffn` call, 2 a multiply-add: only the chosen experts' rows and columns count."""
    tokens = 1
    for size in u_shape[:-1]:
        tokens *= size
    D, C = fc1_shape
    return 2 * 2 * tokens * C * (D // mask_shape[-1]) * active


def expert_ffn_scatter_flops(_out_shape, _index_shape, _rows_shape, _update_shape, _gate_shape, *ffn, **_kwargs) -> int:
    """FLOPs of one `expert_ffn_scatter` operator: those of its `expert_ffn`."""
    return expert_ffn_flops(*ffn)


register_flop_formula(torch.ops.actvar_kernels.expert_ffn)(expert_ffn_flops)
register_flop_formula(torch.ops.actvar_kernels.expert_ffn_scatter)(expert_ffn_scatter_flops)
