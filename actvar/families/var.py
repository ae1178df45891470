"""Answer for VAR: `actvar.models.VAR`, and the public implementation's class in any module path."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actvar.families.base import (
    MODULATION,
    BlockCall,
    Called,
    Embedded,
    OnScale,
    Rows,
    Sizes,
)
from actvar.families.layers import linear_called
from actvar.families.named_layers import (
    NamedLayersFamily,
    mismatch_of_blocks,
    required_layers,
    shared_modulations,
    weight_kinds_of,
)
from actvar.families.var_layers import modulations_at_once, parts_called
from actvar.families.var_mixin import PatchedVAR
from actvar.families.var_scales import adding_method, logits_by_scale
from actvar.models.transformer_block import MAX_LOG_SCALE, TransformerBlock
from actvar.models.var import VAR
from actvar.utils.attributes import replaced
from actvar.utils.class_swap import own_class
from actvar.utils.wrappers import unwrapped
from actvar_kernels import linear_once
from actvar_kernels.cpu_backend.packing import once_on_gpu

REQUIRED_OF_MODEL = ("blocks", "patch_nums", "autoregressive_infer_cfg", "head", "head_nm")
REQUIRED_OF_BLOCK = (*required_layers("attn"), "ln_wo_grad", "shared_aln")


class VARFamily(NamedLayersFamily):
    """Answer for VAR; `actvar.families.base.Family` describes the methods."""

    name = "VAR (actvar.models.VAR or the class of the public VAR code)"
    model_mixin: type = PatchedVAR
    leaves_out_guidance = True
    hands_on = True
    weight_kinds: Sequence[tuple[str, str]] = weight_kinds_of("attn")

    # the model

    def mismatch(self, model: Any) -> str | None:
        for name in REQUIRED_OF_MODEL:
            if not hasattr(model, name):
                return f"expected an attribute {name!r}"
        return mismatch_of_blocks(model, model.blocks, "blocks", REQUIRED_OF_BLOCK, TransformerBlock, "ln_wo_grad")

    def loop_fields(self, model: Any) -> Collection[str]:
        return ("sampler", "decoder_dtype", "cuda_graph", "cudnn_benchmark") if isinstance(model, VAR) else ()

    def loop_is_ours(self, model: Any) -> bool:
        return own_class(model).autoregressive_infer_cfg is VAR.autoregressive_infer_cfg

    def ends_early(self, model: Any) -> bool:
        return self.loop_is_ours(model)

    def blocks(self, model: Any) -> Sequence[Any]:
        return model.blocks

    def maps(self, model: Any) -> tuple[tuple[int, int], ...]:
        return tuple((side, side) for side in model.patch_nums)

    def sizes(self, model: Any) -> Sizes:
        first = unwrapped(model.blocks[0])
        fc1, head, embedding = first.ffn.fc1, unwrapped(model.head), unwrapped(model.word_embed)
        adaln = "shared" if first.shared_aln else "per block"
        return Sizes(fc1.in_features, fc1.out_features, embedding.in_features, head.out_features, adaln)

    def recorded_sizes(self, model: Any) -> dict[str, int | list[int]]:
        sizes = self.sizes(model)
        return {
            "depth": len(model.blocks),
            "width": sizes.width,
            "hidden": sizes.hidden,
            "patch_nums": list(model.patch_nums),
        }

    def autoencoder(self, model: Any) -> Any:
        return model.vae_proxy[0]

    def finetuned_names(self, model: Any) -> list[str]:
        """Return the names of the parameters of attention, FFN and head; not of AdaLN, norms and embeddings."""
        block_names = [
            f"blocks.{index}.{part}.{name}"
            for index, block in enumerate(model.blocks)
            for part in ("attn", "ffn")
            for name, _ in getattr(block, part).named_parameters()
        ]
        return [*block_names, *(f"head.{name}" for name, _ in model.head.named_parameters())]

    def embedded(self, model: Any, conditions: Any, inputs: Tensor) -> Embedded:
        cond = model.class_emb(conditions)
        rest = model.word_embed(inputs.to(model.word_embed.weight.dtype))
        x = torch.cat((cond.unsqueeze(1) + model.pos_start, rest), dim=1)
        x = x + model.lvl_embed(model.lvl_1L) + model.pos_1LC
        mask = model.attn_bias_for_masking.to(x.dtype)
        return Embedded(BlockCall(x, model.shared_ada_lin(cond), mask=mask), cond)

    def with_unconditional(self, model: Any, conditions: Any) -> Tensor:
        return torch.cat((conditions, torch.full_like(conditions, model.num_classes)))

    def logits(self, model: Any, x: Tensor, head_cond: Tensor) -> Tensor:
        return model.get_logits(x, head_cond)

    def scale_logits(self, model: Any, conditions: Any, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from logits_by_scale(model, self.with_unconditional(model, conditions), inputs)

    @contextmanager
    def watch_scales(self, model: Any, on_scale: OnScale) -> Iterator[None]:
        quantizer = model.vae_proxy[0].quantize
        tokens: list[Tensor] = []
        add_scale, method = adding_method(quantizer)

        def add_and_call(*arguments):
            added = add_scale(*arguments)
            scale = next(number for number in arguments if isinstance(number, int))
            on_scale(scale, tokens.pop() if tokens else None, added[0])
            tokens.clear()
            return added

        handle = quantizer.embedding.register_forward_pre_hook(lambda _, arguments: tokens.append(arguments[0]))
        try:
            with replaced(quantizer, **{method: add_and_call}):
                yield
        finally:
            handle.remove()

    def teacher_input(self, model: Any, conditions: Any, token_maps: Tensor) -> Tensor:
        quantizer = model.vae_proxy[0].quantize
        maps = list(token_maps.split([side * side for side in model.patch_nums], dim=1))
        own = getattr(quantizer, "teacher_input", None)
        return own(maps) if own is not None else quantizer.idxBl_to_var_input(maps)

    def head_called(self, model: Any) -> str | None:
        return linear_called(model.head)

    def packed_head(self, model: Any) -> list[Tensor | None]:
        return [model.head._parameters.get("weight")]

    # the block

    def block_call(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None = None) -> BlockCall:
        return BlockCall(x, cond_BD, mask=attn_bias)

    def block_arguments(self, call: BlockCall) -> dict[str, Tensor | None]:
        return {"x": call.x, "cond_BD": call.cond, "attn_bias": call.mask}

    def attention(self, block: Any) -> Any:
        return block.attn

    def parts_called(self, block: Any) -> dict[str, Called]:
        return parts_called(block)

    def modulation(self, block: Any, cond: Tensor) -> tuple[Tensor, ...]:
        if block.shared_aln:
            return (block.ada_gss + cond).unbind(2)
        if MODULATION in self.called(block):
            return block.ada_lin(cond).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)
        silu, last = block.ada_lin
        return linear_once(silu(cond), last.weight, last.bias).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)

    def modulations(self, blocks: Sequence[Any], cond: Tensor) -> Sequence[tuple[Tensor, ...]] | None:
        return (shared_modulations if blocks[0].shared_aln else modulations_at_once)(blocks, cond)

    def project(
        self,
        block: Any,
        queries_from: Tensor,
        keys_from: Tensor,
        bias: Tensor,
        queries_at: Rows,
        keys_at: Rows,
        call: BlockCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.projected(block, queries_from, keys_from, bias)

    def head_scale(self, block: Any) -> Tensor | None:
        if not block.attn.attn_l2_norm:
            return None
        scale = block.attn.scale_mul_1H11
        return once_on_gpu((scale,), "of heads", lambda: scale.clamp_max(MAX_LOG_SCALE).exp().flatten())

    def called_attention(self, block: Any, u: Tensor, mask: Tensor | None, at: Rows, call: BlockCall) -> Tensor:
        return block.attn(u, attn_bias=mask)
