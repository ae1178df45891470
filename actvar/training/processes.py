"""Run what several processes share: who they are, how they are started, and how Ctrl-C stops them all."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_rows(part: torch.Tensor) -> torch.Tensor:
    """The processes' parts, equally long and of a type that gloo knows, joined along the first axis in rank order."""
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


@contextmanager
def launched_processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if it did: by NCCL on GPUs, by gloo on CPUs.

    Yields this process's device: its own GPU where `device` is CUDA, else `device`.
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
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values / world_size()


@contextmanager
def stop_requests() -> Iterator[Callable[[torch.device], bool]]:
    """Let Ctrl-C and SIGTERM wait for a good moment: yields a function that says whether one of them came.

    The function is called by every process at the same point, with the device of the processes' messages, and tells
    all the same. A second signal acts at once. In a thread that cannot receive signals nothing is changed.
    """
    asked = threading.Event()

    def ask(number: int, _frame) -> None:
        asked.set()
        signal.signal(number, previous[number])

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
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
    """Run `worker(*args)` in `processes` processes of one thread each, joined by gloo; one process runs in place."""
    if processes == 1:
        worker(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process, args=(processes, port, worker, args), nprocs=processes, start_method="spawn"
    )


def _process(index: int, processes: int, port: int, worker: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=processes)
    try:
        worker(*args)
    finally:
        dist.destroy_process_group()
