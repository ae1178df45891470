"""Whole models with random weights on a GPU: the last scale's blocks as a CUDA graph, and a sample, in milliseconds."""

from __future__ import annotations

import torch
from torch import nn

from actvar import ActVARConfig, patched
from actvar.models import build_vae_var
from actvar_kernels.compile_cases import HEAD_DIM, MODELS
from benchmarks.gpu import captured_call

CONFIGS = {
    "dense": ActVARConfig(token_rates=(1, 1), ffn_rate=1),
    "actvar dense schedule": ActVARConfig(expert_schedule="dense"),
    "actvar tile_list": ActVARConfig(expert_schedule="tile_list"),
    "actvar snap": ActVARConfig(expert_schedule="snap"),
}


def block_times(model: str, batch: int) -> list[dict]:
    """One row per configuration: milliseconds (20th, 50th, 80th percentile) in bfloat16."""
    from triton.testing import do_bench

    width, sides = MODELS[model]
    _, var = build_vae_var(
        depth=width // HEAD_DIM, width=width, patch_nums=sides, shared_aln=model == "d36", device="cuda"
    )
    var.to(torch.bfloat16)
    labels = torch.arange(batch, device="cuda")
    rows = []
    for name, config in CONFIGS.items():
        with patched(var, config):
            replay, _ = captured_call(lambda: last_scale(var, batch))
            rows.append(
                {
                    "model": model,
                    "batch": batch,
                    "configuration": name,
                    "last_scale_graph_ms": do_bench(replay, quantiles=[0.2, 0.5, 0.8]),
                    "sample_eager_ms": do_bench(
                        lambda: var.autoregressive_infer_cfg(batch, labels, g_seed=0, top_k=900, top_p=0.96),
                        quantiles=[0.2, 0.5, 0.8],
                        rep=2000,
                    ),
                }
            )
    return rows


def last_scale(var: nn.Module, batch: int) -> torch.Tensor:
    """All blocks over the last scale, after a cache of the right length."""
    scale, weight = var.actvar.schedule[-1], var.head.weight
    x = weight.new_zeros(2 * batch, scale.tokens, var.C)
    cond = weight.new_zeros(2 * batch, var.C)
    past = weight.new_zeros(2 * batch, var.num_heads, scale.cached_before, HEAD_DIM)
    modulation = var.shared_ada_lin(cond)
    for block in var.blocks:
        block.attn.kv_caching(True)
        block.attn.cached_k = block.attn.cached_v = past
        x = block(x, modulation, None)
        block.attn.kv_caching(False)
    return x
