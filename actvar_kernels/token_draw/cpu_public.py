"""Run guidance, filters and draw of the public VAR code in C++ on the CPU.

The same random numbers give the same tokens.
"""

from __future__ import annotations

import functools
import logging
import threading

import torch

from actvar_kernels.backend import choose
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.token_draw import public
from actvar_kernels.token_draw.cpu_kernel import available, library, why_unavailable

logger = logging.getLogger(__name__)

_global_generator = threading.Lock()
_BOTH, _MASS = 1, 2  # filters that a row is still to go through, as in public.cpp


def runs(logits: torch.Tensor) -> bool:
    """Return whether the C++ code takes these logits under the chosen backend: on the CPU, one of `cpu.DTYPES`.

    Raises:
        BackendUnavailableError: `"cpu"` was asked for by name and does not take them.
    """
    backend = choose(
        "sampling", logits, why_not_in_cpp=lambda: why_not(logits), library_on_triton=True, has_operator=False
    )
    return backend.name == "cpu"


def why_not(logits: torch.Tensor) -> str | None:
    """Return why the C++ code does not take logits on the CPU, or None."""
    if logits.dtype not in cpu.DTYPES:
        return f"it takes {cpu.TAKEN}, got {logits.dtype}"
    return None if available() else why_unavailable()


def guide_and_filter(logits: torch.Tensor, guidance: float, top_k: int, top_p: float) -> torch.Tensor:
    """Return guided logits after `public.filter_`, `[B, L, V]` float32, bit for bit.

    PyTorch filters a row again where rounding, or the order of equal logits, could decide what top-p removes. It does
    so with both filters where logits are not finite.

    Args:
        logits: `[2B, L, V]`, one of `cpu.DTYPES`, conditional half first.
        guidance: strength t: logits are `(1 + t) * cond - t * uncond`.
        top_k: 0 ... V; 0 keeps all.
        top_p: 0 ... 1; 0 keeps all.

    Raises:
        ValueError: `top_k` is above V.
        MemoryError: there is none left for a row.
    """
    rows, L, V = logits.shape
    if top_k > V:
        raise ValueError(f"top_k: expected at most {V}, got {top_k}")
    logits = logits.float() if logits.dtype == torch.float16 else logits
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    out = logits.new_empty(rows // 2, L, V, dtype=torch.float32)
    left = logits.new_empty(rows // 2, L, dtype=torch.uint8)
    failed = library().guide_and_filter(
        logits.dtype == torch.bfloat16,
        logits.data_ptr(),
        out.data_ptr(),
        left.data_ptr(),
        *out.shape,
        *logits.stride()[:2],
        1 + guidance,
        guidance,
        top_k,
        top_p > 0,
        1 - top_p,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a row of {V} logits")
    for which, k in ((_BOTH, top_k), (_MASS, 0)):
        remaining = left == which
        if remaining.any():
            filtered = out[remaining]
            public.filter_(filtered, k, top_p)
            out[remaining] = filtered
    return out


def draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return what `public.draw` does, token for token, and leave the generator in the same state.

    The draw works on a copy of the state. So other threads must not draw from the same generator meanwhile, nor from
    the global one (None).

    Args:
        probabilities: `[..., V]` float32.
        generator: source of random numbers, on the CPU.
    """
    if not _draws_as_torch():
        return public.draw(probabilities, generator)
    return _draw(probabilities, generator)


def _draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw in C++."""
    probabilities = probabilities.contiguous()
    V = probabilities.shape[-1]
    tokens = probabilities.new_empty(probabilities.shape[:-1], dtype=torch.int64)
    with _global_generator:
        state = torch.get_rng_state() if generator is None else generator.get_state()
        pointers = probabilities.data_ptr(), state.data_ptr(), tokens.data_ptr()
        failed = library().draw(*pointers, tokens.numel(), V, torch.get_num_threads())
        if failed == 2:
            return public.draw(probabilities, generator)  # which says what is wrong with them
        if failed:
            raise MemoryError(f"no memory for the random numbers of {V} tokens")
        if generator is None:
            torch.set_rng_state(state)
        else:
            generator.set_state(state)
    return tokens


@functools.cache
def _draws_as_torch() -> bool:
    """Return whether this version of PyTorch draws as the C++ code supposes.

    This is tried once, and logged if it does not.
    """
    of_cpu = {"dtype": torch.float32, "device": "cpu"}
    probabilities = torch.rand(20, 50, generator=torch.Generator("cpu").manual_seed(1), **of_cpu).softmax(dim=-1)
    twins = [torch.Generator("cpu").manual_seed(2) for _ in range(2)]
    drawn = [draw(probabilities, twin) for draw, twin in zip((public.draw, _draw), twins, strict=True)]
    same = torch.equal(*drawn) and torch.equal(*(twin.get_state() for twin in twins))
    if not same:
        logger.warning("torch %s draws tokens in another way than the C++ code, which is not used", torch.__version__)
    return same
