"""Bring an adapter's weights to the strength of guidance that images are drawn with.

The weights let conditional rows imitate guided logits of one strength. The model's own weights do so for no guidance.
For a strength in between, every weight is taken from in between, in proportion. Guided logits are linear in the
strength, so this is right to first order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actvar.utils.modes import inference_mode
from actvar.utils.weight_override import own_parameters, running_with, tuned_parameters
from actvar_kernels.checks import as_number
from actvar_kernels.cpu_backend.packing import drop_changed, packed

if TYPE_CHECKING:
    from actvar.sparse.state import PatchState


class StrengthWeights:
    """Run a patched model with weights for the strength of a sample; those of the last strength are kept.

    Args:
        state: the `PatchState` of the model.
    """

    def __init__(self, state: PatchState):
        self.state = state
        self.share = torch.ones((), dtype=torch.float64, device="cpu")

    @contextmanager
    def running(self, model: nn.Module, *cfg: Any) -> Iterator[None]:
        """Let `model` run with weights for strengths of guidance while the context is open.

        Args:
            model: the patched model.
            cfg: strength of each scale; those without unconditional rows count, or one for all. Above the adapter's own
                strength its weights run as they are.

        Raises:
            TypeError, ValueError: a strength that is no number.
        """
        share = self._share(cfg)
        if share == 1:
            yield
            return
        if share != self.share.item():
            self.share = torch.full_like(self.share, share)
        tuned, own = tuned_parameters(model), own_parameters(model)
        drop_changed(tuned.values())
        with running_with(model, {name: self._between(own[name], weight) for name, weight in tuned.items()}):
            yield

    def _share(self, cfg: Sequence[Any]) -> float:
        """Return the share of the adapter's changes that strengths of guidance ask for, between 0 and 1."""
        trained, family = self.state.config.guidance_strength, self.state.family
        if trained is None:
            return 1.0
        first = sum(scale.guided for scale in self.state.schedule)
        asked = [as_number("cfg", strength, "a number") for strength in cfg[first:] or cfg]
        mean = sum(family.strength(strength, 1, 2) for strength in asked) / len(asked)
        return min(1.0, max(0.0, mean / family.strength(trained, 1, 2)))

    @inference_mode(False)  # weights made in this mode have no version, by which packed copies know them
    def _between(self, own: nn.Parameter, tuned: nn.Parameter) -> nn.Parameter:
        """Return a weight between two, computed in float32 and rounded once; made anew when one of them changes."""

        def mixed() -> nn.Parameter:
            weight: Tensor = torch.lerp(own.detach().float(), tuned.detach().float(), self.share.item())
            return nn.Parameter(weight.to(tuned.dtype), requires_grad=False)

        return packed((tuned, own, self.share), "strength", mixed)
