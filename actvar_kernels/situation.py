"""Say how a call may run: whether PyTorch traces, transforms or differentiates it."""

from __future__ import annotations

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

TORCH, RECORDED, DIRECT = "torch", "recorded", "direct"
"""Answers of `situation`."""
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors whose memory holds their numbers."""


def situation(*tensors: torch.Tensor | None) -> str:
    """Return how a call on `tensors` may run: `TORCH`, `RECORDED` or `DIRECT`.

    - `TORCH`: only PyTorch's own operations may run. PyTorch traces or exports, there is a transform of `torch.func`, a
      forward-mode derivative or a function mode, or a tensor is of a subclass. Kernels would not be seen there, or
      would read memory that such a tensor does not have.
    - `RECORDED`: registered operators run, which `torch.compile`, dispatch modes and gradients need.
    - `DIRECT`: kernels are launched.

    Args:
        tensors: all that the call reads, of any shape and dtype; None stands for one that is not there.
    """
    if torch.compiler.is_compiling():
        return TORCH if _is_exporting() else RECORDED
    if (
        torch._C._get_tracing_state() is not None
        or is_transforming()
        or (torch._C._len_torch_function_stack() > 0 and _has_function_mode())
    ):
        return TORCH
    if torch._C._len_torch_dispatch_stack() > 0:
        return RECORDED
    if not are_plain(*tensors):
        return TORCH
    return RECORDED if wants_gradient(*tensors) else DIRECT


def is_transforming() -> bool:
    """Return whether a transform of `torch.func`, or a forward-mode derivative, is at work."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def are_plain(*tensors: torch.Tensor | None) -> bool:
    """Return whether all `tensors` have memory of their own that a kernel may read: no subclass, no other layout."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.layout is not torch.strided):
            return False
    return True


def _is_exporting() -> bool:
    """Return whether `torch.export` traces."""
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # from PyTorch 2.7 on
    return is_exporting is not None and is_exporting()


def _has_function_mode() -> bool:
    """Return whether a mode other than that of the default device replaces PyTorch's functions."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Return whether a call on `tensors`, of which some may be None, is differentiated."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
