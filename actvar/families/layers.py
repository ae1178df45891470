"""Look at the layers of blocks with the public VAR code's names: kernels may read some, and the others must be called.

Infinity's code has these names too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from actvar.families.base import ATTENTION, FFN, PROJECTION, Called
from actvar.models.infinity.layers import InfinityBlock, RotarySelfAttention
from actvar.models.transformer_block import FeedForward, HeadNorm, SelfAttention, TransformerBlock
from actvar.utils.class_swap import own_class
from actvar.utils.plain_layers import is_ordinary, why_called, why_not_by_class

PUBLIC_NAMES = {
    TransformerBlock: "AdaLNSelfAttn",
    InfinityBlock: "CrossAttnBlock",
    SelfAttention: "SelfAttention",
    RotarySelfAttention: "SelfAttention",
    FeedForward: "FFN",
    HeadNorm: "AdaLNBeforeHead",
}
"""Our classes, each with the name of the public code's class that has the same forward."""
INERT = (nn.Identity, nn.Dropout, nn.GELU)
"""Layers in the public code's attention and FFN that kernels leave out, or compute themselves."""


def is_known(kind: type, own: type) -> bool:
    """Return whether `kind` is `own`, a key of `PUBLIC_NAMES`, or the public code's class of that forward."""
    return kind is own or (kind.__name__ == PUBLIC_NAMES[own] and kind.__bases__ == (nn.Module,))


def class_with_forward(module: nn.Module) -> type:
    """Return the class that defines the `forward` of `module`, without the mixins of a patch."""
    return next(kind for kind in own_class(module).__mro__ if "forward" in kind.__dict__)


def linear_called(layer: Any) -> str | None:
    """Return why a linear layer must be called instead of read, or None."""
    reason = why_called(layer, nn.Linear)
    return "has no bias" if reason is None and layer.bias is None else reason


def layers_called(block: Any, path: str, own: type) -> dict[str, Called]:
    """Return the layers of attention and FFN that kernels must not read, see `Family.parts_called`.

    `mat_qkv` counts as the attention, which reads its weight and does not call it.

    Args:
        block: a block with the public names.
        path: name of its self-attention.
        own: our class of the attention, which must be of it or of its public counterpart.
    """
    attention = getattr(block, path)
    reason = module_called(attention, own, {"mat_qkv", "proj"}) or weight_called(attention.mat_qkv)
    return called_for(
        {
            ATTENTION: (path, reason),
            PROJECTION: (f"{path}.proj", linear_called(attention.proj)),
            FFN: ("ffn", ffn_called(block.ffn)),
        }
    )


def called_for(reasons: Mapping[str, tuple[str, str | None]]) -> dict[str, Called]:
    """Return the parts that have a reason, from path and reason of each."""
    return {part: Called(path, reason) for part, (path, reason) in reasons.items() if reason is not None}


def module_called(module: nn.Module, own: type, read: Collection[str]) -> str | None:
    """Return why a module of several layers must be called instead of read, or None.

    Args:
        module: the module.
        own: the class of ours that it must be, or be the public counterpart of.
        read: names of the layers that the caller looks at itself.
    """
    kind = own_class(module)
    if not is_known(kind, own):
        return f"is of {kind.__module__}.{kind.__qualname__}"
    others = ((name, layer) for name, layer in module._modules.items() if name not in read)
    return why_not_by_class(module) or first_called(others, lambda layer: why_called(layer, *INERT))


def ffn_called(ffn: Any) -> str | None:
    """Return why an FFN must be called, or None."""
    reason = module_called(ffn, FeedForward, {"fc1", "fc2"})
    reason = reason or first_called([("fc1", ffn.fc1), ("fc2", ffn.fc2)], linear_called)
    if reason is None and getattr(ffn._modules.get("act"), "approximate", "tanh") != "tanh":
        return "act is another GELU than that of tanh"
    return reason


def weight_called(layer: nn.Module) -> str | None:
    """Return why kernels must not read the weight of `layer`, a `mat_qkv`, which attention does not call; or None."""
    weight = layer._parameters.get("weight")
    if own_class(layer) is nn.Linear and weight is not None and is_ordinary(weight):
        return None
    return f"mat_qkv is a {type(layer).__qualname__}, or has a weight of a tensor subclass"


def first_called(layers: Iterable[tuple[str, Any]], reason_of: Callable[[Any], str | None]) -> str | None:
    """Return the name of the first of `layers` that has a reason, and the reason; None if none has one."""
    for name, layer in layers:
        reason = reason_of(layer)
        if reason is not None:
            return f"{name} {reason}"
    return None
