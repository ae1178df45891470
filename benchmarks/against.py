"""The package as it is now beside an earlier commit, interleaved: exit code 1 if an operation or a sample got slower.

    python -m benchmarks --against REV

The earlier commit is checked out into a temporary folder, and a process of each runs this folder's
`benchmarks/against_worker.py`; one waits while the other measures. Noise is what the repeats of a case spread: the
distance of its 20th and 80th percentiles, relative to the median, in the commit where it is larger. A median that is
slower by more than noise, and by more than `SMALLEST`, is measured again by new processes, and is a regression if it is
so again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.results import percentiles_of

ROOT = Path(__file__).parent.parent
SMALLEST = 0.03  # two processes that run the same code differ by so much
REPEATS = 15

Timer = Callable[[str], float]
"""Seconds of a case by its name."""


class WorkerError(RuntimeError):
    """A process that measures came to an end."""


@dataclass(frozen=True)
class Change:
    """A case in both commits: medians in seconds, and the noise of their ratio."""

    case: str
    earlier: float
    present: float
    noise: float

    @classmethod
    def of(cls, case: str, earlier: Sequence[float], present: Sequence[float]) -> Change:
        """From the seconds of every repeat."""
        spreads = [(high - low) / middle for low, middle, high in map(percentiles_of, (earlier, present))]
        return cls(case, percentiles_of(earlier)[1], percentiles_of(present)[1], max(spreads))

    @property
    def ratio(self) -> float:
        return self.present / self.earlier

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + max(self.noise, SMALLEST)

    def __str__(self) -> str:
        return (
            f"{self.case:56s}{1e3 * self.earlier:11.3f}{1e3 * self.present:11.3f}{self.ratio:8.2f}x"
            f"{self.noise:8.0%}{'  slower' if self.slower else ''}"
        )


def changes(cases: Sequence[str], earlier: Timer, present: Timer, repeats: int = REPEATS) -> list[Change]:
    """Every case in both commits, which take turns in going first; the first repeat warms up."""
    found = []
    for case in tqdm(cases, desc="cases", leave=False):
        seconds: dict[str, list[float]] = {"earlier": [], "present": []}
        timers = {"earlier": earlier, "present": present}
        for repeat in range(repeats + 1):
            for name in sorted(timers, reverse=bool(repeat % 2)):
                measured = timers[name](case)
                if repeat:
                    seconds[name].append(measured)
        found.append(Change.of(case, seconds["earlier"], seconds["present"]))
    return found


def compare(revision: str, subset: str, only: str = "", repeats: int = REPEATS, root: Path = ROOT) -> int:
    """Print every case of a subset whose name contains `only`, and return the exit code: 1 if one is slower.

    Raises:
        ValueError: no such revision, or no such case.
        WorkerError: one of the two commits cannot run the benchmark.
    """
    with _checkout(root, revision) as folder:
        with _timers(folder, root, subset) as (cases, timers):
            chosen = [case for case in cases if only in case]
            if not chosen:
                raise ValueError(f"expected a case that contains {only!r}, have {', '.join(cases)}")
            print(f"{'milliseconds':56s}{revision[:10]:>11s}{'present':>11s}{'ratio':>9s}{'noise':>8s}")
            first = changes(chosen, **timers, repeats=repeats)
            print("\n".join(map(str, first)), flush=True)
        suspects = [change.case for change in first if change.slower]
        if not suspects:
            return 0
        print("again, by new processes:")
        with _timers(folder, root, subset) as (_, timers):
            second = changes(suspects, **timers, repeats=repeats)
            print("\n".join(map(str, second)))
    regressions = [change.case for change in second if change.slower]
    print(f"slower than {revision}: {', '.join(regressions)}" if regressions else "not confirmed")
    return 1 if regressions else 0


@contextmanager
def _checkout(root: Path, revision: str) -> Iterator[Path]:
    """A temporary worktree of `revision`, with the present `benchmarks`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "earlier"
        _git(root, "worktree", "add", "--detach", str(folder), revision)
        try:
            shutil.rmtree(folder / "benchmarks", ignore_errors=True)
            shutil.copytree(root / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
            yield folder
        finally:
            _git(root, "worktree", "remove", "--force", str(folder))


def _git(root: Path, *arguments: str) -> None:
    run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {run.stderr.strip()}")


@contextmanager
def _timers(earlier: Path, present: Path, subset: str) -> Iterator[tuple[list[str], Mapping[str, Timer]]]:
    """Names of the cases that both can run, and a timer of each."""
    processes = {name: _started(folder, subset) for name, folder in (("earlier", earlier), ("present", present))}
    try:
        cases = {name: _answer(process) for name, process in processes.items()}

        def timer(process: subprocess.Popen) -> Timer:
            def seconds(case: str) -> float:
                process.stdin.write(case + "\n")
                process.stdin.flush()
                return _answer(process)

            return seconds

        both = [case for case in cases["present"] if case in cases["earlier"]]
        yield both, {name: timer(process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def _started(folder: Path, subset: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.against_worker", subset],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen) -> object:
    line = process.stdout.readline()
    if not line:
        raise WorkerError(f"expected an answer of {process.args}, it ended with exit code {process.wait()}")
    return json.loads(line)
