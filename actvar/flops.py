"""FLOPs of the transformer in one sampling run, by formula and by torch's counter. A multiply-add is 2 FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from actvar.config import ActVARConfig
from actvar.families import family_of, unwrapped
from actvar.recording import Shared
from actvar.schedule import Scale, build_schedule
from actvar_kernels.backend import using_backend
from actvar_kernels.expert_ffn.op import expert_ffn_flops

DENSE = ActVARConfig(token_rates=(1.0, 1.0), ffn_rate=1.0)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one scale, over all rows and blocks, by component."""

    qkv: int
    attention: int
    proj: int
    ffn: int
    gates: int
    adaln: int
    head: int

    @property
    def total(self) -> int:
        return self.qkv + self.attention + self.proj + self.ffn + self.gates + self.adaln + self.head


def formula_flops(
    *,
    width: int,
    hidden: int,
    depth: int,
    vocab_size: int,
    code_size: int,
    patch_nums: Sequence[int],
    shared_aln: bool,
    batch: int,
    config: ActVARConfig = DENSE,
) -> list[StepFlops]:
    """FLOPs of each scale for `batch` images under guidance (2 rows an image); LN, softmax and other element-wise
    work is not counted, selectors and routers are. AdaLN counts at every scale, as the models compute it.

    Args:
        width, hidden, depth, vocab_size, code_size, patch_nums, shared_aln: sizes C, D, blocks, V, Cvae, ... of a VAR.
    """
    rows, C = 2 * batch, width
    steps = []
    for of_blocks in zip(*(build_schedule(config, patch_nums, block) for block in range(depth)), strict=True):
        tokens, index = of_blocks[0].tokens, of_blocks[0].index
        blocks = [block_flops(scale, config, C, hidden) for scale in of_blocks]
        adaln_blocks = 1 if shared_aln else depth
        embedded = 0 if index == 0 else batch * tokens
        steps.append(
            StepFlops(
                **{part: rows * sum(block[part] for block in blocks) for part in blocks[0]},
                adaln=rows * 2 * C * (6 * C * adaln_blocks + 2 * C),
                head=rows * 2 * C * vocab_size * tokens + 2 * C * code_size * embedded,
            )
        )
    return steps


def block_flops(scale: Scale, config: ActVARConfig, width: int, hidden: int) -> dict[str, int]:
    """FLOPs of one row in one block at `scale`, by component: `qkv`, `attention`, `proj`, `ffn`, `gates`."""
    C = width
    kept = scale.keep if scale.select else scale.tokens
    projected = kept if config.kv == "compact" else scale.tokens
    share = scale.experts / config.num_experts if scale.route else 1.0
    return {
        "qkv": 2 * C * C * (kept + 2 * projected),
        "attention": 4 * C * kept * (scale.cached_before + projected),
        "proj": 2 * C * C * kept,
        "ffn": round(4 * C * hidden * kept * share),
        "gates": 2 * C * (scale.tokens * scale.select + config.num_experts * kept * scale.route),
    }


def model_flops(var: nn.Module, batch: int) -> list[StepFlops]:
    """`formula_flops` of a model, patched or not."""
    var = unwrapped(var)
    family = family_of(var)
    shared = var.__dict__.get("actvar")
    return formula_flops(
        width=family.width(var),
        hidden=family.hidden_size(var),
        depth=len(var.blocks),
        vocab_size=var.head.out_features,
        code_size=var.word_embed.in_features,
        patch_nums=var.patch_nums,
        shared_aln=var.blocks[0].shared_aln,
        batch=batch,
        config=shared.config if isinstance(shared, Shared) else DENSE,
    )


@torch.no_grad()
def counted_flops(var: nn.Module, batch: int) -> int:
    """FLOPs of the same run counted by `torch.utils.flop_counter` on the model itself, with fake tensors.

    The reference runs, so AdaLN counts at every scale. An expert FFN counts the experts that are on, whatever is done
    with the others.
    """
    formulas = {
        torch.ops.actvar_kernels.expert_ffn: expert_ffn_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    weight = var.head.weight
    with using_backend("reference"), FakeTensorMode(allow_non_fake_inputs=True), counter:
        cond = torch.empty(2 * batch, var.blocks[0].ffn.fc1.in_features, dtype=weight.dtype, device=weight.device)
        for block in var.blocks:
            block.attn.kv_caching(True)
        try:
            for index, side in enumerate(var.patch_nums):
                if index:
                    codes = var.word_embed.weight.new_empty(batch, side * side, var.word_embed.in_features)
                    x = var.word_embed(codes).repeat(2, 1, 1)
                else:
                    x = cond.unsqueeze(1).expand(-1, side * side, -1)
                modulation = var.shared_ada_lin(cond)
                for block in var.blocks:
                    x = block(x=x, cond_BD=modulation, attn_bias=None)
                var.get_logits(x, cond)
        finally:
            for block in var.blocks:
                block.attn.kv_caching(False)
    return counter.get_total_flops()


def _cpu_attention_flops(query_shape, key_shape, value_shape, *_args, out_shape=None, **_kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)
