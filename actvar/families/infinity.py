"""Answer for Infinity: `actvar.models.Infinity`. The public code's class is in `actvar.families.infinity_public`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actvar.families.base import BlockCall, Called, OnScale, Rows, Sizes
from actvar.families.infinity_mixin import PatchedInfinity
from actvar.families.layers import layers_called
from actvar.families.named_layers import NamedLayersFamily, mismatch_of_blocks, required_layers, weight_kinds_of
from actvar.models.infinity import Infinity, scale_schedule
from actvar.models.infinity.layers import BlockContext, InfinityBlock, RotarySelfAttention, query_scale, widened
from actvar.utils.class_swap import own_class
from actvar.utils.wrappers import unwrapped
from actvar_kernels import rotate_heads
from actvar_kernels.cpu_backend.packing import once_on_gpu
from actvar_kernels.residual_norm.reference import AdaLN

REQUIRED_OF_BLOCK = (*required_layers("sa"), "ca", "ca_norm.weight", "ca_norm.bias", "ada_gss")


class InfinityFamily(NamedLayersFamily):
    """Answer for our Infinity; `actvar.families.base.Family` describes the methods."""

    name = "Infinity (actvar.models.Infinity)"
    model_mixin: type = PatchedInfinity
    leaves_out_guidance = True
    has_between = True
    weight_kinds: Sequence[tuple[str, str]] = (("text_proj_for", "text"), (".ca.", "cross"), *weight_kinds_of("sa"))

    # the model

    def mismatch(self, model: Any) -> str | None:
        if not isinstance(model, Infinity):
            return "expected an actvar.models.Infinity"
        return self.mismatch_of_blocks(model)

    def mismatch_of_blocks(self, model: Any) -> str | None:
        """Return why the blocks of a model cannot be patched, or None if they can."""
        blocks = self.blocks(model)
        return mismatch_of_blocks(model, blocks, "unregistered_blocks", REQUIRED_OF_BLOCK, InfinityBlock, "ca_norm")

    def loop_fields(self, model: Any) -> Collection[str]:
        return ("sampler", "decoder_dtype", "cuda_graph")

    def loop_is_ours(self, model: Any) -> bool:
        return getattr(own_class(model), "sample", None) is Infinity.sample

    def blocks(self, model: Any) -> Sequence[Any]:
        return model.unregistered_blocks

    def maps(self, model: Any) -> tuple[tuple[int, int], ...]:
        """Return the maps of square images of 1024x1024 pixels; every sample brings its own."""
        return tuple((h, w) for _, h, w in scale_schedule())

    def sizes(self, model: Any) -> Sizes:
        fc1, head = unwrapped(self.blocks(model)[0]).ffn.fc1, unwrapped(model.head)
        return Sizes(fc1.in_features, fc1.out_features, model.word_embed.in_features, head.out_features, "shared")

    def recorded_sizes(self, model: Any) -> dict[str, int | list[int]]:
        sizes = self.sizes(model)
        return {"depth": len(self.blocks(model)), "width": sizes.width, "hidden": sizes.hidden}

    def autoencoder(self, model: Any) -> Any:
        return model.vae_proxy[0]

    @contextmanager
    def watch_scales(self, model: Any, on_scale: OnScale) -> Iterator[None]:
        """Call `on_scale` after every scale; tokens are None, since bits are drawn."""
        add_scale = model.add_scale

        def add_and_call(scale: int, features: Tensor, bits: Tensor) -> Tensor:
            features = add_scale(scale, features, bits)
            on_scale(scale, None, features)
            return features

        model.add_scale = add_and_call
        try:
            yield
        finally:
            del model.add_scale

    def finetuned_names(self, model: Any) -> list[str]:
        """Return the names of the parameters of self-attention, FFN and head; not of AdaLN, norms and texts."""
        parts = (".sa.", ".ffn.")
        names = [name for name, _ in model.named_parameters()]
        return [name for name in names if any(part in name for part in parts) or name.startswith("head.")]

    # the block

    def attention(self, block: Any) -> Any:
        return block.sa

    def block_call(self, x: Tensor, context: BlockContext) -> BlockCall:
        return BlockCall(x, context.modulation, context.scale, context, context.mask)

    def block_arguments(self, call: BlockCall) -> dict[str, Any]:
        return {"x": call.x, "context": call.context}

    def conditional(self, call: BlockCall) -> BlockCall:
        context = call.context.first(len(call.cond) // 2)
        return call._replace(x=call.x[: len(context.modulation)], cond=context.modulation, context=context)

    def parts_called(self, block: Any) -> dict[str, Called]:
        return layers_called(block, "sa", RotarySelfAttention)

    def modulation(self, block: Any, cond: Tensor) -> tuple[Tensor, ...]:
        return (block.ada_gss + cond).unbind(2)

    def layer_dtype(self, block: Any) -> torch.dtype | None:
        return block.sa.q_bias.dtype

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
        q, k, v = self.projected(block, queries_from, keys_from, bias)
        rotation = self.rotation(call)
        scale = once_on_gpu((block.sa.scale_mul_1H11,), "of queries", lambda: query_scale(block.sa))
        q = rotate_heads(q, rotation, queries_at.index, scale)
        return q, rotate_heads(k, rotation, keys_at.index), v

    def rotation(self, call: BlockCall) -> Tensor:
        """Return cosine and sine of the angles of the call's tokens, `[2, L, d / 2]`."""
        return call.context.rotation

    def called_attention(self, block: Any, u: Tensor, mask: Tensor | None, at: Rows, call: BlockCall) -> Tensor:
        return block.sa(u, call.context._replace(mask=mask), at.index)

    def between_norm(self, block: Any, rows: int) -> AdaLN:
        weight, bias = block.ca_norm.weight, block.ca_norm.bias

        def as_adaln() -> Tensor:
            wide = widened(weight)  # in 16 bits, 1 less than a small weight would be rounded
            return torch.stack((torch.ones_like(wide), wide - 1, widened(bias)))

        parts = once_on_gpu((weight, bias), "as AdaLN", as_adaln)
        return AdaLN(*(part.expand(rows, 1, -1) for part in parts))

    def between(self, block: Any, u: Tensor, at: Rows, call: BlockCall) -> Tensor:
        return block.ca(u, call.context.text)
