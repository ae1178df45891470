"""List the tiles of the 3x3 convolution, of which a measured table takes one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from actvar_kernels.triton_backend.tiles import RDNA


class ConvTiles(NamedTuple):
    """Describe the convolution.

    Attributes:
        pixels: neighbouring pixels of a program, a power of two.
        columns: outputs of a program, a power of two.
        tail: more outputs beside them, a power of two or 0.
        depth: channels of a step.
        warps: warps of a program.
        stages: pipeline stages.
        descriptors: whether the GPU copies tiles by tensor descriptors, where tiles are whole or parts of image rows.
    """

    pixels: int
    columns: int
    tail: int
    depth: int
    warps: int
    stages: int
    descriptors: bool

    def takes_descriptors(self, channels: int, width: int) -> bool:
        """Return whether images of this width and number of channels are read by tensor descriptors."""
        rows = width % self.pixels == 0 or self.pixels % width == 0
        return self.descriptors and rows and channels % self.depth == 0


def candidates(arch: int, dtype: torch.dtype, inputs: int, outputs: int) -> list[ConvTiles]:
    """Return tiles from large to small; 160 outputs, and multiples of them, are tiles of 128 and 32.

    Args:
        arch: compute capability.
        dtype: float32, float16 or bfloat16.
        inputs, outputs: channels.
    """
    if dtype == torch.float32:
        return [ConvTiles(64, 64 if outputs >= 64 else 16, 0, 16, 8, 2, descriptors=False)]
    sizes = [(columns, tail) for columns, tail in ((128, 0), (128, 32), (64, 0)) if outputs % (columns + tail) == 0]
    columns, tail = sizes[0] if sizes else (16, 0) if outputs <= 16 else (64, 0)
    depth = 64 if inputs % 64 == 0 and arch in (90, 100) else 32
    warps = 16 if arch == RDNA else 8  # with fewer the compiler spills there
    wide = ConvTiles(128, columns, tail, depth, warps, 4 if depth == 32 else 3, descriptors=arch in (90, 100))
    return [wide, wide._replace(pixels=64, warps=warps // 2)]
