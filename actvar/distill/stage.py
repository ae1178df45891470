"""The common base of both stages of the distillation."""

from __future__ import annotations

from torch import nn


class Stage(nn.Module):
    """The losses of one stage as a module, with the patched model at `self.var`."""

    var: nn.Module

    def train(self, mode: bool = True) -> Stage:
        """Set the mode of the model alone, which drops labels in training; its blocks stay in eval mode."""
        super().train(mode)
        for child in self.var.children():
            child.eval()
        return self

    def finish(self) -> None:
        """Bring what was trained into the model, after the last step; most of it is there already."""
