"""Add a model family that is unlike VAR, as an example of how it is done: a model of its own, and `ToyFamily`.

The model's blocks rotate queries and keys (RoPE) and have cross-attention behind an affine norm between attention and
FFN. The token maps are not square, and guidance is mixed in after a block instead of on the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actvar.families.base import BlockCall, Called, Embedded, OnScale, Rows, Sizes
from actvar.families.defaults import BaseFamily
from actvar.utils.attributes import replaced
from actvar.utils.weight_override import own_weights
from actvar_kernels import linear
from actvar_kernels.residual_norm.reference import AdaLN

MAPS = ((1, 1), (1, 2), (2, 3), (3, 5))
CODE_SIZE, CODES, CLASSES, TEXT_TOKENS = 4, 24, 6, 3
TOKENS = [height * width for height, width in MAPS]
STARTS = [sum(TOKENS[:scale]) for scale in range(len(MAPS))]


def rotated(rows: Tensor, positions: Tensor) -> Tensor:
    """Return queries or keys `[R, H, L, d]` rotated by their positions `[R or 1, L]`."""
    half = rows.shape[-1] // 2
    angles = positions[:, None, :, None] * 10 ** -torch.linspace(0, 1, half)
    first, second = rows[..., :half], rows[..., half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()), -1)


class Attention(nn.Module):
    """Attend from rows to a K/V cache and themselves, or to a text, with several heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cached: tuple[Tensor, Tensor] | None = None
        self.caches = False

    def split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = map(self.split, self.into(x).chunk(3, dim=-1))
        q, k = rotated(q, positions), rotated(k, positions)
        if self.caches:
            if self.cached is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(self.cached, (k, v), strict=True))
            self.cached = k, v
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)
        return self.out(out.transpose(1, 2).flatten(2))

    def over_text(self, x: Tensor, text: Tensor) -> Tensor:
        (q, _, _), (_, k, v) = ([self.split(part) for part in self.into(rows).chunk(3, -1)] for rows in (x, text))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Run two linear layers with a GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(u), approximate="tanh"))


class ToyBlock(nn.Module):
    """Run attention, cross-attention to a text, and an FFN; the first and the last behind an adaptive LayerNorm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attention, self.cross_attention = Attention(width, heads), Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width)
        self.table = nn.Parameter(torch.empty(1, 6, width))

    def forward(self, x: Tensor, condition: Tensor, text: Tensor, scale: int | None, mask: Tensor | None) -> Tensor:
        """Return `[R, L, C]` of `x` `[R, L, C]`, `condition` `[R, 6, C]` and `text` `[R, T, C]`."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.table + condition).unsqueeze(2).unbind(1)
        start, count = (0, x.shape[1]) if scale is None else (STARTS[scale], TOKENS[scale])
        positions = torch.arange(start, start + count).unsqueeze(0)
        x = x + gamma1 * self.self_attention(_norm(x) * (1 + scale1) + shift1, positions, mask)
        x = x + self.cross_attention.over_text(self.cross_norm(x), text)
        return x + gamma2 * self.feed_forward(_norm(x) * (1 + scale2) + shift2)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Codes(nn.Module):
    """Stand for the autoencoder: code vectors and a decoder of one layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.pixels = nn.Embedding(CODES, CODE_SIZE), nn.Linear(CODE_SIZE, 1)

    def added(self, scale: int, features: Tensor, tokens: Tensor) -> Tensor:
        """Return the features `[B, CODE_SIZE, H, W]` with the tokens `[B, L]` of a scale."""
        codes = self.embedding(tokens).transpose(1, 2).unflatten(2, MAPS[scale])
        return features + F.interpolate(codes, size=MAPS[-1])

    def inputs(self, scale: int, features: Tensor) -> Tensor:
        """Return what scale number `scale` is embedded from, `[B, L, CODE_SIZE]`."""
        return F.adaptive_avg_pool2d(features, MAPS[scale]).flatten(2).transpose(1, 2)

    def fhat_to_img(self, features: Tensor) -> Tensor:
        return self.pixels(features.movedim(1, -1)).movedim(-1, 1)


class ToyModel(nn.Module):
    """Predict the next scale from a class and a text that belongs to it."""

    def __init__(self, depth: int = 3, width: int = 32, heads: int = 2, guided_block: int = 1):
        super().__init__()
        self.num_classes, self.guided_block = CLASSES, guided_block
        self.codes = (Codes().eval(),)
        self.layers = nn.ModuleList(ToyBlock(width, heads) for _ in range(depth))
        self.classes, self.text = nn.Embedding(CLASSES + 1, width), nn.Embedding(CLASSES + 1, TEXT_TOKENS * width)
        self.embed, self.to_condition = nn.Linear(CODE_SIZE, width), nn.Linear(width, 6 * width)
        self.head = nn.Linear(width, CODES)
        generator = torch.Generator().manual_seed(0)
        for module in (self, self.codes[0]):
            for parameter in module.parameters():
                parameter.data.normal_(std=0.3, generator=generator)

    def conditions(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        condition = self.to_condition(self.classes(labels)).unflatten(-1, (6, -1))
        return condition, self.text(labels).unflatten(-1, (TEXT_TOKENS, -1))

    def first_rows(self, labels: Tensor) -> Tensor:
        return self.classes(labels).unsqueeze(1)

    def get_logits(self, x: Tensor) -> Tensor:
        return self.head(_norm(x))

    def predict(self, scale: int, inputs: Tensor | None, labels: Tensor, strength: float | None) -> Tensor:
        """Return logits `[R, L, CODES]` of one scale, with guidance of that strength mixed in after a block."""
        condition, text = self.conditions(labels)
        x = self.first_rows(labels) if inputs is None else self.embed(inputs).repeat(len(labels) // len(inputs), 1, 1)
        for number, block in enumerate(self.layers):
            x = block(x, condition, text, scale, None)
            if number == self.guided_block and strength is not None:
                with_class, without = x.chunk(2)
                x = (without + (1 + strength) * (with_class - without)).repeat(2, 1, 1)
        return self.get_logits(x)

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Return logits of all scales at once."""
        condition, text = self.conditions(labels)
        x = torch.cat((self.first_rows(labels), self.embed(inputs)), dim=1)
        for block in self.layers:
            x = block(x, condition, text, None, block_causal())
        return self.get_logits(x)

    def scales(self) -> range:
        """Return the numbers of the scales that are sampled."""
        return range(len(MAPS))

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B: int, label_B: Tensor, g_seed: int = 0, cfg: float = 1.5, **_) -> Tensor:
        """Return images `[B, 1, H, W]`."""
        generator, codes = torch.Generator().manual_seed(g_seed), self.codes[0]
        labels = torch.cat((label_B, torch.full_like(label_B, CLASSES)))
        features = torch.zeros(B, CODE_SIZE, *MAPS[-1])
        try:
            for block in self.layers:
                block.self_attention.caches = True
            for scale in self.scales():
                inputs = codes.inputs(scale, features) if scale else None
                logits = self.predict(scale, inputs, labels, cfg * scale / (len(MAPS) - 1))[:B]
                tokens = logits.softmax(-1).flatten(0, 1).multinomial(1, generator=generator).view(B, -1)
                features = codes.added(scale, features, tokens)
        finally:
            for block in self.layers:
                block.self_attention.caches, block.self_attention.cached = False, None
        return codes.fhat_to_img(features)


def block_causal() -> Tensor:
    """Return the mask `[1, 1, L, L]` under which a row sees its own scale and those before."""
    level = torch.arange(len(MAPS)).repeat_interleave(torch.tensor(TOKENS))
    hidden = level.unsqueeze(1) < level.unsqueeze(0)
    return torch.zeros(1, 1, len(level), len(level)).masked_fill_(hidden, -torch.inf)


class PatchedToy(nn.Module):
    """Go in front of the class of a patched `ToyModel`."""

    def forward(self, labels, inputs):
        self.actvar.begin_pass(self)
        try:
            if self.actvar.first_tuned:
                with self.actvar.during(rows_stand_alone=True):
                    return torch.cat([logits for _, logits in logits_by_scale(self, labels, inputs)], dim=1)
            return super().forward(labels, inputs)
        finally:
            self.actvar.end_pass()

    def autoregressive_infer_cfg(self, *args, **kwargs):
        self.actvar.expect_own_blocks(self)
        with self.actvar.sampling(self, in_place=False):
            return super().autoregressive_infer_cfg(*args, **kwargs)

    def scales(self):
        left_out = 0 if self.actvar.rows_stand_alone else sum(scale.left_out for scale in self.actvar.schedule)
        return super().scales()[: len(MAPS) - left_out]

    def predict(self, scale, inputs, labels, strength):
        guided = self.actvar.rows_stand_alone or self.actvar.schedule[scale].guided
        return super().predict(scale, inputs, labels, strength if guided else None)

    def get_logits(self, x):
        with nullcontext() if self.actvar.scale_is_tuned else own_weights(self.head):
            self.actvar.begin_head(self, x.shape[1])
            return super().get_logits(x)


def logits_by_scale(model: nn.Module, labels: Tensor, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield number and logits of every scale for rows of the classes `labels` `[R]`, through the K/V cache."""
    try:
        for block in model.layers:
            ToyCache(block.self_attention).start()
        for scale, scale_inputs in zip(model.scales(), [None, *inputs.split(TOKENS[1:], dim=1)], strict=False):
            yield scale, model.predict(scale, scale_inputs, labels, None)
    finally:
        for block in model.layers:
            ToyCache(block.self_attention).drop()


class ToyCache(NamedTuple):
    attention: Attention

    @property
    def is_on(self) -> bool:
        return self.attention.caches

    @property
    def rows(self) -> int:
        return 0 if self.attention.cached is None else self.attention.cached[0].shape[2]

    @property
    def version(self) -> Tensor | None:
        return None if self.attention.cached is None else self.attention.cached[0]

    def start(self) -> None:
        self.attention.caches, self.attention.cached = True, None

    def drop(self) -> None:
        self.attention.caches, self.attention.cached = False, None

    def read(self) -> tuple[Tensor, Tensor] | None:
        return self.attention.cached

    def write(self, keys: Tensor, values: Tensor) -> None:
        self.attention.cached = keys, values


class ToyFamily(BaseFamily):
    """Answer for `ToyModel`; the methods are described in `actvar.families.base.Family`."""

    name = "toy"
    model_mixin = PatchedToy
    leaves_out_guidance = True
    takes_eight_bits = True
    has_between = True
    hidden_axes = {"feed_forward.up.weight": 0, "feed_forward.up.bias": 0, "feed_forward.down.weight": 1}
    weight_kinds = (("self_attention.into.", "qkv"), ("self_attention.out.", "proj"), ("feed_forward.", "ffn"))

    def ends_early(self, _model: nn.Module) -> bool:
        return True

    def mismatch(self, model: nn.Module) -> str | None:
        return None if isinstance(model, ToyModel) else "expected a ToyModel"

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.layers

    def maps(self, _model: nn.Module) -> tuple[tuple[int, int], ...]:
        return MAPS

    def sizes(self, model: nn.Module) -> Sizes:
        up = model.layers[0].feed_forward.up
        return Sizes(up.in_features, up.out_features, CODE_SIZE, CODES, adaln="shared")

    def autoencoder(self, model: nn.Module) -> nn.Module:
        return model.codes[0]

    def finetuned_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if name.startswith(("layers.", "head."))]

    def embedded(self, model: nn.Module, labels: Tensor, inputs: Tensor) -> Embedded:
        condition, text = model.conditions(labels)
        x = torch.cat((model.first_rows(labels), model.embed(inputs)), dim=1)
        return Embedded(BlockCall(x, condition, context=text, mask=block_causal()), None)

    def with_unconditional(self, _model: nn.Module, labels: Tensor) -> Tensor:
        return torch.cat((labels, torch.full_like(labels, CLASSES)))

    def logits(self, model: nn.Module, x: Tensor, _head_cond: Any) -> Tensor:
        return model.get_logits(x)

    def scale_logits(self, model: nn.Module, labels: Tensor, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from logits_by_scale(model, self.with_unconditional(model, labels), inputs)

    @contextmanager
    def watch_scales(self, model: nn.Module, on_scale: OnScale) -> Iterator[None]:
        codes = model.codes[0]
        added = codes.added

        def add_and_call(scale: int, features: Tensor, tokens: Tensor) -> Tensor:
            features = added(scale, features, tokens)
            on_scale(scale, tokens, features)
            return features

        with replaced(codes, added=add_and_call):
            yield

    def teacher_input(self, model: nn.Module, _labels: Tensor, token_maps: Tensor) -> Tensor:
        codes, features, inputs = model.codes[0], torch.zeros(len(token_maps), CODE_SIZE, *MAPS[-1]), []
        for scale, tokens in enumerate(token_maps.split(TOKENS, dim=1)[:-1]):
            features = codes.added(scale, features, tokens)
            inputs.append(codes.inputs(scale + 1, features))
        return torch.cat(inputs, dim=1)

    def block_call(
        self, x: Tensor, condition: Tensor, text: Tensor, scale: int | None, mask: Tensor | None
    ) -> BlockCall:
        return BlockCall(x, condition, scale, text, mask)

    def block_arguments(self, call: BlockCall) -> dict[str, Any]:
        return dict(x=call.x, condition=call.cond, text=call.context, scale=call.scale, mask=call.mask)

    def parts_called(self, _block: nn.Module) -> dict[str, Called]:
        return {}

    def cache(self, block: nn.Module) -> ToyCache:
        return ToyCache(block.self_attention)

    def modulation(self, block: nn.Module, cond: Tensor) -> tuple[Tensor, ...]:
        return (block.table + cond).unsqueeze(2).unbind(1)

    def qkv_bias(self, block: nn.Module) -> Tensor:
        return block.self_attention.into.bias

    def project(
        self,
        block: nn.Module,
        queries_from: Tensor,
        keys_from: Tensor,
        bias: Tensor,
        queries_at: Rows,
        keys_at: Rows,
        _call: BlockCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = block.self_attention
        if (quantized := block.actvar.quantized) is not None:
            ours, theirs = (linear(rows, attention.into.weight, bias, quantized) for rows in (queries_from, keys_from))
            parts = ours.chunk(3, dim=-1)[0], *theirs.chunk(3, dim=-1)[1:]
            q, k, v = (attention.split(part) for part in parts)
        else:
            sources = (queries_from, keys_from, keys_from)
            weights = zip(attention.into.weight.chunk(3), bias.chunk(3), sources, strict=True)
            q, k, v = (attention.split(F.linear(rows, weight, part)) for weight, part, rows in weights)
        device = queries_from.device
        return rotated(q, queries_at.positions(device)), rotated(k, keys_at.positions(device)), v

    def attention_scale(self, block: nn.Module) -> float:
        return block.self_attention.scale

    def attention_output(self, block: nn.Module, out: Tensor) -> Tensor:
        layer, quantized = block.self_attention.out, block.actvar.quantized
        return layer(out) if quantized is None else linear(out, layer.weight, layer.bias, quantized)

    def between_norm(self, block: nn.Module, rows: int) -> AdaLN:
        norm = block.cross_norm
        parts = (torch.ones_like(norm.weight), norm.weight - 1, norm.bias)
        return AdaLN(*(part.expand(rows, 1, -1) for part in parts))

    def between(self, block: nn.Module, u: Tensor, _at: Rows, call: BlockCall) -> Tensor:
        return block.cross_attention.over_text(u, call.context)

    def ffn_module(self, block: nn.Module) -> nn.Module:
        return block.feed_forward

    def ffn_weights(self, block: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        up, down = block.feed_forward.up, block.feed_forward.down
        return up.weight, up.bias, down.weight, down.bias
