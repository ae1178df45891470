"""Define the VAR transformer, which predicts scale after scale. State-dict keys follow the official `var_d*.pth`.

Names that other code uses (`blocks`, `attn.kv_caching`, `autoregressive_infer_cfg`, ...) are the public
implementation's. Therefore loops written for the public classes run here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from actvar.models.arguments import by_one_thread, checked_draw, checked_integer, checked_labels, expect_own_blocks
from actvar.models.initial_weights import init_products
from actvar.models.quantizer import uninitialised_embedding
from actvar.models.token_draw import Randomness, by_image, generators, guided, gumbel_softmax, sample_top_k_top_p
from actvar.models.transformer_block import HeadNorm, SharedAdaLin, TransformerBlock
from actvar.models.vqvae import VQVAE
from actvar.utils.modes import no_grad


class Condition(NamedTuple):
    """Hold what all scales of a sample have in common.

    Args:
        labels: classes of the rows, `[R]` int64.
        embedded: their embeddings, `[R, C]`.
        modulation: input of every block's AdaLN, `[R, C]`, or with shared AdaLN `[R, 1, 6, C]`.
        position: position and level embeddings of all scales, `[1, L, C]`.
    """

    labels: torch.Tensor
    embedded: torch.Tensor
    modulation: torch.Tensor
    position: torch.Tensor


class VAR(nn.Module):
    """Sample token maps scale by scale, and decode them to images.

    `build_vae_var` and `load_var` make a model; they initialise or load every tensor.

    Args:
        vae: the autoencoder that turns sampled tokens into images. It is kept outside the module tree, so its weights
            are not part of this `state_dict` and `.to()` does not move it.
        num_classes: number of classes; index `num_classes` is the unconditional embedding.
        depth, width, num_heads: number of blocks, channels `C`, number of attention heads.
        patch_nums: side of the token map of every scale.
        shared_aln: whether one AdaLN projection serves all blocks (d36) instead of one per block.
        attn_l2_norm: whether queries and keys are normalised, with a learned scale per head.
    """

    blocks: Any  # a `ModuleList`, whose blocks may be patched or inside wrappers
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
        """Return the logits `[R, L, V]` float32 of the last block's output `x` `[R, L, C]`.

        Args:
            x: output of the last block.
            cond_BD: embedded classes `[R, C]`.
        """
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
            B: number of images.
            label_B: the class of each image as an integer tensor `[B]` on the model's device, one class for all as an
                int, or None for random classes. Labels are 0 ... num_classes - 1, or negative for unconditional images.
            g_seed: seed of the sampling noise, -2^63 ... 2^64 - 1; None draws from torch's global generator.
                With a sequence of `B` seeds, image b has the noise of a batch of one with `g_seed=g_seed[b]`.
            cfg: guidance strength; scale number `s` of `S` uses `cfg * s / (S - 1)`.
            top_k: number of the likeliest tokens to keep; 0 keeps all.
            top_p: probability that the smallest set of tokens to keep reaches, after `top_k`; 0 keeps all.
            more_smooth: mix code vectors by a Gumbel softmax instead of drawing one (for display only).

        Returns:
            images `[B, channels, H, W]` in [0, 1].

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: an argument out of its range, or a block with the patch of another model.
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
                    codes = (mixture @ vae.quantize.embedding.weight).transpose(1, 2).reshape(B, self.Cvae, pn, pn)
                    f_hat, following = vae.quantize.add_scale(scale, f_hat, codes)
                else:
                    tokens = self.next_tokens(scale, inputs, condition, cfg * scale / last, top_k, top_p, rng)
                    f_hat, following = vae.quantize.add_tokens(scale, f_hat, tokens, self.word_embed.weight.dtype)
                inputs = following.view(B, self.Cvae, -1).transpose(1, 2)
        finally:
            for block in self.blocks:
                block.attn.kv_caching(False)
        return self.decode(f_hat).add_(1).mul_(0.5)

    def scales(self) -> range:
        """Return the numbers of the scales that are sampled."""
        return range(len(self.patch_nums))

    def condition(self, label_B: torch.Tensor) -> Condition:
        """Return the `Condition` of rows with classes `label_B` `[R]` int64; `num_classes` stands for no class."""
        cond_BD = self.class_emb(label_B)
        return Condition(label_B, cond_BD, self.shared_ada_lin(cond_BD), self.lvl_embed(self.lvl_1L) + self.pos_1LC)

    def predict(self, scale: int, inputs: torch.Tensor | None, condition: Condition) -> torch.Tensor:
        """Return the logits `[R, L, V]` float32 of scale number `scale`; arguments are those of `run_blocks`."""
        return self.get_logits(self.run_blocks(scale, inputs, condition), condition.embedded)

    def run_blocks(self, scale: int, inputs: torch.Tensor | None, condition: Condition) -> torch.Tensor:
        """Return the last block's output `[R, L, C]` at one scale, with the K/V cache of the scales before it.

        Args:
            scale: number of the scale.
            inputs: the sum of all coarser scales averaged to this scale's grid, `[B, L, Cvae]`, each for `R / B` rows;
                None at the first scale.
            condition: the condition of the `R` rows.
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
        """Return the images `[B, channels, H, W]` in [-1, 1] of features `f_hat` `[B, Cvae, side, side]`."""
        return self.vae_proxy[0].fhat_to_img(f_hat)

    def next_tokens(
        self,
        scale: int,
        inputs: torch.Tensor | None,
        condition: Condition,
        guidance: float,
        top_k: int,
        top_p: float,
        rng: Randomness,
    ) -> torch.Tensor:
        """Return tokens `[B, L]` int64 of scale number `scale`; arguments are those of `run_blocks` and `draw`."""
        return self.draw(self.predict(scale, inputs, condition), guidance, top_k, top_p, rng, scale)

    def draw(
        self,
        logits: torch.Tensor,
        guidance: float,
        top_k: int,
        top_p: float,
        rng: Randomness,
        scale: int,
    ) -> torch.Tensor:
        """Draw tokens `[B, L]` int64 of one scale.

        Args:
            logits: logits of the scale, `[2B, L, V]` float32, the conditional half first.
            guidance: strength of the guidance at this scale.
            top_k, top_p, rng: as in `sample_top_k_top_p`.
            scale: number of the scale.
        """
        return sample_top_k_top_p(guided(logits, guidance), top_k, top_p, rng)

    def _labels(self, B: int, label_B: int | torch.Tensor | None, rng: Randomness) -> torch.Tensor:
        """Return labels `[B]` int64 of the checked argument `label_B`; None draws them."""
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
        """Return logits `[B, L, V]` float32 of all scales at once, by teacher forcing.

        Args:
            label_B: classes `[B]` int64; in train mode each becomes the unconditional one by `cond_drop_rate`.
            x_BLCv_wo_first_l: `[B, L - first_l, Cvae]` from `VectorQuantizer.teacher_input`.

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
        init_products(self, std, generator)
        for position in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(position, std=std, generator=generator)
        self.head.weight.mul_(0.02)
        modulation: Any = self.head_nm.ada_lin[-1]
        modulation.weight.mul_(0.5)
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
        """Fill `lvl_1L` with the scale of every position, and the block-causal mask.

        The mask is 0 where attention may look, otherwise -inf.
        """
        sides = torch.tensor(self.patch_nums, device=self.lvl_1L.device)
        level = torch.arange(len(sides), device=sides.device).repeat_interleave(sides * sides)
        self.lvl_1L.copy_(level.unsqueeze(0))
        visible = level.unsqueeze(1) >= level.unsqueeze(0)
        self.attn_bias_for_masking.zero_().masked_fill_(~visible, -torch.inf)
