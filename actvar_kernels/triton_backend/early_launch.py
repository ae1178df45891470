"""Let a Triton kernel be launched before the kernel ahead of it has ended: programmatic dependent launch.

GPUs from sm_90 on begin such a kernel as soon as every program of the kernel ahead has called
`griddepcontrol.launch_dependents` or ended. Its programs are then ready on the multiprocessors when the memory of that
kernel is. `griddepcontrol.wait` blocks until all grids that the kernel depends on have ended and what they wrote is
visible (PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol").

Every kernel that takes `PDL` calls `begin` as its first statement, in every program, before it touches global memory.
Only `fetch_ahead` may stand before it. So three rules hold:

1. It reads nothing that the kernel ahead has yet to write, and writes nothing that the kernel ahead has yet to read.
2. The same is true of all earlier kernels. A kernel with `PDL` ends only after its own wait, hence after the kernel
   ahead of it, and so on. A kernel without `PDL` begins only after all kernels before it have ended.
3. No program waits for one that cannot begin: `launch_dependents` lets the next kernel in only once all programs of
   this one have begun, and on sm_100 have taken their tensor memory, which they do before the wait.

PyTorch's own kernels, copies and the ends of CUDA graphs are launched without `PDL`, and wait as ever. Weights are read
after the wait as well: a kernel that was launched just before may have converted or changed them. `fetch_ahead` reads
nothing. It asks for weights in the L2 cache, through which all accesses of global memory go: what an earlier kernel
still writes is written there, and found there after the wait.
"""

# Triton adds `tl.extra.cuda` when it finds its backends.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl

from actvar_kernels.triton_backend.forced import Forced
from actvar_kernels.triton_backend.tiles import architecture
from actvar_kernels.triton_backend.tuned_choices import tuned_early_launch
from actvar_kernels.triton_backend.tuning_table import FIRST_WITH_EARLY_LAUNCH


def early_launch(tensor: torch.Tensor) -> dict[str, bool]:
    """Return the arguments of a launch that say whether it may begin early; without a measured table it does not.

    Args:
        tensor: one of the kernel's, on its GPU.

    Raises:
        ValueError: `using_early_launch` asks for it and the GPU has none; or see `tuning_table.read_table`.
        RuntimeError: this release of Triton has none.
    """
    wanted = tuned_early_launch(tensor) if _forced.value is None else _forced.value
    if not wanted:
        return {"PDL": False}
    arch = architecture(tensor)
    if arch < FIRST_WITH_EARLY_LAUNCH:
        raise ValueError(
            f"using_early_launch(True): expected a GPU of sm_{FIRST_WITH_EARLY_LAUNCH} or newer, got {tensor.device}, "
            f"which counts as sm_{arch}; leave it out there"
        )
    if not hasattr(tl.extra.cuda, "gdc_wait"):
        raise RuntimeError(
            f"programmatic dependent launch: expected a Triton with gdc_wait, got {triton.__version__}; "
            "install triton 3.6 or newer"
        )
    return {"PDL": True, "launch_pdl": True}


_forced = Forced[bool]()


def using_early_launch(early: bool) -> AbstractContextManager[None]:
    """Launch every kernel of a block early, or none, for the duration of the context, whatever a table says."""
    return _forced.using(early)


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for all kernels ahead, then let the next one begin; without `PDL` this is no code."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch_ahead(ptr, first, last, ROWS: tl.constexpr, LENGTH: tl.constexpr, PDL: tl.constexpr):
    """Ask for rows of a matrix of weights in the L2 cache while the kernels ahead run; without `PDL` this is no code.

    Args:
        ptr: the matrix, whose rows have `LENGTH` numbers.
        first: the first of `ROWS` rows.
        last: the last row that there is.
    """
    if PDL:
        LINE: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # numbers of a line of 128 bytes
        LINES: tl.constexpr = triton.next_power_of_2((LENGTH + LINE - 1) // LINE)
        row = tl.minimum(first + tl.arange(0, ROWS), last).to(tl.int64)[:, None]
        lines = ptr + row * LENGTH + tl.minimum(tl.arange(0, LINES) * LINE, LENGTH - 1)[None, :]
        # Triton knows assembly with a result alone
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )
