"""VAR: our `actvar.models.VAR` and the public implementation's class, in any module path."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.var import MAX_LOG_SCALE, VAR, FeedForward, HeadNorm, SelfAttention, TransformerBlock
from actvar.utils.class_swap import own_class
from actvar.utils.plain_layers import is_ordinary, why_called, why_not_by_class
from actvar.utils.wrappers import unwrapped
from actvar_kernels import (
    choose_fused,
    expert_ffn,
    gelu_linear,
    linear,
    linear_once,
    normalize_modulate,
)
from actvar_kernels.backend import are_plain
from actvar_kernels.constants import NORM_EPS

NAME = "VAR (actvar.models.VAR or the class of the public VAR code)"
PUBLIC_NAMES = {
    TransformerBlock: "AdaLNSelfAttn",
    SelfAttention: "SelfAttention",
    FeedForward: "FFN",
    HeadNorm: "AdaLNBeforeHead",
}
"""Classes of `actvar.models.var`, and what the public code calls those with the same forward."""
INERT = (nn.Identity, nn.Dropout, nn.GELU)
"""Layers inside of attention and FFN of the public code that kernels leave out, or compute themselves."""
SHARDED = ("FullyShardedDataParallel", "FSDPModule")
HIDDEN_AXES = {"ffn.fc1.weight": 0, "ffn.fc1.bias": 0, "ffn.fc2.weight": 1}
"""The axis of hidden units in a block's tensors."""


def mismatch(model: nn.Module) -> str | None:
    """Why `model` is not of this family, or None if it is."""
    for module in (model, *map(unwrapped, getattr(model, "blocks", ()))):
        if any(kind.__name__ in SHARDED for kind in type(module).__mro__):
            return f"expected whole parameters, got those of a {type(module).__name__}; patch it before it is sharded"
    for name in ("blocks", "patch_nums", "autoregressive_infer_cfg", "head", "head_nm"):
        if not hasattr(model, name):
            return f"expected an attribute {name!r}"
    if not len(model.blocks):
        return "expected at least one block"
    required = (
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
    first_with: dict[int, int] = {}
    for index, block in enumerate(map(unwrapped, model.blocks)):
        for path in required:
            part = block
            for name in path.split("."):
                part = getattr(part, name, None)
            if part is None:
                return f"expected blocks[{index}].{path}, which {type(block).__name__} does not have"
        if not _is_known(_class_with_forward(block), TransformerBlock):
            return f"expected blocks[{index}] with the forward of a known class, got a {type(block).__name__}"
        sizes, first = _ffn_sizes(block), _ffn_sizes(unwrapped(model.blocks[0]))
        if None in sizes or sizes != first:
            return f"expected blocks[{index}].ffn of the first block's sizes {first}, got {sizes}"
        other = first_with.setdefault(id(block.ffn.fc1._parameters.get("weight", block.ffn.fc1)), index)
        if other != index:  # their experts would not be the same
            return f"expected an FFN for every block, got the same one in blocks[{other}] and blocks[{index}]"
        if block.ln_wo_grad.eps != NORM_EPS:
            return f"expected blocks[{index}].ln_wo_grad.eps of {NORM_EPS}, got {block.ln_wo_grad.eps}"
    return None


def _class_with_forward(module: nn.Module) -> type:
    """Return the class, apart from mixins of a patch, that defines the `forward` of `module`."""
    return next(kind for kind in own_class(module).__mro__ if "forward" in kind.__dict__)


def _is_known(kind: type, own: type) -> bool:
    """Return whether `kind` is `own`, or the public code's class in its place, in any module path."""
    return kind is own or (kind.__name__ == PUBLIC_NAMES[own] and kind.__bases__ == (nn.Module,))


def _ffn_sizes(block: nn.Module) -> tuple[int | None, int | None]:
    """Return hidden units and inputs of the FFN, as its first layer says, which may be wrapped."""
    fc1 = block.ffn.fc1
    return getattr(fc1, "out_features", None), getattr(fc1, "in_features", None)


def parts_called(block: nn.Module) -> dict[str, str]:
    """Return the parts of a block that kernels must not read, and why not.

    Keys are among `"ln_wo_grad"`, `"ada_lin"`, `"attn"`, `"attn.proj"` and `"ffn"`. A part that is not there is read.
    `mat_qkv` counts as `attn`, which reads its weight and does not call it.
    """
    attn, ffn = block.attn, block.ffn
    found = {
        "ln_wo_grad": why_called(block.ln_wo_grad, nn.LayerNorm),
        "attn": _module_called(attn, SelfAttention, {"mat_qkv", "proj"}) or _weight_called(attn.mat_qkv),
        "attn.proj": _linear_called(attn.proj),
        "ffn": _ffn_called(ffn),
    }
    if not block.shared_aln:
        found["ada_lin"] = _ada_lin_called(block.ada_lin)
    return {part: reason for part, reason in found.items() if reason is not None}


def called(block: nn.Module) -> Mapping[str, str]:
    """Return what `parts_called` said when the sample began, of a block that is not patched what it says."""
    gates = block._modules.get("actvar")
    return parts_called(block) if gates is None else gates.called


def head_called(model: nn.Module) -> str | None:
    """Return why the head must be called instead of read, or None."""
    return _linear_called(model.head)


def _linear_called(layer: nn.Module) -> str | None:
    """Return why a linear layer must be called, or None."""
    reason = why_called(layer, nn.Linear)
    return "has no bias" if reason is None and layer.bias is None else reason


def _module_called(module: nn.Module, own: type, read: Collection[str]) -> str | None:
    """Return why a module of several layers must be called, or None; layers named in `read` are looked at elsewhere."""
    kind = own_class(module)
    if not _is_known(kind, own):
        return f"is of {kind.__module__}.{kind.__qualname__}"
    others = ((name, layer) for name, layer in module._modules.items() if name not in read)
    return why_not_by_class(module) or _first(others, lambda layer: why_called(layer, *INERT))


def _ffn_called(ffn: nn.Module) -> str | None:
    """Return why an FFN must be called, or None."""
    reason = _module_called(ffn, FeedForward, {"fc1", "fc2"})
    reason = reason or _first([("fc1", ffn.fc1), ("fc2", ffn.fc2)], _linear_called)
    if reason is None and getattr(ffn._modules.get("act"), "approximate", "tanh") != "tanh":
        return "act is another GELU than that of tanh"
    return reason


def _ada_lin_called(ada_lin: nn.Module) -> str | None:
    """Return why a block's AdaLN must be called, or None."""
    reason = why_called(ada_lin, nn.Sequential)
    if reason is None and len(ada_lin) != 2:
        return f"has {len(ada_lin)} layers"
    return (
        reason
        or _first([("0", ada_lin[0])], lambda silu: why_called(silu, nn.SiLU))
        or (_first([("1", ada_lin[1])], _linear_called))
    )


def _weight_called(layer: nn.Module) -> str | None:
    """Return why the weight of `mat_qkv`, of which attention calls nothing, must not be read by kernels, or None."""
    weight = layer._parameters.get("weight")
    if own_class(layer) is nn.Linear and weight is not None and is_ordinary(weight):
        return None
    return f"mat_qkv is a {type(layer).__qualname__}, or has a weight of a tensor subclass"


def _first(layers: Iterable[tuple[str, nn.Module]], reason_of: Callable[[nn.Module], str | None]) -> str | None:
    """Return the first reason among `layers`, behind the layer's name, or None."""
    for name, layer in layers:
        reason = reason_of(layer)
        if reason is not None:
            return f"{name} {reason}"
    return None


def has_draw_and_decode(model: nn.Module) -> bool:
    """Whether the model's sampling loop draws its tokens and decodes images by methods that a patch can replace."""
    return isinstance(model, VAR)


def loop_is_ours(model: nn.Module) -> bool:
    """Whether `autoregressive_infer_cfg` of the unpatched class is that of `actvar.models.VAR`."""
    return getattr(type(model), "original_class", type(model)).autoregressive_infer_cfg is VAR.autoregressive_infer_cfg


def draw_is_ours(model: nn.Module) -> bool:
    """Whether `draw` of the unpatched class is that of `actvar.models.VAR`."""
    return getattr(getattr(type(model), "original_class", type(model)), "draw", None) is VAR.draw


def width(model: nn.Module) -> int:
    """Return the channels of a token."""
    return _ffn_sizes(unwrapped(model.blocks[0]))[1]


def hidden_size(model: nn.Module) -> int:
    """Return the hidden units of an FFN."""
    return _ffn_sizes(unwrapped(model.blocks[0]))[0]


def finetuned_names(model: nn.Module) -> list[str]:
    """Names of the parameters that stage 2 trains: attention, FFN and head; not AdaLN, norms and embeddings."""
    of_blocks = [
        f"blocks.{index}.{part}.{name}"
        for index, block in enumerate(model.blocks)
        for part in ("attn", "ffn")
        for name, _ in getattr(block, part).named_parameters()
    ]
    return [*of_blocks, *(f"head.{name}" for name, _ in model.head.named_parameters())]


def embedded(model: nn.Module, labels: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first block gets under teacher forcing, `[R, L, C]`, and the condition that every block gets.

    Args:
        labels: classes `[R]`, `model.num_classes` for rows without one.
        inputs: `[R, L - first_l, Cvae]`, see `VectorQuantizer.teacher_input`.
    """
    cond = model.class_emb(labels)
    rest = model.word_embed(inputs.to(model.word_embed.weight.dtype))
    x = torch.cat((cond.unsqueeze(1) + model.pos_start, rest), dim=1)
    return x + model.lvl_embed(model.lvl_1L) + model.pos_1LC, model.shared_ada_lin(cond)


def modulation(block: nn.Module, cond: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """gamma1, gamma2, scale1, scale2, shift1, shift2, each `[R, 1, C]`, of a patched block's condition."""
    if block.shared_aln:
        return (block.ada_gss + cond).unbind(2)
    if "ada_lin" in called(block):
        return block.ada_lin(cond).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)
    silu, last = block.ada_lin
    return linear_once(silu(cond), last.weight, last.bias).unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)


def qkv_bias(block: nn.Module) -> torch.Tensor:
    """Bias of queries, keys and values, `[3C]`."""
    attn = block.attn
    return torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias))


def project(
    block: nn.Module, queries_from: torch.Tensor, keys_from: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """q `[R, H, K, d]` of `queries_from` `[R, K, C]`; k and v `[R, H, T, d]` of `keys_from` `[R, T, C]`.

    `bias` `[3C]` is that of `qkv_bias`.
    """
    attn = block.attn
    weight = attn.mat_qkv.weight
    if queries_from is keys_from:
        return _heads(attn, linear(queries_from, weight, bias), 3)
    C = weight.shape[1]
    q = _heads(attn, F.linear(queries_from, weight[:C], bias[:C]), 1)
    kv = _heads(attn, F.linear(keys_from, weight[C:], bias[C:]), 2)
    return *q, *kv


def _heads(attn: nn.Module, projected: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    R, L, _ = projected.shape
    split = projected.view(R, L, parts, attn.num_heads, attn.head_dim)
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def head_scale(block: nn.Module) -> torch.Tensor | None:
    """Per-head query scale `[H]` under QK norm, or None without it."""
    if not block.attn.attn_l2_norm:
        return None
    return block.attn.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().flatten()


def cached_tokens(block: nn.Module) -> int:
    """Rows in the block's K/V cache."""
    past = read_cache(block)
    return 0 if past is None else past[0].shape[2]


def read_cache(block: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cached keys and values, each `[R, H, P, d]`, or None when nothing is cached."""
    attn = block.attn
    keys, values = attn.cached_k, attn.cached_v
    if not attn.caching or keys is None:
        return None
    return (keys.transpose(1, 2), values.transpose(1, 2)) if _tokens_first(attn, values.dtype) else (keys, values)


def write_cache(block: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Replace the cache by `keys` and `values` `[R, H, P, d]`, in the layout that the block itself uses."""
    attn = block.attn
    if attn.caching:
        swap = _tokens_first(attn, values.dtype)
        attn.cached_k = keys.transpose(1, 2) if swap else keys
        attn.cached_v = values.transpose(1, 2) if swap else values


def drop_cache(block: nn.Module) -> None:
    """Empty the block's K/V cache and stop caching."""
    block.attn.kv_caching(False)


def _tokens_first(attn: nn.Module, dtype: torch.dtype) -> bool:
    """Flash-attention and xformers keep `[R, tokens, H, d]`; the public code takes flash only below float32."""
    flags = vars(attn)  # where a flag that is not there is found missing at once
    return (flags.get("using_flash", False) and dtype != torch.float32) or flags.get("using_xform", False)


def attention_output(block: nn.Module, out: torch.Tensor) -> torch.Tensor:
    """Return the projection after attention, `[R, K, C]`, of a patched block."""
    proj = block.attn.proj
    return proj(out) if "attn.proj" in called(block) else linear(out, proj.weight, proj.bias)


def head_logits(
    model: nn.Module, x: torch.Tensor, cond: torch.Tensor, guidance: float | None = None
) -> torch.Tensor | None:
    """Logits `[R, L, V]` of the last block's output as kernels compute them, in the head's dtype, or None: the model's
    own way.

    With `guidance` they are those after it, `[R / 2, L, V]`, which the head, a linear layer, lets through from the norm
    before it; on Triton only. There the norm is one launch, if neither the head's dtype nor autocast has a say in which
    dtype to compute in."""
    if head_called(model) is not None:
        return None
    backend = choose_fused(x)
    if backend.packs_weights and guidance is None:
        h = model.head_nm(x.float(), cond)
        h = h if torch.is_autocast_enabled("cpu") else h.to(model.head.weight.dtype)
        return linear(h, model.head.weight, model.head.bias)
    if not backend.fuses_residual or x.dtype != model.head.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return None
    norm = model.head_nm
    if _module_called(norm, HeadNorm, {"ada_lin", "ln_wo_grad"}) or why_called(norm.ln_wo_grad, nn.LayerNorm):
        return None
    scale, shift = model.head_nm.ada_lin(cond).unsqueeze(1).chunk(2, dim=-1)
    return model.head(normalize_modulate(x, scale, shift, guidance))


def dense_ffn(block: nn.Module, u: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The block's own FFN of `u` `[R, K, C]`, on CUDA without gradients by `gelu_linear`; where experts run in C++, all
    `num_experts` of them, on the weights that are packed for the sparse scales."""
    if "ffn" in called(block):
        return block.ffn(u)
    weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias = ffn_weights(block)
    backend = choose_fused(u)
    if backend.packs_weights:
        every = u.new_ones(*u.shape[:-1], num_experts, dtype=torch.bool)
        return expert_ffn(u, every, num_experts, *weights)
    converts = u.dtype != fc1_weight.dtype or torch.is_autocast_enabled(u.device.type)
    if not backend.fuses or torch.is_grad_enabled() or converts:
        return block.ffn(u)
    return F.linear(gelu_linear(u.flatten(0, 1), fc1_weight, fc1_bias), fc2_weight, fc2_bias).view_as(u)


def packed_weights(block: nn.Module) -> list[torch.Tensor | None]:
    """Return the weights of a block that kernels keep packed copies of; None for a layer without one of its own."""
    layers = (block.attn.mat_qkv, block.attn.proj, block.ffn.fc1)
    return [layer._parameters.get("weight") for layer in layers]


def reordered_hidden(block: nn.Module, order: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
    """The FFN's weights, and what they are with hidden unit `order[i]` in place `i`, for a permutation `order` `[D]`.

    The FFN computes the same sum in another order; `order.argsort()` takes every weight back, bit for bit.

    Raises:
        TypeError: a layer of the FFN is more than its weight.
    """
    weights = {}
    for name, axis in HIDDEN_AXES.items():
        layer, leaf = block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        weight = layer._parameters.get(leaf)
        if own_class(layer) is not nn.Linear or weight is None or not are_plain(weight):
            raise TypeError(f"{name}: expected a plain layer, whose hidden units can be reordered, got {layer}")
        weights[weight] = axis
    return {weight: weight.index_select(axis, order.to(weight.device)) for weight, axis in weights.items()}


def ffn_weights(block: nn.Module) -> tuple[torch.Tensor, ...]:
    """fc1 weight `[D, C]` and bias, fc2 weight `[C, D]` and bias."""
    fc1, fc2 = block.ffn.fc1, block.ffn.fc2
    return fc1.weight, fc1.bias, fc2.weight, fc2.bias
