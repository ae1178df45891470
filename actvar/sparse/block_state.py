"""What ActVAR adds to a block: the token selector, the expert router, and the order of the FFN's hidden units."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from actvar.families.base import Called, Family
from actvar.sparse.block_cache import BlockCache
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
        """Write nothing: adapter tensors are saved apart, by `save_adapter`."""

    def _load_from_state_dict(self, *_args):
        """Read nothing: adapter tensors are loaded apart, by `load_adapter`."""


class BlockState(nn.Module):
    """Selector and router of one block, its schedule, and the state shared with the other blocks.

    Args:
        width: channels C of a token.
        hidden: hidden units D of the FFN.
        num_experts: outputs of the router.
        block_index: number of the block.
        shared: the `PatchState` of the model.
        device: of the gates.

    `hidden_order` `[D]` int64 on the CPU is the order in which the FFN's hidden units lie; `set_order_and_gates`
    changes it with them.
    """

    @inference_mode(False)  # for a patch that is put on in inference mode and trained or loaded into outside
    def __init__(self, width: int, hidden: int, num_experts: int, block_index: int, shared, device: torch.device):
        super().__init__()
        self.selector = Gate(width, 1, 2 * block_index, device)
        self.router = Gate(width, num_experts, 2 * block_index + 1, device)
        self.block_index = block_index
        self.schedule = shared.schedules[block_index]
        self.shared = shared
        self.cache = BlockCache()
        self.hidden_order = torch.arange(hidden, device="cpu")

    @property
    def family(self) -> Family:
        """Return the model family of the block."""
        return self.shared.family

    @property
    def called(self) -> Mapping[str, Called]:
        """Return the parts of the block that are called instead of read, see `Family.parts_called`."""
        return self.shared.called[self.block_index]

    @property
    def changed_order(self) -> Tensor | None:
        """Return `hidden_order`, or None where every hidden unit is in its own place."""
        return None if torch.equal(self.hidden_order, self.hidden_order.sort().values) else self.hidden_order


@inference_mode(True)  # in which weights that were made in it may be changed, as all others may
def set_order_and_gates(
    block: nn.Module, order: Tensor | None, values: Mapping[nn.Parameter, Tensor] | None = None
) -> None:
    """Bring the hidden units of a patched block into an order, and give its gates new values.

    All that changes does so in one call into torch, for which Ctrl-C waits. An interruption finds the block either
    unchanged or changed wholly, and `hidden_order` says which.

    Args:
        order: `[D]` int64, counted from the original order; None for the original order.
        values: new values by parameter of the gates.

    Raises:
        TypeError: the FFN's layers are wrapped or quantised, so that their hidden units cannot be reordered.
    """
    before = block.actvar.hidden_order
    order = before.sort().values if order is None else order.to("cpu", torch.int64)
    changes = {before: order, **(values or {})}
    if not torch.equal(order, before):
        moved = block.actvar.family.reordered_hidden(block, before.argsort()[order])
        drop(moved)
        changes |= moved
    torch._foreach_copy_(list(changes), list(changes.values()))


def restore_order(block: nn.Module) -> None:
    """Bring the hidden units of a patched block into their original order, or log that their layers do not allow it."""
    try:
        set_order_and_gates(block, None)
    except TypeError as error:
        logger.warning("%s; they stay in the order of the experts, in which the FFN computes the same sum", error)
