"""Predict the sampling time of a model on a card that is not there, dense against ActVAR.

    python -m benchmarks.virtual_gpu --model d16 --batch 8 --gpu h100

runs the real sampling code on a virtual GPU: every Triton kernel is compiled for the card, every launch is counted, and
an operation that makes the host wait is an error. Times are *predicted* by `benchmarks/roofline.py`, not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from actvar import ActVARConfig, Execution
from actvar.config import DENSE
from actvar.execution import EXPERT_EXECUTIONS
from actvar.models.build import OFFICIAL_CHANNEL_MULTIPLIERS, skeleton
from actvar.patching.patch import patch_silently
from actvar.sparse.block import ActVARBlock
from actvar_kernels.backend import using_backend
from actvar_kernels.operations.shapes import MODELS
from actvar_kernels.tools.compile_check import LineParser
from actvar_kernels.tools.virtual import HostSyncError, Launch, VirtualGPU, to_fake_cuda, virtual_gpu, why_unavailable
from actvar_kernels.tools.virtual.cost import Share
from benchmarks.roofline import CARDS, Card, launch_cost, seconds
from benchmarks.routing import SKIPS, share_function

ACTVAR = ActVARConfig()
MOST_LAUNCHES = 9  # of an active block


@dataclass
class Step:
    """Hold the launches of one scale of a sampling run: those of every block, and those before the next scale."""

    tokens: int
    blocks: list[list[Launch]]
    rest: list[Launch]


@dataclass
class Run:
    """Hold a whole sampling run: `before` the first block; `decoder`: from features to images."""

    before: list[Launch]
    steps: list[Step]
    decoder: list[Launch]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if why_unavailable() is not None:
        parser.error(f"virtual GPU: {why_unavailable()}")
    card, schedule = CARDS[options.gpu], options.schedule
    share = share_function(options.skip)
    report = {"predicted": True, "model": options.model, "batch": options.batch, "gpu": options.gpu}
    report |= {"schedule": schedule, "skip": options.skip}
    try:
        for name, config in (("dense", DENSE), ("actvar", ACTVAR)):
            run = sampling_run(options.model, options.batch, card.arch, config, schedule)
            report[name] = summary(run, card, share)
    except HostSyncError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(text(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = LineParser("python -m benchmarks.virtual_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="d16")
    parser.add_argument("--batch", type=_positive, default=8, help="images (default 8)")
    parser.add_argument("--gpu", choices=CARDS, default="h100")
    parser.add_argument("--schedule", choices=EXPERT_EXECUTIONS, default="auto", help="of the experts (default auto)")
    help_skip = "routing that decides which blocks a tile list leaves out, or their share (default measured)"
    skips = "{" + ",".join(SKIPS) + "} or NUMBER"
    parser.add_argument("--skip", type=_skip, default="measured", metavar=skips, help=help_skip)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {value!r}")
    return int(value)


def _skip(value: str) -> str | float:
    if value in SKIPS:
        return value
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(SKIPS)} or a number in [0, 1), got {value!r}")
    return share


def sampling_run(
    model: str,
    batch: int,
    arch: int,
    config: ActVARConfig,
    expert_execution: str = "auto",
    weights: str | None = None,
) -> Run:
    """Sample once with a model of an official size on a virtual GPU: transformer and decoder in bfloat16.

    `torch.autocast` has no effect in a build of torch for the CPU, so that the decoder's weights are in bfloat16.

    Raises:
        HostSyncError: the host would wait for the GPU.
    """
    width, sides = MODELS[model]
    sizes = dict(V=4096, Cvae=32, ch=160, share_quant_resi=4, num_classes=1000, attn_l2_norm=True, num_res_blocks=2)
    vae, var = skeleton(
        **sizes,
        patch_nums=sides,
        depth=width // 64,
        width=width,
        shared_aln=model == "d36",
        ch_mult=OFFICIAL_CHANNEL_MULTIPLIERS,
        image_channels=3,
    )
    with using_backend("triton"), virtual_gpu(arch) as gpu:
        to_fake_cuda(vae)
        for module in (vae.decoder, vae.post_quant_conv, var):
            to_fake_cuda(module, torch.bfloat16)
        patch_silently(var, config, Execution("fast", expert_execution=expert_execution, weights=weights))
        labels = torch.empty(batch, dtype=torch.int64, device="cuda")
        draw = dict(cfg=1.5, top_k=900, top_p=0.96)
        decode = vae.fhat_to_img
        vae.fhat_to_img = lambda f_hat: decode(f_hat.to(torch.bfloat16))
        var.autoregressive_infer_cfg(batch, labels, **draw)  # copies of weights are kept for the next sample
        gpu.launches.clear()
        with _marked_regions(gpu, vae, var):
            var.autoregressive_infer_cfg(batch, labels, **draw)
    return _split(gpu.launches, sides)


@contextmanager
def _marked_regions(gpu: VirtualGPU, vae: torch.nn.Module, var: torch.nn.Module) -> Iterator[None]:
    """Give launches the number of their block as region, "decoder" in the autoencoder, "" elsewhere."""
    forward, numbers = ActVARBlock.forward, {id(block): str(number) for number, block in enumerate(var.blocks)}

    def within(region: str, function: Callable, then: str = "") -> Callable:
        def call(*args, **kwargs):
            gpu.region = region
            result = function(*args, **kwargs)
            gpu.region = then
            return result

        return call

    vae.fhat_to_img = within("decoder", vae.fhat_to_img, then="decoder")

    def marked(block, *args, **kwargs):
        return within(numbers[id(block)], forward)(block, *args, **kwargs)

    ActVARBlock.forward = marked  # on the class: a block with a forward of its own runs apart from the others
    try:
        yield
    finally:
        ActVARBlock.forward = forward


def _split(launches: list[Launch], sides: tuple[int, ...]) -> Run:
    run = Run([], [], [])
    current, region = run.before, ""
    for launch in launches:
        if launch.region != region:
            region = launch.region
            if region == "decoder":
                current = run.decoder
            elif region == "":
                current = run.steps[-1].rest
            else:
                if region == "0":
                    run.steps.append(Step(sides[len(run.steps)] ** 2, [], []))
                run.steps[-1].blocks.append([])
                current = run.steps[-1].blocks[-1]
        current.append(launch)
    return run


def summary(run: Run, card: Card, share: Share) -> dict[str, object]:
    """Return the launches, bytes and predicted milliseconds of a run."""

    def milliseconds(launches: list[Launch]) -> float:
        return 1e3 * sum(seconds(launch, card, share) for launch in launches)

    steps = []
    for step in run.steps:
        counts = [sum(launch.launches for launch in block) for block in step.blocks]
        traffic = [sum(launch_cost(launch, share).bytes for launch in block) for block in step.blocks]
        steps.append(
            {
                "tokens": step.tokens,
                "launches_per_block": max(counts),
                "megabytes_per_block": max(traffic) / 1e6,
                "blocks_ms": sum(map(milliseconds, step.blocks)),
                "rest_ms": milliseconds(step.rest),
                "block": _block_table(step.blocks[-1], card, share),
            }
        )
    last_two = sum(step["blocks_ms"] + step["rest_ms"] for step in steps[-2:])
    whole = milliseconds(run.before) + sum(step["blocks_ms"] + step["rest_ms"] for step in steps)
    blocks = [launch for step in run.steps for block in step.blocks for launch in block]
    rest = [*run.before, *(launch for step in run.steps for launch in step.rest)]
    return {
        "steps": steps,
        "last_two_steps_ms": last_two,
        "whole_run_ms": whole,
        "launches": {
            part: sum(launch.launches for launch in launches)
            for part, launches in (("blocks", blocks), ("rest", rest), ("decoder", run.decoder))
        },
        "blocks_ms": milliseconds(blocks),
        "rest_ms": milliseconds(rest),
        "decoder_ms": milliseconds(run.decoder),
    }


def _block_table(block: list[Launch], card: Card, share: Share) -> list[dict[str, object]]:
    rows = []
    for launch in block:
        cost = launch_cost(launch, share)
        rows.append(
            {
                "name": launch.name,
                "launches": launch.launches,
                "megabytes": cost.bytes / 1e6,
                "gigaflops": cost.flops / 1e9,
                "microseconds": 1e6 * seconds(launch, card, share),
            }
        )
    return rows


def text(report: dict) -> str:
    """Return the report to read."""
    title = f"{report['model']}, batch {report['batch']}, {report['gpu']}, bfloat16, schedule {report['schedule']}"
    lines = [f"{title}, skip {report['skip']}: every time is predicted, none is measured", ""]
    for name in ("dense", "actvar"):
        steps = report[name]["steps"]
        lines.append(f"{name}: launches and predicted time of one block at the last scale")
        for row in steps[-1]["block"]:
            lines.append(
                f"  {row['name']:28s} {row['launches']:2d} {row['megabytes']:9.2f} MB {row['gigaflops']:9.2f} GFLOP "
                f"{row['microseconds']:9.2f} us"
            )
        active = max(step["launches_per_block"] for step in steps[-2:])
        verdict = "" if active <= MOST_LAUNCHES else f", more than {MOST_LAUNCHES}"
        counts = Counter(step["launches_per_block"] for step in steps)
        spread = ", ".join(f"{count} at {times}" for count, times in sorted(counts.items()))
        lines.append(f"  {active} launches per block at the last two scales{verdict} (of all scales: {spread})")
        megabytes = ", ".join(f"{step['megabytes_per_block']:.1f} MB" for step in steps[-2:])
        lines.append(f"  {megabytes} per block at the last two scales")
        parts = ", ".join(f"{count} in the {part}" for part, count in report[name]["launches"].items())
        lines.append(f"  launches of a sample: {parts}")
        lines.append("")
    lines.append(f"{'predicted ms':22s} {'dense':>9s} {'ActVAR':>9s} {'speed-up':>9s}")
    dense, actvar = report["dense"], report["actvar"]
    for number, (a, b) in enumerate(zip(dense["steps"], actvar["steps"], strict=True), 1):
        label = f"step {number:2d} ({a['tokens']} tokens)"
        lines.append(_row(label, a["blocks_ms"] + a["rest_ms"], b["blocks_ms"] + b["rest_ms"]))
    lines.append(_row("blocks, last two", *(sum(s["blocks_ms"] for s in r["steps"][-2:]) for r in (dense, actvar))))
    lines.append(_row("last two steps", dense["last_two_steps_ms"], actvar["last_two_steps_ms"]))
    lines.append(_row("whole run", dense["whole_run_ms"], actvar["whole_run_ms"]))
    lines.append(_row("decoder, not included", dense["decoder_ms"], actvar["decoder_ms"]))
    return "\n".join(lines)


def _row(label: str, dense: float, actvar: float) -> str:
    return f"{label:22s} {dense:9.3f} {actvar:9.3f} {dense / actvar:9.2f}"


if __name__ == "__main__":
    sys.exit(main())
