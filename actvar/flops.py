"""Count the transformer's FLOPs in one sampling run, by formula and by torch's counter. A multiply-add is 2 FLOPs."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from actvar.config import DENSE, ActVARConfig
from actvar.families import family_of
from actvar.families.base import Adaln
from actvar.models.arguments import checked_integer
from actvar.models.vqvae import without_decoder
from actvar.sparse.schedule import Scale, build_schedule
from actvar.sparse.state import is_patched, patch_state
from actvar.utils.devices import device_of
from actvar.utils.weight_override import own_parameters
from actvar.utils.wrappers import unwrapped
from actvar_kernels.backend import using_backend


@dataclass(frozen=True)
class StepFlops:
    """Hold the FLOPs of one scale by module, over all rows and blocks.

    `head` includes the embedding of the tokens that the scale begins with. `cross` is attention to a text with all its
    projections, and `text` what is computed from the text before the blocks.
    """

    qkv: int
    attention: int
    proj: int
    ffn: int
    selector: int
    router: int
    adaln: int
    head: int
    cross: int = 0
    text: int = 0

    @property
    def total(self) -> int:
        """Return the FLOPs of all modules."""
        return sum(getattr(self, module) for module in MODULES)


MODULES = tuple(field.name for field in fields(StepFlops))
BY_LAST_WEIGHT = ("cross", "text")
"""Modules whose attention follows a product with their own weight, by which it is told from self-attention."""


class TextSize(NamedTuple):
    """Hold the number of tokens of a row's text, and their channels."""

    tokens: int
    channels: int


NO_TEXT = TextSize(0, 0)


def total_flops(steps: Sequence[StepFlops]) -> int:
    """Return the FLOPs of all scales."""
    return sum(step.total for step in steps)


def formula_flops(
    *,
    width: int,
    hidden: int,
    depth: int,
    vocab_size: int,
    code_size: int,
    maps: Sequence[tuple[int, int]],
    adaln: Adaln,
    batch: int,
    config: ActVARConfig = DENSE,
    text: TextSize = NO_TEXT,
) -> list[StepFlops]:
    """Return the FLOPs of each scale for `batch` images, with 2 rows an image where there is guidance, otherwise 1.

    A scale that is left out has none. Selectors and routers count. LayerNorm, softmax and other element-wise work does
    not. A block's own AdaLN counts at every scale and a shared one at the first, as the models compute them. Kernels
    compute both once a sample. What is projected from a text counts at the first scale.

    Args:
        width, hidden, depth, vocab_size, code_size: sizes C, D, blocks, V, Cvae.
        maps: height and width of the token map of every scale.
        adaln: "per block", "shared" where one AdaLN projection serves all blocks, or "none".
        batch: number of images.
        config: rates and variants.
        text: of each row, for models whose blocks attend to one.

    Raises:
        TypeError: a batch that is no integer.
        ValueError: a batch below 1, or a configuration that does not fit the maps.
    """
    batch, C = checked_integer("batch", batch, 1), width
    steps = []
    for block_scales in zip(*(build_schedule(config, maps, block) for block in range(depth)), strict=True):
        tokens, index = block_scales[0].tokens, block_scales[0].index
        rows = 0 if block_scales[0].left_out else 2 * batch if block_scales[0].guided else batch
        blocks = [block_flops(scale, config, C, hidden, text.tokens) for scale in block_scales]
        adaln_layers = {"per block": depth, "shared": index == 0, "none": 0}[adaln]
        head_adaln = adaln != "none"
        embedded = 0 if index == 0 or block_scales[0].left_out else batch * tokens
        steps.append(
            StepFlops(
                **{module: rows * sum(block[module] for block in blocks) for module in blocks[0]},
                adaln=rows * 2 * C * (6 * C * adaln_layers + 2 * C * head_adaln),
                head=rows * 2 * C * vocab_size * tokens + 2 * C * code_size * embedded,
                text=0 if index else rows * text_flops(text, C),
            )
        )
    return steps


def text_flops(text: TextSize, width: int) -> int:
    """Return the FLOPs of a row before the blocks: its text's projection by two layers, and its pooling to one vector.

    No text has none.
    """
    T, Ct, C = *text, width
    projection = 2 * T * Ct * C + 2 * T * C * C
    pooling = 2 * T * Ct * 2 * C + 4 * T * C + 2 * C * C
    return projection + pooling if T else 0


def block_flops(scale: Scale, config: ActVARConfig, width: int, hidden: int, text_tokens: int = 0) -> dict[str, int]:
    """Return the FLOPs of one row in one block at `scale`, by module.

    The modules are those of `StepFlops` but `adaln`, `head` and `text`. Keys and values of the text are projected at
    the first scale.
    """
    C = width
    kept = scale.keep if scale.select else scale.tokens
    projected = kept if config.kv == "compact" else scale.tokens
    share = scale.experts / config.num_experts if scale.route or scale.static else 1.0
    cross = (4 * C * C + 4 * C * text_tokens) * kept if text_tokens else 0
    return {
        "qkv": 2 * C * C * (kept + 2 * projected),
        "attention": 4 * C * kept * (scale.cached_before + projected),
        "proj": 2 * C * C * kept,
        "ffn": round(4 * C * hidden * kept * share),
        "selector": 2 * C * scale.tokens * scale.select,
        "router": 2 * C * config.num_experts * kept * scale.route,
        "cross": cross + (0 if scale.index else 4 * C * C * text_tokens),
    }


def model_flops(
    var: Any, batch: int, config: ActVARConfig | None = None, maps: Sequence[tuple[int, int]] | None = None
) -> list[StepFlops]:
    """Return the `formula_flops` of a model without a text, of which only shapes are read.

    Args:
        var: a model of any family, patched or not, with or without weights.
        batch: number of images.
        config: rates and variants; None for those of the patch, or of the dense model without one.
        maps: height and width of the token map of every scale; None for those of the family.
    """
    var = unwrapped(var)
    family = family_of(var)
    sizes = family.sizes(var)
    own: ActVARConfig = var.actvar.config if is_patched(var) else DENSE
    return formula_flops(
        width=sizes.width,
        hidden=sizes.hidden,
        depth=len(family.blocks(var)),
        vocab_size=sizes.vocabulary,
        code_size=sizes.code_size,
        maps=family.maps(var) if maps is None else maps,
        adaln=sizes.adaln,
        batch=batch,
        config=own if config is None else config,
    )


def equation_12(*, width: int, depth: int, maps: Sequence[tuple[int, int]], config: ActVARConfig) -> float:
    """Return the FLOPs that one row saves by Eq. 12: the savings of the active steps and blocks less their gates' cost.

    L is a step's length, C the width and N the number of experts. t is the saving rate of tokens, and w that of FFN
    weights. The terms are our reading of the paper's words; the text they were read from lacks the formulas:

        saved = t * 8 L C^2  +  (1 - (1 - t)^2) * 4 L^2 C  +  (1 - (1 - t) (1 - w)) * 16 L C^2
        cost  = 2 L C (selector, where t > 0)  +  2 (1 - t) L C N (router, where w > 0)

    The savings are those of projections, attention and an FFN of 4 C hidden units. Only attention among the step's own
    tokens counts. L and C do not describe the K/V cache, with which a step has more attention and the next step fewer
    keys.

    Args:
        width: channels C.
        depth: number of blocks.
        maps: height and width of the token map of every scale.
        config: rates, each one number for all blocks.

    Raises:
        TypeError: a rate that is a tuple with one for each block.
    """
    saved = 0.0
    for scale, token_rate, ffn_rate in zip(config.scales, config.token_rates, config.ffn_rates, strict=True):
        if isinstance(token_rate, tuple) or isinstance(ffn_rate, tuple):
            raise TypeError(f"config: expected one rate for all blocks, got {token_rate} and {ffn_rate}")
        L, C, t, w = math.prod(maps[scale]), width, 1 - token_rate, 1 - ffn_rate
        block = t * 8 * L * C**2 + (1 - (1 - t) ** 2) * 4 * L**2 * C + (1 - (1 - t) * (1 - w)) * 16 * L * C**2
        gates = 2 * L * C * (t > 0) + 2 * (1 - t) * L * C * config.num_experts * (w > 0)
        saved += depth * (block - gates)
    return saved


@torch.no_grad()
def counted_flops(var: nn.Module, batch: int) -> list[StepFlops]:
    """Return the FLOPs of each scale of one sampling run, counted by torch on the model's own operations.

    A scale that is left out has none.

    A copy of the model with fake tensors for weights runs on the reference backend, so a model on the meta device will
    do. An expert FFN counts the experts that are on, even if the others are computed too. A product belongs to the
    module whose weight it has, and to attention if it has no weight.

    Args:
        var: a model of any family, patched or not, with or without weights.
        batch: number of images.

    Raises:
        TypeError: a batch that is no integer.
        ValueError: a batch below 1.
    """
    batch = checked_integer("batch", batch, 1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    var = unwrapped(var)
    var = without_weights(var, mode, family_of(var).autoencoder(var))
    counts = CountByModule(var, family_of(var).weight_kinds)
    counter = FlopCounterMode(display=False, custom_mapping=counts.formulas())
    steps = []
    family = family_of(var)
    (_, *later), code_size = family.maps(var), family.sizes(var).code_size
    with using_backend("reference"), mode, counter:
        labels = torch.zeros(batch, dtype=torch.int64, device="cpu")
        inputs = torch.empty(batch, sum(map(math.prod, later)), code_size, dtype=torch.float32, device="cpu")
        with patch_state(var).during(rows_are_guided=True) if is_patched(var) else nullcontext():
            for _ in family.scale_logits(var, labels, inputs):
                steps.append(counts.take())
    nothing = StepFlops(**dict.fromkeys(MODULES, 0))
    return steps + (1 + len(later) - len(steps)) * [nothing]


@torch.no_grad()
def sampling_flops(var: Any) -> int:
    """Return the transformer's FLOPs for one image under guidance, counted by torch during the sample.

    `autoregressive_infer_cfg` runs on the reference backend, so changes of a method to the sampling loop are counted.
    The autoencoder's FLOPs are not: the image is not decoded, and convolutions do not count.

    Args:
        var: a model with weights, patched or not.
    """
    counts, aten = CountByModule(unwrapped(var), family_of(unwrapped(var)).weight_kinds), torch.ops.aten
    formulas = counts.formulas() | {aten.convolution: lambda *_, **__: 0}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    autoencoder = family_of(unwrapped(var)).autoencoder(unwrapped(var))
    with using_backend("reference"), without_decoder(autoencoder, "fhat_to_img"), counter:
        var.autoregressive_infer_cfg(1, torch.zeros(1, dtype=torch.int64, device=device_of(var)), g_seed=0)
    return counts.take().total


def without_weights(var: Any, mode: FakeTensorMode, autoencoder: nn.Module) -> Any:
    """Return a copy of `var` on the CPU whose parameters and buffers are fake tensors of `mode`.

    The copy has the same `autoencoder`.
    """
    with mode:
        parameters = (*var.parameters(), *own_parameters(var).values())
        copies = {id(p): nn.Parameter(_on_cpu(p), p.requires_grad) for p in parameters}
        copies |= {id(b): _on_cpu(b) for b in var.buffers()}
    return copy.deepcopy(var, copies | {id(autoencoder): autoencoder})


def _on_cpu(like: torch.Tensor) -> torch.Tensor:
    """Return a tensor without values, of the shape and dtype of `like`."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu")


class CountByModule:
    """Sum the FLOPs that a counter finds by the module of `StepFlops`.

    Args:
        var: the model.
        weight_kinds: parts of parameter names with their modules, as in `Family.weight_kinds`.
    """

    def __init__(self, var: nn.Module, weight_kinds: Sequence[tuple[str, str]]):
        self.flops: Counter[str] = Counter()
        self.module_of: dict[StorageWeakRef, str] = {}
        self.last: str | None = None
        kinds = (*weight_kinds, (".selector.", "selector"), (".router.", "router"))
        weights = [*var.named_parameters(), *own_parameters(var).items()]
        for name, parameter in weights:
            module = next((module for place, module in kinds if place in name), None)
            if module is not None and name.endswith(".weight"):
                self.module_of[_storage(parameter)] = module

    def take(self) -> StepFlops:
        """Return the FLOPs counted since the last call."""
        step = StepFlops(**{module: self.flops[module] for module in MODULES})
        self.flops.clear()
        return step

    def formulas(self) -> dict[object, Callable]:
        """Return a counter's formulas by operator, each of which also adds to the sums.

        Torch and `actvar_kernels` have registered most of them. Another one is for the selector on the reference
        backend, whose product is a multiplication and a sum.
        """
        aten = torch.ops.aten
        formulas = {operator: self._summed(formula) for operator, formula in flop_registry.items()}
        formulas[aten._scaled_dot_product_flash_attention_for_cpu] = self._summed(_cpu_attention_flops)
        formulas[aten.mul] = self._summed(self._selector_flops)
        formulas[aten._to_copy] = self._summed(self._cast_flops)
        return formulas

    def _summed(self, formula: Callable[..., int]) -> Callable[..., int]:
        """Return `formula` as one that also adds its result to the sum of the module."""

        def count(*args, **kwargs) -> int:
            flops = formula(*args, **kwargs)
            own = self._module(args)
            self.last = (own if flops else None) or self.last
            self.flops[own or (self.last if self.last in BY_LAST_WEIGHT else "attention")] += flops
            return flops

        count._get_raw = True  # the counter then passes tensors, not their shapes
        return count

    def _module(self, args: Sequence[object]) -> str | None:
        """Return the module of the first weight among `args`, or None without a weight."""
        found = (self.module_of.get(_storage(arg)) for arg in args if isinstance(arg, torch.Tensor))
        return next((module for module in found if module is not None), None)

    def _selector_flops(self, *args, out_val: torch.Tensor, **_kwargs) -> int:
        """Return the FLOPs of a multiplication: those of the selector's product, otherwise none."""
        return 2 * out_val.numel() if self._module(args) == "selector" else 0

    def _cast_flops(self, source: torch.Tensor, *_args, out_val: torch.Tensor, **_kwargs) -> int:
        """Return no FLOPs, and let a weight in another dtype belong to the module of the original."""
        module = self._module((source,))
        if module is not None:
            self.module_of[_storage(out_val)] = module
        return 0


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    """Return a key for the memory of a tensor."""
    return StorageWeakRef(tensor.untyped_storage())


def _cpu_attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args, **_kwargs) -> int:
    """Return the FLOPs of torch's attention on the CPU, for which torch has no formula."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)
