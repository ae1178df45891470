"""The operations of one active block with inputs of a model's shape: what benchmarks and GPU checks call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from actvar_kernels import (
    add_normalize_route,
    expert_ffn_scatter,
    normalize_modulate,
    scatter_rows,
    select_tokens,
    subset_attention,
)
from actvar_kernels.tools.compile_cases import HEAD_DIM, MODELS, Model

SIZES = MODELS | {"fashion-mnist": Model(192, (1, 2, 3, 4, 6, 8))}
# An operation may err this many times as much as PyTorch's plain code does in the same type.
ERROR_FACTOR = 4


def allowed_error(of_reference: float, dtype: torch.dtype) -> float:
    """Largest error against float64 of an operation whose reference errs by `of_reference` in `dtype`."""
    return ERROR_FACTOR * of_reference + torch.finfo(dtype).eps


def _share(rate: float, count: int) -> int:
    return max(1, int(rate * count + 0.5))


@dataclass(frozen=True)
class BlockShape:
    """One active scale: `rows` R sequences of `tokens` L, of which `keep` K are updated, after `cached` P keys."""

    rows: int
    tokens: int
    keep: int
    cached: int
    width: int
    num_experts: int = 16
    active: int = 12

    @classmethod
    def last_scale(cls, model: str, batch: int, rate: float = 0.75) -> BlockShape:
        """The last scale of a model, two rows an image, with `rate` of the tokens and experts at the last two scales:
        16x16 tokens, 32x32 for d36, 8x8 for fashion-mnist."""
        *dense, before, last = (side * side for side in SIZES[model].sides)
        cached = sum(dense) + _share(rate, before)
        return cls(
            2 * batch, last, _share(rate, last), cached, SIZES[model].width, active=_share(rate, cls.num_experts)
        )


@dataclass
class BlockInputs:
    """Random inputs of every operation, values of the size they have in a model."""

    x: torch.Tensor
    selector: torch.Tensor
    selector_bias: torch.Tensor
    modulation: tuple[torch.Tensor, ...]
    qkv: torch.Tensor
    past: tuple[torch.Tensor, torch.Tensor]
    head_scale: torch.Tensor
    update: torch.Tensor
    router: torch.Tensor
    router_bias: torch.Tensor
    ffn: tuple[torch.Tensor, ...]
    index: torch.Tensor
    mask: torch.Tensor

    def to(self, dtype: torch.dtype) -> BlockInputs:
        """The same numbers in another floating-point type."""
        return self._each(vars(self), lambda value: value.to(dtype) if value.is_floating_point() else value)

    def first_rows(self, rows: int) -> BlockInputs:
        """The inputs of the first `rows` sequences."""
        of_rows = ("x", "modulation", "qkv", "past", "update", "index", "mask")
        return self._each(of_rows, lambda value: value[:rows])

    def _each(self, names: Iterable[str], convert: Callable[[torch.Tensor], torch.Tensor]) -> BlockInputs:
        def converted(value):
            return tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)

        return replace(self, **{name: converted(getattr(self, name)) for name in names})


def block_inputs(shape: BlockShape, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> BlockInputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device=device) * std).to(dtype)

    R, C, N = shape.rows, shape.width, shape.num_experts
    heads, hidden = C // HEAD_DIM, 4 * C
    kept = torch.rand(R, shape.tokens, generator=generator, device=device).argsort(1)[:, : shape.keep]
    chosen = torch.rand(R, shape.keep, N, generator=generator, device=device).argsort(2)[..., : shape.active]
    keys = torch.nn.functional.normalize(normal(R, heads, shape.cached, HEAD_DIM), dim=-1)
    return BlockInputs(
        x=normal(R, shape.tokens, C),
        selector=normal(1, C, std=C**-0.5),
        selector_bias=normal(1),
        modulation=normal(R, 1, 6, C, std=0.3).unbind(2),
        qkv=normal(R, shape.keep, 3 * C),
        past=(keys, normal(R, heads, shape.cached, HEAD_DIM)),
        head_scale=normal(heads, std=0.1).exp() * 4,
        update=normal(R, shape.keep, C),
        router=normal(N, C, std=C**-0.5),
        router_bias=normal(N, std=0.1),
        ffn=(normal(hidden, C, std=C**-0.5), normal(hidden, std=0.1), normal(C, hidden, std=hidden**-0.5), normal(C)),
        index=kept.sort(1).values,
        mask=torch.zeros(R, shape.keep, N, dtype=torch.bool, device=device).scatter_(2, chosen, True),
    )


def operations(shape: BlockShape, inputs: BlockInputs) -> dict[str, Callable[[], torch.Tensor]]:
    """One call per operation, in the order of a block; each returns the values to compare at fixed indices.

    Calls may be repeated: what they write in place is the same every time.
    """
    gamma1, gamma2, scale1, scale2, shift1, shift2 = inputs.modulation
    heads = shape.width // HEAD_DIM
    q, k, v = inputs.qkv.unflatten(-1, (3, heads, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)
    rows = inputs.x.gather(1, inputs.index.unsqueeze(-1).expand(-1, -1, shape.width))
    rest, u = inputs.x.clone(), torch.nn.functional.layer_norm(rows, rows.shape[-1:])

    def selected() -> torch.Tensor:
        selection = select_tokens(inputs.x, inputs.selector, inputs.selector_bias, scale1, shift1, shape.keep)
        return selection.scores

    def routed() -> torch.Tensor:
        return add_normalize_route(
            inputs.x,
            inputs.index,
            inputs.update,
            gamma1,
            scale2,
            shift2,
            inputs.router,
            inputs.router_bias,
            shape.active,
        ).u

    def experts(schedule: str) -> Callable[[], torch.Tensor]:
        return lambda: expert_ffn_scatter(
            rest, inputs.index, rows, u, inputs.mask, shape.active, *inputs.ffn, gamma2, schedule
        )

    return {
        "select_tokens": selected,
        "normalize_modulate": lambda: normalize_modulate(rows, scale1, shift1),
        "subset_attention": lambda: subset_attention(q, k, v, inputs.past, inputs.head_scale, 1.0, keep_cache=False)[0],
        "add_normalize_route": routed,
        "expert_ffn_scatter dense": experts("dense"),
        "expert_ffn_scatter tile_list": experts("tile_list"),
        "scatter_rows": lambda: scatter_rows(rest, inputs.index, rows, inputs.update, gamma2),
    }
