"""Find from how many tokens on it pays to leave experts out on this CPU: `python -m benchmarks.few_tokens`.

The same kernel with all 16 experts and with 12 of them that tokens choose at random, in turn. Where the second takes
more time, a scale would have to run all experts and leave out what was not chosen.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterable

import torch

from actvar.sampling.timing import interleaved_seconds, seconds_of
from actvar_kernels import expert_ffn
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.operations.shapes import SIZES
from benchmarks.sampling import DTYPES

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EXPERTS, ACTIVE = 16, 12
CALLS = 5  # of one measurement, with weights of their own, as blocks have


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m benchmarks.few_tokens", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["fashion-mnist", "d16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=41, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    if cpu.why_unavailable() is not None:
        parser.error(f"it measures the C++ kernel, which does not run here: {cpu.why_unavailable()}")
    print("| time of all experts over that of 12 of 16, by tokens | " + " | ".join(map(str, options.tokens)) + " |")
    print("|---" * (len(options.tokens) + 1) + "|")
    for model in options.models:
        for name, dtype in DTYPES.items():
            if dtype == torch.bfloat16 and not cpu.multiplies_bfloat16():
                continue
            found = ratios(SIZES[model].width, dtype, options.tokens, options.repeats)
            print(f"| {model}, {name} | " + " | ".join(f"{ratio:.2f}" for ratio in found) + " |")


@torch.no_grad()
def ratios(width: int, dtype: torch.dtype, tokens: Iterable[int], repeats: int) -> list[float]:
    """Return the time with all experts over the time with chosen ones, by tokens: the median of ratios in turn."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    hidden, found = 4 * width, []
    weights = [(normal(hidden, width), normal(hidden), normal(width, hidden), normal(width)) for _ in range(CALLS)]

    def seconds(u: torch.Tensor, mask: torch.Tensor, active: int) -> float:
        return seconds_of(lambda: [expert_ffn(u, mask, active, *each) for each in weights], u.device)

    for count in tokens:
        u, order = normal(count, width), torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)
        runs = {active: functools.partial(seconds, u, order < active, active) for active in (EXPERTS, ACTIVE)}
        every, chosen = interleaved_seconds(runs, repeats, f"{width} wide, {count} tokens").values()
        found.append(statistics.median(a / b for a, b in zip(every, chosen, strict=True)))
    return found


if __name__ == "__main__":
    main()
