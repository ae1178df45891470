"""The questions that a model family answers: which blocks, which scales, where the K/V cache, how the FFN splits.

A family is stateless. Every patched block keeps its own at `block.actvar.family`, so nothing else has to know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

OnScale = Callable[[int, Tensor, Tensor], None]
"""Called behind every scale of a sample with its number, its tokens `[B, L]` and the image's features so far."""


class BlockCall(NamedTuple):
    """One call of a block.

    Args:
        x: rows of the residual stream, `[R, L, C]`.
        cond: the condition that `Family.modulation` reads.
        scale: number of the scale, or None where the tokens and the K/V cache tell it.
        context: what `Family.between` reads, such as the features of a text; None without one.
        mask: additive attention mask under teacher forcing, where `x` has all scales; None at a single scale.
    """

    x: Tensor
    cond: Any
    scale: int | None = None
    context: Any = None
    mask: Tensor | None = None


class Rows(NamedTuple):
    """Positions of rows in the whole sequence of tokens.

    Args:
        start: position of the first token that `index` counts from.
        count: tokens there.
        index: `[R, K]` int64, the rows counted from `start`; None for all `count`.
    """

    start: int
    count: int
    index: Tensor | None

    def positions(self, device: torch.device) -> Tensor:
        """Return the positions as int64, `[R, K]`, or `[1, count]` for all rows."""
        if self.index is not None:
            return self.index + self.start
        return torch.arange(self.start, self.start + self.count, device=device).unsqueeze(0)

    def all(self) -> Rows:
        """Return the positions of all `count` rows."""
        return self._replace(index=None)


class Sizes(NamedTuple):
    """Sizes of a model.

    Args:
        width: channels C of a token.
        hidden: hidden units D of an FFN.
        code_size: channels of the features that the next scale is embedded from.
        vocabulary: logits V of a token.
        shares_modulation: one AdaLN projection serves all blocks.
    """

    width: int
    hidden: int
    code_size: int
    vocabulary: int
    shares_modulation: bool


NORM, MODULATION, ATTENTION, PROJECTION, FFN = "norm", "modulation", "attention", "projection", "ffn"
"""Parts of a block that kernels read; `PROJECTION` is the one behind attention."""


class Called(NamedTuple):
    """A part of a block that must be called instead of read: its name in the block, and why."""

    path: str
    reason: str


class Embedded(NamedTuple):
    """Teacher forcing in two parts: `call` for the first block, and the condition that the head reads."""

    call: BlockCall
    head_cond: Any


class Cache(Protocol):
    """The K/V cache of one block."""

    @property
    def is_on(self) -> bool:
        """Return whether keys and values are kept for later scales."""
        ...

    @property
    def rows(self) -> int:
        """Return the number of cached rows."""
        ...

    @property
    def key(self) -> Tensor | None:
        """Return a tensor that is another one after every write, or None when nothing is cached."""
        ...

    def start(self) -> None:
        """Begin with an empty cache."""
        ...

    def drop(self) -> None:
        """Empty the cache and stop caching."""
        ...

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Return cached keys and values, each `[R, H, P, d]`, or None when nothing is cached."""
        ...

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Replace the cache by `keys` and `values` `[R, H, P, d]`, in the layout that the block itself uses."""
        ...


class Family(Protocol):
    """The answers of one family. Neither `model` nor `block` is inside a wrapper."""

    name: str
    model_mixin: type
    """Put in front of a patched model's class."""
    hidden_axes: Mapping[str, int]
    """The axis of hidden units in a block's tensors, by name."""
    has_between: bool
    """Something stands between attention and FFN."""
    weight_kinds: Sequence[tuple[str, str]]
    """Parts of parameter names and the kind of product that such a weight is in, see `actvar.flops.StepFlops`."""

    # the model
    def mismatch(self, model: nn.Module) -> str | None:
        """Return why `model` is not of this family, or None if it is."""
        ...

    def has_draw_and_decode(self, model: nn.Module) -> bool:
        """Return whether a patch can replace how tokens are drawn and images decoded."""
        ...

    def loop_is_ours(self, model: nn.Module) -> bool:
        """Return whether the unpatched class samples by our own loop, which needs no block's input afterwards."""
        ...

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the transformer blocks in order; each may be inside a wrapper, such as that of `torch.compile`."""
        ...

    def maps(self, model: nn.Module) -> tuple[tuple[int, int], ...]:
        """Return height and width of the token map of every scale."""
        ...

    def sizes(self, model: nn.Module) -> Sizes: ...

    def recorded_sizes(self, model: nn.Module) -> dict[str, int | list[int]]:
        """Return what an adapter file records of the model that it fits."""
        ...

    def autoencoder(self, model: nn.Module) -> nn.Module:
        """Return what turns sampled tokens into images."""
        ...

    def finetuned_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that stage 2 of the distillation trains."""
        ...

    def embedded(self, model: nn.Module, labels: Tensor, inputs: Tensor) -> Embedded:
        """Return teacher forcing up to the first block, of classes `[R]` and inputs `[R, L - first, Cvae]`."""
        ...

    def without_class(self, model: nn.Module, labels: Tensor) -> Tensor:
        """Return labels `[R]` that stand for no class."""
        ...

    def logits(self, model: nn.Module, x: Tensor, head_cond: Any) -> Tensor:
        """Return the logits `[R, L, V]` of the last block's output `[R, L, C]`."""
        ...

    def scale_logits(self, model: nn.Module, labels: Tensor, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and the logits `[2B, L, V]` of every scale that is sampled, through the K/V cache.

        Args:
            labels: classes `[B]`; the unconditional rows come behind.
            inputs: `[B, L - first, Cvae]`.
        """
        ...

    def watch_scales(self, model: nn.Module, on_scale: OnScale) -> AbstractContextManager[None]:
        """Call `on_scale` behind every scale that is sampled while the context is open."""
        ...

    def teacher_input(self, model: nn.Module, token_maps: Tensor) -> Tensor:
        """Return inputs `[B, L - first, Cvae]` for teacher forcing of token maps `[B, L]`."""
        ...

    def head_called(self, model: nn.Module) -> str | None:
        """Return why the head must be called instead of read, or None."""
        ...

    def packed_head(self, model: nn.Module) -> list[Tensor | None]:
        """Return the weights of the head that kernels keep packed copies of."""
        ...

    # the block
    def block_call(self, *args: Any, **kwargs: Any) -> BlockCall:
        """Return the arguments of a block's own `forward`."""
        ...

    def block_arguments(self, call: BlockCall) -> dict[str, Any]:
        """Return the keyword arguments of a block's own `forward`."""
        ...

    def parts_called(self, block: nn.Module) -> dict[str, Called]:
        """Return the parts of a block that kernels must not read, by `NORM`, `MODULATION` and so on."""
        ...

    def packed_weights(self, block: nn.Module) -> list[Tensor | None]:
        """Return the weights of a block that kernels keep packed copies of."""
        ...

    def cache(self, block: nn.Module) -> Cache: ...

    def modulation(self, block: nn.Module, cond: Any) -> tuple[Tensor, ...]:
        """Return gamma1, gamma2, scale1, scale2, shift1, shift2, each `[R, 1, C]`."""
        ...

    def qkv_bias(self, block: nn.Module) -> Tensor:
        """Return the bias of queries, keys and values, `[3C]`."""
        ...

    def project(
        self, block: nn.Module, queries_from: Tensor, keys_from: Tensor, bias: Tensor, queries_at: Rows, keys_at: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q `[R, H, K, d]` of `queries_from` `[R, K, C]`; k and v `[R, H, T, d]` of `keys_from` `[R, T, C]`.

        Args:
            bias: `[3C]`, by `qkv_bias`.
            queries_at, keys_at: where the rows stand, for position encodings that act on queries and keys.
        """
        ...

    def head_scale(self, block: nn.Module) -> Tensor | None:
        """Return the query scale per head `[H]` under QK norm, or None without it."""
        ...

    def attention_scale(self, block: nn.Module) -> float:
        """Return what the products of queries and keys are multiplied by."""
        ...

    def called_attention(self, block: nn.Module, u: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the block's own attention module gives for `u` `[R, K, C]`."""
        ...

    def attention_output(self, block: nn.Module, out: Tensor) -> Tensor:
        """Return the projection after attention, `[R, K, C]`."""
        ...

    def between(self, block: nn.Module, rows: Tensor, at: Rows, call: BlockCall) -> Tensor:
        """Return `rows` `[R, K, C]` after what stands between attention and FFN, such as cross-attention.

        It is called where `has_between` is True.
        """
        ...

    def dense_ffn(self, block: nn.Module, u: Tensor, num_experts: int) -> Tensor:
        """Return the block's FFN of `u` `[R, K, C]` by the fastest equal way."""
        ...

    def called_ffn(self, block: nn.Module, u: Tensor) -> Tensor:
        """Return what the block's own FFN module gives for `u` `[R, K, C]`."""
        ...

    def ffn_module(self, block: nn.Module) -> nn.Module:
        """Return the module that maps the FFN's input to its output."""
        ...

    def set_ffn_module(self, block: nn.Module, ffn: nn.Module) -> None:
        """Put another module in the place of `ffn_module`."""
        ...

    def pruned_ffn(self, block: nn.Module, units: Tensor) -> nn.Module:
        """Return the FFN with the hidden units `units` `[m]` int64 alone, in memory of its own."""
        ...

    def ffn_weights(self, block: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the FFN's first weight `[D, C]` and bias, second weight `[C, D]` and bias."""
        ...

    def reordered_hidden(self, block: nn.Module, order: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the FFN's weights, and what they are with hidden unit `order[i]` in place `i`.

        Args:
            order: a permutation, `[D]` int64.

        Raises:
            TypeError: a layer of the FFN is more than its weight.
        """
        ...


class PatchedState(Protocol):
    """What a `model_mixin` sees of the patch at `self.actvar`, see `actvar.sparse.state.PatchState`."""

    config: Any
    execution: Any
    seed: Tensor | None
    rows_are_guided: bool

    def begin_pass(self, model: nn.Module) -> None: ...

    def end_pass(self) -> None: ...

    def sampling(self, model: nn.Module, in_place: bool) -> AbstractContextManager[None]: ...

    def begin_head(self, model: nn.Module, tokens: int) -> None: ...

    def expect_own_blocks(self, model: nn.Module) -> None: ...
