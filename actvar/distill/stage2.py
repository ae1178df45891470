"""Stage 2: train attention, FFN and head for the gates of stage 1, which stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from actvar.distill.data import GUIDANCE
from actvar.distill.losses import block_loss, guided_loss, output_loss
from actvar.distill.stage import Stage
from actvar.families import family_of
from actvar.patching.patch import unpatched
from actvar.patching.weight_override import replace_parameters, tuned_parameters
from actvar.sparse.state import patch_state
from actvar.utils.devices import device_of
from actvar.utils.wrappers import unwrapped

LOSSES = ("cls", "block", "output", "guided")


class Stage2(Stage):
    """Loss of a batch as a module, so that it can be trained in several processes.

    The teacher is the same model without the patch: only what is trained is held twice.

    Args:
        var: a patched model; its attention, FFN and head get trainable copies of their weights, the only trainable
            parameters, or go on from those that an adapter brought. `remove_patch` puts the originals back.
        losses: parts of the loss, of `LOSSES`. With `guided` every image is computed with its class and without, as in
            sampling, and no label is dropped.
        cfg: guidance strength of the part `guided`, as in sampling.

    Raises:
        ValueError: the model is not patched, or parts that do not exist.
    """

    def __init__(self, var: nn.Module, losses: Collection[str] = LOSSES[:3], cfg: float = GUIDANCE):
        super().__init__()
        patch_state(var)
        if not losses or not set(losses) <= set(LOSSES):
            raise ValueError(f"losses: expected some of {LOSSES}, got {tuple(losses)}")
        self.var, self.losses = var, tuple(losses)
        self.family = family_of(var)
        maps = self.family.maps(var)
        strengths = [cfg * scale / (len(maps) - 1) for scale, (h, w) in enumerate(maps) for _ in range(h * w)]
        self.strength = torch.tensor(strengths, dtype=torch.float32, device=device_of(var)).unsqueeze(1)
        var.requires_grad_(False)
        names = self.family.finetuned_names(var)
        done = tuned_parameters(var).keys()
        replace_parameters(
            var, {name: nn.Parameter(var.get_parameter(name).detach().clone()) for name in names if name not in done}
        )
        for parameter in tuned_parameters(var).values():
            parameter.requires_grad_(True)

    @property
    def guides(self) -> bool:
        return "guided" in self.losses

    def train(self, mode: bool = True) -> Stage2:
        super().train(mode)
        self.var.training = mode and not self.guides  # else it drops labels
        return self

    def forward(self, labels: torch.Tensor, inputs: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalar losses over all scales: `loss` (Eq. 22), the sum of those asked for, and `cls`, `block`, `output`,
        with `guided` if that was asked for.

        Args:
            labels: classes `[B]`.
            inputs: `[B, L - first_l, Cvae]`, see `VectorQuantizer.teacher_input`.
            tokens: the true token maps `[B, L]`.
        """
        count = len(labels)
        if self.guides:
            labels = torch.cat((labels, self.family.without_class(self.var, labels)))
            inputs = torch.cat((inputs, inputs))
        teacher_outputs, teacher_logits = self._teacher(labels, inputs)
        with _block_outputs(self.var) as outputs:
            logits = self.var(labels, inputs)
        with torch.autocast(logits.device.type, enabled=False):
            cls = F.cross_entropy(logits[:count].flatten(0, 1), tokens.flatten().long())
            block, output = block_loss(outputs, teacher_outputs), output_loss(logits, teacher_logits)
            parts = {"cls": cls, "block": block, "output": output}
            if self.guides:
                parts["guided"] = guided_loss(logits, teacher_logits, self.strength)
        return {"loss": sum(parts[name] for name in self.losses)} | parts

    @torch.no_grad()
    def _teacher(self, labels: torch.Tensor, inputs: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Block outputs and logits of the dense model, which drops the labels that the student is going to drop."""
        devices = [labels.device] if labels.is_cuda else []
        with torch.random.fork_rng(devices), unpatched(self.var), _block_outputs(self.var) as outputs:
            logits = self.var(labels, inputs)
        return outputs, logits


@contextmanager
def _block_outputs(var: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The output of every block, in order, of calls within the context."""
    outputs: list[torch.Tensor] = []
    blocks = family_of(unwrapped(var)).blocks(unwrapped(var))
    handles = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
