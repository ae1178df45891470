"""Name the weights of an FFN, as the functions of this folder pass them on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FFNWeights(NamedTuple):
    """Name the weights of two linear layers: `[D, C]`, `[D]`, `[C, D]` and `[C]`, all floating-point."""

    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor

    def first(self, units: int) -> FFNWeights:
        """Return views of the first `units` hidden units, which share memory and versions with these tensors."""
        into, bias, out = self.fc1_weight[:units], self.fc1_bias[:units], self.fc2_weight[:, :units]
        return FFNWeights(into, bias, out, self.fc2_bias)
