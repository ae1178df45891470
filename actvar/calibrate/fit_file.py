"""Keep the fits of all blocks in a file, so that a plan that was interrupted need not fit again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from actvar.calibrate.curves import Curves
from actvar.calibrate.fit import BlockFit
from actvar.utils.files import replacing

_CURVES = ("update_lost", "update_lost_by_oracle", "output_lost", "static_lost", "norm_kept", "norm_kept_by_oracle")


def save_fits(fits: list[BlockFit], path: Path) -> None:
    """Write the fits of all blocks, without residual streams.

    Args:
        fits: by block.
        path: the file.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for block, fit in enumerate(fits):
        parts = {"selector": fit.selector, "weight": fit.router[0], "bias": fit.router[1], "order": fit.order}
        for name, tensor in (parts | {"static_order": fit.static_order}).items():
            if tensor is not None:
                tensors[f"{block}.{name}"] = tensor
        for scale, curves in fit.curves.items():
            tensors |= {f"{block}.curves.{scale}.{name}": getattr(curves, name) for name in _CURVES}
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, temporary)


def load_fits(path: Path, device: torch.device) -> list[BlockFit]:
    """Return the fits that `save_fits` wrote, with their gates on `device`.

    Raises:
        FileNotFoundError: no such file.
        SafetensorError: a damaged file.
    """
    tensors = load_file(path)
    fits = []
    while f"{len(fits)}.selector" in tensors:
        block = len(fits)
        scales = sorted({int(name.split(".")[2]) for name in tensors if name.startswith(f"{block}.curves.")})
        curves = {}
        for scale in scales:
            found = {name: tensors[f"{block}.curves.{scale}.{name}"] for name in _CURVES}
            curves[scale] = Curves(len(found["update_lost"]) - 1, len(found["output_lost"]) - 1)
            vars(curves[scale]).update(found)
        selector, weight, bias = (tensors[f"{block}.{name}"].to(device) for name in ("selector", "weight", "bias"))
        orders = (tensors.get(f"{block}.{name}") for name in ("order", "static_order"))
        order, static_order = (None if each is None else each.to(device) for each in orders)
        fits.append(BlockFit(selector, (weight, bias), order, curves, [], static_order))
    return fits
