"""Time blocks of Infinity on this machine: the public code, ours, the same accelerated, and plans of ActVAR.

    python -m benchmarks.infinity --size 1M --dtype bf16 --public-infinity DIR

Blocks run without tokenizer, head and draw, at every scale of square images of one prompt of 64 tokens, with guidance
(two rows). They have random weights, which change no time. All ways run in turn in one process, and the table is of
medians. In bfloat16 the public code keeps its blocks in it and samples under autocast, as its scripts do.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actvar import ActVARConfig, Execution
from actvar.config import DENSE
from actvar.models import Infinity, build_infinity
from actvar.models.infinity import SIZES, scale_schedule
from actvar.models.infinity.arguments import checked_draw
from actvar.models.infinity.schedules import Schedule, tokens_of
from actvar.patching.patch import patched_silently
from actvar_kernels.tools.compile_check import LineParser
from benchmarks import results
from benchmarks.public_infinity import import_infinity, public_twin
from benchmarks.sampling import DTYPES, expect_kernels, interleaved, machine, medians

TEXT_TOKENS, TEXT_CHANNELS, BITS, GUIDANCE = 64, 2048, 32, 4.0
LAST = (-3, -2, -1)
PLANS = {
    "tokens .75": ActVARConfig(scales=LAST, token_rates=(0.75,) * 3, ffn_rate=1.0),
    "tokens, experts .75": ActVARConfig(scales=LAST, token_rates=(0.75,) * 3, ffn_rate=0.75),
    "tokens .5, no guidance": ActVARConfig(scales=LAST, token_rates=(0.5,) * 3, ffn_rate=0.75, guidance_until=-2),
}
"""Plans at the last three scales; the last one leaves out guidance in two."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = LineParser("python -m benchmarks.infinity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1M", help="pixels of the image (default 1M)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--width", type=int, default=2048, help="channels, 128 a head (default 2048)")
    parser.add_argument("--blocks", type=int, default=2, help="number of blocks (default 2)")
    parser.add_argument("--weights", choices=("int8",), help="also measure products in eight bits")
    parser.add_argument("--public-infinity", type=Path, help="clone of the public code, to be measured as well")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way (default 3)")
    parser.add_argument("--csv", type=Path, help="add the numbers to this file, see benchmarks/results.py")
    options = parser.parse_args(arguments)
    if options.csv is not None:
        expect_kernels(parser)
    schedule = scale_schedule(size=options.size)
    _, infinity = build_infinity(BITS, False, options.blocks, options.width, options.width // 128, 1, TEXT_CHANNELS)
    runs = interleaved(
        ways(infinity, options, schedule), lambda run: seconds_by_scale(run, schedule), options.repeats, "Infinity"
    )
    print(table(options, {name: medians(of_way) for name, of_way in runs.items()}))
    if options.csv is not None:
        shape = results.Shape(f"infinity-{options.blocks}x{options.width}", 1, options.dtype, 0.75, schedule[-1][1])
        rows = [
            shape.row(name, figure, "ms", [1e3 * run[figure] for run in of_way])
            for name, of_way in runs.items()
            for figure in of_way[0]
        ]
        results.add(options.csv, rows)
    return 0


def ways(infinity: Infinity, options: argparse.Namespace, schedule: Schedule) -> dict[str, Callable[[], Any]]:
    """Return by name a context manager that gives a function, which starts a sample and returns one of its scales."""
    dtype, found = DTYPES[options.dtype], {}
    if options.public_infinity is not None:
        public: Any = public_twin(import_infinity(options.public_infinity), infinity, options.size)
        public.load_state_dict(infinity.state_dict())
        for block in public.unregistered_blocks:
            block.to(dtype).ca_norm.float()  # which autocast does on CUDA alone
        found["public code"] = lambda: nullcontext(lambda: public_sample(public, dtype, schedule))
    infinity.to(dtype)
    plans = {"accelerated": DENSE, **PLANS}
    executions = {"": None} | ({" int8": Execution(weights="int8")} if options.weights else {})

    @contextmanager
    def patched(config: ActVARConfig, execution: Execution | None) -> Iterator[Callable[[], Any]]:
        with patched_silently(infinity, config, None, execution):
            yield lambda: own_sample(infinity, schedule)

    found["dense"] = lambda: nullcontext(lambda: own_sample(infinity, schedule))
    for suffix, execution in executions.items():
        found |= {name + suffix: partial(patched, config, execution) for name, config in plans.items()}
    return found


def own_sample(infinity: Infinity, schedule: Schedule) -> Any:
    """Yield after the blocks of every scale of one sample of ours."""
    draw = checked_draw(len(schedule), infinity.depth, GUIDANCE, 1.0, 0, 0.0, None, (0,))
    text = torch.randn(TEXT_TOKENS, TEXT_CHANNELS, generator=torch.Generator().manual_seed(0))
    rows = torch.cat((text, infinity.unconditional([TEXT_TOKENS]).to(text.dtype)))
    condition = infinity.condition(rows, [TEXT_TOKENS] * 2)
    with infinity.sampling(schedule, draw):
        for scale, inputs in enumerate(scale_inputs(schedule)):
            x = infinity.embedded(scale, inputs, condition)
            yield lambda scale=scale, x=x: infinity.run_blocks(schedule, scale, x, condition, draw)


def public_sample(public: Any, dtype: torch.dtype, schedule: Schedule) -> Any:
    """Yield after the blocks of every scale of one sample of the public code."""
    text = torch.randn(TEXT_TOKENS, TEXT_CHANNELS, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, TEXT_TOKENS, 2 * TEXT_TOKENS], dtype=torch.int32)
    texts = public.text_norm(torch.cat((text, public.cfg_uncond[:TEXT_TOKENS])))
    pooled = public.text_proj_for_sos((texts, ends, TEXT_TOKENS))
    context = public.text_proj_for_ca(texts), ends, TEXT_TOKENS
    modulation = public.shared_ada_lin(pooled.float()).float().contiguous()
    blocks = public.unregistered_blocks
    try:
        for block in blocks:
            block.sa.kv_caching(True)
        for scale, inputs in enumerate(scale_inputs(schedule)):
            x = pooled.unsqueeze(1) + public.pos_start if inputs is None else public.word_embed(inputs).repeat(2, 1, 1)

            def run(x=x, scale=scale):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    for block in blocks:
                        x = block(x, modulation, context, None, None, schedule, public.rope2d_freqs_grid, scale)
                return x

            yield run
    finally:
        for block in blocks:
            block.sa.kv_caching(False)


def scale_inputs(schedule: Schedule) -> list[torch.Tensor | None]:
    """Return what every scale is embedded from, `[1, L, BITS]`; None for the first scale."""
    generator = torch.Generator().manual_seed(0)
    return [None, *(torch.randn(1, tokens, BITS, generator=generator) for tokens in tokens_of(schedule)[1:])]


@torch.no_grad()
def seconds_by_scale(start: Callable[[], Any], schedule: Schedule) -> dict[str, float]:
    """Return the seconds of the blocks at all scales, at the last three, and at each."""
    seconds = []
    for run in start():
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    scales = {f"blocks, {h}x{w}": value for (_, h, w), value in zip(schedule, seconds, strict=True)}
    return {"blocks of all scales": sum(seconds), "blocks of the last three": sum(seconds[-3:])} | scales


def table(options: argparse.Namespace, seconds: dict[str, dict[str, float]]) -> str:
    """Return the medians to read, with speed-ups over the first way and over the accelerated model."""
    title = "{blocks} blocks of width {width}, {size} pixels, {dtype}, medians of {repeats}".format(**vars(options))
    lines = [f"{title}, {machine()['threads']} threads", f"{'':28s}{'all ms':>10s}{'last three':>12s}"]
    first, accelerated = next(iter(seconds.values())), seconds["accelerated"]
    lines[-1] += f"{'times ' + next(iter(seconds)):>20s}{'times accelerated':>20s}"
    for name, of_way in seconds.items():
        gains = (base["blocks of all scales"] / of_way["blocks of all scales"] for base in (first, accelerated))
        times = f"{1e3 * of_way['blocks of all scales']:10.0f}{1e3 * of_way['blocks of the last three']:12.0f}"
        lines.append(f"{name:28s}{times}" + "".join(f"{gain:19.2f}x" for gain in gains))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
