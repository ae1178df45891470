"""Training in several processes: their ranks, their start, their messages, and how Ctrl-C stops them all."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def rank() -> int:
    """Return the number of this process, 0 without others."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_rows(part: torch.Tensor) -> torch.Tensor:
    """Return the parts of all processes, joined along the first axis in the order of the ranks.

    Args:
        part: of this process, `[n, ...]` of the same shape in all of them, of a dtype that gloo knows.
    """
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


@contextmanager
def launched_processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if any: by NCCL on GPUs, by gloo on CPUs.

    Args:
        device: to train on.

    Yields:
        This process's device: its own GPU where `device` is CUDA, otherwise `device`.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over all processes of `values`, which have the same shape in all of them."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values / world_size()


@contextmanager
def stop_requests() -> Iterator[Callable[[torch.device], bool]]:
    """Let Ctrl-C and SIGTERM wait for a good moment while the context is open.

    A second signal acts at once. In a thread that cannot receive signals nothing is changed.

    Yields:
        A function that returns whether a signal came to any process. All processes call it at the same point, with the
        device of their messages.
    """
    asked = threading.Event()

    def ask(number: int, _frame) -> None:
        asked.set()
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {int(number): signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if world_size() == 1:
            yield lambda _: asked.is_set()  # without waiting for a GPU
        else:
            yield (
                lambda device: (
                    mean_over_processes(torch.tensor([asked.is_set()], dtype=torch.float32, device=device)).item() > 0
                )
            )
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_in_processes(worker: Callable[..., None], processes: int, *args) -> None:
    """Run `worker(*args)` in `processes` processes of one thread each, joined by gloo; one process runs in place.

    Args:
        worker: a function that can be pickled.
        processes: number of processes.
        args: of the worker.
    """
    if processes == 1:
        worker(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_process, args=(processes, port, worker, args), nprocs=processes, start_method="spawn")


def _process(index: int, processes: int, port: int, worker: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=processes)
    try:
        worker(*args)
    finally:
        dist.destroy_process_group()
