"""The two learned parts of ActVAR: the token selector and the expert router of a block."""

from __future__ import annotations

import torch
from torch import nn

from actvar.per_sample import Kept


class Gate(nn.Module):
    """A linear layer that follows its model (`.to`, `parameters`, `deepcopy`) but is no part of its `state_dict`.

    Args:
        inputs: width C.
        outputs: 1 for the selector, the number of experts for the router.
        seed: of the generator that draws the untrained weight.
    """

    @torch.inference_mode(False)  # for a patch that is put on in inference mode and trained or loaded into outside
    def __init__(self, inputs: int, outputs: int, seed: int, device: torch.device):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        weight = torch.randn(outputs, inputs, generator=generator, device="cpu", dtype=torch.float32) * inputs**-0.5
        self.weight = nn.Parameter(weight.to(device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=torch.float32), requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Adapter tensors are saved apart, by `save_adapter`."""

    def _load_from_state_dict(self, *_args):
        """Adapter tensors are loaded apart, by `load_adapter`."""


class Gates(nn.Module):
    """Selector and router of one block, with the schedule they work by and the state shared with the other blocks."""

    def __init__(self, width: int, num_experts: int, block_index: int, shared, device: torch.device):
        super().__init__()
        self.selector = Gate(width, 1, 2 * block_index, device)
        self.router = Gate(width, num_experts, 2 * block_index + 1, device)
        self.block_index = block_index
        self.shared = shared
        self.kept = Kept()
