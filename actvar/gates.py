"""What ActVAR adds to a block: the token selector, the expert router, and the order of the FFN's hidden units."""

from __future__ import annotations

import torch
from torch import nn

from actvar.families import var as family
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
    """Selector and router of one block, with the schedule they work by and the state shared with the other blocks.

    `order` `[D]` int64 is the order of the FFN's hidden units while the block is patched, or None: as they were.
    """

    def __init__(self, width: int, num_experts: int, block_index: int, shared, device: torch.device):
        super().__init__()
        self.selector = Gate(width, 1, 2 * block_index, device)
        self.router = Gate(width, num_experts, 2 * block_index + 1, device)
        self.block_index = block_index
        self.schedule = shared.schedules[block_index]
        self.shared = shared
        self.kept = Kept()
        self.register_buffer("order", None, persistent=False)


def set_order(block: nn.Module, order: torch.Tensor | None) -> None:
    """Bring the hidden units of a patched block into `order` `[D]` int64, counted from the original one; None: into
    that."""
    undo_order(block)
    block.actvar.order = None if order is None else order.to(block.ffn.fc1.weight.device, torch.int64)
    apply_order(block)


def apply_order(block: nn.Module) -> None:
    """Bring the weights of a block that has just got its gates into their order."""
    if block.actvar.order is not None:
        family.reorder_hidden(block, block.actvar.order)


def undo_order(block: nn.Module) -> None:
    """Bring the weights of a block that is about to lose its gates into the original order."""
    if block.actvar.order is not None:
        family.reorder_hidden(block, block.actvar.order.argsort())
