"""Read numbers computed with the public VAR code, and rebuild the weights behind them by their rule.

`data/*.safetensors` hold inputs and outputs of tiny models (float32, CPU); their metadata has the configuration, the
seeds of `fill` and the sampling arguments. `data/state_dict_manifest.json` lists every tensor of the published files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from actvar.models import VAR, VQVAE, build_vae_var

DATA = Path(__file__).parents[1] / "data"
CASES = ("separate_adaln", "shared_adaln", "no_l2_norm")
NOT_FILLED = ("lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV", "zero_k_bias")


@dataclass(frozen=True)
class Golden:
    """Hold one case: models with the weights of the rule, sampling arguments, and recorded tensors."""

    vae: VQVAE
    var: VAR
    sampling: dict[str, float]
    tensors: dict[str, Tensor]


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Overwrite the weights of `module` by the rule that the recorded numbers were made with."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(module.state_dict().items()):
        if name.rsplit(".", 1)[-1] in NOT_FILLED:
            continue
        z = torch.randn(tensor.shape, generator=generator)
        if name.endswith("scale_mul_1H11"):
            value = 1 + 0.3 * z
        elif "norm" in name and name.endswith(".weight"):
            value = 1 + 0.1 * z
        elif tensor.ndim == 2 and ("embed" in name or "emb." in name) and "word_embed" not in name:
            value = 0.5 * z
        elif tensor.ndim >= 2:
            value = z / tensor[0].numel() ** 0.5
        else:
            value = 0.1 * z
        tensor.copy_(value)


def load_golden(case: str) -> Golden:
    """Rebuild the models of one of `CASES` and read its recorded tensors."""
    with safe_open(DATA / f"{case}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    integers = ("V", "Cvae", "ch", "share_quant_resi", "num_classes", "depth")
    vae, var = build_vae_var(
        **{name: int(metadata[name]) for name in integers},
        **{name: metadata[name] == "True" for name in ("shared_aln", "attn_l2_norm")},
        patch_nums=tuple(map(int, metadata["patch_nums"].split(","))),
    )
    fill(vae, int(metadata["vae_fill_seed"]))
    fill(var, int(metadata["var_fill_seed"]))
    sampling = {
        "g_seed": int(metadata["g_seed"]),
        "cfg": float(metadata["cfg"]),
        "top_k": int(metadata["top_k"]),
        "top_p": float(metadata["top_p"]),
    }
    return Golden(vae, var, sampling, tensors)


def manifest() -> dict[str, dict]:
    """Return by published file `config`, `state_dict` (name -> [shape, dtype]) and, of a transformer, `parameters`."""
    return json.loads((DATA / "state_dict_manifest.json").read_text())


def meta_tensors(state_dict: dict[str, list], patch_nums: list[int]) -> dict[str, Tensor]:
    """Return the tensors of a manifest entry without memory, except `lvl_1L`, which has its values."""
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in state_dict.items()
    }
    if "lvl_1L" in tensors:
        sides = torch.tensor(patch_nums)
        tensors["lvl_1L"] = torch.arange(len(sides)).repeat_interleave(sides * sides).unsqueeze(0)
    return tensors
