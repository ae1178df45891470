"""Write checkpoints of a tiny VAR and its autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from actvar.models import VAR, VQVAE, build_vae_var

TINY = dict(
    V=16, Cvae=4, ch=32, share_quant_resi=2, patch_nums=(1, 2, 3), num_classes=5, depth=2, width=128,
    shared_aln=False, attn_l2_norm=True, ch_mult=(1, 2), num_res_blocks=1, image_channels=3,
)  # fmt: skip
Tensors = dict[str, Tensor]


def tiny_pair(seed: int = 0, **overrides: object) -> tuple[VQVAE, VAR]:
    vae, var = build_vae_var(**{**TINY, **overrides}, seed=seed)
    hit_counts = vae.quantize.ema_vocab_hit_SV
    hit_counts.copy_(torch.arange(hit_counts.numel()).view_as(hit_counts))
    return vae, var


def write(state: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def write_shards(
    state: Tensors, folder: Path, count: int, index: bool = True, stem: str = "model", suffix: str = ".safetensors"
) -> Path:
    """Write shards as other libraries do; return the path of the index, or the folder without one."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    weight_map = {}
    for shard in range(count):
        file = f"{stem}-{shard + 1:05}-of-{count:05}{suffix}"
        write({name: state[name] for name in names[shard::count]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::count], file)
    if not index:
        return folder
    path = folder / f"{stem}{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path
