"""The VAR transformer: class-conditional next-scale prediction. State-dict keys follow the official `var_d*.pth`.

Attribute and method names that other code touches (`blocks`, `attn.kv_caching`, `autoregressive_infer_cfg`, ...) are
those of the public implementation, so that loops written for it run here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.arguments import by_one_thread, checked_draw, checked_integer, checked_labels, expect_own_blocks
from actvar.models.quantizer import uninitialised_embedding
from actvar.models.sampling import Randomness, by_image, generators, guided, gumbel_softmax, sample_top_k_top_p
from actvar.models.vqvae import VQVAE
from actvar.utils.modes import no_grad
from actvar_kernels.subset_attention.reference import attend

HEAD_DIM = 64
MAX_LOG_SCALE = math.log(100)


class FeedForward(nn.Module):
    """`fc2(gelu_tanh(fc1(x)))` with hidden size `4C`."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Multi-head attention with a K/V cache `[R, H, tokens, 64]` that grows by one scale per call.

    With `attn_l2_norm` queries and keys are normalised and scaled per head by `exp(min(scale_mul, log 100))`;
    without, the softmax scale is `0.25 / sqrt(64)`.
    """

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
        """Start an empty cache, or drop it."""
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
    """One VAR block: attention and FFN, each behind an adaptive LayerNorm conditioned on the class."""

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
        """`x` `[R, L, C]`; `cond_BD` `[R, C]`, or `[R, 1, 6, C]` with shared AdaLN; returns `[R, L, C]`."""
        modulation = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        x = x + self.attn(self.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1), attn_bias=attn_bias).mul_(gamma1)
        return x + self.ffn(self.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2)).mul(gamma2)


class Condition(NamedTuple):
    """Of the rows of one sample: classes `[R]`, their embeddings `[R, C]`; what every block's AdaLN gets, `[R, C]` or
    with shared AdaLN `[R, 1, 6, C]`; position and level embeddings `[1, L, C]` of all scales."""

    labels: torch.Tensor
    embedded: torch.Tensor
    modulation: torch.Tensor
    position: torch.Tensor


class HeadNorm(nn.Module):
    """Adaptive LayerNorm before the classifier head."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_wo_grad = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada_lin(cond_BD).unsqueeze(1).chunk(2, dim=-1)
        return self.ln_wo_grad(x).mul(scale.add(1)).add(shift)


class SharedAdaLin(nn.Linear):
    """One AdaLN projection for all blocks; returns `[R, 1, 6, C]`."""

    def forward(self, cond_BD: torch.Tensor) -> torch.Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, self.in_features)


class VAR(nn.Module):
    """Build it with `build_vae_var` or `load_var`, which initialise or load every tensor.

    Args:
        vae: the autoencoder that turns sampled tokens into images; kept outside the module tree, so its weights are
            not part of this `state_dict` and `.to()` does not move it.
        num_classes: classes; index `num_classes` is the unconditional embedding.
        depth, width, num_heads: transformer blocks, channels `C`, attention heads.
        patch_nums: token map side of every scale.
        shared_aln: one AdaLN projection for all blocks (d36) instead of one per block.
        attn_l2_norm: normalised queries and keys with a learned scale per head.
    """

    lvl_1L: torch.Tensor
    attn_bias_for_masking: torch.Tensor

    def __init__(
        self,
        vae: VQVAE,
        num_classes: int,
        depth: int,
        width: int,
        num_heads: int,
        patch_nums: Sequence[int],
        shared_aln: bool,
        attn_l2_norm: bool,
    ):
        super().__init__()
        self.C, self.depth, self.num_heads, self.num_classes = width, depth, num_heads, num_classes
        self.Cvae, self.V = vae.Cvae, vae.vocab_size
        self.patch_nums = tuple(patch_nums)
        self.L, self.first_l = sum(p * p for p in patch_nums), patch_nums[0] ** 2
        self.cond_drop_rate = 0.1
        self.vae_proxy = (vae,)

        self.word_embed = nn.Linear(self.Cvae, width)
        self.class_emb = uninitialised_embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.first_l, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.L, width))
        self.lvl_embed = uninitialised_embedding(len(patch_nums), width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(width, 6 * width)) if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads, shared_aln, attn_l2_norm) for _ in range(depth))
        self.register_buffer("lvl_1L", torch.empty(1, self.L, dtype=torch.int64))
        self.register_buffer("attn_bias_for_masking", torch.empty(1, 1, self.L, self.L))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, self.V)

    def get_logits(self, x: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        """Logits `[R, L, V]` in float32 of the last block's output `[R, L, C]`."""
        h = self.head_nm(x.float(), cond_BD)
        return self.head(h.to(self.head.weight.dtype)).float()

    @no_grad
    @by_one_thread
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | torch.Tensor | None,
        g_seed: int | Sequence[int] | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> torch.Tensor:
        """Sample `B` images with classifier-free guidance.

        Args:
            label_B: class per image, an integer tensor `[B]` on the model's device; one class for all, an int; or None
                for random classes. Labels are 0 ... num_classes - 1, or negative for unconditional images.
            g_seed: seed of the sampling noise, -2^63 ... 2^64 - 1; None draws from torch's global generator.
                With a sequence of `B` seeds an image's noise is that of a batch of it alone, `g_seed=g_seed[b]`.
            cfg: guidance strength; step `s` of `S` uses `cfg * s / (S - 1)`.
            top_k, top_p: keep the k likeliest tokens, then the smallest set with probability p; 0 switches off.
            more_smooth: mix code vectors by a Gumbel softmax instead of taking the sampled one (for display only).

        Returns:
            images `[B, channels, H, W]` in [0, 1].

        Raises:
            TypeError, ValueError: an argument of another type or out of its range, or a block with the patch of another
                model; nothing was sampled.
            RuntimeError: another thread is sampling from this model.
        """
        expect_own_blocks(self)
        g_seed, cfg, top_k, top_p = checked_draw(g_seed, cfg, top_k, top_p, self.V)
        B = checked_integer("B", B, 1)
        label_B = checked_labels(B, label_B, self.num_classes, self.lvl_1L.device)
        device, vae = self.lvl_1L.device, self.vae_proxy[0]
        rng = generators(g_seed, B, device)
        label_B = self._labels(B, label_B, rng)

        condition = self.condition(torch.cat((label_B, torch.full_like(label_B, self.num_classes))))
        side, last, inputs = self.patch_nums[-1], len(self.patch_nums) - 1, None
        f_hat = torch.zeros(B, self.Cvae, side, side, device=device, dtype=vae.quantize.embedding.weight.dtype)

        try:
            for block in self.blocks:
                block.attn.kv_caching(True)
            for scale in self.scales():
                pn = self.patch_nums[scale]
                if more_smooth:
                    logits = guided(self.predict(scale, inputs, condition), cfg * scale / last)
                    sample_top_k_top_p(logits, top_k, top_p, rng)
                    temperature = max(0.27 * (1 - scale / last * 0.95), 0.005)
                    mixture = gumbel_softmax(logits.mul(1 + scale / last), temperature, rng)
                    codes = mixture @ vae.quantize.embedding.weight
                else:
                    tokens = self.next_tokens(scale, inputs, condition, cfg * scale / last, top_k, top_p, rng)
                    codes = vae.quantize.embedding(tokens)
                codes = codes.transpose(1, 2).reshape(B, self.Cvae, pn, pn)
                f_hat, following = vae.quantize.add_scale(scale, f_hat, codes)
                inputs = following.view(B, self.Cvae, -1).transpose(1, 2)
        finally:
            for block in self.blocks:
                block.attn.kv_caching(False)
        return self.decode(f_hat).add_(1).mul_(0.5)

    def scales(self) -> range:
        """Numbers of the scales that are sampled."""
        return range(len(self.patch_nums))

    def condition(self, label_B: torch.Tensor) -> Condition:
        """What all scales of a sample have in common, of rows with classes `[R]`, `num_classes` for none."""
        cond_BD = self.class_emb(label_B)
        return Condition(label_B, cond_BD, self.shared_ada_lin(cond_BD), self.lvl_embed(self.lvl_1L) + self.pos_1LC)

    def predict(self, scale: int, inputs: torch.Tensor | None, condition: Condition) -> torch.Tensor:
        """Logits `[R, L, V]` of scale number `scale`; arguments as in `run_blocks`."""
        return self.get_logits(self.run_blocks(scale, inputs, condition), condition.embedded)

    def run_blocks(self, scale: int, inputs: torch.Tensor | None, condition: Condition) -> torch.Tensor:
        """The last block's output `[R, L, C]` at scale number `scale`, with the K/V cache of the scales before it.

        Args:
            inputs: `[B, L, Cvae]`, the sum of all coarser scales averaged to this one's grid, for `R / B` rows each;
                None at the first scale.
        """
        start = sum(pn * pn for pn in self.patch_nums[:scale])
        position = condition.position[:, start : start + self.patch_nums[scale] ** 2]
        if inputs is None:
            x = condition.embedded.unsqueeze(1) + self.pos_start + position
        else:
            x = self.word_embed(inputs.to(self.word_embed.weight.dtype).contiguous())
            x = (x.expand(len(condition.embedded) // len(x), *x.shape) + position).flatten(0, 1)
        for block in self.blocks:
            x = block(x=x, cond_BD=condition.modulation, attn_bias=None)
        return x

    def decode(self, f_hat: torch.Tensor) -> torch.Tensor:
        """Images `[B, channels, H, W]` in [-1, 1] of features `[B, Cvae, side, side]`."""
        return self.vae_proxy[0].fhat_to_img(f_hat)

    def next_tokens(
        self, scale: int, inputs: torch.Tensor | None, condition: Condition, guidance: float, *sampling
    ) -> torch.Tensor:
        """Tokens `[B, L]` of scale number `scale`; other arguments as in `run_blocks` and `draw`."""
        return self.draw(self.predict(scale, inputs, condition), guidance, *sampling, scale)

    def draw(
        self,
        logits: torch.Tensor,
        guidance: float,
        top_k: int,
        top_p: float,
        rng: Randomness,
        scale: int,
    ) -> torch.Tensor:
        """Tokens `[B, L]` of scale number `scale`, drawn from its logits `[2B, L, V]`, conditional half first."""
        return sample_top_k_top_p(guided(logits, guidance), top_k, top_p, rng)

    def _labels(self, B: int, label_B: int | torch.Tensor | None, rng: Randomness) -> torch.Tensor:
        device = self.lvl_1L.device
        if label_B is None:

            def draw(uniform: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
                return torch.multinomial(uniform[0], num_samples=len(uniform), replacement=True, generator=generator)

            return by_image(
                draw, torch.full((B, self.num_classes), 1 / self.num_classes, dtype=torch.float32, device=device), rng
            )
        if isinstance(label_B, int):
            return torch.full((B,), self.num_classes if label_B < 0 else label_B, device=device)
        return label_B

    def forward(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor) -> torch.Tensor:
        """Teacher forcing over all scales at once.

        Args:
            label_B: classes `[B]`; in train mode each is dropped to the unconditional one with `cond_drop_rate`.
            x_BLCv_wo_first_l: `[B, L - first_l, Cvae]` from `VectorQuantizer.teacher_input`.

        Returns:
            logits `[B, L, V]` in float32.

        Raises:
            ValueError: a block with the patch of another model.
        """
        expect_own_blocks(self)
        B = x_BLCv_wo_first_l.shape[0]
        if self.training:
            dropped = torch.rand(B, dtype=torch.float32, device=label_B.device) < self.cond_drop_rate
            label_B = torch.where(dropped, self.num_classes, label_B)
        with torch.autocast(x_BLCv_wo_first_l.device.type, enabled=False):
            cond_BD = self.class_emb(label_B)
            start = cond_BD.unsqueeze(1) + self.pos_start
            rest = self.word_embed(x_BLCv_wo_first_l.to(self.word_embed.weight.dtype))
            x = torch.cat((start, rest), dim=1) + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        modulation = self.shared_ada_lin(cond_BD)
        for block in self.blocks:
            x = block(x=x, cond_BD=modulation, attn_bias=self.attn_bias_for_masking)
        return self.get_logits(x, cond_BD)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise every parameter and buffer as the public code does, from `generator` alone."""
        std = math.sqrt(1 / self.C / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        for position in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(position, std=std, generator=generator)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin[-1].weight.mul_(0.5)
        for block in self.blocks:
            attn = block.attn
            for zero in (attn.q_bias, attn.v_bias, attn.zero_k_bias):
                zero.zero_()
            if attn.attn_l2_norm:
                attn.scale_mul_1H11.fill_(math.log(4))
            attn.proj.weight.div_(math.sqrt(2 * self.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.depth))
            if block.shared_aln:
                block.ada_gss.normal_(std=self.C**-0.5, generator=generator)
                gammas, rest = block.ada_gss[:, :, :2], block.ada_gss[:, :, 2:]
            else:
                weight = block.ada_lin[-1].weight
                gammas, rest = weight[: 2 * self.C], weight[2 * self.C :]
            gammas.mul_(1e-5)
            rest.mul_(0.5)
        self.init_buffers()

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Fill the scale index of every position and the block-causal mask (0 where attention may look, else -inf)."""
        sides = torch.tensor(self.patch_nums, device=self.lvl_1L.device)
        level = torch.arange(len(sides), device=sides.device).repeat_interleave(sides * sides)
        self.lvl_1L.copy_(level.unsqueeze(0))
        visible = level.unsqueeze(1) >= level.unsqueeze(0)
        self.attn_bias_for_masking.zero_().masked_fill_(~visible, -torch.inf)
