"""`torch.no_grad` and `torch.inference_mode` as decorators, put back whenever Ctrl-C strikes.

Torch's own enter and leave in Python: Ctrl-C in there skips the end, and the thread stays without gradients. Here one
call into torch puts the mode back, in a `finally` before which Python handles no signal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def no_grad(function: Callable) -> Callable:
    """`function` without gradients."""

    @functools.wraps(function)
    def without_gradients(*args, **kwargs):
        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return without_gradients


def inference_mode(enabled: bool) -> Callable[[Callable], Callable]:
    """A decorator of functions that run in inference mode, or outside of it."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def in_mode(*args, **kwargs):
            mode = torch._C._InferenceMode(enabled)
            try:
                mode.__enter__()
                return function(*args, **kwargs)
            finally:
                mode.__exit__(None, None, None)  # nothing happens if it was not entered

        return in_mode

    return decorate
