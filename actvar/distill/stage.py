"""What both stages of the distillation have in common."""

from __future__ import annotations

from torch import nn


class Stage(nn.Module):
    """A patched model with the losses of one stage: `self.var`."""

    def train(self, mode: bool = True) -> Stage:
        """Only labels are dropped in training; the blocks stay in eval mode."""
        super().train(mode)
        for child in self.var.children():
            child.eval()
        return self
