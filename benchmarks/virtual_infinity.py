"""Predict the sampling time of Infinity on a card that is not there: dense, ActVAR, and a plan with less guidance.

    python -m benchmarks.virtual_infinity --models infinity-2b --batches 1 --gpu h100

runs the real sampling code with one block on a virtual GPU, for square images of 1024x1024 pixels with guidance and
texts of 64 tokens. All blocks are alike, so its launches and times count once for each. Times are *predicted* by
`benchmarks/roofline.py`, not measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from actvar import ActVARConfig, Execution
from actvar.config import DENSE
from actvar.models.infinity import scale_schedule
from actvar.models.infinity.build import OFFICIAL_CH_MULT, infinity_skeleton
from actvar.patching.patch import patch_silently
from actvar_kernels.backend import using_backend
from actvar_kernels.tools.compile_check import LineParser
from actvar_kernels.tools.virtual import HostSyncError, Launch, VirtualGPU, to_fake_cuda, virtual_gpu, why_unavailable
from benchmarks.infinity import PLANS, TEXT_CHANNELS, TEXT_TOKENS
from benchmarks.roofline import CARDS, Card, seconds
from benchmarks.routing import share_function

SIZES: dict[str, dict[str, Any]] = {
    "infinity-2b": dict(bits=32, spatial_patchify=False, depth=32, embed_dim=2048, num_heads=16),
    "infinity-8b": dict(bits=14, spatial_patchify=True, depth=40, embed_dim=3584, num_heads=28),
}
PLAN_NAMES = ("tokens, experts .75", "tokens .5, no guidance")
SCHEDULE = scale_schedule()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = LineParser("python -m benchmarks.virtual_infinity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=tuple(SIZES), help="(default both)")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4), help="images (default 1 4)")
    parser.add_argument("--gpu", choices=CARDS, default="h100")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1:
        parser.error(f"--batches: expected integers above 0, got {min(options.batches)}")
    if why_unavailable() is not None:
        parser.error(f"virtual GPU: {why_unavailable()}")
    card, rows = CARDS[options.gpu], []
    plans = {"dense": DENSE} | {name: PLANS[name] for name in PLAN_NAMES}
    try:
        for model, batch in product(options.models, options.batches):
            found = {
                name: summary(sampling_launches(model, batch, card.arch, config), SIZES[model]["depth"], card)
                for name, config in plans.items()
            }
            print(text(f"{model}, batch {batch}, {options.gpu}", found))
            rows += [row(model, batch, options.gpu, name, of_way) for name, of_way in found.items()]
    except HostSyncError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def sampling_launches(model: str, batch: int, arch: Any, config: ActVARConfig) -> list[Launch]:
    """Return the launches of a sample with one block; the region is the scale of a block, "decoder" or "".

    Raises:
        HostSyncError: the host would wait for the GPU.
    """
    sizes: dict[str, Any] = SIZES[model] | dict(depth=1, block_chunks=1, text_channels=TEXT_CHANNELS, text_maxlen=512)
    multipliers = OFFICIAL_CH_MULT[: 4 if sizes["spatial_patchify"] else 5]
    tokenizer, infinity = infinity_skeleton(**sizes, ch=128, num_res_blocks=2, ch_mult=multipliers)
    with using_backend("triton"), virtual_gpu(arch) as gpu, torch.no_grad():
        to_fake_cuda(tokenizer)
        to_fake_cuda(infinity, torch.bfloat16)
        patch_silently(infinity, config, Execution("fast"))
        lengths = [TEXT_TOKENS] * batch
        prompts = torch.empty(sum(lengths), TEXT_CHANNELS, dtype=torch.bfloat16, device="cuda")
        infinity.sample(prompts, lengths, SCHEDULE)  # what follows from weights alone is kept for the next sample
        gpu.launches.clear()
        infinity.run_blocks = _within(gpu, lambda schedule, scale, *_: str(scale), infinity.run_blocks)
        infinity.decode = _within(gpu, lambda *_: "decoder", infinity.decode)
        infinity.sample(prompts, lengths, SCHEDULE)
    return list(gpu.launches)


def _within(gpu: VirtualGPU, region: Callable[..., str], function: Callable) -> Callable:
    """Return `function`, whose launches get the region that `region` gives for its arguments."""

    def call(*arguments):
        gpu.region = region(*arguments)
        result = function(*arguments)
        gpu.region = ""
        return result

    return call


def summary(launches: list[Launch], depth: int, card: Card) -> dict[str, Any]:
    """Return launches and predicted milliseconds of a sample with `depth` blocks, by part and of a block by scale."""
    share = share_function("measured")

    def of(regions: list[str]) -> dict[str, float]:
        chosen = [launch for launch in launches if launch.region in regions]
        return {
            "launches": sum(launch.launches for launch in chosen),
            "ms": 1e3 * sum(seconds(launch, card, share) for launch in chosen),
        }

    scales = [str(scale) for scale in range(len(SCHEDULE))]
    blocks = {name: depth * value for name, value in of(scales).items()}
    parts = {"blocks": blocks, "rest": of([""]), "decoder": of(["decoder"])}
    whole = {name: sum(part[name] for part in parts.values()) for name in ("launches", "ms")}
    return parts | {"whole": whole, "block by scale": [of([scale]) for scale in scales]}


def row(model: str, batch: int, gpu: str, way: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return launches and predicted milliseconds of one way as a flat row."""
    parts = ("blocks", "rest", "decoder")
    counts = {f"launches_{part}": found[part]["launches"] for part in parts}
    times = {f"predicted_{part}_ms": round(found[part]["ms"], 3) for part in parts}
    whole = {"predicted_ms": round(found["whole"]["ms"], 3)}
    return {"model": model, "batch": batch, "gpu": gpu, "way": way} | counts | times | whole


def text(title: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the summaries of all ways to read."""
    lines = [
        f"{title}, bfloat16, 1024x1024 pixels: every time is predicted, none is measured",
        f"{'':24s}" + "".join(f"{name:>24s}" for name in found),
    ]
    for scale, (_, h, w) in enumerate(SCHEDULE):
        rows = [of_way["block by scale"][scale] for of_way in found.values()]
        cells = [f"{part['launches']:4d} launches {part['ms']:7.3f} ms" for part in rows]
        lines.append(f"{f'a block, {h}x{w}':24s}" + "".join(f"{cell:>24s}" for cell in cells))
    for part in ("blocks", "rest", "decoder", "whole"):
        cells = [f"{of_way[part]['launches']:6d} {of_way[part]['ms']:9.1f} ms" for of_way in found.values()]
        lines.append(f"{part:24s}" + "".join(f"{cell:>24s}" for cell in cells))
    gains = [found["dense"]["whole"]["ms"] / of_way["whole"]["ms"] for of_way in found.values()]
    lines.append(f"{'times dense':24s}" + "".join(f"{gain:>23.2f}x" for gain in gains))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
