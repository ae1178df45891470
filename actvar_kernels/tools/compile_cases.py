"""The operations with tensors as they come in the official models' last two scales; for `compile_check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import actvar_kernels as ops
from actvar_kernels.expert_ffn.op import SCHEDULES
from actvar_kernels.tiles import ExpertTiles, architecture, expert_ffn_candidates, using_expert_tiles

HEAD_DIM, EXPERTS, ACTIVE_EXPERTS, VOCABULARY = 64, 16, 12, 4096
NORM_GROUPS = 32
GUIDANCE, TOP_K, TOP_P = 1.5, 900, 0.96
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Scale(NamedTuple):
    """Tokens of a scale, those that are kept, and cached rows before it."""

    tokens: int
    keep: int
    cached: int


class Model(NamedTuple):
    """Width and token map sides of an official model."""

    width: int
    sides: tuple[int, ...]

    def active_scales(self) -> tuple[Scale, Scale]:
        """The last two scales at 75 %."""
        *dense, before, last = (side * side for side in self.sides)
        cached = sum(dense)
        return Scale(before, _kept(before), cached), Scale(last, _kept(last), cached + _kept(before))


def _kept(tokens: int) -> int:
    return int(0.75 * tokens + 0.5)


_SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
MODELS = {
    "d16": Model(1024, _SIDES_256),
    "d20": Model(1280, _SIDES_256),
    "d24": Model(1536, _SIDES_256),
    "d30": Model(1920, _SIDES_256),
    "d36": Model(2304, _SIDES_512),
}


def cases(model: str, batch: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of every operation, with tensors on the device "cuda"."""
    width = MODELS[model].width
    before, last = MODELS[model].active_scales()
    yield from _block_cases(2 * batch, width, before, dtype, is_last=False)
    yield from _block_cases(2 * batch, width, last, dtype, is_last=True)
    yield from _sampling_cases(2 * batch, last.tokens)
    yield from _decoder_cases(batch, MODELS[model].sides[-1], dtype)


def _block_cases(R: int, C: int, scale: Scale, dtype: torch.dtype, is_last: bool) -> Iterator:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    L, K, P = scale
    H, D = C // HEAD_DIM, 4 * C
    gamma, a, b = empty(R, 1, 6, C).unbind(2)[:3]
    x, rest = empty(R, L, C), empty(R, L, C)
    rows, update, u = empty(R, K, C), empty(R, K, C), empty(R, K, C)
    index = empty(R, K, dtype=torch.int64)
    selector = empty(1, C, dtype=torch.float32), empty(1, dtype=torch.float32)
    router = empty(EXPERTS, C, dtype=torch.float32), empty(EXPERTS, dtype=torch.float32)
    mask = empty(R, K, EXPERTS, dtype=torch.bool)
    ffn = empty(D, C), empty(D), empty(C, D), empty(C)
    q, k, v = empty(R, K, 3 * C).unflatten(-1, (3, H, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)
    room = tuple(empty(R, H, P + L, HEAD_DIM) for _ in range(2))
    past = tuple(part[:, :, :P] for part in room)
    scales = empty(H)

    yield "select_tokens", lambda: ops.select_tokens(x, *selector, a, b, K)
    yield "select_tokens in place", lambda: ops.select_tokens(x, *selector, a, b, K, in_place=True)
    yield "normalize_modulate", lambda: ops.normalize_modulate(x, a, b)
    yield "normalize_modulate with guidance", lambda: ops.normalize_modulate(x, a, b, GUIDANCE)
    if is_last:
        yield "subset_attention", lambda: ops.subset_attention(q, k, v, past, scales, 1.0, keep_cache=False)
        yield "subset_attention without QK norm", lambda: ops.subset_attention(q, k, v, past, None, 0.03)
        visible = empty(R, 1, K, P + K)
        yield "subset_attention with mask", lambda: ops.subset_attention(q, k, v, past, scales, 1.0, visible)
    else:
        yield "subset_attention with room", lambda: ops.subset_attention(q, k, v, past, scales, 1.0, room=room)
        yield "subset_attention of the first scale", lambda: ops.subset_attention(q, k, v, None, scales, 1.0)
    yield "add_normalize", lambda: ops.add_normalize(rows, None, update, gamma, a, b)
    yield (
        "add_normalize_route",
        lambda: ops.add_normalize_route(x, index, update, gamma, a, b, *router, ACTIVE_EXPERTS),
    )
    yield (
        "add_normalize_route of all tokens",
        lambda: ops.add_normalize_route(rows, None, update, gamma, a, b, *router, ACTIVE_EXPERTS),
    )
    deferred = ops.Residual(x, update, gamma)
    yield (
        "add_normalize_route of a deferred sum",
        lambda: ops.add_normalize_route(x, index, update, gamma, a, b, *router, ACTIVE_EXPERTS, deferred=True),
    )
    yield "route_experts", lambda: ops.route_experts(u, *router, ACTIVE_EXPERTS)
    yield "expert_ffn", lambda: ops.expert_ffn(u, mask, ACTIVE_EXPERTS, *ffn)
    for schedule in SCHEDULES:
        yield (
            f"expert_ffn_scatter {schedule}",
            lambda schedule=schedule: ops.expert_ffn_scatter(
                rest, index, rows, u, mask, ACTIVE_EXPERTS, *ffn, gamma, schedule
            ),
        )
        yield (
            f"expert_ffn_scatter {schedule} of a deferred sum",
            lambda schedule=schedule: ops.expert_ffn_scatter(
                x, index, deferred, u, mask, ACTIVE_EXPERTS, *ffn, gamma, schedule
            ),
        )
    yield (
        "expert_ffn_scatter of all tokens",
        lambda: ops.expert_ffn_scatter(None, None, rows, u, mask, ACTIVE_EXPERTS, *ffn, gamma),
    )
    if is_last:  # what `actvar_kernels.tools.tune` may choose

        def with_tile(tile: ExpertTiles, schedule: str) -> None:
            with using_expert_tiles(tile):
                ops.expert_ffn_scatter(None, None, rows, u, mask, ACTIVE_EXPERTS, *ffn, gamma, schedule)

        for tile in expert_ffn_candidates(architecture(u), dtype, D // EXPERTS, aligned=True):
            for schedule in ("dense", "tile_list"):
                yield (
                    f"expert_ffn_scatter {schedule}, tiles of {tile.rows} x {tile.down.columns}",
                    lambda tile=tile, schedule=schedule: with_tile(tile, schedule),
                )
    yield "scatter_rows", lambda: ops.scatter_rows(rest, index, rows, update, gamma)


def _sampling_cases(R: int, L: int) -> Iterator:
    logits = torch.empty(R, L, VOCABULARY, device="cuda")
    seed = torch.empty(1, dtype=torch.int64, device="cuda")
    noise = torch.empty(R // 2, L, VOCABULARY, device="cuda")
    yield "sample_tokens", lambda: ops.sample_tokens(logits, GUIDANCE, TOP_K, TOP_P, seed=seed)
    yield "sample_tokens of guided logits", lambda: ops.sample_tokens(logits, None, TOP_K, TOP_P, seed=seed)
    yield "sample_tokens with a number as seed", lambda: ops.sample_tokens(logits, GUIDANCE, TOP_K, 0.0, seed=0)
    yield "sample_tokens with noise", lambda: ops.sample_tokens(logits, GUIDANCE, 0, 0.0, noise=noise)


def _decoder_cases(B: int, side: int, dtype: torch.dtype) -> Iterator:
    """The widths of the official autoencoder, each at the largest image that has it."""
    for C, scale in ((640, 2), (320, 8), (160, 16)):
        x = torch.empty(B, scale * side, scale * side, C, dtype=dtype, device="cuda").permute(0, 3, 1, 2)
        vector = torch.empty(C, device="cuda")

        def norm(x=x, vector=vector, **options) -> torch.Tensor:
            return ops.group_norm_silu(x, vector, vector, NORM_GROUPS, 1e-6, **options)

        yield f"group_norm_silu of {C} channels", norm
        yield (
            f"group_norm_silu of {C} channels with offset",
            lambda norm=norm, vector=vector: norm(offset=vector),
        )
        if C == 640:
            yield f"group_norm_silu of {C} channels without SiLU", lambda norm=norm: norm(silu=False)
        yield f"add_residual of {C} channels", lambda x=x, vector=vector: ops.add_residual(x, x, vector)
