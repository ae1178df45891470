"""Define the block of the VAR transformer and its layers, with the names of the public implementation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actvar_kernels.subset_attention.reference import attend

HEAD_DIM = 64
MAX_LOG_SCALE = math.log(100)


class FeedForward(nn.Module):
    """Compute `fc2(gelu_tanh(fc1(x)))` of `x` `[R, L, C]`, with a hidden size of `4C` unless another is given."""

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden or 4 * width)
        self.fc2 = nn.Linear(hidden or 4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Compute multi-head attention, with a K/V cache `[R, H, tokens, 64]` that grows by one scale per call.

    With `attn_l2_norm` queries and keys are normalised, and queries are scaled per head by `exp(min(scale_mul, log
    100))`. Without it the softmax scale is `0.25 / sqrt(64)`.
    """

    zero_k_bias: torch.Tensor
    cached_k: torch.Tensor | None
    cached_v: Any  # a tensor where `cached_k` is one

    def __init__(self, width: int, num_heads: int, attn_l2_norm: bool):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_l2_norm = num_heads, width // num_heads, attn_l2_norm
        if attn_l2_norm:
            self.scale = 1.0
            self.scale_mul_1H11 = nn.Parameter(torch.empty(1, num_heads, 1, 1))
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.register_buffer("zero_k_bias", torch.empty(width))
        self.proj = nn.Linear(width, width)
        self.caching, self.cached_k, self.cached_v = False, None, None

    def kv_caching(self, enable: bool) -> None:
        """Start an empty cache, or drop the cache."""
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        R, L, C = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(R, L, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
            k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        out = attend(q, k, v, attn_bias, self.scale)
        return self.proj(out.transpose(1, 2).reshape(R, L, C))


class TransformerBlock(nn.Module):
    """Run attention and FFN, each after an adaptive LayerNorm (AdaLN) that is conditioned on the class."""

    def __init__(self, width: int, num_heads: int, shared_aln: bool, attn_l2_norm: bool):
        super().__init__()
        self.C, self.shared_aln = width, shared_aln
        self.attn = SelfAttention(width, num_heads, attn_l2_norm)
        self.ffn = FeedForward(width)
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        """Run the block: `[R, L, C]` -> `[R, L, C]`.

        Args:
            x: rows of the residual stream, `[R, L, C]`.
            cond_BD: `[R, C]`, or `[R, 1, 6, C]` with shared AdaLN.
            attn_bias: additive mask under teacher forcing, or None.
        """
        modulation = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        x = x + self.attn(self.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1), attn_bias=attn_bias).mul_(gamma1)
        return x + self.ffn(self.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2)).mul(gamma2)


class HeadNorm(nn.Module):
    """Apply the adaptive LayerNorm before the classifier head: `[R, L, C]` and `[R, C]` -> `[R, L, C]`."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada_lin(cond_BD).unsqueeze(1).chunk(2, dim=-1)
        return self.ln_wo_grad(x).mul(scale.add(1)).add(shift)


class SharedAdaLin(nn.Linear):
    """Project the condition `[R, C]` to AdaLN's input of all blocks, `[R, 1, 6, C]`."""

    def forward(self, cond_BD: torch.Tensor) -> torch.Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, self.in_features)
