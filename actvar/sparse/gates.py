"""What ActVAR adds to a block: the token selector, the expert router, and the order of the FFN's hidden units."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from actvar.families import var as family
from actvar.sparse.block_cache import Kept
from actvar.utils.modes import inference_mode
from actvar_kernels.cpu_backend.packing import drop

logger = logging.getLogger(__name__)


class Gate(nn.Module):
    """A linear layer that follows its model (`.to`, `parameters`, `deepcopy`) but is no part of its `state_dict`.

    Args:
        inputs: width C.
        outputs: 1 for the selector, the number of experts for the router.
        seed: of the generator that draws the untrained weight.
    """

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

    `places` `[D]` int64 on the CPU is the order in which the FFN's hidden units lie: `update` changes it with them.
    """

    @inference_mode(False)  # for a patch that is put on in inference mode and trained or loaded into outside
    def __init__(self, width: int, hidden: int, num_experts: int, block_index: int, shared, device: torch.device):
        super().__init__()
        self.selector = Gate(width, 1, 2 * block_index, device)
        self.router = Gate(width, num_experts, 2 * block_index + 1, device)
        self.block_index = block_index
        self.schedule = shared.schedules[block_index]
        self.shared = shared
        self.kept = Kept()
        self.places = torch.arange(hidden, device="cpu")

    @property
    def called(self) -> Mapping[str, str]:
        """Parts of the block that are called instead of read, and why; see `families.var.parts_called`."""
        return self.shared.called[self.block_index]

    @property
    def order(self) -> torch.Tensor | None:
        """`places`, or None where every hidden unit is in its own."""
        return None if torch.equal(self.places, self.places.sort().values) else self.places


@inference_mode(True)  # in which weights that were made in it may be changed, as all others may
def update(
    block: nn.Module, order: torch.Tensor | None, values: Mapping[nn.Parameter, torch.Tensor] | None = None
) -> None:
    """Bring the hidden units of a patched block into `order` `[D]`, counted from the original one, None: into that; and
    give its gates new `values`.

    All that changes does so in one call into torch, for which Ctrl-C waits: an interruption finds the block as it was
    or as it shall be, and `places` says which.

    Raises:
        TypeError: the FFN's layers are wrapped or quantised, so that their hidden units cannot be reordered.
    """
    places = block.actvar.places
    order = places.sort().values if order is None else order.to("cpu", torch.int64)
    changes = {places: order, **(values or {})}
    if not torch.equal(order, places):
        moved = family.reordered_hidden(block, places.argsort()[order])
        drop(moved)
        changes |= moved
    torch._foreach_copy_(list(changes), list(changes.values()))


def restore_order(block: nn.Module) -> None:
    """Bring the hidden units of a patched block into their original order, or log that their layers do not allow it."""
    try:
        update(block, None)
    except TypeError as error:
        logger.warning("%s; they stay in the order of the experts, in which the FFN computes the same sum", error)
