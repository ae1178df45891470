"""The operations of one active block with inputs of a model's shape: what benchmarks and GPU checks call."""

from __future__ import annotations

from collections.abc import Callable
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
from actvar_kernels.compile_cases import HEAD_DIM, MODELS


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
    def last_scale(cls, model: str, batch: int) -> BlockShape:
        """The last scale of an official model at 75 %, two rows an image: 16x16 tokens, or 32x32 for d36."""
        scale = MODELS[model].active_scales()[-1]
        return cls(2 * batch, scale.tokens, scale.keep, scale.cached, MODELS[model].width)


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

        def convert(value):
            if isinstance(value, tuple):
                return tuple(convert(part) for part in value)
            return value.to(dtype) if value.is_floating_point() else value

        return replace(self, **{name: convert(value) for name, value in vars(self).items()})


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
        "expert_ffn_scatter snap": experts("snap"),
        "scatter_rows": lambda: scatter_rows(rest, inputs.index, rows, inputs.update, gamma2),
    }
