"""VAR: our `actvar.models.VAR` and the public implementation's class, in any module path."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.var import VAR
from actvar_kernels import (
    backend_of,
    cpp_runs,
    expert_ffn,
    gelu_linear,
    linear,
    linear_once,
    normalize_modulate,
)

NAME = "VAR (actvar.models.VAR or the class of the public VAR code)"
NORM_EPS = 1e-6
MAX_LOG_SCALE = 4.605170185988092  # log(100)
HIDDEN_AXES = {"ffn.fc1.weight": 0, "ffn.fc1.bias": 0, "ffn.fc2.weight": 1}
"""The axis of hidden units in a block's tensors."""


def mismatch(model: nn.Module) -> str | None:
    """Why `model` is not of this family, or None if it is."""
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
    first_with: dict[nn.Parameter, int] = {}
    for index, block in enumerate(model.blocks):
        for path in required:
            part = block
            for name in path.split("."):
                part = getattr(part, name, None)
            if part is None:
                return f"expected blocks[{index}].{path}, which {type(block).__name__} does not have"
        for name in ("fc1", "fc2"):
            linear = getattr(block.ffn, name)
            if not isinstance(linear, nn.Linear) or linear.bias is None:
                return f"expected blocks[{index}].ffn.{name} as nn.Linear with a bias, got {type(linear).__name__}"
        sizes, first = tuple(block.ffn.fc1.weight.shape), tuple(model.blocks[0].ffn.fc1.weight.shape)
        if sizes != first:
            return f"expected blocks[{index}].ffn of the first block's sizes {first}, got {sizes}"
        other = first_with.setdefault(block.ffn.fc1.weight, index)
        if other != index:  # their experts would not be the same
            return f"expected an FFN for every block, got the same one in blocks[{other}] and blocks[{index}]"
        if block.ln_wo_grad.eps != NORM_EPS:
            return f"expected blocks[{index}].ln_wo_grad.eps of {NORM_EPS}, got {block.ln_wo_grad.eps}"
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
    return model.blocks[0].ffn.fc1.in_features


def hidden_size(model: nn.Module) -> int:
    return model.blocks[0].ffn.fc1.out_features


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
    """gamma1, gamma2, scale1, scale2, shift1, shift2, each `[R, 1, C]`, of the block's condition."""
    if block.shared_aln:
        return (block.ada_gss + cond).unbind(2)
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
    """The projection after attention, `[R, K, C]`."""
    proj = block.attn.proj
    return linear(out, proj.weight, proj.bias)


def head_logits(
    model: nn.Module, x: torch.Tensor, cond: torch.Tensor, guidance: float | None = None
) -> torch.Tensor | None:
    """Logits `[R, L, V]` of the last block's output as kernels compute them, in the head's dtype, or None: the model's
    own way.

    With `guidance` they are those after it, `[R / 2, L, V]`, which the head, a linear layer, lets through from the norm
    before it; on Triton only. There the norm is one launch, if neither the head's dtype nor autocast has a say in which
    dtype to compute in."""
    if cpp_runs(x) and guidance is None:
        h = model.head_nm(x.float(), cond)
        h = h if torch.is_autocast_enabled("cpu") else h.to(model.head.weight.dtype)
        return linear(h, model.head.weight, model.head.bias)
    if (
        backend_of("head", x) != "triton"
        or x.dtype != model.head.weight.dtype
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    scale, shift = model.head_nm.ada_lin(cond).unsqueeze(1).chunk(2, dim=-1)
    return model.head(normalize_modulate(x, scale, shift, guidance))


def dense_ffn(block: nn.Module, u: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The block's own FFN of `u` `[R, K, C]`, on CUDA without gradients by `gelu_linear`; where experts run in C++, all
    `num_experts` of them, on the weights that are packed for the sparse scales."""
    weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias = ffn_weights(block)
    if cpp_runs(u):
        every = u.new_ones(*u.shape[:-1], num_experts, dtype=torch.bool)
        return expert_ffn(u, every, num_experts, *weights)
    if not u.is_cuda or torch.is_grad_enabled() or u.dtype != fc1_weight.dtype or torch.is_autocast_enabled("cuda"):
        return block.ffn(u)
    return F.linear(gelu_linear(u.flatten(0, 1), fc1_weight, fc1_bias), fc2_weight, fc2_bias).view_as(u)


def reordered_hidden(block: nn.Module, order: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
    """The FFN's weights, and what they are with hidden unit `order[i]` in place `i`, for a permutation `order` `[D]`.

    The FFN computes the same sum in another order; `order.argsort()` takes every weight back, bit for bit.
    """
    weights = {block.get_parameter(name): axis for name, axis in HIDDEN_AXES.items()}
    return {weight: weight.index_select(axis, order.to(weight.device)) for weight, axis in weights.items()}


def ffn_weights(block: nn.Module) -> tuple[torch.Tensor, ...]:
    """fc1 weight `[D, C]` and bias, fc2 weight `[C, D]` and bias."""
    fc1, fc2 = block.ffn.fc1, block.ffn.fc2
    return fc1.weight, fc1.bias, fc2.weight, fc2.bias
