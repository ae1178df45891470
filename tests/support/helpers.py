"""Build a tiny VAR whose branches all matter, and sample with it."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn

from actvar.models import VAR, build_vae_var
from support.golden import fill

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Pages to read, whose code and commands the tests run."""
PATCH_NUMS = (1, 2, 3, 5)
NUM_CLASSES = 10


def make_tiny_var(**changes) -> VAR:
    """Return two blocks of width 128 with four scales and one-channel images, weights by the golden rule."""
    sizes = dict(
        V=64,
        Cvae=8,
        ch=32,
        patch_nums=PATCH_NUMS,
        num_classes=NUM_CLASSES,
        depth=2,
        width=128,
        ch_mult=(1, 1),
        num_res_blocks=1,
        image_channels=1,
    )
    vae, var = build_vae_var(**(sizes | changes))
    fill(vae, 0)
    fill(var, 1)
    return var


def sample(var: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    """Return two images of classes 1 and 2."""
    return var.autoregressive_infer_cfg(2, torch.tensor([1, 2]), g_seed=seed, cfg=1.5, top_k=20, top_p=0.95)


def fingerprint(module: nn.Module) -> dict:
    """Return classes, attributes and tensors of every submodule."""
    return {
        name: (
            type(m),
            sorted(m.__dict__),
            list(m._modules),
            {k: v.clone() for k, v in m.named_parameters(recurse=False)},
        )
        for name, m in module.named_modules()
    }


def assert_same_fingerprint(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name][:3] == right[name][:3], name
        assert all(torch.equal(a, right[name][3][k]) for k, a in left[name][3].items()), name


def sampled_tokens(var) -> torch.Tensor:
    """Return the token maps `[2, L]` of one sampling run."""
    maps = []
    embedding = var.vae_proxy[0].quantize.embedding
    handle = embedding.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    try:
        sample(var)
    finally:
        handle.remove()
    return torch.cat(maps, dim=1)


def write_idx(path: Path, data: np.ndarray) -> None:
    header = struct.pack(f">HBB{data.ndim}I", 0, 8, data.ndim, *data.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + data.tobytes())
