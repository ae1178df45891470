"""Compute logits and tokens by plain code, which the tests of the baselines compare with."""

from __future__ import annotations

from pathlib import Path

import torch

from actvar import baselines
from actvar.baselines.static_pruning import fix_experts
from actvar.config import ActVARConfig
from actvar.distill import Stage2
from actvar.evaluate.predictions import predictions
from actvar.models import VAR
from actvar.patching.adapter import save_adapter
from actvar.patching.patch import patched_silently
from actvar.utils.weight_override import tuned_parameters
from support.helpers import PATCH_NUMS, sample

STATIC = ActVARConfig(token_rates=(1.0, 1.0), ffn_rate=0.75)
STARTS = [sum(side * side for side in PATCH_NUMS[:scale]) for scale in range(len(PATCH_NUMS))]


def static_adapter_file(var: VAR, folder: Path) -> Path:
    """Write a file of static pruning with changed weights into `folder`; `var` is as before."""
    path = folder / "static.safetensors"
    with patched_silently(var, STATIC, None):
        fix_experts(var, baselines.magnitude_units(var, 0.75))
        Stage2(var)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in tuned_parameters(var).values():
                weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
        save_adapter(var, path)
    return path


def token_maps(var: VAR, images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randint(var.V, (images, side * side), generator=generator) for side in var.patch_nums]
    return torch.arange(images), var.vae_proxy[0].quantize.teacher_input(maps)


def logits_of(var: VAR) -> list[torch.Tensor]:
    return [logits for _, logits in predictions(var, *token_maps(var))]


@torch.no_grad()
def oracle_logits(var: VAR, update) -> list[torch.Tensor]:
    """Return logits by scale of plain code.

    `update(block_index, scale, name, x, sublayer)` stands for `sublayer(x)`, the gated output of attention or FFN. Keys
    and values are those of the rows a sublayer saw.
    """
    labels, inputs = token_maps(var)
    labels = torch.cat((labels, torch.full_like(labels, var.num_classes)))
    cond = var.class_emb(labels)
    position = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    caches = [None] * len(var.blocks)
    found = []
    for scale, side in enumerate(var.patch_nums):
        span = slice(STARTS[scale], STARTS[scale] + side * side)
        if scale:
            x = var.word_embed(inputs[:, span.start - 1 : span.stop - 1]).repeat(2, 1, 1) + position[:, span]
        else:
            x = cond.unsqueeze(1) + var.pos_start + position[:, span]
        modulation = var.shared_ada_lin(cond)
        for index, block in enumerate(var.blocks):
            parts = block.ada_gss + modulation if block.shared_aln else block.ada_lin(modulation).view(-1, 1, 6, var.C)
            gamma1, gamma2, scale1, scale2, shift1, shift2 = parts.unbind(2)

            def attention(rows, block=block, index=index, gate=gamma1, scale=scale1, shift=shift1, normed=None):
                u = block.ln_wo_grad(rows) * (1 + scale) + shift if normed is None else normed(block, scale, shift)
                block.attn.kv_caching(True)
                if caches[index] is not None:
                    block.attn.cached_k, block.attn.cached_v = caches[index]
                out = block.attn(u, None) * gate
                caches[index] = block.attn.cached_k, block.attn.cached_v
                block.attn.kv_caching(False)
                return out

            def ffn(rows, block=block, gate=gamma2, scale=scale2, shift=shift2, normed=None):
                u = block.ln_wo_grad(rows) * (1 + scale) + shift if normed is None else normed(block, scale, shift)
                return block.ffn(u) * gate

            for name, sublayer in (("attention", attention), ("ffn", ffn)):
                x = x + update(index, scale, name, x, sublayer)
        found.append(var.get_logits(x, cond))
    return found


def drawn_tokens(var: VAR) -> list[torch.Tensor]:
    """Return the token maps `[2, side, side]` that `sample` draws."""
    maps, embedding = [], var.vae_proxy[0].quantize.embedding
    handle = embedding.register_forward_pre_hook(lambda _, arguments: maps.append(arguments[0]))
    sample(var)
    handle.remove()
    return maps


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for of_scale, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(of_scale, wanted, atol=2e-4, rtol=1e-4)
