"""Answer for Infinity in the class of the public code, in any module path."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from actvar.families.base import NORM, BlockCall, Called, OnScale, Rows
from actvar.families.infinity import InfinityFamily, by_bit, texts_of
from actvar.families.infinity_mixin import maps_of
from actvar.families.kv_cache import AttentionCache
from actvar.models.arguments import one_thread
from actvar.models.basic_vae import NORM_GROUPS
from actvar.models.checkpoint.infinity_sizes import TokenizerSizes, infinity_pair, infinity_sizes
from actvar.models.infinity import Infinity, InfinityTokenizer
from actvar.utils.class_swap import own_class
from actvar.utils.plain_layers import why_called
from actvar.utils.weight_override import own_weights
from actvar.utils.wrappers import unwrapped
from actvar_kernels.residual_norm.reference import AdaLN

if TYPE_CHECKING:
    from actvar.families.patched_state import PatchedState

REQUIRED_OF_MODEL = ("unregistered_blocks", "rope2d_freqs_grid", "autoregressive_infer_cfg", "head", "head_nm")


class PublicContext(NamedTuple):
    """Hold the other arguments of a public block, with the public names."""

    ca_kv: tuple[Tensor, Tensor, int]
    attn_fn: Any
    scale_schedule: Any
    rope2d_freqs_grid: dict[str, Tensor]
    scale_ind: int


class PatchedPublicInfinity(nn.Module):
    """Change how a patched public Infinity samples; goes in front of its class, with the patch's state in `actvar`."""

    actvar: PatchedState

    def forward(self, label_B_or_BLT, x_BLC_wo_prefix, scale_schedule, cfg_infer=False, **kwargs):
        """Run teacher forcing as the model itself does, or sample with `cfg_infer`.

        Raises:
            ValueError: the blocks are not those that were patched, or the sequence is padded and scales are sparse.
        """
        if cfg_infer:
            return self.autoregressive_infer_cfg(label_B_or_BLT=label_B_or_BLT, scale_schedule=scale_schedule, **kwargs)
        self.actvar.begin_pass(self)
        try:
            self.actvar.fit_maps(self, maps_of(scale_schedule))
            return super().forward(label_B_or_BLT, x_BLC_wo_prefix, scale_schedule, **kwargs)
        finally:
            self.actvar.end_pass()

    @torch.no_grad()
    def autoregressive_infer_cfg(self, *args, **kwargs):
        """Sample as the model itself does, with its arguments. The K/V caches are empty afterwards.

        Raises:
            ValueError: the blocks are not those that were patched, the configuration names a scale that the schedule
                does not have, or guidance is to act after a block at a scale without guidance.
        """
        signature = inspect.signature(own_class(self).autoregressive_infer_cfg)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        schedule, strengths = given.arguments["scale_schedule"], given.arguments["cfg_list"]
        state = self.actvar
        state.expect_own_blocks(self)
        state.fit_maps(self, maps_of(schedule))
        layers = given.arguments["cfg_insertion_layer"]
        if state.config.guidance_until is not None and any(layer < 0 for layer in layers):
            raise ValueError(
                f"cfg_insertion_layer: expected [0], guidance on the logits, with guidance_until="
                f"{state.config.guidance_until}, got {layers}; the public code cannot mix rows after a block where "
                "there are none to mix"
            )
        guided = any(strength != 1 for strength in strengths)
        sampling = state.sampling(self, in_place=False, guided=guided)
        with one_thread(self), state.strengths.running(self, *strengths), sampling:
            return super().autoregressive_infer_cfg(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def get_logits(self, h, cond_BD):
        """Return the logits of `h` `[R, L, C]` as the model's own method does, by the weights of the scale.

        Conditional rows alone, `[R / 2, L, C]`, have their logits twice, so that guidance leaves them as they are.
        """
        if 2 * len(h) == len(cond_BD):
            return self.get_logits(h, cond_BD[: len(h)]).repeat(2, 1, 1)
        with nullcontext() if self.actvar.scale_is_tuned else own_weights(self.head):  # pyright: ignore[reportArgumentType]
            self.actvar.begin_head(self, h.shape[1])
            return super().get_logits(h, cond_BD)  # pyright: ignore[reportAttributeAccessIssue]


class PublicInfinityFamily(InfinityFamily):
    """Answer for the public Infinity; `actvar.families.base.Family` describes the methods."""

    name = "Infinity of the public code"
    model_mixin: type = PatchedPublicInfinity

    def mismatch(self, model: Any) -> str | None:
        for name in REQUIRED_OF_MODEL:
            if not hasattr(model, name):
                return f"expected an attribute {name!r}"
        problem = self.mismatch_of_blocks(model)
        if problem is not None:
            return problem
        for index, block in enumerate(map(unwrapped, self.blocks(model))):
            place = f"unregistered_blocks[{index}]"
            if not block.shared_aln or not block.sa.cos_attn:
                return f"expected {place} with shared_aln and cos_attn, as the published models have them"
            if block.fused_norm_func is None:
                return (
                    f"expected {place} of a model with fused_norm=True, as the published scripts have it: without it "
                    "the public code rotates queries and keys of every scale as those of the first"
                )
        return None

    def loop_fields(self, model: Any) -> Collection[str]:
        return ()

    def ends_early(self, model: Any) -> bool:
        return False

    def autoencoder(self, model: Any) -> Any:
        raise TypeError("expected an actvar.models.Infinity, which holds its tokenizer; the public class holds none")

    def watch_scales(self, model: Any, on_scale: OnScale) -> AbstractContextManager[None]:
        raise TypeError(
            "expected an actvar.models.Infinity, whose scales can be watched; the public loop is one method"
        )

    def drawing_twin(self, model: Any, tokenizer: Any = None) -> Infinity:
        """Return ours with the weights of the public model.

        Args:
            model: of the public class.
            tokenizer: an `actvar.models.InfinityTokenizer`; None for one that turns bits into codes and no more.

        Raises:
            TypeError: layers of the model are wrapped or of other classes, so that its weights are not ours, or another
                kind of tokenizer.
            ValueError: a tokenizer of another number of bits.
        """
        state = model.state_dict()
        sizes = infinity_sizes(state)
        bits = sizes.token_bits // (4 if model.apply_spatial_patchify else 1)
        _, twin = infinity_pair(sizes, TokenizerSizes(bits, NORM_GROUPS, (1,), 1))
        if state.keys() != twin.state_dict().keys():
            other = min(state.keys() ^ twin.state_dict().keys())
            raise TypeError(f"expected the tensors of the public class, which ours has as well, got others: {other}")
        twin.load_state_dict(state, assign=True)
        if tokenizer is not None:
            if not isinstance(tokenizer, InfinityTokenizer):
                kind = type(tokenizer).__name__
                raise TypeError(f"tokenizer: expected an actvar.models.InfinityTokenizer, got {kind}")
            if tokenizer.bits != bits:
                raise ValueError(f"tokenizer: expected {bits} bits, as the model draws them, got {tokenizer.bits}")
            twin.vae_proxy = (tokenizer,)
        return twin

    def token_maps(self, model: Any, conditions: Any, seed: int, cfg: float) -> Tensor:
        raise self._needs_tokenizer()

    def images(self, model: Any, conditions: Any, seed: int, cfg: float) -> Tensor:
        raise self._needs_tokenizer()

    def teacher_input(self, model: Any, conditions: Any, token_maps: Tensor) -> Tensor:
        raise self._needs_tokenizer()

    def predicted(self, model: Any, conditions: Any, inputs: Tensor) -> Tensor:
        """Return the logits of all scales; in train mode, texts are left out by PyTorch's random numbers."""
        text, lengths = texts_of(conditions).joined()
        text = text.clone()  # the public forward writes into it
        if model.training:
            kept = torch.rand(len(lengths), device=text.device) >= model.cond_drop_rate
            for part, own, is_kept in zip(text.split(lengths), lengths, kept.tolist(), strict=True):
                if not is_kept:
                    part.copy_(model.cfg_uncond[:own])
        ends = torch.tensor([0, *lengths], device=text.device).cumsum(0).to(torch.int32)
        own_rate, model.cond_drop_rate = model.cond_drop_rate, 0.0  # which Python's random numbers would apply
        try:
            logits = model((text, lengths, ends, max(lengths)), inputs, conditions.schedule)
        finally:
            model.cond_drop_rate = own_rate
        return by_bit(logits, conditions.tau)

    def _needs_tokenizer(self) -> TypeError:
        """Return the error for what the tokenizer has to compute."""
        return TypeError(
            "expected an actvar.models.Infinity, which holds its tokenizer; load the checkpoint with "
            "actvar.load_infinity, whose adapters the public class takes as well"
        )

    # the block

    def block_call(
        self,
        x: Tensor,
        cond_BD: Tensor,
        ca_kv: tuple[Tensor, Tensor, int],
        attn_bias_or_two_vector: Any,
        attn_fn: Any = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Any = None,
        scale_ind: int = 0,
    ) -> BlockCall:
        context = PublicContext(ca_kv, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind)
        scale = scale_ind if attn_bias_or_two_vector is None else None
        return BlockCall(x, cond_BD, scale, context, attn_bias_or_two_vector)

    def block_arguments(self, call: BlockCall) -> dict[str, Any]:
        own = {"x": call.x, "cond_BD": call.cond, "attn_bias_or_two_vector": call.mask}
        return own | call.context._asdict()

    def conditional(self, call: BlockCall) -> BlockCall:
        rows = len(call.cond) // 2
        text, ends, most = call.context.ca_kv  # the texts behind the last end are not read
        context = call.context._replace(ca_kv=(text, ends[: rows + 1], most))
        return call._replace(x=call.x[:rows], cond=call.cond[:rows], context=context)

    def parts_called(self, block: Any) -> dict[str, Called]:
        called, reason = super().parts_called(block), why_called(block.ca_norm, nn.LayerNorm)
        return called if reason is None else called | {NORM: Called("ca_norm", reason)}  # this block calls its norm

    def cache(self, block: Any) -> PublicCache:
        return PublicCache(block.sa)

    def rotation(self, call: BlockCall) -> Tensor:
        schedule = call.context.scale_schedule
        start = sum(frames * h * w for frames, h, w in schedule[: call.scale]) if call.scale else 0
        table = call.context.rope2d_freqs_grid[str(tuple(schedule))].to(call.x.device)
        return table[:, 0, 0, 0, start : start + call.x.shape[1]]

    def called_attention(self, block: Any, u: Tensor, mask: Tensor | None, at: Rows, call: BlockCall) -> Tensor:
        if at.index is not None:
            raise TypeError(
                "sa: expected plain layers, which attention of some tokens can read, got one that has to be called; "
                "the public class rotates all tokens of a scale. Merge or remove what is around it, or load the "
                "checkpoint with actvar.load_infinity"
            )
        context = call.context
        rotary = dict(scale_schedule=context.scale_schedule, rope2d_freqs_grid=context.rope2d_freqs_grid)
        return block.sa(u, mask, context.attn_fn, **rotary, scale_ind=context.scale_ind)

    def between_norm(self, block: Any, rows: int) -> AdaLN:
        norm = super().between_norm(block, rows)
        return norm._replace(gamma=norm.gamma * block.ca_gamma)

    def between(self, block: Any, u: Tensor, at: Rows, call: BlockCall) -> Tensor:
        return block.ca(u, call.context.ca_kv)


class PublicCache(AttentionCache):
    """Read and write the K/V cache of a public block, which lies tokens first for every dtype where it does at all."""

    def tokens_first(self, dtype: torch.dtype) -> bool:
        return self.attn.using_flash
