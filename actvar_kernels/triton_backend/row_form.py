"""Say in which form an operation returns the rows that the next layer reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from actvar_kernels.backend import KERNEL_DTYPES, Backend
from actvar_kernels.situation import wants_gradient


class RowForm(NamedTuple):
    """Say in which form rows are wanted after a norm.

    Attributes:
        dtype: of the rows; they are rounded to it from the dtype that the operation has without a form.
        quantized: the dtype, one of `constants.FORMATS`, in which Triton may return them in eight bits, as
            `ByteRows`. Elsewhere, and with gradients, they are not in eight bits. None for those of `dtype`.
    """

    dtype: torch.dtype
    quantized: torch.dtype | None = None

    def is_fused(self, backend: Backend, *tensors: torch.Tensor) -> bool:
        """Return whether a call on `tensors` that a backend runs writes rows of this form in its launch."""
        return backend.name == "triton" and self.dtype in KERNEL_DTYPES and not wants_gradient(*tensors)

    def empty(self, like: torch.Tensor, *shape: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return memory for rows `[..., C]` of this form, and for their scales `[..., 1]` in eight bits."""
        scales = None if self.quantized is None else like.new_empty(*shape[:-1], 1, dtype=torch.float32)
        return like.new_empty(*shape, dtype=self.quantized or self.dtype), scales


class ByteRows(NamedTuple):
    """Hold rows in eight bits, as `linear.quantized.quantize` defines them.

    Attributes:
        values: `[..., C]`, int8 or float8_e4m3fn.
        scales: `[..., 1]` float32.
        dtype: of the rows that they were made of, in which products are returned.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


class NormedRows(NamedTuple):
    """Stand for `LN(x) * (1 + scale) + shift`, rows that the layer which reads them makes in its launch.

    Attributes:
        x: `[R, L, C]`, float32, float16 or bfloat16.
        scale, shift: `[R, 1, C]`, float32, float16 or bfloat16.
    """

    x: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor


def values_of(rows: torch.Tensor | ByteRows) -> torch.Tensor:
    """Return the numbers of rows, of whatever dtype they are."""
    return rows.values if isinstance(rows, ByteRows) else rows


def formed(values: torch.Tensor, scales: torch.Tensor | None, form: RowForm) -> torch.Tensor | ByteRows:
    """Return rows of a form from what a kernel wrote to `RowForm.empty`."""
    return values if form.quantized is None or scales is None else ByteRows(values, scales, form.dtype)


def scales_of(rows: torch.Tensor | ByteRows) -> torch.Tensor:
    """Return the scales of rows in eight bits, as an operator does; they are empty for others."""
    return rows.scales if isinstance(rows, ByteRows) else rows.new_empty(0, dtype=torch.float32)


def fake_rows(like: torch.Tensor, form: RowForm, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for rows of a form, and for the scales that `scales_of` gives."""
    rows, scales = form.empty(like, *shape)
    return rows, like.new_empty(0, dtype=torch.float32) if scales is None else scales
