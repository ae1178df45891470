"""VAR: our `actvar.models.VAR` and the public implementation's class, in any module path."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

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
from actvar.families.var_layers import class_with_forward, is_known, linear_called, parts_called
from actvar.families.var_model import PatchedVAR
from actvar.models.var import MAX_LOG_SCALE, VAR, TransformerBlock
from actvar.utils.class_swap import own_class
from actvar.utils.wrappers import unwrapped
from actvar_kernels import choose_fused, expert_ffn, gelu_linear, linear, linear_once
from actvar_kernels.constants import NORM_EPS
from actvar_kernels.situation import are_plain

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


class VARFamily:
    """Answers of VAR; the methods are described in `actvar.families.base.Family`."""

    name = "VAR (actvar.models.VAR or the class of the public VAR code)"
    model_mixin = PatchedVAR
    has_between = False
    hidden_axes: Mapping[str, int] = {"ffn.fc1.weight": 0, "ffn.fc1.bias": 0, "ffn.fc2.weight": 1}
    weight_kinds = (
        (".attn.mat_qkv.", "qkv"),
        (".attn.proj.", "proj"),
        (".ffn.", "ffn"),
        ("ada_lin.", "adaln"),
        ("head.", "head"),
        ("word_embed.", "head"),
    )

    # the model

    def mismatch(self, model: nn.Module) -> str | None:
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
            if other != index:  # their experts would not be the same
                return f"expected an FFN for every block, got the same one in blocks[{other}] and blocks[{index}]"
        return None

    def has_draw_and_decode(self, model: nn.Module) -> bool:
        return isinstance(model, VAR)

    def loop_is_ours(self, model: nn.Module) -> bool:
        return _unpatched_class(model).autoregressive_infer_cfg is VAR.autoregressive_infer_cfg

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.blocks

    def maps(self, model: nn.Module) -> tuple[tuple[int, int], ...]:
        return tuple((side, side) for side in model.patch_nums)

    def sizes(self, model: nn.Module) -> Sizes:
        first = unwrapped(model.blocks[0])
        hidden, width = _ffn_sizes(first)
        head, embedding = unwrapped(model.head), unwrapped(model.word_embed)
        return Sizes(width, hidden, embedding.in_features, head.out_features, first.shared_aln)

    def recorded_sizes(self, model: nn.Module) -> dict[str, int | list[int]]:
        sizes = self.sizes(model)
        return {
            "depth": len(model.blocks),
            "width": sizes.width,
            "hidden": sizes.hidden,
            "patch_nums": list(model.patch_nums),
        }

    def autoencoder(self, model: nn.Module) -> nn.Module:
        return model.vae_proxy[0]

    def finetuned_names(self, model: nn.Module) -> list[str]:
        """Return attention, FFN and head; not AdaLN, norms and embeddings."""
        block_names = [
            f"blocks.{index}.{part}.{name}"
            for index, block in enumerate(model.blocks)
            for part in ("attn", "ffn")
            for name, _ in getattr(block, part).named_parameters()
        ]
        return [*block_names, *(f"head.{name}" for name, _ in model.head.named_parameters())]

    def embedded(self, model: nn.Module, labels: Tensor, inputs: Tensor) -> Embedded:
        cond = model.class_emb(labels)
        rest = model.word_embed(inputs.to(model.word_embed.weight.dtype))
        x = torch.cat((cond.unsqueeze(1) + model.pos_start, rest), dim=1)
        x = x + model.lvl_embed(model.lvl_1L) + model.pos_1LC
        mask = model.attn_bias_for_masking.to(x.dtype)
        return Embedded(BlockCall(x, model.shared_ada_lin(cond), mask=mask), cond)

    def without_class(self, model: nn.Module, labels: Tensor) -> Tensor:
        return torch.full_like(labels, model.num_classes)

    def logits(self, model: nn.Module, x: Tensor, head_cond: Tensor) -> Tensor:
        return model.get_logits(x, head_cond)

    def scale_logits(self, model: nn.Module, labels: Tensor, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        scale_inputs = inputs.split([side * side for side in model.patch_nums[1:]], dim=1)
        condition = model.condition(torch.cat((labels, self.without_class(model, labels))))
        blocks = [unwrapped(block) for block in model.blocks]
        try:
            for block in blocks:
                self.cache(block).start()
            for scale in model.scales():
                yield scale, model.predict(scale, scale_inputs[scale - 1] if scale else None, condition)
        finally:
            for block in blocks:
                self.cache(block).drop()

    @contextmanager
    def watch_scales(self, model: nn.Module, on_scale: OnScale) -> Iterator[None]:
        quantizer = model.vae_proxy[0].quantize
        tokens: list[Tensor] = []
        add_scale, method = _adding_method(quantizer)

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

    def teacher_input(self, model: nn.Module, token_maps: Tensor) -> Tensor:
        quantizer = model.vae_proxy[0].quantize
        maps = list(token_maps.split([side * side for side in model.patch_nums], dim=1))
        own = getattr(quantizer, "teacher_input", None)
        return own(maps) if own is not None else quantizer.idxBl_to_var_input(maps)

    def head_called(self, model: nn.Module) -> str | None:
        return linear_called(model.head)

    def packed_head(self, model: nn.Module) -> list[Tensor | None]:
        return [model.head._parameters.get("weight")]

    # the block

    def block_call(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None = None) -> BlockCall:
        return BlockCall(x, cond_BD, mask=attn_bias)

    def block_arguments(self, call: BlockCall) -> dict[str, Tensor | None]:
        return {"x": call.x, "cond_BD": call.cond, "attn_bias": call.mask}

    def parts_called(self, block: nn.Module) -> dict[str, Called]:
        return parts_called(block)

    def packed_weights(self, block: nn.Module) -> list[Tensor | None]:
        layers = (block.attn.mat_qkv, block.attn.proj, block.ffn.fc1)
        return [layer._parameters.get("weight") for layer in layers]

    def cache(self, block: nn.Module) -> AttentionCache:
        return AttentionCache(block.attn)

    def modulation(self, block: nn.Module, cond: Tensor) -> tuple[Tensor, ...]:
        if block.shared_aln:
            return (block.ada_gss + cond).unbind(2)
        if MODULATION in _called(block):
            return block.ada_lin(cond).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)
        silu, last = block.ada_lin
        return linear_once(silu(cond), last.weight, last.bias).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)

    def qkv_bias(self, block: nn.Module) -> Tensor:
        attn = block.attn
        return torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias))

    def project(
        self, block: nn.Module, queries_from: Tensor, keys_from: Tensor, bias: Tensor, _queries_at: Rows, _keys_at: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        weight = attn.mat_qkv.weight
        if queries_from is keys_from:
            return _heads(attn, linear(queries_from, weight, bias), 3)
        C = weight.shape[1]
        q = _heads(attn, F.linear(queries_from, weight[:C], bias[:C]), 1)
        kv = _heads(attn, F.linear(keys_from, weight[C:], bias[C:]), 2)
        return *q, *kv

    def head_scale(self, block: nn.Module) -> Tensor | None:
        if not block.attn.attn_l2_norm:
            return None
        return block.attn.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().flatten()

    def attention_scale(self, block: nn.Module) -> float:
        return block.attn.scale

    def called_attention(self, block: nn.Module, u: Tensor, mask: Tensor | None) -> Tensor:
        return block.attn(u, attn_bias=mask)

    def attention_output(self, block: nn.Module, out: Tensor) -> Tensor:
        proj = block.attn.proj
        if PROJECTION in _called(block):
            return proj(out)
        return linear(out, proj.weight, proj.bias)

    def between(self, _block: nn.Module, rows: Tensor, _at: Rows, _call: BlockCall) -> Tensor:
        return rows

    def dense_ffn(self, block: nn.Module, u: Tensor, num_experts: int) -> Tensor:
        """Return the FFN of `u`: in C++ by all experts on the packed weights, on CUDA by `gelu_linear`."""
        if FFN in _called(block):
            return block.ffn(u)
        weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias = self.ffn_weights(block)
        if choose_fused(u).packs_weights:
            every = u.new_ones(*u.shape[:-1], num_experts, dtype=torch.bool)
            return expert_ffn(u, every, num_experts, *weights)
        if not u.is_cuda or torch.is_grad_enabled() or u.dtype != fc1_weight.dtype or torch.is_autocast_enabled("cuda"):
            return block.ffn(u)
        return F.linear(gelu_linear(u.flatten(0, 1), fc1_weight, fc1_bias), fc2_weight, fc2_bias).view_as(u)

    def called_ffn(self, block: nn.Module, u: Tensor) -> Tensor:
        return block.ffn(u)

    def ffn_module(self, block: nn.Module) -> nn.Module:
        return block.ffn

    def set_ffn_module(self, block: nn.Module, ffn: nn.Module) -> None:
        block.ffn = ffn

    def pruned_ffn(self, block: nn.Module, units: Tensor) -> nn.Module:
        ffn = block.ffn
        small = copy.deepcopy(ffn).requires_grad_(False)
        small.fc1.weight, small.fc1.bias = nn.Parameter(ffn.fc1.weight[units]), nn.Parameter(ffn.fc1.bias[units])
        small.fc2.weight = nn.Parameter(ffn.fc2.weight[:, units].contiguous())
        small.fc1.out_features = small.fc2.in_features = len(units)
        return small.requires_grad_(False)

    def ffn_weights(self, block: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fc1, fc2 = block.ffn.fc1, block.ffn.fc2
        return fc1.weight, fc1.bias, fc2.weight, fc2.bias

    def reordered_hidden(self, block: nn.Module, order: Tensor) -> dict[nn.Parameter, Tensor]:
        axes = {}
        for name, axis in self.hidden_axes.items():
            layer, leaf = block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            weight = layer._parameters.get(leaf)
            if own_class(layer) is not nn.Linear or weight is None or not are_plain(weight):
                raise TypeError(f"{name}: expected a plain layer, whose hidden units can be reordered, got {layer}")
            axes[weight] = axis
        return {weight: weight.index_select(axis, order.to(weight.device)) for weight, axis in axes.items()}


class AttentionCache(NamedTuple):
    """The K/V cache that a block of VAR keeps in its attention module, see `actvar.families.base.Cache`."""

    attn: nn.Module

    @property
    def is_on(self) -> bool:
        return self.attn.caching

    @property
    def rows(self) -> int:
        past = self.read()
        return 0 if past is None else past[0].shape[2]

    @property
    def key(self) -> Tensor | None:
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


def _called(block: nn.Module) -> Mapping[str, Called]:
    """Return what `parts_called` said when the sample began; for a block that is not patched what it says now."""
    state = block._modules.get("actvar")
    return parts_called(block) if state is None else state.called


def _block_mismatch(block: nn.Module, place: str, first: tuple[int | None, int | None]) -> str | None:
    """Return why a block is not of this family, or None; `first` are hidden units and inputs of the first block."""
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


def _ffn_sizes(block: nn.Module) -> tuple[int | None, int | None]:
    """Return hidden units and inputs of the FFN, by its first layer, which may be wrapped."""
    fc1 = getattr(getattr(block, "ffn", None), "fc1", None)
    return getattr(fc1, "out_features", None), getattr(fc1, "in_features", None)


def _unpatched_class(model: nn.Module) -> type:
    return getattr(type(model), "original_class", type(model))


def _adding_method(quantizer: nn.Module):
    """Return the method that adds a scale to the image's features, and its name: ours or the public code's."""
    for name in ("add_scale", "get_next_autoregressive_input"):
        if hasattr(quantizer, name):
            return getattr(quantizer, name), name
    raise TypeError(f"expected the quantizer of a VAR, got {type(quantizer).__name__}")


def _heads(attn: nn.Module, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Return queries, keys and values `[R, H, L, d]`, `parts` of them, of `projected` `[R, L, parts * C]`."""
    R, L, _ = projected.shape
    split = projected.view(R, L, parts, attn.num_heads, attn.head_dim)
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def _tokens_first(attn: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether the cache is `[R, tokens, H, d]`, as flash-attention and xformers keep it.

    The public code takes flash only below float32.
    """
    flags = vars(attn)  # where a flag that is not there is found missing at once
    return (flags.get("using_flash", False) and dtype != torch.float32) or flags.get("using_xform", False)
