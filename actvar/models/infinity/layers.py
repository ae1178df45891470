"""Define the block of the Infinity transformer and its layers, with the names of the public implementation.

The residual stream is float32 or wider. Layers multiply in the dtype of their own weights, such as bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from actvar.models.transformer_block import MAX_LOG_SCALE, FeedForward, SelfAttention
from actvar_kernels.rotary.reference import rotate_heads
from actvar_kernels.subset_attention.reference import attend

NORM_EPS = 1e-6


class Text(NamedTuple):
    """Hold the texts of all rows behind each other.

    Args:
        tokens: features of the tokens, `[sum of lengths, channels]`.
        lengths: number of tokens of each row.
        filled: `mask_to` of texts that were filled up to one length, otherwise None.
    """

    tokens: torch.Tensor
    lengths: Sequence[int]
    filled: torch.Tensor | None = None

    def first(self, rows: int) -> Text:
        """Return the texts of the first `rows` rows."""
        lengths = self.lengths[:rows]
        return Text(self.tokens[: sum(lengths)], lengths, None if self.filled is None else self.filled[:rows])

    def mask(self) -> torch.Tensor | None:
        """Return the mask of attention, `[R, 1, 1, T]` float32; None if rows are equally long."""
        longest = max(self.lengths)
        return self.filled if min(self.lengths) == longest else self.mask_to(longest)

    def mask_to(self, length: int) -> torch.Tensor:
        """Return 0 at a row's tokens and -inf behind them, for rows of `length` tokens, `[R, 1, 1, length]` float32."""
        device = self.tokens.device
        is_behind = torch.arange(length, device=device) >= torch.tensor(self.lengths, device=device)[:, None]
        return torch.zeros(is_behind.shape, device=device).masked_fill_(is_behind, -torch.inf)[:, None, None]

    def filled_up(self, length: int) -> Text:
        """Return the same texts with zeros behind each, up to `length` tokens, which attention does not see."""
        rows = pad_sequence(list(self.tokens.split(list(self.lengths))), batch_first=True)
        rows = F.pad(rows, (0, 0, 0, length - rows.shape[1]))
        return Text(rows.flatten(0, 1), len(rows) * [length], self.mask_to(length))


class KeysAndValues(NamedTuple):
    """Hold keys and values of the texts of all rows, `[R, H, T, d]`, filled up to the longest, and their mask."""

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None

    def first(self, rows: int) -> KeysAndValues:
        """Return those of the first `rows` rows."""
        return KeysAndValues(*(part if part is None else part[:rows] for part in self))  # pyright: ignore[reportArgumentType]


class TextCondition(NamedTuple):
    """Hold what all scales of a sample have in common.

    Args:
        pooled: one vector per row, `[R, C]`.
        modulation: input of every block's AdaLN, `[R, 1, 6, C]`.
        text: texts of the rows, projected for cross-attention.
    """

    pooled: torch.Tensor
    modulation: torch.Tensor
    text: Text


class BlockContext(NamedTuple):
    """Hold what all blocks get in a call beside the rows.

    Args:
        modulation: what shared AdaLN adds to each block's own, `[R, 1, 6, C]` float32.
        text: projected texts of the rows.
        rotation: cosine and sine of the angles of the call's tokens, `[2, L, d / 2]`.
        scale: number of the scale; None under teacher forcing, where all scales are there.
        mask: additive mask `[L, L]` under teacher forcing; None in sampling.
        is_last: whether no scale comes after, so that keys and values need not be kept.
    """

    modulation: torch.Tensor
    text: Text
    rotation: torch.Tensor
    scale: int | None = None
    mask: torch.Tensor | None = None
    is_last: bool = False

    def first(self, rows: int) -> BlockContext:
        """Return the context of the first `rows` rows."""
        return self._replace(modulation=self.modulation[:rows], text=self.text.first(rows))


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return `x` rounded to bfloat16 in its own dtype, and as it is if that has 16 bits."""
    return x if x.dtype.itemsize == 2 else x.to(torch.bfloat16).to(x.dtype)


def guided(x: torch.Tensor, strength: float) -> torch.Tensor:
    """Return `strength * text + (1 - strength) * other` `[B, ...]` of rows `[2B, ...]`, those of the texts first."""
    text, other = x.chunk(2)
    return strength * text + (1 - strength) * other


class RMSNorm(nn.Module):
    """Divide features `[..., channels]` by their root mean square, and multiply them by weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = widened(x)
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS) * self.weight).to(x.dtype)


class RotarySelfAttention(SelfAttention):
    """Compute multi-head attention with normalised and rotated queries and keys, and a K/V cache as `SelfAttention`."""

    def __init__(self, width: int, num_heads: int):
        super().__init__(width, num_heads, attn_l2_norm=True)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor, context: BlockContext, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `[R, L, C]` for rows `[R, L, C]`, those of the call's tokens `index` `[R, L]` int64 or of all."""
        R, L, C = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(R, L, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = rotate_heads(q, context.rotation, index, query_scale(self))
        k = rotate_heads(k, context.rotation, index)
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = (None, None) if context.is_last else (k, v)
        out = attend(q, k, v, None if context.mask is None else context.mask.to(v.dtype), self.scale)
        return self.proj(out.transpose(1, 2).reshape(R, L, C))


def query_scale(attention: Any) -> torch.Tensor:
    """Return what the normalised queries of a `RotarySelfAttention` are multiplied by, `[H]`."""
    return widened(attention.scale_mul_1H11).clamp_max(MAX_LOG_SCALE).exp().flatten()


class CrossAttention(nn.Module):
    """Attend from rows `[R, L, C]`, or from one learned query, to the texts of the rows.

    Args:
        width: channels `C` of the result.
        text_channels: channels of the texts.
        num_heads: number of attention heads.
        pools: whether a learned query per head takes the place of the rows.
    """

    zero_k_bias: torch.Tensor

    def __init__(self, width: int, text_channels: int, num_heads: int, pools: bool = False):
        super().__init__()
        self.num_heads, self.head_dim, self.pools = num_heads, width // num_heads, pools
        if pools:
            self.mat_q = nn.Parameter(torch.empty(1, num_heads, self.head_dim))
        else:
            self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(text_channels, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.empty(width))
        self.register_buffer("zero_k_bias", torch.empty(width))
        self.proj = nn.Linear(width, width)
        self.caching, self.cached_kv = False, None

    def kv_caching(self, enable: bool) -> None:
        """Start to keep the keys and values of the texts of the first call, or drop them."""
        self.caching, self.cached_kv = enable, None

    def forward(self, x: torch.Tensor | None, text: Text) -> torch.Tensor:
        """Return `[R, L, C]` in the dtype of the weights; `L` is 1 where this pools.

        The attention's operands and result have 16 bits, as in the public code: wider ones are rounded to bfloat16.

        Args:
            x: rows `[R, L, C]`, or None where this pools.
            text: texts of the rows.
        """
        k, v, mask = self.keys_and_values(text)
        if isinstance(self.mat_q, nn.Parameter):
            q = self.mat_q.unsqueeze(2).expand(len(v), -1, -1, -1)
        else:
            q = by_head(self.mat_q(x), self.num_heads)
        out = attend(rounded(q), k, v, mask, self.head_dim**-0.5)
        return self.proj(rounded(out).transpose(1, 2).flatten(2))

    def keys_and_values(self, text: Text) -> KeysAndValues:
        """Return keys and values of texts, in sampling those of the first call, which may have had more rows behind."""
        if self.cached_kv is not None:
            return self.cached_kv.first(len(text.lengths))
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        projected = rounded(F.linear(text.tokens.to(self.mat_kv.weight.dtype), self.mat_kv.weight, bias))
        k, v = pad_sequence(list(projected.split(list(text.lengths))), batch_first=True).chunk(2, dim=-1)
        mask = text.mask()
        mask = mask if mask is None else mask.to(v.dtype)
        found = KeysAndValues(by_head(k, self.num_heads), by_head(v, self.num_heads), mask)
        if self.caching:
            self.cached_kv = found
        return found


def by_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return `x` `[R, T, C]` by head, `[R, H, T, d]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class TextPool(nn.Module):
    """Pool texts to one vector per row `[R, C]`, the condition of AdaLN."""

    def __init__(self, width: int, text_channels: int):
        super().__init__()
        head_dim = 128 if width <= 4096 else 64
        self.ca = CrossAttention(width, text_channels, max(text_channels // head_dim, 1), pools=True)

    def forward(self, text: Text) -> torch.Tensor:
        return self.ca(None, text).squeeze(1)


class InfinityBlock(nn.Module):
    """Run self-attention, cross-attention to the text and FFN; the first and the last after an adaptive LayerNorm."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.C = width
        self.sa = RotarySelfAttention(width, num_heads)
        self.ca = CrossAttention(width, width, num_heads)
        self.ffn = FeedForward(width, hidden_of(width))
        self.ca_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, width))

    def kv_caching(self, enable: bool) -> None:
        """Start empty caches of both attentions, or drop them."""
        self.sa.kv_caching(enable)
        self.ca.kv_caching(enable)

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Run the block: `[R, L, C]` -> `[R, L, C]`, float32 or wider.

        Args:
            x: rows of the residual stream, `[R, L, C]`.
            context: what all blocks get.
        """
        dtype = self.sa.q_bias.dtype
        modulation = self.ada_gss + context.modulation
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        x = widened(x)
        x = x + self.sa(self.norm(x).mul(scale1 + 1).add(shift1).to(dtype), context).mul(gamma1)
        weight, bias = self.ca_norm.weight.to(x.dtype), self.ca_norm.bias.to(x.dtype)
        x = x + self.ca(F.layer_norm(x, (self.C,), weight, bias, NORM_EPS).to(dtype), context.text)
        return x + self.ffn(self.norm(x).mul(scale2 + 1).add(shift2).to(dtype)).mul(gamma2)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` `[R, L, C]` after a LayerNorm without weights."""
        return F.layer_norm(x, (self.C,), eps=NORM_EPS)


class BlockChunk(nn.Module):
    """Hold some blocks that follow each other as `module`, as the official keys have it."""

    def __init__(self, blocks: Sequence[InfinityBlock]):
        super().__init__()
        self.module = nn.ModuleList(blocks)


def hidden_of(width: int) -> int:
    """Return the hidden size of an FFN of `width` channels: four times as many, as a multiple of 256."""
    return max(round(4 * width / 256), 1) * 256
