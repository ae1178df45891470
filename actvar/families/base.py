"""List the questions that a model family answers: which blocks, which scales, where the K/V cache, how the FFN splits.

A family is stateless. Every patched block keeps its family at `block.actvar.family`, so nothing else has to know it.

A block of every family is `x = x + gamma1 * attention(norm(x) * (1 + scale1) + shift1)`, then
`x = x + gamma * between(norm(x) * (1 + scale) + shift)` where there is such a layer, then
`x = x + gamma2 * ffn(norm(x) * (1 + scale2) + shift2)`. The norm is a LayerNorm without weights.

Models and blocks are annotated `Any`. Their classes may be those of other people's code, so no class names the
attributes that a family reads; `Family.mismatch` checks these attributes at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from actvar.families.drawing import Drawing
from actvar.families.kv_cache import Cache
from actvar_kernels.residual_norm.reference import AdaLN, Gated
from actvar_kernels.triton_backend.row_form import NormedRows

OnScale = Callable[[int, Any, Tensor], None]
"""Called after every scale of a sample with three arguments.

They are the scale's number, its tokens `[B, L]` int64, and the sum of the features so far, `[B, Cvae, height, width]`.
Tokens are None where code vectors were mixed instead of drawn.
"""


Adaln = Literal["per block", "shared", "none"]
"""Tells which AdaLN projections a model has; the head's goes with that of the blocks."""


class BlockCall(NamedTuple):
    """Hold the arguments of one call of a block.

    Args:
        x: rows of the residual stream, `[R, L, C]` in a floating dtype.
        cond: the condition that `Family.modulation` reads.
        scale: number of the scale, or None where the tokens and the K/V cache tell it.
        context: input of `Family.between`, such as the features of a text; None without one.
        mask: additive attention mask under teacher forcing, where `x` has all scales; None at a single scale.
    """

    x: Tensor
    cond: Any
    scale: int | None = None
    context: Any = None
    mask: Tensor | None = None


class Rows(NamedTuple):
    """Hold the positions of rows in the whole sequence of tokens.

    Args:
        start: position of the first token that `index` counts from.
        count: number of tokens from `start` on.
        index: `[R, K]` int64, the rows counted from `start`; None for all `count` rows.
    """

    start: int
    count: int
    index: Tensor | None

    def positions(self, device: torch.device) -> Tensor:
        """Return the positions on `device`, `[R, K]` int64, or `[1, count]` int64 for all rows."""
        if self.index is not None:
            return self.index + self.start
        return torch.arange(self.start, self.start + self.count, device=device).unsqueeze(0)

    def all(self) -> Rows:
        """Return the positions of all `count` rows."""
        return self._replace(index=None)


class Sizes(NamedTuple):
    """Hold the sizes of a model.

    Args:
        width: channels C of a token.
        hidden: hidden units D of an FFN.
        code_size: channels of the features that the next scale is embedded from.
        vocabulary: logits V of a token.
        adaln: "per block", "shared" where one AdaLN projection serves all blocks, or "none".
    """

    width: int
    hidden: int
    code_size: int
    vocabulary: int
    adaln: Adaln


NORM, MODULATION, ATTENTION, PROJECTION, FFN = "norm", "modulation", "attention", "projection", "ffn"
"""Parts of a block that kernels read; `PROJECTION` is the linear layer after attention."""


class Called(NamedTuple):
    """Name a part of a block that must be called instead of read.

    Args:
        path: name of the part in the block.
        reason: why its weights must not be read, as the predicate of a sentence.
    """

    path: str
    reason: str


class Embedded(NamedTuple):
    """Hold what teacher forcing begins with.

    Args:
        call: arguments of the first block.
        head_cond: the condition that `Family.logits` reads.
    """

    call: BlockCall
    head_cond: Any


class Family(Drawing, Protocol):
    """Answer questions about the models of one family. Neither `model` nor `block` is inside a wrapper."""

    name: str
    model_mixin: type
    """The class that goes in front of a patched model's own."""
    hidden_axes: Mapping[str, int]
    """The axis of hidden units in each of a block's tensors that have one, by the tensor's name in the block."""
    leaves_out_guidance: bool
    """True where the mixin can sample on with the conditional rows alone, once the blocks return no others."""
    takes_eight_bits: bool
    """True where `project` and `attention_output` multiply in eight bits if `block.actvar.quantized` says so."""
    takes_few_rows: bool
    """True where `project` takes `NormedRows`, and the family has `attention_added` and `ffn_added`."""
    hands_on: bool
    """True where the model's own loop gives a block what the block before returned, and looks at it in no other way."""
    has_between: bool
    """True where a layer, such as cross-attention, stands between attention and FFN."""
    weight_kinds: Sequence[tuple[str, str]]
    """Parts of parameter names, each with the field of `actvar.flops.StepFlops` that counts such a weight's product."""

    # the model
    def mismatch(self, model: Any) -> str | None:
        """Return why `model` is not of this family, or None if it is.

        Experts compute a linear layer, GELU by tanh and a linear layer, both layers with biases. Norms have the
        `NORM_EPS` of `actvar_kernels.constants`. A family whose blocks may differ from that checks it here.
        """
        ...

    def loop_fields(self, model: Any) -> Collection[str]:
        """Return the fields of `Execution` that change the sampling loop and that the mixin follows."""
        ...

    def loop_is_ours(self, model: Any) -> bool:
        """Return whether the unpatched class samples by the loop of our model, which reads no block's input again."""
        ...

    def ends_early(self, model: Any) -> bool:
        """Return whether the mixin can end sampling before the last scale, as `ActVARConfig.scales_until` asks for."""
        ...

    def blocks(self, model: Any) -> Sequence[Any]:
        """Return the transformer blocks in order, each possibly inside a wrapper, such as that of `torch.compile`."""
        ...

    def maps(self, model: Any) -> tuple[tuple[int, int], ...]:
        """Return height and width of the token map of every scale.

        Where every sample brings maps of its own, these are the ones that a patch is checked with. The mixin then calls
        `PatchState.fit_maps` before the blocks run.
        """
        ...

    def sizes(self, model: Any) -> Sizes:
        """Return the sizes of the model."""
        ...

    def recorded_sizes(self, model: Any) -> dict[str, int | list[int]]:
        """Return the sizes that an adapter file records of the model that it fits, JSON-compatible."""
        ...

    def autoencoder(self, model: Any) -> Any:
        """Return the module that turns sampled tokens into images."""
        ...

    def finetuned_names(self, model: Any) -> list[str]:
        """Return the names of the parameters that stage 2 of the distillation trains."""
        ...

    def head_called(self, model: Any) -> str | None:
        """Return why the head must be called instead of read, or None where kernels may read it."""
        ...

    def packed_head(self, model: Any) -> list[Tensor | None]:
        """Return the weights of the head that kernels keep packed copies of; None for one that is not there."""
        ...

    # the block
    def block_call(self, *args: Any, **kwargs: Any) -> BlockCall:
        """Return the arguments that a block's own `forward` was called with."""
        ...

    def block_arguments(self, call: BlockCall) -> dict[str, Any]:
        """Return `call` as keyword arguments of a block's own `forward`."""
        ...

    def conditional(self, call: BlockCall) -> BlockCall:
        """Return `call` of the conditional rows alone, the first half of the condition's rows.

        `call.x` has all rows, or the conditional ones that the block before returned.
        """
        ...

    def parts_called(self, block: Any) -> dict[str, Called]:
        """Return the parts of a block that kernels must not read, by `NORM`, `MODULATION` and so on.

        `actvar.utils.plain_layers` says of a layer whether a hook, an adapter or another class forbids it.
        """
        ...

    def packed_weights(self, block: Any) -> list[Tensor | None]:
        """Return the weights of a block that kernels keep packed copies of; None for one that is not there."""
        ...

    def cache(self, block: Any) -> Cache:
        """Return the K/V cache of a block."""
        ...

    def modulation(self, block: Any, cond: Any) -> tuple[Tensor, ...]:
        """Return AdaLN's gamma1, gamma2, scale1, scale2, shift1 and shift2 under `cond`, each `[R, 1, C]`.

        Without AdaLN gamma is 1, scale the norm's weight less 1, and shift its bias. Kernels keep the result for the
        next scale where `cond` is the same object.
        """
        ...

    def modulations(self, blocks: Sequence[Any], cond: Any) -> Sequence[tuple[Tensor, ...]] | None:
        """Return `modulation` of all `blocks` from few launches, or None where each has to be asked by itself."""
        ...

    def qkv_bias(self, block: Any) -> Tensor:
        """Return the bias of queries, keys and values, `[3C]`; zeros without one."""
        ...

    def layer_dtype(self, block: Any) -> torch.dtype | None:
        """Return the dtype in which layers take rows after a norm; None for that of the residual stream."""
        ...

    def project(
        self,
        block: Any,
        queries_from: Tensor,
        keys_from: Tensor,
        bias: Tensor,
        queries_at: Rows,
        keys_at: Rows,
        call: BlockCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[R, H, K, d]`, keys `[R, H, T, d]` and values `[R, H, T, d]`.

        Args:
            queries_from: rows that queries are projected from, `[R, K, C]`.
            keys_from: rows that keys and values are projected from, `[R, T, C]`; may be `queries_from` itself.
            bias: the result of `qkv_bias`, `[3C]`.
            queries_at, keys_at: positions of the rows, for position encodings that act on queries and keys.
            call: arguments of the block.
        """
        ...

    def head_scale(self, block: Any) -> Tensor | None:
        """Return the query scale per head `[H]` where attention applies QK norm; None where it must not."""
        ...

    def attention_scale(self, block: Any) -> float:
        """Return the factor of the products of queries and keys."""
        ...

    def called_attention(self, block: Any, u: Tensor, mask: Tensor | None, at: Rows, call: BlockCall) -> Tensor:
        """Return the output `[R, K, C]` of the block's own attention.

        Args:
            u: rows after norm and modulation, `[R, K, C]`.
            mask: additive mask, or None.
            at: positions of the rows.
            call: arguments of the block.

        Raises:
            TypeError: the attention cannot be called for some rows alone.
        """
        ...

    def attention_output(self, block: Any, out: Tensor) -> Tensor:
        """Return `out` `[R, K, C]`, the joined heads, after the linear layer that follows attention."""
        ...

    def four_layers(self, block: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return weight and bias of a block's linear layers: into attention, out of it, and both of the FFN.

        Called where `takes_few_rows` is True and no kernel is kept from reading them.
        """
        ...

    def attention_added(self, block: Any, out: Tensor, onto: Gated) -> Tensor:
        """Return `onto.rows + onto.gamma * attention_output(block, out)` from one launch, see `linear_residual`.

        Called where `takes_few_rows` is True.
        """
        ...

    def ffn_added(self, block: Any, u: NormedRows, onto: Gated) -> Tensor:
        """Return `onto.rows + onto.gamma * dense_ffn` of rows that are not normalised yet, from two launches.

        Called where `takes_few_rows` is True.
        """
        ...

    def between_norm(self, block: Any, rows: int) -> AdaLN:
        """Return what stands around the layer between attention and FFN; called where `has_between` is True.

        Args:
            rows: number R of rows; gamma, scale and shift are `[R, 1, C]`.
        """
        ...

    def between(self, block: Any, u: Tensor, at: Rows, call: BlockCall) -> Tensor:
        """Return the output `[R, K, C]` of the layer between attention and FFN; called where `has_between` is True.

        Args:
            u: rows after the norm of `between_norm`, `[R, K, C]`.
            at: positions of the rows.
            call: arguments of the block.
        """
        ...

    def dense_ffn(self, block: Any, u: Tensor, num_experts: int) -> Tensor:
        """Return the output `[R, K, C]` of the whole FFN for `u` `[R, K, C]`, computed in the fastest way there is.

        Args:
            u: rows after norm and modulation.
            num_experts: experts of the patch, all of which are on here.
        """
        ...

    def called_ffn(self, block: Any, u: Tensor) -> Tensor:
        """Return the output `[R, K, C]` of the block's own FFN module for `u` `[R, K, C]`."""
        ...

    def ffn_module(self, block: Any) -> Any:
        """Return the module that maps the FFN's input to its output."""
        ...

    def set_ffn_module(self, block: Any, ffn: nn.Module) -> None:
        """Put another module in the place of `ffn_module`."""
        ...

    def pruned_ffn(self, block: Any, units: Tensor) -> Any:
        """Return a copy of the FFN that has only the hidden units `units` `[m]` int64."""
        ...

    def ffn_weights(self, block: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the FFN's first weight `[D, C]` and bias `[D]`, then its second weight `[C, D]` and bias `[C]`."""
        ...

    def reordered_hidden(self, block: Any, order: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return each of the FFN's parameters with its values after hidden unit `order[i]` has moved to place `i`.

        Args:
            order: a permutation, `[D]` int64.

        Raises:
            TypeError: a layer of the FFN is more than its weight.
        """
        ...
