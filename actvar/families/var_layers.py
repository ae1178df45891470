"""Look at the layers of a VAR: kernels may read some of them, and the others must be called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from actvar.families.base import ATTENTION, FFN, MODULATION, NORM, PROJECTION, Called
from actvar.models.transformer_block import FeedForward, HeadNorm, SelfAttention, TransformerBlock
from actvar.utils.class_swap import own_class
from actvar.utils.plain_layers import is_ordinary, why_called, why_not_by_class

PUBLIC_NAMES = {
    TransformerBlock: "AdaLNSelfAttn",
    SelfAttention: "SelfAttention",
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


def parts_called(block: Any) -> dict[str, Called]:
    """Return the parts of a block that kernels must not read, see `Family.parts_called`.

    `mat_qkv` counts as `attn`, since attention reads its weight and does not call it.
    """
    attn, ffn = block.attn, block.ffn
    reasons = {
        NORM: ("ln_wo_grad", why_called(block.ln_wo_grad, nn.LayerNorm)),
        ATTENTION: ("attn", module_called(attn, SelfAttention, {"mat_qkv", "proj"}) or _weight_called(attn.mat_qkv)),
        PROJECTION: ("attn.proj", linear_called(attn.proj)),
        FFN: ("ffn", _ffn_called(ffn)),
    }
    if not block.shared_aln:
        reasons[MODULATION] = ("ada_lin", _ada_lin_called(block.ada_lin))
    return {part: Called(path, reason) for part, (path, reason) in reasons.items() if reason is not None}


def linear_called(layer: Any) -> str | None:
    """Return why a linear layer must be called instead of read, or None."""
    reason = why_called(layer, nn.Linear)
    return "has no bias" if reason is None and layer.bias is None else reason


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
    return why_not_by_class(module) or _first(others, lambda layer: why_called(layer, *INERT))


def _ffn_called(ffn: Any) -> str | None:
    """Return why an FFN must be called, or None."""
    reason = module_called(ffn, FeedForward, {"fc1", "fc2"})
    reason = reason or _first([("fc1", ffn.fc1), ("fc2", ffn.fc2)], linear_called)
    if reason is None and getattr(ffn._modules.get("act"), "approximate", "tanh") != "tanh":
        return "act is another GELU than that of tanh"
    return reason


def _ada_lin_called(ada_lin: Any) -> str | None:
    """Return why a block's AdaLN must be called, or None."""
    reason = why_called(ada_lin, nn.Sequential)
    if reason is None and len(ada_lin) != 2:
        return f"has {len(ada_lin)} layers"
    return (
        reason
        or _first([("0", ada_lin[0])], lambda silu: why_called(silu, nn.SiLU))
        or (_first([("1", ada_lin[1])], linear_called))
    )


def _weight_called(layer: nn.Module) -> str | None:
    """Return why kernels must not read the weight of `layer`, a `mat_qkv`, which attention does not call; or None."""
    weight = layer._parameters.get("weight")
    if own_class(layer) is nn.Linear and weight is not None and is_ordinary(weight):
        return None
    return f"mat_qkv is a {type(layer).__qualname__}, or has a weight of a tensor subclass"


def _first(layers: Iterable[tuple[str, Any]], reason_of: Callable[[Any], str | None]) -> str | None:
    """Return the name of the first of `layers` that has a reason, and the reason; None if none has one."""
    for name, layer in layers:
        reason = reason_of(layer)
        if reason is not None:
            return f"{name} {reason}"
    return None
