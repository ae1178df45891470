"""Define the Infinity transformer, which predicts the bits of a token map scale after scale, from a text.

State-dict keys follow the official `infinity_2b_reg.pth` and `infinity_8b_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.arguments import by_one_thread
from actvar.models.infinity.arguments import Draw, TextArgument, checked_draw, checked_negative, checked_text
from actvar.models.infinity.layers import (
    BlockChunk,
    BlockContext,
    InfinityBlock,
    RMSNorm,
    Text,
    TextCondition,
    TextPool,
    guided,
    widened,
)
from actvar.models.infinity.rotary import rotation
from actvar.models.infinity.schedules import Schedule, checked_schedule, levels_and_mask, tokens_of
from actvar.models.infinity.tokenizer import InfinityTokenizer, resized
from actvar.models.initial_weights import init_products
from actvar.models.quantizer import uninitialised_embedding
from actvar.models.token_draw import Randomness, generators, sample_top_k_top_p
from actvar.models.transformer_block import HeadNorm, SharedAdaLin
from actvar.utils.modes import no_grad
from actvar_kernels.checks import expect_shape

MOST_SCALES = 15


class Infinity(nn.Module):
    """Sample maps of bits scale by scale from a text, and decode them to images.

    `build_infinity` and `load_infinity` make a model; they initialise or load every tensor.

    Args:
        tokenizer: turns sampled bits into images. It is kept outside the module tree, so its weights are not part of
            this `state_dict` and `.to()` does not move it.
        spatial_patchify: whether a token stands for 2x2 places of the tokenizer's map.
        depth, width, num_heads: number of blocks, channels `C`, number of attention heads.
        block_chunks: number of chunks that the blocks are in, which their keys tell.
        text_channels: channels of the text features.
        text_maxlen: number of text tokens that there are unconditional features for.
    """

    block_chunks: Any  # a `ModuleList`, whose blocks may be patched or inside wrappers

    def __init__(
        self,
        tokenizer: InfinityTokenizer,
        spatial_patchify: bool,
        depth: int,
        width: int,
        num_heads: int,
        block_chunks: int,
        text_channels: int,
        text_maxlen: int,
    ):
        super().__init__()
        self.C, self.depth, self.num_heads = width, depth, num_heads
        self.text_channels, self.text_maxlen = text_channels, text_maxlen
        self.spatial_patchify = spatial_patchify
        self.token_bits = tokenizer.bits * (4 if spatial_patchify else 1)
        self.cond_drop_rate = 0.1
        self.vae_proxy = (tokenizer,)

        self.cfg_uncond = nn.Parameter(torch.empty(text_maxlen, text_channels))
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.text_norm = RMSNorm(text_channels)
        self.text_proj_for_sos = TextPool(width, text_channels)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(text_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.lvl_embed = uninitialised_embedding(MOST_SCALES, width)
        self.word_embed = nn.Linear(self.token_bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(width, 6 * width))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, 2 * self.token_bits)
        blocks, size = [InfinityBlock(width, num_heads) for _ in range(depth)], depth // block_chunks
        if block_chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            self.block_chunks = nn.ModuleList(BlockChunk(blocks[i : i + size]) for i in range(0, depth, size))

    @property
    def unregistered_blocks(self) -> list[Any]:
        """Return all blocks in their order."""
        if hasattr(self, "blocks"):
            return list(self.blocks)
        return [block for chunk in self.block_chunks for block in chunk.module]

    @no_grad
    @by_one_thread
    def sample(
        self,
        text: torch.Tensor,
        lengths: Sequence[int],
        schedule: Sequence[tuple[int, int, int]],
        *,
        cfg: float | Sequence[float] = 4.0,
        tau: float | Sequence[float] = 0.5,
        top_k: int = 900,
        top_p: float = 0.97,
        g_seed: int | Sequence[int] | None = None,
        insertion: Sequence[int] = (0,),
        negative: TextArgument | None = None,
        return_bits: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Sample one image for each of `B` texts, with classifier-free guidance.

        Args:
            text: features of all texts behind each other, `[sum of lengths, text_channels]`, on the model's device.
            lengths: number of tokens of each text, `B` of them.
            schedule: `(1, h, w)` of every scale's token map, as `scale_schedule` returns it.
            cfg: guidance strength, one number or one per scale; the logits are `cfg * text + (1 - cfg) * other`.
            tau: temperature of the draw, one number or one per scale.
            top_k: number of the likeliest values of a bit to keep; 0 keeps both, as does every number above 1.
            top_p: probability that the values of a bit to keep reach together; 0 keeps both.
            g_seed: seed of the draw, -2^63 ... 2^64 - 1; None draws from torch's global generator. With a sequence
                of `B` seeds, image b has the draw of a batch of one with `g_seed=g_seed[b]`.
            insertion: where guidance acts: 0 on the logits, `-i` on the output of block `depth - i`.
            negative: text and lengths of what the images are guided away from, one text per image; None for the
                unconditional features.
            return_bits: whether to return the drawn bits too.

        Returns:
            RGB images `[B, 3, H, W]` in [0, 1]; with `return_bits` also the bits of every scale, `[B, h, w, bits]`
            uint8, where h and w are twice those of the schedule if the model is patchified.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: an argument out of its range, or of another size than the others need.
            RuntimeError: another thread is sampling from this model.
        """
        schedule = checked_schedule(schedule, MOST_SCALES)
        lengths = checked_text("text", text, lengths, self.cfg_uncond)
        B = len(lengths)
        draw = checked_draw(len(schedule), self.depth, cfg, tau, top_k, top_p, g_seed, insertion)
        rows, row_lengths = text, lengths
        if draw.is_guided:
            other, other_lengths = self.unconditional(lengths), lengths
            if negative is not None:
                other, other_lengths = checked_negative(negative, B, self.cfg_uncond)
            rows, row_lengths = torch.cat((text, other.to(text.dtype))), [*lengths, *other_lengths]
        images, *bits = self.drawn(self.condition(rows, row_lengths), schedule, draw)
        return (images, bits) if return_bits else images

    def drawn(self, condition: TextCondition, schedule: Schedule, draw: Draw) -> tuple[torch.Tensor, ...]:
        """Return the images `[B, 3, H, W]` of a condition, then the bits of every scale; see `sample`.

        Args:
            condition, schedule, draw: of the rows, those of the texts first; of every scale; how bits are drawn.

        Raises:
            ValueError: another number of seeds than images.
        """
        B, device = len(condition.pooled) // (2 if draw.is_guided else 1), condition.pooled.device
        rng = generators(draw.g_seed, B, device)
        sizes = [size for _, *size in self.tokenizer_schedule(schedule)]
        features = torch.zeros(B, self.vae_proxy[0].bits, *sizes[-1], device=device)
        inputs, bits = None, []
        with self.sampling(schedule, draw):
            for scale in self.scales(schedule):
                x = self.run_blocks(schedule, scale, self.embedded(scale, inputs, condition), condition, draw)
                logits = self.guided_logits(scale, x, condition, draw)
                drawn = self.draw_bits(scale, logits.view(B, -1, 2), draw, rng)
                bits.append(self.as_bits(drawn.view(B, *schedule[scale][1:], -1)))
                features = self.add_scale(scale, features, bits[-1])
                if scale + 1 < len(schedule):
                    inputs = self.as_tokens(resized(features, sizes[scale + 1]))
        return self.decode(features).add_(1).mul_(0.5), *bits

    @contextmanager
    def sampling(self, schedule: Schedule, draw: Draw) -> Iterator[None]:
        """Keep keys and values from scale to scale while the context is open.

        Args:
            schedule: `(1, h, w)` of every scale that is sampled.
            draw: how tokens are drawn.
        """
        try:
            for block in self.unregistered_blocks:
                block.kv_caching(True)
            yield
        finally:
            for block in self.unregistered_blocks:
                block.kv_caching(False)

    def scales(self, schedule: Schedule) -> Iterator[int]:
        """Yield the number of every scale that is sampled; of each when the one before is drawn."""
        yield from range(len(schedule))

    def condition(self, text: torch.Tensor, lengths: Sequence[int]) -> TextCondition:
        """Return the condition of rows with the texts `[sum of lengths, text_channels]`."""
        text = self.text_norm(text.to(self.cfg_uncond.dtype))
        pooled = self.text_proj_for_sos(Text(text, lengths))
        modulation = widened(self.shared_ada_lin(pooled))
        return TextCondition(pooled, modulation, Text(self.text_proj_for_ca(text), lengths))

    def unconditional(self, lengths: Sequence[int]) -> torch.Tensor:
        """Return unconditional features `[sum of lengths, text_channels]` for texts of the same lengths."""
        return torch.cat([self.cfg_uncond[:length] for length in lengths])

    def embedded(self, scale: int, inputs: torch.Tensor | None, condition: TextCondition) -> torch.Tensor:
        """Return the first block's input `[R, L, C]` at one scale.

        Args:
            scale: number of the scale.
            inputs: the sum of all scales before on this scale's grid, `[B, L, token_bits]`, each for `R / B` rows; None
                at the first scale.
            condition: condition of the `R` rows.
        """
        if inputs is None:
            x = condition.pooled.unsqueeze(1) + self.pos_start
        else:
            x = self.word_embed(inputs.to(self.word_embed.weight.dtype))
            x = x.repeat(len(condition.pooled) // len(x), 1, 1)
        return widened(x) + self.lvl_embed.weight[scale]

    def run_blocks(
        self, schedule: Schedule, scale: int, x: torch.Tensor, condition: TextCondition, draw: Draw
    ) -> torch.Tensor:
        """Return the last block's output `[R, L, C]` at one scale, with the K/V cache of the scales before it.

        Args:
            schedule: `(1, h, w)` of every scale.
            scale: number of the scale.
            x: input of the first block, `[R, L, C]`, the rows of the texts first.
            condition: condition of the rows.
            draw: says how strong guidance is and where it acts.
        """
        start = sum(tokens_of(schedule[:scale]))
        angles = self.angles(schedule)[:, start : start + x.shape[1]]
        is_last = scale + 1 == len(schedule)
        context = BlockContext(condition.modulation, condition.text, angles, scale, is_last=is_last)
        for index, block in enumerate(self.unregistered_blocks):
            x = block(x, context)
            if draw.cfg[scale] != 1 and index - self.depth in draw.insertion:
                x = guided(x, draw.cfg[scale]).repeat(2, 1, 1)
        return x

    def guided_logits(self, scale: int, x: torch.Tensor, condition: TextCondition, draw: Draw) -> torch.Tensor:
        """Return the logits `[B, L, 2 * token_bits]` to draw from at one scale, after guidance and temperature.

        Args:
            scale: number of the scale.
            x: output of the last block, `[R, L, C]`, where R is `2B` with guidance.
            condition: condition of the rows.
            draw: says how strong guidance is, where it acts, and the temperature.
        """
        factor, rows = 1 / draw.tau[scale], len(condition.pooled) // (2 if draw.is_guided else 1)
        if draw.cfg[scale] != 1 and 0 in draw.insertion:
            return guided(self.get_logits(x, condition.pooled).mul(factor), draw.cfg[scale])
        return self.get_logits(x[:rows], condition.pooled[:rows]).mul(factor)

    def add_scale(self, scale: int, features: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """Return the sum of codes `[B, bits, height, width]` with those of a scale's bits `[B, h, w, bits]`."""
        return features.add_(resized(self.vae_proxy[0].quantizer.lfq.to_codes(bits), features.shape[2:]))

    def draw_bits(self, scale: int, logits: torch.Tensor, draw: Draw, rng: Randomness) -> torch.Tensor:
        """Return bits `[B, N]` int64 of the logits of 0 and 1 `[B, N, 2]`, which may change."""
        return sample_top_k_top_p(logits, draw.top_k, draw.top_p, rng)

    def get_logits(self, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """Return the logits `[R, L, 2 * token_bits]` float32 or wider of the last block's output.

        Args:
            x, pooled: output of the last block, `[R, L, C]`, and pooled texts of the rows, `[R, C]`.
        """
        return widened(self.head(self.head_nm(widened(x), pooled).to(self.head.weight.dtype)))

    def forward(
        self,
        text: torch.Tensor,
        lengths: Sequence[int],
        inputs: torch.Tensor,
        schedule: Sequence[tuple[int, int, int]],
    ) -> torch.Tensor:
        """Return logits `[B, L, 2 * token_bits]` float32 of all scales at once, by teacher forcing.

        Args:
            text, lengths: features of `B` texts, as in `sample`; in train mode each text becomes the unconditional one
                by `cond_drop_rate`.
            inputs: `[B, L - 1, token_bits]` from `teacher_input`.
            schedule: `(1, h, w)` of every scale, `L` tokens together.

        Raises:
            TypeError, ValueError: as in `sample`; inputs of another shape.
        """
        schedule = checked_schedule(schedule, MOST_SCALES)
        lengths = checked_text("text", text, lengths, self.cfg_uncond)
        expect_shape("inputs", inputs, (len(lengths), sum(tokens_of(schedule)) - 1, self.token_bits))
        if self.training:
            is_kept = torch.rand(len(lengths), device=text.device) >= self.cond_drop_rate
            of_token = is_kept.repeat_interleave(torch.tensor(lengths, device=text.device), output_size=len(text))
            text = torch.where(of_token[:, None], text, self.unconditional(lengths).to(text.dtype))
        return self.logits_of_inputs(self.condition(text, lengths), inputs, schedule)

    def logits_of_inputs(self, condition: TextCondition, inputs: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        """Return logits `[R, L, 2 * token_bits]` of all scales at once, see `forward`.

        Args:
            condition: condition of the rows.
            inputs: `[R, L - 1, token_bits]`.
            schedule: `(1, h, w)` of every scale.
        """
        x, context = self.embedded_inputs(condition, inputs, schedule)
        for block in self.unregistered_blocks:
            x = block(x, context)
        return self.get_logits(x, condition.pooled)

    def embedded_inputs(
        self, condition: TextCondition, inputs: torch.Tensor, schedule: Schedule
    ) -> tuple[torch.Tensor, BlockContext]:
        """Return the first block's input `[R, L, C]` for all scales, and the context of all blocks."""
        level, mask = levels_and_mask(schedule, inputs.device)
        start = condition.pooled.unsqueeze(1) + self.pos_start
        x = torch.cat((start, self.word_embed(inputs.to(self.word_embed.weight.dtype))), dim=1)
        x = widened(x) + self.lvl_embed(level)
        return x, BlockContext(condition.modulation, condition.text, self.angles(schedule), mask=mask)

    @torch.no_grad()
    def teacher_input(self, bits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the input for teacher forcing `[B, L - 1, token_bits]` float32: at each scale what `sample` puts in.

        Args:
            bits: bits of every scale, `[B, h, w, bits]`, as `sample` and `InfinityTokenizer.encode` return them.
        """
        features, inputs = torch.zeros(()), []
        for of_scale, following in zip(bits, bits[1:], strict=False):
            codes = self.vae_proxy[0].quantizer.lfq.to_codes(of_scale)
            features = features.to(codes.device) + resized(codes, bits[-1].shape[1:3])
            inputs.append(self.as_tokens(resized(features, following.shape[1:3])))
        return torch.cat(inputs, dim=1)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Return the images `[B, 3, H, W]` in [-1, 1] of the sum of all scales' codes `[B, bits, h, w]`."""
        return self.vae_proxy[0].decode(features)

    def angles(self, schedule: Schedule) -> torch.Tensor:
        """Return cosine and sine of the rotary angles of all scales' tokens, `[2, L, d / 2]`."""
        return rotation(tuple(schedule), self.C // self.num_heads, self.pos_start.device)

    def tokenizer_schedule(self, schedule: Sequence[tuple[int, int, int]]) -> Schedule:
        """Return `(1, h, w)` of the tokenizer's maps, twice as high and wide where the model is patchified."""
        factor = 2 if self.spatial_patchify else 1
        return [(frames, factor * h, factor * w) for frames, h, w in schedule]

    def as_tokens(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the tokens `[B, h * w, token_bits]` of maps `[B, bits, h, w]` of the tokenizer."""
        if self.spatial_patchify:
            maps = F.pixel_unshuffle(maps, 2)
        return maps.flatten(2).transpose(1, 2)

    def as_bits(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return the bits `[B, h, w, bits]` uint8 of drawn tokens `[B, h, w, token_bits]`."""
        if self.spatial_patchify:
            drawn = F.pixel_shuffle(drawn.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return drawn.to(torch.uint8)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise every parameter and buffer from `generator` alone, so that blocks start close to the identity."""
        std = math.sqrt(1 / self.C / 3)
        init_products(self, std, generator)
        for norm in self.modules():
            if isinstance(norm, nn.LayerNorm | RMSNorm) and norm.weight is not None:
                norm.weight.fill_(1)
                if isinstance(norm, nn.LayerNorm):
                    norm.bias.zero_()
        nn.init.trunc_normal_(self.cfg_uncond, std=1.2, generator=generator).div_(math.sqrt(self.text_channels))
        pool: Any = self.text_proj_for_sos.ca
        modulation: Any = self.head_nm.ada_lin[-1]
        for start in (self.pos_start, pool.mat_q):
            nn.init.trunc_normal_(start, std=std, generator=generator)
        for zero in (pool.v_bias, pool.zero_k_bias):
            zero.zero_()
        self.head.weight.mul_(0.02)
        modulation.weight.mul_(0.5)
        for block in self.unregistered_blocks:
            for zero in (block.sa.q_bias, block.sa.v_bias, block.sa.zero_k_bias, block.ca.v_bias, block.ca.zero_k_bias):
                zero.zero_()
            block.sa.scale_mul_1H11.fill_(math.log(4))
            for last in (block.sa.proj, block.ca.proj, block.ffn.fc2):
                last.weight.div_(math.sqrt(2 * self.depth))
            block.ada_gss.normal_(std=self.C**-0.5, generator=generator)
            block.ada_gss[:, :, :2].mul_(1e-5)
            block.ada_gss[:, :, 2:].mul_(0.5)
