"""Make inputs of every operation of a block, random or without values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from actvar_kernels.operations.shapes import BlockShape


@dataclass
class BlockInputs:
    """Hold the tensors that the operations of a block read, with the letters of `BlockShape`.

    Attributes:
        x: `[R, L, C]`.
        base: `[R, L, C]`, the tokens that keep their value; memory of its own.
        selector, selector_bias: `[1, C]` and `[1]`.
        modulation: gamma1, gamma2, scale1, scale2, shift1, shift2, each `[R, 1, C]`.
        qkv: `[R, K, 3 * C]`.
        room: keys and values `[R, H, P + K, d]`, of which the first P rows are cached.
        head_scale: `[H]`.
        rows, update, u: `[R, K, C]`: the kept rows, what attention adds to them, and the input of the FFN.
        router, router_bias: `[N, C]` and `[N]`.
        ffn: `[D, C]`, `[D]`, `[C, D]` and `[C]`.
        index: `[R, K]` int64.
        mask: `[R, K, N]` bool.
        shape: sizes of all.
    """

    x: torch.Tensor
    base: torch.Tensor
    selector: torch.Tensor
    selector_bias: torch.Tensor
    modulation: tuple[torch.Tensor, ...]
    qkv: torch.Tensor
    room: tuple[torch.Tensor, torch.Tensor]
    head_scale: torch.Tensor
    rows: torch.Tensor
    update: torch.Tensor
    u: torch.Tensor
    router: torch.Tensor
    router_bias: torch.Tensor
    ffn: tuple[torch.Tensor, ...]
    index: torch.Tensor
    mask: torch.Tensor
    shape: BlockShape

    @property
    def heads(self) -> tuple[torch.Tensor, ...]:
        """Return q, k and v, each `[R, H, K, d]`."""
        return self.qkv.unflatten(-1, (3, -1, self.shape.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def past(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cached keys and values, each `[R, H, P, d]`."""
        keys, values = self.room
        return keys[:, :, : self.shape.cached], values[:, :, : self.shape.cached]

    def to(self, dtype: torch.dtype) -> BlockInputs:
        """Return the same numbers in another floating-point type."""
        names = [name for name in vars(self) if name != "shape"]
        return self._each(names, lambda value: value.to(dtype) if value.is_floating_point() else value)

    def first_rows(self, rows: int) -> BlockInputs:
        """Return the inputs of the first `rows` sequences."""
        names = ("x", "base", "modulation", "qkv", "room", "rows", "update", "u", "index", "mask")
        first = self._each(names, lambda value: value[:rows])
        return replace(first, base=first.base.clone(), shape=replace(self.shape, rows=rows))

    def _each(self, names: Iterable[str], convert: Callable[[torch.Tensor], torch.Tensor]) -> BlockInputs:
        def converted(value):
            return tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)

        return replace(self, **{name: converted(getattr(self, name)) for name in names})


def random_inputs(shape: BlockShape, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> BlockInputs:
    """Return random inputs, with values of the size that they have in a model.

    Args:
        shape: sizes of the tensors.
        dtype: of all floating-point tensors.
        device: where the tensors are.
        seed: of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device=device) * std).to(dtype)

    def order(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, device=device).argsort(-1)

    R, N = shape.rows, shape.num_experts
    index = order(R, shape.tokens)[:, : shape.keep].sort(1).values
    mask = order(R, shape.keep, N) < shape.active
    inputs = _inputs(shape, normal, normal, index, mask)
    keys = F.normalize(inputs.room[0], dim=-1)
    rows = inputs.x.gather(1, index.unsqueeze(-1).expand(-1, -1, shape.width))
    return replace(
        inputs,
        base=inputs.x.clone(),
        room=(keys, inputs.room[1]),
        head_scale=inputs.head_scale.exp() * 4,
        rows=rows,
        u=F.layer_norm(rows, rows.shape[-1:]),
    )


def empty_inputs(
    shape: BlockShape, dtype: torch.dtype, device: torch.device | str, stream: torch.dtype | None = None
) -> BlockInputs:
    """Return inputs without values; selector and router are in float32, as those of a patched model.

    Args:
        shape: sizes of the tensors.
        dtype: of the other floating-point tensors.
        device: where the tensors are.
        stream: dtype of the residual stream and of AdaLN; None for that of the rest.
    """

    def empty(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def gate(*size: int, std: float = 1.0) -> torch.Tensor:
        return empty(*size, dtype=torch.float32)

    index = empty(shape.rows, shape.keep, dtype=torch.int64)
    mask = empty(shape.rows, shape.keep, shape.num_experts, dtype=torch.bool)
    inputs = _inputs(shape, empty, gate, index, mask)
    return inputs if stream is None else inputs._each(("x", "base", "rows", "modulation"), lambda t: t.to(stream))


def _inputs(
    shape: BlockShape,
    normal: Callable[..., torch.Tensor],
    gate: Callable[..., torch.Tensor],
    index: torch.Tensor,
    mask: torch.Tensor,
) -> BlockInputs:
    """Return inputs whose tensors `normal` makes from sizes and a standard deviation, those of gates by `gate`."""
    R, L, K, C, N = shape.rows, shape.tokens, shape.keep, shape.width, shape.num_experts
    heads, hidden, d = C // shape.head_dim, 4 * C, shape.head_dim
    return BlockInputs(
        x=normal(R, L, C),
        base=normal(R, L, C),
        selector=gate(1, C, std=C**-0.5),
        selector_bias=gate(1),
        modulation=normal(R, 1, 6, C, std=0.3).unbind(2),
        qkv=normal(R, K, 3 * C),
        room=(normal(R, heads, shape.cached + K, d), normal(R, heads, shape.cached + K, d)),
        head_scale=normal(heads, std=0.1),
        rows=normal(R, K, C),
        update=normal(R, K, C),
        u=normal(R, K, C),
        router=gate(N, C, std=C**-0.5),
        router_bias=gate(N, std=0.1),
        ffn=(normal(hidden, C, std=C**-0.5), normal(hidden, std=0.1), normal(C, hidden, std=hidden**-0.5), normal(C)),
        index=index,
        mask=mask,
        shape=shape,
    )
