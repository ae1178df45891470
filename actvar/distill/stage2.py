"""Stage 2: train attention, FFN and head for the gates of stage 1, which do not change."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from actvar.distill.data import GUIDANCE
from actvar.distill.losses import block_loss, guided_loss, output_loss
from actvar.distill.low_rank import LowRank
from actvar.distill.stage import Stage
from actvar.families import family_of
from actvar.families.conditions import Conditions
from actvar.patching.patch import unpatched
from actvar.sparse.state import patch_state
from actvar.utils.weight_override import replace_parameters, restore_parameters, running_with, tuned_parameters
from actvar.utils.wrappers import unwrapped

LOSSES = ("cls", "block", "output", "guided")


class Stage2(Stage):
    """Loss of a batch as a module, so that it can be trained in several processes.

    The teacher is the same model without the patch, so that only the trained weights are held twice.

    Args:
        var: a patched model. The only trainable parameters become the weights of attention, FFN and head: those that an
            adapter brought, otherwise copies of the model's. `remove_patch` puts the originals back.
        losses: parts of the loss, from `LOSSES`. With `guided` every image is computed with its class and without it,
            like in sampling, and no label is dropped. At scales without guidance, the student's conditional row alone
            learns the teacher's guided logits.
        cfg: guidance strength of the part `guided`.
        lora: rank of low-rank changes of the matrices, which are trained in place of all weights; None: all weights are
            trained, also those that an adapter changes by factors. `finish` brings low-rank changes into the model.

    Raises:
        TypeError: matrices that take no low-rank change.
        ValueError: the model is not patched, parts that do not exist, a rank that does not fit, or with `lora` blocks
            under activation checkpointing.
    """

    def __init__(
        self,
        var: nn.Module,
        losses: Collection[str] = LOSSES[:3],
        cfg: float = GUIDANCE,
        lora: int | None = None,
    ):
        super().__init__()
        state = patch_state(var)
        if not losses or not set(losses) <= set(LOSSES):
            raise ValueError(f"losses: expected some of {LOSSES}, got {tuple(losses)}")
        if state.first_tuned and tuple(losses) != ("guided",):
            raise ValueError(
                "losses: expected 'guided' alone where weights begin at a later scale (weights_from), "
                f"got {tuple(losses)}"
            )
        self.var, self.losses = var, tuple(losses)
        self.family = family_of(var)
        self.cfg = cfg
        var.requires_grad_(False)
        self.low_rank = None if lora is None else LowRank(var, lora)
        if self.low_rank is None:
            _train_all(var)

    @property
    def guides(self) -> bool:
        """Return whether every image is computed with its class and without it."""
        return "guided" in self.losses

    def train(self, mode: bool = True) -> Stage2:
        """Set the mode of the model alone, which drops labels in training unless the loss is guided."""
        super().train(mode)
        self.var.training = mode and not self.guides
        return self

    def forward(self, conditions: Conditions, inputs: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return scalar losses: `loss` (Eq. 22) over the scales with trained weights, and its possible parts.

        The parts are `cls`, `block`, `output`, and `guided` if it is in `losses`; `guided` alone where trained weights
        begin at a later scale. `loss` sums those in `losses`.

        Args:
            conditions: classes `[B]` int64, or texts.
            inputs: `[B, L - first_l, Cvae]` float32, see `Drawing.teacher_input`.
            tokens: the true token maps, `[B, L]`, or bits `[B, L, bits]`, of an integer dtype.
        """
        count, state = len(conditions), patch_state(self.var)
        state.fit_maps(self.var, self.family.maps_of(self.var, conditions))
        if self.guides:
            conditions = self.family.with_unconditional(self.var, conditions)
            inputs = torch.cat((inputs, inputs))
        teacher_outputs, teacher_logits = self._teacher(conditions, inputs)
        if state.first_tuned:
            needs_all_rows = any(scale.guided for scale in state.schedule[state.first_tuned :])
            rows = len(conditions) if needs_all_rows else count
            logits = self._student(conditions[:rows], inputs[:rows])
            with torch.autocast(logits.device.type, enabled=False):
                loss = self._guided(logits, teacher_logits)
            return {"loss": loss, "guided": loss}
        with _block_outputs(self.var) as outputs:
            logits = self._student(conditions, inputs)
        with torch.autocast(logits.device.type, enabled=False):
            cls = F.cross_entropy(logits[:count].flatten(0, -2), tokens.flatten().long())
            block, output = block_loss(outputs, teacher_outputs), output_loss(logits, teacher_logits)
            parts = {"cls": cls, "block": block, "output": output}
            if self.guides:
                parts["guided"] = self._guided(logits, teacher_logits)
        first, *others = (parts[name] for name in self.losses)
        return {"loss": sum(others, first)} | parts

    def finish(self) -> None:
        if self.low_rank is not None:
            self.low_rank.put_into(self.var)

    def _student(self, conditions: Conditions, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of the patched model with the trained weights."""
        if self.low_rank is None:
            return self.family.predicted(self.var, conditions, inputs)
        with running_with(self.var, self.low_rank.weights(self.var)):
            return self.family.predicted(self.var, conditions, inputs)

    def _guided(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Return `guided_loss` over the tokens that trained weights predict."""
        state = patch_state(self.var)
        late, count = state.schedule[state.first_tuned :], len(state.schedule)
        strengths = [self.family.strength(self.cfg, scale.index, count) for scale in late]
        own = [strength if scale.guided else 0.0 for strength, scale in zip(strengths, late, strict=True)]
        tokens = torch.tensor([scale.tokens for scale in late], device=logits.device)
        shape = (-1, *(1 for _ in logits.shape[2:]))  # of one for each token
        of_tokens = (
            torch.tensor(of_scale, dtype=torch.float32, device=logits.device).repeat_interleave(tokens).view(shape)
            for of_scale in (strengths, own)
        )
        return guided_loss(logits[:, late[0].start :], teacher_logits[:, late[0].start :], *of_tokens)

    @torch.no_grad()
    def _teacher(self, conditions: Conditions, inputs: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return block outputs and logits of the dense model, which drops the same rows as the student after it."""
        devices = [inputs.device] if inputs.is_cuda else []
        with torch.random.fork_rng(devices), unpatched(self.var), _block_outputs(self.var) as outputs:
            logits = self.family.predicted(self.var, conditions, inputs)
        return outputs, logits


def _train_all(var: nn.Module) -> None:
    """Put copies in place of all weights that stage 2 trains, and let these and those of an adapter be trained."""
    tuned = tuned_parameters(var)
    for name in family_of(var).finetuned_names(var):
        if name not in tuned:
            tuned[name] = nn.Parameter(var.get_parameter(name).detach().clone())
    restore_parameters(var)
    replace_parameters(var, tuned)
    for parameter in tuned.values():
        parameter.requires_grad_(True)


@contextmanager
def _block_outputs(var: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the output of every block, in order, while the context is open."""
    outputs: list[torch.Tensor] = []
    blocks = family_of(unwrapped(var)).blocks(unwrapped(var))

    def keep(_block: nn.Module, _arguments: tuple, output: torch.Tensor) -> None:
        outputs.append(output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
