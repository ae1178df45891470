"""The answers for blocks whose layers have the names of the public VAR code; Infinity's blocks have them too.

Attention has `mat_qkv`, `q_bias`, `zero_k_bias`, `v_bias` and `proj`, and keeps the K/V cache. The FFN has `fc1` and
`fc2`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actvar.families.base import FFN, PROJECTION, Called
from actvar.families.defaults import BaseFamily
from actvar.families.kv_cache import AttentionCache
from actvar.families.layers import class_with_forward, is_known
from actvar.utils.wrappers import unwrapped
from actvar_kernels import Gated, choose_fused, expert_ffn, gelu_linear, linear, linear_residual, norm_linear
from actvar_kernels.constants import NORM_EPS
from actvar_kernels.cpu_backend.packing import once_on_gpu
from actvar_kernels.triton_backend.row_form import NormedRows

SHARDED = ("FullyShardedDataParallel", "FSDPModule")


class NamedLayersFamily(BaseFamily):
    """Answer for blocks with the public names; a family inherits it and adds its own."""

    takes_eight_bits = True
    takes_few_rows = True
    hidden_axes: Mapping[str, int] = {"ffn.fc1.weight": 0, "ffn.fc1.bias": 0, "ffn.fc2.weight": 1}

    def attention(self, block: Any) -> Any:
        """Return the self-attention of a block; every family has its own."""
        raise NotImplementedError

    def parts_called(self, block: Any) -> dict[str, Called]:
        """Return the parts that kernels must not read; every family has its own."""
        raise NotImplementedError

    def called(self, block: Any) -> Mapping[str, Called]:
        """Return `parts_called` as found when the sample began, or now for a block without a patch."""
        state = block._modules.get("actvar")
        return self.parts_called(block) if state is None else state.called

    def packed_weights(self, block: Any) -> list[Tensor | None]:
        attention = self.attention(block)
        layers = (attention.mat_qkv, attention.proj, block.ffn.fc1)
        return [layer._parameters.get("weight") for layer in layers]

    def cache(self, block: Any) -> AttentionCache:
        return AttentionCache(self.attention(block))

    def qkv_bias(self, block: Any) -> Tensor:
        attention = self.attention(block)
        biases = attention.q_bias, attention.zero_k_bias, attention.v_bias
        return once_on_gpu(biases, "joined", lambda: torch.cat(biases))

    def projected(
        self, block: Any, queries_from: Tensor, keys_from: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[R, H, K, d]`, keys and values `[R, H, T, d]` without position encodings, see `project`."""
        attention = self.attention(block)
        weight = attention.mat_qkv.weight
        quantized = _quantized(block)
        if queries_from is keys_from:
            q, k, v = _heads(attention, linear(queries_from, weight, bias, quantized), 3)
            return q, k, v
        if quantized is not None:  # bytes are packed for the whole weight
            q, _, _ = _heads(attention, linear(queries_from, weight, bias, quantized), 3)
            _, k, v = _heads(attention, linear(keys_from, weight, bias, quantized), 3)
            return q, k, v
        C = weight.shape[1]
        (q,) = _heads(attention, F.linear(queries_from, weight[:C], bias[:C]), 1)
        k, v = _heads(attention, F.linear(keys_from, weight[C:], bias[C:]), 2)
        return q, k, v

    def attention_scale(self, block: Any) -> float:
        return self.attention(block).scale

    def attention_output(self, block: Any, out: Tensor) -> Tensor:
        proj = self.attention(block).proj
        if PROJECTION in self.called(block):
            return proj(out)
        return linear(out, proj.weight, proj.bias, _quantized(block))

    def dense_ffn(self, block: Any, u: Tensor, num_experts: int) -> Tensor:
        """Return the FFN of `u` `[R, K, C]`: in C++ as experts that are all on, on CUDA by `gelu_linear`."""
        if FFN in self.called(block):
            return block.ffn(u)
        weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias = self.ffn_weights(block)
        if choose_fused(u).packs_weights:
            every = u.new_ones(*u.shape[:-1], num_experts, dtype=torch.bool)
            return expert_ffn(u, every, num_experts, *weights)
        if not u.is_cuda or torch.is_grad_enabled() or u.dtype != fc1_weight.dtype or torch.is_autocast_enabled("cuda"):
            return block.ffn(u)
        return F.linear(gelu_linear(u.flatten(0, 1), fc1_weight, fc1_bias), fc2_weight, fc2_bias).view_as(u)

    def four_layers(self, block: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        attention, (fc1_weight, fc1_bias, fc2_weight, fc2_bias) = self.attention(block), self.ffn_weights(block)
        around = (attention.mat_qkv.weight, attention.q_bias), (attention.proj.weight, attention.proj.bias)
        return *around, (fc1_weight, fc1_bias), (fc2_weight, fc2_bias)

    def attention_added(self, block: Any, out: Tensor, onto: Gated) -> Tensor:
        proj = self.attention(block).proj
        return linear_residual(out, proj.weight, proj.bias, onto)

    def ffn_added(self, block: Any, u: NormedRows, onto: Gated) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = self.ffn_weights(block)
        return linear_residual(norm_linear(*u, fc1_weight, fc1_bias, with_gelu=True), fc2_weight, fc2_bias, onto)

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


def shared_modulations(blocks: Sequence[Any], cond: Tensor) -> list[tuple[Tensor, ...]] | None:
    """Return `Family.modulations` of blocks that share one AdaLN projection: on Triton in one launch.

    Args:
        blocks: each has its own part as `ada_gss`, `[1, 1, 6, C]`.
        cond: what they have in common, `[R, 1, 6, C]`.
    """
    tables = [block.ada_gss for block in blocks]
    alike = len({(table.shape, table.dtype, table.device) for table in tables}) == 1
    if not alike or torch.is_grad_enabled() or not choose_fused(cond).fuses_residual:
        return None
    joined = once_on_gpu(tables, "of all blocks", lambda: torch.stack(tables))
    return [part.unbind(2) for part in (joined + cond).unbind(0)]


def required_layers(attention: str) -> tuple[str, ...]:
    """Return the paths of the parts that a block with the public names must have, by the name of its self-attention."""
    parts = ("mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj", "kv_caching")
    return *(f"{attention}.{part}" for part in parts), "ffn.fc1", "ffn.fc2"


def weight_kinds_of(attention: str) -> tuple[tuple[str, str], ...]:
    """Return `Family.weight_kinds` of a model with the public names, by the name of its blocks' self-attention."""
    return (
        (f".{attention}.mat_qkv.", "qkv"),
        (f".{attention}.proj.", "proj"),
        (".ffn.", "ffn"),
        ("ada_lin.", "adaln"),
        ("head.", "head"),
        ("word_embed.", "head"),
    )


def mismatch_of_blocks(
    model: Any, blocks: Sequence[Any], place: str, required: Sequence[str], own: type, norm: str
) -> str | None:
    """Return why blocks cannot be patched, or None if they can.

    Args:
        model: the model.
        blocks: its transformer blocks, possibly inside wrappers.
        place: name of the list of blocks, for the message.
        required: paths of the parts that every block must have.
        own: our class of the blocks, which must be of it or of its public counterpart.
        norm: name of a norm in every block, whose eps must be `NORM_EPS`.
    """
    blocks = [unwrapped(block) for block in blocks]
    for module in (model, *blocks):
        if any(kind.__name__ in SHARDED for kind in type(module).__mro__):
            kind = type(module).__name__
            return f"expected whole parameters, got those of a {kind}; patch it before it is sharded"
    if not blocks:
        return "expected at least one block"
    first_with: dict[int, int] = {}
    for index, block in enumerate(blocks):
        problem = _block_mismatch(block, f"{place}[{index}]", _ffn_sizes(blocks[0]), required, own)
        if problem is not None:
            return problem
        other = first_with.setdefault(id(block.ffn.fc1._parameters.get("weight", block.ffn.fc1)), index)
        if other != index:  # each block orders its hidden units by its own experts
            return f"expected an FFN for every block, got the same one in {place}[{other}] and {place}[{index}]"
        eps = getattr(block, norm).eps
        if eps != NORM_EPS:
            return f"expected {place}[{index}].{norm}.eps of {NORM_EPS}, got {eps}"
    return None


def _block_mismatch(
    block: Any, place: str, first: tuple[int | None, int | None], required: Sequence[str], own: type
) -> str | None:
    """Return why a block cannot be patched, or None if it can.

    Args:
        block: a transformer block outside of wrappers.
        place: name of the block, for the message.
        first: the first block's `_ffn_sizes`.
        required, own: as in `mismatch_of_blocks`.
    """
    for path in required:
        part = block
        for name in path.split("."):
            part = getattr(part, name, None)
        if part is None:
            return f"expected {place}.{path}, which {type(block).__name__} does not have"
    if not is_known(class_with_forward(block), own):
        return f"expected {place} with the forward of a known class, got a {type(block).__name__}"
    sizes = _ffn_sizes(block)
    if None in sizes or sizes != first:
        return f"expected {place}.ffn of the first block's sizes {first}, got {sizes}"
    return None


def _ffn_sizes(block: Any) -> tuple[int | None, int | None]:
    """Return hidden units and inputs of the FFN, read from its first layer; None for a size that is not there."""
    fc1 = getattr(getattr(block, "ffn", None), "fc1", None)
    return getattr(fc1, "out_features", None), getattr(fc1, "in_features", None)


def _quantized(block: Any) -> torch.dtype | None:
    """Return the dtype in which a block multiplies in eight bits, which one without a patch does not."""
    state = block._modules.get("actvar")
    return None if state is None else state.quantized


def _heads(attn: Any, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split `projected` `[R, L, parts * C]` into `parts` tensors `[R, H, L, d]`."""
    R, L, _ = projected.shape
    split = projected.view(R, L, parts, attn.num_heads, attn.head_dim)
    return split.permute(2, 0, 3, 1, 4).unbind(0)
