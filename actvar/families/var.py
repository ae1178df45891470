"""Answer for VAR: `actvar.models.VAR`, and the public implementation's class in any module path."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actvar.families.base import (
    FFN,
    MODULATION,
    PROJECTION,
    BlockCall,
    Called,
    Embedded,
    OnScale,
    Rows,
    Sizes,
)
from actvar.families.defaults import BaseFamily
from actvar.families.var_layers import class_with_forward, is_known, linear_called, parts_called
from actvar.families.var_mixin import PatchedVAR
from actvar.families.var_scales import adding_method, logits_by_scale
from actvar.models.transformer_block import MAX_LOG_SCALE, TransformerBlock
from actvar.models.var import VAR
from actvar.utils.class_swap import own_class
from actvar.utils.wrappers import unwrapped
from actvar_kernels import choose_fused, expert_ffn, gelu_linear, linear, linear_once
from actvar_kernels.constants import NORM_EPS
from actvar_kernels.cpu_backend.packing import once_on_gpu

SHARDED = ("FullyShardedDataParallel", "FSDPModule")
REQUIRED_OF_MODEL = ("blocks", "patch_nums", "autoregressive_infer_cfg", "head", "head_nm")
REQUIRED_OF_BLOCK = (
    "attn.mat_qkv",
    "attn.q_bias",
    "attn.zero_k_bias",
    "attn.v_bias",
    "attn.proj",
    "attn.kv_caching",
    "ffn.fc1",
    "ffn.fc2",
    "ln_wo_grad",
    "shared_aln",
)


class VARFamily(BaseFamily):
    """Answer for VAR; `actvar.families.base.Family` describes the methods."""

    name = "VAR (actvar.models.VAR or the class of the public VAR code)"
    model_mixin: type = PatchedVAR
    leaves_out_guidance = True
    hands_on = True
    takes_int8 = True
    hidden_axes: Mapping[str, int] = {"ffn.fc1.weight": 0, "ffn.fc1.bias": 0, "ffn.fc2.weight": 1}
    weight_kinds: Sequence[tuple[str, str]] = (
        (".attn.mat_qkv.", "qkv"),
        (".attn.proj.", "proj"),
        (".ffn.", "ffn"),
        ("ada_lin.", "adaln"),
        ("head.", "head"),
        ("word_embed.", "head"),
    )

    # the model

    def mismatch(self, model: Any) -> str | None:
        for module in (model, *map(unwrapped, getattr(model, "blocks", ()))):
            if any(kind.__name__ in SHARDED for kind in type(module).__mro__):
                kind = type(module).__name__
                return f"expected whole parameters, got those of a {kind}; patch it before it is sharded"
        for name in REQUIRED_OF_MODEL:
            if not hasattr(model, name):
                return f"expected an attribute {name!r}"
        if not len(model.blocks):
            return "expected at least one block"
        first_with: dict[int, int] = {}
        blocks = [unwrapped(block) for block in model.blocks]
        for index, block in enumerate(blocks):
            problem = _block_mismatch(block, f"blocks[{index}]", _ffn_sizes(blocks[0]))
            if problem is not None:
                return problem
            other = first_with.setdefault(id(block.ffn.fc1._parameters.get("weight", block.ffn.fc1)), index)
            if other != index:  # each block orders its hidden units by its own experts
                return f"expected an FFN for every block, got the same one in blocks[{other}] and blocks[{index}]"
        return None

    def has_draw_and_decode(self, model: Any) -> bool:
        return isinstance(model, VAR)

    def loop_is_ours(self, model: Any) -> bool:
        return own_class(model).autoregressive_infer_cfg is VAR.autoregressive_infer_cfg

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

    def embedded(self, model: Any, labels: Tensor, inputs: Tensor) -> Embedded:
        cond = model.class_emb(labels)
        rest = model.word_embed(inputs.to(model.word_embed.weight.dtype))
        x = torch.cat((cond.unsqueeze(1) + model.pos_start, rest), dim=1)
        x = x + model.lvl_embed(model.lvl_1L) + model.pos_1LC
        mask = model.attn_bias_for_masking.to(x.dtype)
        return Embedded(BlockCall(x, model.shared_ada_lin(cond), mask=mask), cond)

    def without_class(self, model: Any, labels: Tensor) -> Tensor:
        return torch.full_like(labels, model.num_classes)

    def logits(self, model: Any, x: Tensor, head_cond: Tensor) -> Tensor:
        return model.get_logits(x, head_cond)

    def scale_logits(self, model: Any, labels: Tensor, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from logits_by_scale(model, torch.cat((labels, self.without_class(model, labels))), inputs)

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
        setattr(quantizer, method, add_and_call)
        try:
            yield
        finally:
            handle.remove()
            delattr(quantizer, method)

    def teacher_input(self, model: Any, token_maps: Tensor) -> Tensor:
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

    def parts_called(self, block: Any) -> dict[str, Called]:
        return parts_called(block)

    def packed_weights(self, block: Any) -> list[Tensor | None]:
        layers = (block.attn.mat_qkv, block.attn.proj, block.ffn.fc1)
        return [layer._parameters.get("weight") for layer in layers]

    def cache(self, block: Any) -> AttentionCache:
        return AttentionCache(block.attn)

    def modulation(self, block: Any, cond: Tensor) -> tuple[Tensor, ...]:
        if block.shared_aln:
            return (block.ada_gss + cond).unbind(2)
        if MODULATION in _called(block):
            return block.ada_lin(cond).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)
        silu, last = block.ada_lin
        return linear_once(silu(cond), last.weight, last.bias).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)

    def qkv_bias(self, block: Any) -> Tensor:
        attn = block.attn
        biases = attn.q_bias, attn.zero_k_bias, attn.v_bias
        return once_on_gpu(biases, "joined", lambda: torch.cat(biases))

    def project(
        self, block: Any, queries_from: Tensor, keys_from: Tensor, bias: Tensor, queries_at: Rows, keys_at: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        weight = attn.mat_qkv.weight
        int8 = _in_int8(block)
        if queries_from is keys_from:
            q, k, v = _heads(attn, linear(queries_from, weight, bias, int8), 3)
            return q, k, v
        if int8:  # bytes are packed for the whole weight
            q, _, _ = _heads(attn, linear(queries_from, weight, bias, int8), 3)
            _, k, v = _heads(attn, linear(keys_from, weight, bias, int8), 3)
            return q, k, v
        C = weight.shape[1]
        (q,) = _heads(attn, F.linear(queries_from, weight[:C], bias[:C]), 1)
        k, v = _heads(attn, F.linear(keys_from, weight[C:], bias[C:]), 2)
        return q, k, v

    def head_scale(self, block: Any) -> Tensor | None:
        if not block.attn.attn_l2_norm:
            return None
        scale = block.attn.scale_mul_1H11
        return once_on_gpu((scale,), "of heads", lambda: scale.clamp_max(MAX_LOG_SCALE).exp().flatten())

    def attention_scale(self, block: Any) -> float:
        return block.attn.scale

    def called_attention(self, block: Any, u: Tensor, mask: Tensor | None) -> Tensor:
        return block.attn(u, attn_bias=mask)

    def attention_output(self, block: Any, out: Tensor) -> Tensor:
        proj = block.attn.proj
        if PROJECTION in _called(block):
            return proj(out)
        return linear(out, proj.weight, proj.bias, _in_int8(block))

    def dense_ffn(self, block: Any, u: Tensor, num_experts: int) -> Tensor:
        """Return the FFN of `u` `[R, K, C]`: in C++ as experts that are all on, on CUDA by `gelu_linear`."""
        if FFN in _called(block):
            return block.ffn(u)
        weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias = self.ffn_weights(block)
        if choose_fused(u).packs_weights:
            every = u.new_ones(*u.shape[:-1], num_experts, dtype=torch.bool)
            return expert_ffn(u, every, num_experts, *weights)
        if not u.is_cuda or torch.is_grad_enabled() or u.dtype != fc1_weight.dtype or torch.is_autocast_enabled("cuda"):
            return block.ffn(u)
        return F.linear(gelu_linear(u.flatten(0, 1), fc1_weight, fc1_bias), fc2_weight, fc2_bias).view_as(u)

    def ffn_module(self, block: Any) -> Any:
        return block.ffn

    def set_ffn_module(self, block: Any, ffn: nn.Module) -> None:
        block.ffn = ffn

    def pruned_ffn(self, block: Any, units: Tensor) -> Any:
        ffn = block.ffn
        small = copy.deepcopy(ffn).requires_grad_(False)
        small.fc1.weight, small.fc1.bias = nn.Parameter(ffn.fc1.weight[units]), nn.Parameter(ffn.fc1.bias[units])
        small.fc2.weight = nn.Parameter(ffn.fc2.weight[:, units].contiguous())
        small.fc1.out_features = small.fc2.in_features = len(units)
        return small.requires_grad_(False)

    def ffn_weights(self, block: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fc1, fc2 = block.ffn.fc1, block.ffn.fc2
        return fc1.weight, fc1.bias, fc2.weight, fc2.bias


class AttentionCache(NamedTuple):
    """Read and write the K/V cache that a block of VAR keeps in its attention module; see `base.Cache`."""

    attn: Any

    @property
    def is_on(self) -> bool:
        return self.attn.caching

    @property
    def rows(self) -> int:
        past = self.read()
        return 0 if past is None else past[0].shape[2]

    @property
    def version(self) -> Tensor | None:
        return self.attn.cached_k

    def start(self) -> None:
        self.attn.kv_caching(True)

    def drop(self) -> None:
        self.attn.kv_caching(False)

    def read(self) -> tuple[Tensor, Tensor] | None:
        attn = self.attn
        keys, values = attn.cached_k, attn.cached_v
        if not attn.caching or keys is None:
            return None
        swap = _tokens_first(attn, values.dtype)
        return (keys.transpose(1, 2), values.transpose(1, 2)) if swap else (keys, values)

    def write(self, keys: Tensor, values: Tensor) -> None:
        attn = self.attn
        if attn.caching:
            swap = _tokens_first(attn, values.dtype)
            attn.cached_k = keys.transpose(1, 2) if swap else keys
            attn.cached_v = values.transpose(1, 2) if swap else values


def _called(block: Any) -> Mapping[str, Called]:
    """Return the parts that are called: those found when the sample began, or found now in a block without a patch."""
    state = block._modules.get("actvar")
    return parts_called(block) if state is None else state.called


def _in_int8(block: Any) -> bool:
    """Return whether a block multiplies in eight bits, which one without a patch does not."""
    state = block._modules.get("actvar")
    return state is not None and state.int8


def _block_mismatch(block: Any, place: str, first: tuple[int | None, int | None]) -> str | None:
    """Return why a block is not of this family, or None if it is.

    Args:
        block: a transformer block outside of wrappers.
        place: name of the block, for the message.
        first: the first block's `_ffn_sizes`.
    """
    for path in REQUIRED_OF_BLOCK:
        part = block
        for name in path.split("."):
            part = getattr(part, name, None)
        if part is None:
            return f"expected {place}.{path}, which {type(block).__name__} does not have"
    if not is_known(class_with_forward(block), TransformerBlock):
        return f"expected {place} with the forward of a known class, got a {type(block).__name__}"
    sizes = _ffn_sizes(block)
    if None in sizes or sizes != first:
        return f"expected {place}.ffn of the first block's sizes {first}, got {sizes}"
    if block.ln_wo_grad.eps != NORM_EPS:
        return f"expected {place}.ln_wo_grad.eps of {NORM_EPS}, got {block.ln_wo_grad.eps}"
    return None


def _ffn_sizes(block: Any) -> tuple[int | None, int | None]:
    """Return hidden units and inputs of the FFN, read from its first layer; None for a size that is not there."""
    fc1 = getattr(getattr(block, "ffn", None), "fc1", None)
    return getattr(fc1, "out_features", None), getattr(fc1, "in_features", None)


def _heads(attn: Any, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split `projected` `[R, L, parts * C]` into `parts` tensors `[R, H, L, d]`."""
    R, L, _ = projected.shape
    split = projected.view(R, L, parts, attn.num_heads, attn.head_dim)
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def _tokens_first(attn: Any, dtype: torch.dtype) -> bool:
    """Return whether the cache is `[R, tokens, H, d]`, as flash-attention and xformers keep it.

    The public code uses flash-attention only for dtypes other than float32.
    """
    flags = vars(attn)  # faster than `getattr` where a flag is missing
    return (flags.get("using_flash", False) and dtype != torch.float32) or flags.get("using_xform", False)
