"""Run many jobs, some of which wait for others, by several processes on one device."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from actvar.training.processes import rank

LOG = "workers.log"


@dataclass(frozen=True)
class Job:
    """Hold a call of no arguments, in a form that can be pickled.

    Args:
        name: different for every job.
        after: names of jobs to wait for; those that are not in the list are done.
    """

    name: str
    call: Callable[[], object]
    after: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], processes: int, work: Path) -> Iterator[tuple[Job, object]]:
    """Yield each job with what it returned, as they are done; begin in the order of the list, except those that wait.

    One process runs them in place. Several are started anew, with one thread each; what they write to stderr goes to
    `work/workers.log`. After an error the jobs that run are finished and no other is begun.

    Raises:
        RuntimeError: a process died; names what was running.
        ValueError: jobs that wait for each other.
        Exception: that of a job.
    """
    queue = _Queue(jobs)
    results = _in_place(queue) if processes == 1 else _in_processes(queue, processes, work / LOG)
    for job, result in (bar := tqdm(results, desc="jobs", total=len(jobs), disable=rank() != 0)):
        bar.set_postfix_str(job.name)
        yield job, result


class _Queue:
    def __init__(self, jobs: Sequence[Job]):
        self.left, self.unfinished = list(jobs), {job.name for job in jobs}

    def take(self) -> Job | None:
        """Return the first job that need not wait, or None."""
        job = next((job for job in self.left if self.unfinished.isdisjoint(job.after)), None)
        if job is not None:
            self.left.remove(job)
        return job

    def blocked(self) -> ValueError:
        return ValueError(f"jobs that wait for each other: {', '.join(job.name for job in self.left)}")


def _in_place(queue: _Queue) -> Iterator[tuple[Job, object]]:
    while queue.left:
        job = queue.take()
        if job is None:
            raise queue.blocked()
        yield job, job.call()
        queue.unfinished.remove(job.name)


def _in_processes(queue: _Queue, processes: int, log: Path) -> Iterator[tuple[Job, object]]:
    running: dict[Future, Job] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(log,)) as pool:
        while queue.left or running:
            while len(running) < processes and (job := queue.take()) is not None:
                running[pool.submit(job.call)] = job
            if not running:
                raise queue.blocked()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    names = ", ".join(job.name for job in running.values())
                    raise RuntimeError(f"a process died while these ran, see {log}: {names}") from error
                job = running.pop(future)
                queue.unfinished.remove(job.name)
                yield job, result


def _start(log: Path) -> None:
    torch.set_num_threads(1)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
