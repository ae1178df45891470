"""Hold the parts that ActVAR adds to a block: token selector, expert router, the order of the FFN's hidden units."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actvar.families.base import Called, Family
from actvar.sparse.block_cache import BlockCache
from actvar.utils.modes import inference_mode
from actvar_kernels.cpu_backend.packing import drop

if TYPE_CHECKING:
    from actvar.sparse.state import PatchState

logger = logging.getLogger(__name__)


class Gate(nn.Module):
    """Hold a linear layer that follows its model (`.to`, `parameters`, `deepcopy`) but is not in its `state_dict`.

    `weight` is `[outputs, inputs]` and `bias` `[outputs]`, both float32.

    Args:
        inputs: width C.
        outputs: 1 for the selector, the number of experts for the router.
        seed: seed of the generator that draws the untrained weight.
        device: device of the layer.
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
    """Hold selector and router of one block, its schedule, and the state shared with the other blocks.

    `hidden_order` `[D]` int64 on the CPU is the order in which the FFN's hidden units lie. `set_order_and_gates`
    changes it together with them.

    Args:
        width: channels C of a token.
        hidden: hidden units D of the FFN.
        num_experts: outputs of the router.
        block_index: number of the block.
        shared: the `PatchState` of the model.
        device: device of the gates.
    """

    @inference_mode(False)  # a patch put on in inference mode can still be trained or loaded into outside of it
    def __init__(
        self, width: int, hidden: int, num_experts: int, block_index: int, shared: PatchState, device: torch.device
    ):
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
    def quantized(self) -> torch.dtype | None:
        """Return the dtype in which the block multiplies in eight bits, or None where it does not."""
        return self.shared.quantized[self.block_index]

    @property
    def changed_order(self) -> Tensor | None:
        """Return `hidden_order`, or None where every hidden unit is in its original place."""
        return None if torch.equal(self.hidden_order, self.hidden_order.sort().values) else self.hidden_order


def hidden_in_order(block: Any, order: Tensor | None) -> dict[nn.Parameter, Tensor]:
    """Return each parameter that an order of the hidden units would move, with its values in that order.

    Args:
        block: a patched block.
        order: as in `set_order_and_gates`.

    Raises:
        TypeError: the FFN's layers are wrapped or quantised, so that their hidden units cannot be reordered.
    """
    before: Tensor = block.actvar.hidden_order
    order = before.sort().values if order is None else order.to("cpu", torch.int64)
    if torch.equal(order, before):
        return {}
    return block.actvar.family.reordered_hidden(block, before.argsort()[order])


@inference_mode(True)  # only this mode may change weights that were made in it, and it may change all others
def set_order_and_gates(block: Any, order: Tensor | None, values: Mapping[nn.Parameter, Tensor] | None = None) -> None:
    """Bring the hidden units of a patched block into an order, and give its gates new values.

    One call into torch makes all changes, and Ctrl-C waits for it. An interruption therefore finds the block either
    unchanged or changed wholly, and `hidden_order` says which.

    Args:
        block: a patched block.
        order: `[D]` integers, counted from the original order; None for the original order.
        values: new values by parameter of the gates, in the parameters' shapes.

    Raises:
        TypeError: the FFN's layers are wrapped or quantised, so that their hidden units cannot be reordered.
    """
    before: Tensor = block.actvar.hidden_order
    order = before.sort().values if order is None else order.to("cpu", torch.int64)
    moved = hidden_in_order(block, order)
    if moved:
        drop(moved)
    changes = {before: order, **(values or {}), **moved}
    torch._foreach_copy_(list(changes), list(changes.values()))  # pyright: ignore[reportPrivateImportUsage]


def restore_order(block: Any) -> None:
    """Bring the hidden units of a patched block into their original order, or log that their layers do not allow it."""
    try:
        set_order_and_gates(block, None)
    except TypeError as error:
        logger.warning("%s; they stay in the order of the experts, in which the FFN computes the same sum", error)
