"""`python -m soak --seconds 600`, with `tests` on PYTHONPATH: the parts in turn, then one line of counts.

Exit code 1 if a part found what must never happen; what, and the seed that shows it, is on a line of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from support import faults, fuzz, interruptions
from tqdm import tqdm

from soak.drawing import run_samples
from soak.killing import run_bulk_kills, run_evaluation_kills

SUMMARY = {
    "inputs tried": ("inputs",),
    "faults injected": ("faults in sampling", "faults in patching", "failed writes"),
    "kills survived": ("kills survived",),
    "samples drawn": ("samples drawn", "samples in two threads"),
    "patched and unpatched": ("patches",),
}
"""The counts of the parts that make up each of the summary's."""


@dataclass(frozen=True)
class Part:
    """`run(seed)` gives counts and raises where a promise is broken; `watches_memory`: the promise is no leak."""

    name: str
    run: Callable[[int], dict[str, float]]
    watches_memory: bool = False


PARTS = [
    Part("samples", lambda seed: run_samples(1000, seed), watches_memory=True),
    Part("killed bulk sampling", lambda seed: run_bulk_kills(3, seed)),
    Part("killed evaluation", lambda seed: run_evaluation_kills(5, seed)),
    Part("damaged files", lambda seed: fuzz.run_fuzz(2000, seed)),
    Part("faults in sampling", lambda seed: interruptions.run_sampling_faults(5, seed)),
    Part("faults in patching", lambda seed: interruptions.run_patching_faults(5, seed)),
    Part("full disk", lambda _: faults.run_full_disk()),
    Part("killed training", lambda seed: faults.run_kills(5, seed)),
    Part("threads", lambda seed: faults.run_threads(5, seed)),
    Part("patching", lambda _: faults.run_patching(1000), watches_memory=True),
]


def soak(parts: Sequence[Part], seconds: float, seed: int = 0) -> bool:
    """Run `parts` in turn, each at least once, until `seconds` are over; every time with another seed.

    Prints the summary, and every violation when it is found. Returns whether there was none.
    """
    start, counts = time.monotonic(), Counter()
    with tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total} s") as bar:
        while not counts["rounds"] or time.monotonic() - start < seconds:
            for part in parts:
                if counts["rounds"] and time.monotonic() - start > seconds:
                    break
                bar.set_description(part.name)
                try:
                    counts.update(part.run(seed + counts["rounds"]))
                except Exception as error:
                    counts["leaks" if part.watches_memory else "violations"] += 1
                    tqdm.write(
                        f"{part.name}, seed {seed + counts['rounds']}: {error!r}\n{traceback.format_exc()}", sys.stderr
                    )
                bar.n = min(time.monotonic() - start, seconds)
                bar.refresh()
            counts["rounds"] += 1
    sums = {title: sum(counts[name] for name in names) for title, names in SUMMARY.items()}
    sums |= {"violations": counts["violations"], "leaks": counts["leaks"]}
    line = ", ".join(f"{title}: {count:,}" for title, count in sums.items())
    print(f"{line} ({time.monotonic() - start:.0f} s, seeds from {seed})")
    return not counts["violations"] and not counts["leaks"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not soak(PARTS, options.seconds, options.seed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
