"""Count how often the sampling kernel goes over its logits until its thresholds are found.

    python -m benchmarks.sampler_passes

counts in Triton's interpreter, for logits of the bundled model's last scale and for random ones of 4096 tokens with the
filters of `actvar_kernels.operations.shapes`. The number of passes goes into `actvar_kernels/tools/virtual/cost.py`.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable

import torch

from actvar_kernels import sample_tokens
from actvar_kernels.backend import using_backend
from actvar_kernels.operations.shapes import GUIDANCE, TOP_K, TOP_P, VOCABULARY
from actvar_kernels.token_draw import triton_kernel

PASSES = {"_reaching": 1, "_step_up": 2, "_mass_below": 1, "_weigh_lowest": 2}
ROWS = 64


def main() -> None:
    print(f"{'logits':36s} {'top-k':>6s} {'top-p':>6s} {'both':>6s} passes per row")
    for std in (1, 2, 4):
        cond = std * torch.randn(1, ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
        uncond = 0.6 * cond + 0.8 * std * torch.randn(cond.shape, generator=torch.Generator().manual_seed(1))
        show(f"normal, deviation {std}, bfloat16", torch.cat((cond, uncond)).bfloat16(), TOP_K)
    logits = bundled_logits()
    show(f"bundled model, {logits.shape[2]} tokens", logits, round(TOP_K / VOCABULARY * logits.shape[2]))


def show(name: str, logits: torch.Tensor, top_k: int) -> None:
    counts = dict.fromkeys(PASSES, 0)
    with using_backend("triton"), torch.no_grad():
        originals = {part: getattr(triton_kernel, part) for part in PASSES}
        try:
            for part, original in originals.items():
                setattr(triton_kernel, part, counted(original, part, counts))
            tokens = sample_tokens(logits, GUIDANCE, top_k, TOP_P, seed=0)
        finally:
            for part, original in originals.items():
                setattr(triton_kernel, part, original)
    found = {part: counts[part] * PASSES[part] / tokens.numel() for part in PASSES}
    of_top_k, of_top_p = found["_reaching"] + found["_step_up"], found["_mass_below"] + found["_weigh_lowest"]
    print(f"{name:36s} {of_top_k:6.1f} {of_top_p:6.1f} {of_top_k + of_top_p:6.1f}")


def counted(function: Callable, name: str, counts: dict[str, int]) -> Callable:
    def call(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def bundled_logits() -> torch.Tensor:
    """Return the logits `[2, ROWS, V]` of the last scale for the bundled model's first image."""
    from actvar import load_pretrained

    _, var = load_pretrained("fashion-mnist")
    seen = []
    draw = type(var).draw
    var.draw = lambda logits, *args: seen.append(logits) or draw(var, logits, *args)
    with using_backend("reference"):
        var.autoregressive_infer_cfg(1, torch.zeros(1, dtype=torch.int64), g_seed=0)
    return seen[-1][:, :ROWS]


if __name__ == "__main__":
    main()
