"""Count the FLOPs of a sample of Infinity, by formula and by torch's counter."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from actvar.config import DENSE, ActVARConfig
from actvar.families import family_of
from actvar.flops import CountByModule, StepFlops, TextSize, formula_flops, without_weights
from actvar.models import Infinity
from actvar.models.infinity.layers import hidden_of
from actvar.models.infinity.schedules import Schedule
from actvar.sparse.state import is_patched
from actvar_kernels.backend import using_backend


def infinity_flops(
    infinity: Any, schedule: Schedule, batch: int, text_tokens: int, config: ActVARConfig | None = None
) -> list[StepFlops]:
    """Return the FLOPs of each scale by formula, for images that are guided on the logits.

    Args:
        infinity: a model, patched or not, of which only sizes are read.
        schedule: `(1, h, w)` of every scale.
        batch: number of images.
        text_tokens: number of tokens of each image's text.
        config: rates and variants; None for those of the patch, or of the dense model without one.

    Raises:
        TypeError: a batch that is no integer.
        ValueError: a batch below 1, or a configuration that does not fit the schedule.
    """
    own: ActVARConfig = infinity.actvar.config if is_patched(infinity) else DENSE
    return formula_flops(
        width=infinity.C,
        hidden=hidden_of(infinity.C),
        depth=infinity.depth,
        vocab_size=2 * infinity.token_bits,
        code_size=infinity.token_bits,
        maps=[(h, w) for _, h, w in schedule],
        adaln="shared",
        batch=batch,
        config=own if config is None else config,
        text=TextSize(text_tokens, infinity.text_channels),
    )


@torch.no_grad()
def counted_infinity_flops(infinity: Any, schedule: Schedule, batch: int, text_tokens: int) -> list[StepFlops]:
    """Return the FLOPs of each scale of `Infinity.sample`, counted by torch.

    A copy of the model with fake tensors for weights samples on the reference backend, so a model on the meta device
    will do. Images are not decoded.

    Args:
        infinity, schedule, batch, text_tokens: as in `infinity_flops`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = without_weights(infinity, mode, family_of(infinity).autoencoder(infinity))
    counts = CountByModule(model, family_of(infinity).weight_kinds)
    counter = FlopCounterMode(display=False, custom_mapping=counts.formulas())
    steps: list[StepFlops] = []
    model.head.register_forward_hook(lambda *_: steps.append(counts.take()))  # the last product of a scale
    model.decode = lambda features: features
    with using_backend("reference"), mode, counter:
        text = torch.empty(batch * text_tokens, model.text_channels, device="cpu")
        model.sample(text, [text_tokens] * batch, schedule)
    return steps


@torch.no_grad()
def decoder_flops(infinity: Infinity, schedule: Schedule) -> int:
    """Return the FLOPs of decoding one image by torch's counter, for a tokenizer on the meta device."""
    tokenizer, (_, h, w) = family_of(infinity).autoencoder(infinity), infinity.tokenizer_schedule(schedule)[-1]
    with FlopCounterMode(display=False) as counter:
        infinity.decode(torch.empty(1, tokenizer.bits, h, w, device="meta"))
    return counter.get_total_flops()
