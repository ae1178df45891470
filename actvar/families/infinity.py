"""Answer for Infinity: `actvar.models.Infinity`. The public code's class is in `actvar.families.infinity_public`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actvar.families.base import BlockCall, Called, Embedded, OnScale, Rows, Sizes
from actvar.families.conditions import Texts
from actvar.families.infinity_mixin import PatchedInfinity, maps_of, unfiltered
from actvar.families.layers import layers_called
from actvar.families.named_layers import (
    NamedLayersFamily,
    mismatch_of_blocks,
    required_layers,
    shared_modulations,
    weight_kinds_of,
)
from actvar.models.infinity import Infinity, scale_schedule
from actvar.models.infinity.layers import BlockContext, InfinityBlock, RotarySelfAttention, query_scale, widened
from actvar.models.infinity.schedules import tokens_of
from actvar.models.vqvae import without_decoder
from actvar.utils.attributes import replaced
from actvar.utils.class_swap import own_class
from actvar.utils.wrappers import unwrapped
from actvar_kernels import rotate_heads
from actvar_kernels.cpu_backend.packing import once_on_gpu
from actvar_kernels.residual_norm.reference import AdaLN

GUIDED = 2.0
"""A strength with which there are unconditional rows."""
REQUIRED_OF_BLOCK = (*required_layers("sa"), "ca", "ca_norm.weight", "ca_norm.bias", "ada_gss")


class HeadCondition(NamedTuple):
    """Hold what `InfinityFamily.logits` needs beside the rows.

    Args:
        pooled: pooled texts of the rows, `[R, C]`.
        tau: temperature.
    """

    pooled: Tensor
    tau: float


class InfinityFamily(NamedLayersFamily):
    """Answer for our Infinity; `actvar.families.base.Family` describes the methods."""

    name = "Infinity (actvar.models.Infinity)"
    model_mixin: type = PatchedInfinity
    draws_from_texts = True
    default_cfg = 4.0
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

    def ends_early(self, model: Any) -> bool:
        return self.loop_is_ours(model)

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

    # what images are drawn from

    def maps_of(self, model: Any, conditions: Any) -> tuple[tuple[int, int], ...]:
        return maps_of(texts_of(conditions).schedule)

    def with_unconditional(self, model: Any, conditions: Any) -> Texts:
        texts = texts_of(conditions).features
        return replace(conditions, features=(*texts, *(model.cfg_uncond[: len(text)].to(text.dtype) for text in texts)))

    def strength(self, cfg: float, scale: int, count: int) -> float:
        """Return the same strength at every scale; Infinity counts it from 1."""
        return cfg - 1

    def images(self, model: Any, conditions: Any, seed: int, cfg: float) -> Tensor:
        texts, lengths = texts_of(conditions).joined()
        return model.sample(texts, lengths, conditions.schedule, cfg=cfg, tau=conditions.tau, g_seed=seed)

    def token_maps(self, model: Any, conditions: Any, seed: int, cfg: float) -> Tensor:
        """Return the bits `[B, L, bits of a token]` uint8 of images that `images` would draw; no image is decoded."""
        texts, lengths = texts_of(conditions).joined()
        draw = dict(cfg=cfg, tau=conditions.tau, g_seed=seed, return_bits=True)
        with without_decoder(model, "decode"):
            _, bits = model.sample(texts, lengths, conditions.schedule, **draw)
        return torch.cat([model.as_tokens(of_scale.permute(0, 3, 1, 2)) for of_scale in bits], dim=1)

    def teacher_input(self, model: Any, conditions: Any, token_maps: Tensor) -> Tensor:
        schedule = texts_of(conditions).schedule
        of_scale = zip(token_maps.split(tokens_of(schedule), dim=1), schedule, strict=True)
        return model.teacher_input([model.as_bits(bits.unflatten(1, size)) for bits, (_, *size) in of_scale])

    def predicted(self, model: Any, conditions: Any, inputs: Tensor) -> Tensor:
        texts, lengths = texts_of(conditions).joined()
        return by_bit(model(texts, lengths, inputs, conditions.schedule), conditions.tau)

    def embedded(self, model: Any, conditions: Any, inputs: Tensor) -> Embedded:
        condition = model.condition(*texts_of(conditions).joined())
        x, context = model.embedded_inputs(condition, inputs, conditions.schedule)
        return Embedded(self.block_call(x, context), HeadCondition(condition.pooled, conditions.tau))

    def logits(self, model: Any, x: Tensor, head_cond: HeadCondition) -> Tensor:
        return by_bit(model.get_logits(x, head_cond.pooled), head_cond.tau)

    def scale_logits(self, model: Any, conditions: Any, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        rows, schedule = self.with_unconditional(model, conditions), conditions.schedule
        condition, draw = model.condition(*rows.joined()), unfiltered(schedule, model.depth, GUIDED)
        of_scale = [None, *inputs.split(tokens_of(schedule)[1:], dim=1)]
        with model.sampling(schedule, draw):
            for scale in model.scales(schedule):
                x = model.embedded(scale, of_scale[scale], condition)
                x = model.run_blocks(schedule, scale, x, condition, draw)
                yield scale, self.logits(model, x, HeadCondition(condition.pooled[: len(x)], conditions.tau))

    @contextmanager
    def watch_scales(self, model: Any, on_scale: OnScale) -> Iterator[None]:
        """Call `on_scale` after every scale; tokens are None, since bits are drawn."""
        add_scale = model.add_scale

        def add_and_call(scale: int, features: Tensor, bits: Tensor) -> Tensor:
            features = add_scale(scale, features, bits)
            on_scale(scale, None, features)
            return features

        with replaced(model, add_scale=add_and_call):
            yield

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

    def modulations(self, blocks: Sequence[Any], cond: Tensor) -> Sequence[tuple[Tensor, ...]] | None:
        return shared_modulations(blocks, cond)

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


def texts_of(conditions: object) -> Texts:
    """Return `conditions` if they are texts.

    Raises:
        TypeError: they are not.
    """
    if not isinstance(conditions, Texts):
        raise TypeError(f"expected texts (actvar.families.conditions.Texts), got {type(conditions).__name__}")
    return conditions


def by_bit(logits: Tensor, tau: float) -> Tensor:
    """Return logits `[R, L, bits, 2]` under a temperature of those of 0 and 1 of every bit, `[R, L, 2 * bits]`."""
    return (logits / tau).unflatten(-1, (-1, 2))
