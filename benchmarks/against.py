"""Compare this checkout with an earlier commit, in turn: exit code 1 if an operation or a sample got slower.

    python -m benchmarks --against REV

The earlier commit is checked out into a temporary folder, and each of the two runs its own
`benchmarks/against_worker.py` in a process of its own; one waits while the other measures. A case that only one of them
has is printed as not compared. The earlier commit compiles its C++ into the temporary folder, so that the two commits
share no library.

A worker is started as `python -m benchmarks.against_worker SUBSET` in its checkout, and speaks in lines:

1. It writes a JSON list of the names of its cases, each a string of one line.
2. For each line of standard input, the name of one of these cases, it writes the seconds of one run as a JSON number.
3. It ends where its standard input ends. Standard output has nothing else; standard error is shown as it comes.

Noise is what the repeats of a case spread: the distance of its 20th and 80th percentiles, relative to the median, in
the commit where it is larger. A median that is slower by more than noise, and by more than `SMALLEST`, is measured
again by new processes, and is a regression if it is so again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
    """Report that a worker ended, or wrote what is not in the protocol."""


@dataclass(frozen=True)
class Change:
    """Hold a case in both commits: medians in seconds, and the noise of their ratio."""

    case: str
    earlier: float
    present: float
    noise: float

    @classmethod
    def of(cls, case: str, earlier: Sequence[float], present: Sequence[float]) -> Change:
        """Build the change from the seconds of every repeat."""
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


def changes(cases: Sequence[str], earlier: Timer, present: Timer, repeats: int = REPEATS) -> Iterator[Change]:
    """Yield every case, measured in both commits, which take turns in going first; the first repeat warms up."""
    for case in tqdm(cases, desc="cases", leave=False):
        seconds: dict[str, list[float]] = {"earlier": [], "present": []}
        timers = {"earlier": earlier, "present": present}
        for repeat in range(repeats + 1):
            for name in sorted(timers, reverse=bool(repeat % 2)):
                measured = timers[name](case)
                if repeat:
                    seconds[name].append(measured)
        yield Change.of(case, seconds["earlier"], seconds["present"])


def printed(found: Iterator[Change]) -> list[Change]:
    """Print each change as soon as it is measured, and return all."""
    kept = []
    for change in found:
        tqdm.write(str(change))
        sys.stdout.flush()
        kept.append(change)
    return kept


def compare(revision: str, subset: str, only: str = "", repeats: int = REPEATS, root: Path = ROOT) -> int:
    """Print every case of a subset whose name contains `only`, and a verdict; return the exit code: 1 if one is slower.

    Raises:
        ValueError: there is no such revision, or no such case in both commits.
        WorkerError: one of the two commits cannot run the benchmark, or its worker does not speak the protocol.
    """
    with _checkout(root, revision) as folder:
        with _workers(revision, folder, root, subset) as (earlier, present):
            shared = [case for case in present.cases if case in earlier.cases]
            chosen = [case for case in shared if only in case]
            if not chosen:
                raise ValueError(f"expected a case of both commits that contains {only!r}, have {', '.join(shared)}")
            print(f"{'milliseconds':56s}{revision[:10]:>11s}{'present':>11s}{'ratio':>9s}{'noise':>8s}", flush=True)
            first = printed(changes(chosen, earlier.seconds, present.seconds, repeats))
            for worker in (earlier, present):
                for case in worker.cases:
                    if case not in shared and only in case:
                        print(f"{case:56s}  not compared, only in {worker.commit}")
        suspects = [change.case for change in first if change.slower]
        if not suspects:
            print(f"none of {len(first)} cases is slower than {revision}")
            return 0
        print("again, by new processes:", flush=True)
        with _workers(revision, folder, root, subset) as (earlier, present):
            second = printed(changes(suspects, earlier.seconds, present.seconds, repeats))
    regressions = [change.case for change in second if change.slower]
    print(f"slower than {revision}: {', '.join(regressions)}" if regressions else "not confirmed")
    return 1 if regressions else 0


@contextmanager
def _checkout(root: Path, revision: str) -> Iterator[Path]:
    """Give a temporary worktree of `revision`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "earlier"
        _git(root, "worktree", "add", "--detach", str(folder), revision)
        try:
            yield folder
        finally:
            _git(root, "worktree", "remove", "--force", str(folder))


def _git(root: Path, *arguments: str) -> None:
    run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {run.stderr.strip()}")


@contextmanager
def _workers(revision: str, earlier: Path, present: Path, subset: str) -> Iterator[tuple[Worker, Worker]]:
    """Give a worker of each commit; both start at once."""
    builds = {"TORCH_EXTENSIONS_DIR": str(earlier.with_name("extensions"))}
    with ExitStack() as running:
        workers = Worker(revision, earlier, subset, builds), Worker("the present", present, subset, {})
        for worker in workers:
            running.callback(worker.stop)
        for worker in workers:
            worker.read_cases()
        yield workers


class Worker:
    """Run the process of one commit that measures; the protocol is at the top of this module.

    Args:
        commit: what messages call the commit.
        folder: checkout of the commit.
        subset: which cases the worker is asked for.
        variables: environment variables beside those of this process.
    """

    def __init__(self, commit: str, folder: Path, subset: str, variables: Mapping[str, str]):
        self.commit, self.cases = commit, []
        if not (folder / "benchmarks" / "against_worker.py").is_file():  # that of an installed package would run
            raise self._error("a worker", "no such file")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.against_worker", subset],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read_cases(self) -> None:
        """Read the worker's first line into `cases`.

        Raises:
            WorkerError: the worker ended, or the line is not a list of names.
        """
        cases = self._answer("a JSON list of case names")
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            raise self._error("a JSON list of case names", repr(cases))
        self.cases = cases

    def seconds(self, case: str) -> float:
        """Let the worker run a case once.

        Raises:
            WorkerError: the worker ended, or the line is not a positive number.
        """
        expected = f"the seconds of {case!r}"
        try:
            self._process.stdin.write(case + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker ended, which `_answer` reports
        seconds = self._answer(expected)
        if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
            raise self._error(expected, repr(seconds))
        return seconds

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, expected: str) -> object:
        line = self._process.stdout.readline()
        if not line:
            raise self._error(expected, f"its end with exit code {self._process.wait()}")
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise self._error(expected, repr(line)) from None

    def _error(self, expected: str, found: str) -> WorkerError:
        return WorkerError(
            f"{self.commit}: expected {expected} from its benchmarks/against_worker.py, got {found:.200}; compare with "
            "a commit whose worker speaks the protocol that benchmarks/against.py describes"
        )
