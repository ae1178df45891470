"""Read numbers computed with the public Infinity code, and rebuild the weights behind them by their rule.

`data/infinity/infinity_*.safetensors` hold inputs and outputs of tiny models with the real tokenizer (float32, CPU);
their metadata has sizes, seeds of `fill_infinity` and the sampling arguments. `unrounded_*.safetensors` hold the bits
of all scales, and every eighth of the last scale's logits, of the same models and arguments in the public code without
its rounding to bfloat16 in cross-attention; those that start with `negative_` have a negative prompt.
`state_dict_manifest.json` lists every tensor of the published files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from actvar.models import Infinity, InfinityTokenizer, build_infinity
from support.golden import DATA

CASES = ("plain", "patchify", "landscape")
NOT_FILLED = ("lvl_1L", "zero_k_bias", "mask", "zero", "soft_entropy_loss")
TINY = dict(bits=4, depth=4, embed_dim=64, num_heads=2, block_chunks=2, text_channels=128, text_maxlen=12, ch=32)
TINY_SCHEDULE = [(1, 1, 1), (1, 2, 2), (1, 3, 4)]


@dataclass(frozen=True)
class InfinityGolden:
    """Hold one case: models with the weights of the rule, sampling arguments, and recorded tensors."""

    tokenizer: InfinityTokenizer
    infinity: Infinity
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def text(self) -> tuple[Tensor, list[int]]:
        return self.tensors["text"], self.tensors["lengths"].tolist()

    @property
    def schedule(self) -> list[tuple[int, int, int]]:
        return [tuple(scale) for scale in self.facts["schedule"]]

    @property
    def sampling(self) -> dict[str, Any]:
        return {name: self.facts[name] for name in ("cfg", "tau", "top_k", "top_p", "g_seed", "insertion")}


@torch.no_grad()
def fill_infinity(module: nn.Module, seed: int) -> None:
    """Overwrite the weights of `module` by the rule that the recorded numbers were made with."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(module.state_dict().items()):
        if name.rsplit(".", 1)[-1] in NOT_FILLED or not tensor.is_floating_point():
            continue
        z = torch.randn(tensor.shape, generator=generator)
        if name.endswith("scale_mul_1H11"):
            value = 1 + 0.3 * z
        elif "norm" in name and name.endswith(".weight"):
            value = 1 + 0.1 * z
        elif any(part in name for part in ("lvl_embed", "cfg_uncond", "pos_start")):
            value = 0.5 * z
        elif "ada_gss" in name:
            value = 0.3 * z
        elif tensor.ndim >= 2:
            value = z / tensor[0].numel() ** 0.5
        else:
            value = 0.1 * z
        tensor.copy_(value)


def load_infinity_golden(case: str, decodes: bool = False) -> InfinityGolden:
    """Rebuild the models of one of `CASES` and read its recorded tensors.

    The tokenizer is the large one that the images were made with if it `decodes`, otherwise a tiny one.
    """
    with safe_open(DATA / "infinity" / f"infinity_{case}.safetensors", framework="pt") as file:
        facts = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sizes = ("bits", "depth", "embed_dim", "num_heads", "block_chunks", "text_channels")
    tokenizer, infinity = build_infinity(
        **{name: facts[name] for name in sizes},
        spatial_patchify=facts["patchify"],
        text_maxlen=64,
        ch=128 if decodes else 32,
    )
    fill_infinity(tokenizer, facts["vae_fill_seed"])
    fill_infinity(infinity, facts["model_fill_seed"])
    return InfinityGolden(tokenizer, infinity, facts, tensors)


def load_unrounded(case: str) -> dict[str, Tensor]:
    """Read what the public code draws in one of `CASES` without rounding to bfloat16."""
    return load_file(DATA / "infinity" / f"unrounded_{case}.safetensors")


def infinity_manifest() -> dict[str, dict]:
    """Return by published model its sizes, and name -> [dtype, shape] of `model` and `tokenizer`."""
    return json.loads((DATA / "infinity" / "state_dict_manifest.json").read_text())


def tiny_infinity(patchify: bool = False, **changes: Any) -> tuple[InfinityTokenizer, Infinity]:
    """Return a tiny tokenizer and model whose branches all matter, weights by the golden rule."""
    tokenizer, infinity = build_infinity(**{**TINY, **changes}, spatial_patchify=patchify)
    fill_infinity(tokenizer, 0)
    fill_infinity(infinity, 1)
    return tokenizer, infinity


def tiny_text(lengths: list[int], seed: int = 0) -> tuple[Tensor, list[int]]:
    """Return features of texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), TINY["text_channels"], generator=generator), lengths
