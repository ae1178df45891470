"""Decorate functions with `no_grad` and `inference_mode` that put the mode back even after Ctrl-C.

Torch's own context managers enter and leave in Python. Ctrl-C inside of them skips the end, and the thread stays
without gradients. Here one call into torch puts the mode back, in a `finally` before which Python handles no signal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def no_grad(function: Callable) -> Callable:
    """Make `function` run without gradients."""

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
    """Return a decorator by which a function runs in inference mode, or outside of it if `enabled` is False."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def in_mode(*args, **kwargs):
            mode = torch._C._InferenceMode(enabled)
            try:
                mode.__enter__()
                return function(*args, **kwargs)
            finally:
                mode.__exit__(None, None, None)  # does nothing if the mode was not entered

        return in_mode

    return decorate
