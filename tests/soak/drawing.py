"""Many samples in one process, and many images by processes that are killed."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import random
import resource
import shutil
import signal
import tempfile
import threading
import time
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from tqdm import tqdm

from actvar import load_pretrained
from actvar.bulk import Bulk, sample_many
from actvar.compare import Sampling

CLASSES = Sampling(tuple(range(10)))
MOST_GROWTH = 8 * 2**20
"""Bytes. The K/V cache of a batch has more; tensors that stay behind are counted apart."""


def run_samples(count: int, seed: int = 0, batch: int = 20, warm_up: int = 3) -> dict[str, int]:
    """`count` images of the bundled model, batches dense and with ActVAR in turn; after `warm_up` batches of each there
    are no more tensors, and memory stays as it is.

    Raises:
        AssertionError: there are, or the process has grown.
    """
    models = [load_pretrained("fashion-mnist", adapter)[1] for adapter in (None, "paper")]
    bulk = Bulk(replace(CLASSES, seed=seed), count, batch)
    for var in models * warm_up:
        bulk.run(var, 0)
    tensors, memory = _tensors(), []
    for shard in range(bulk.shards):
        bulk.run(models[shard % 2], shard)
        memory.append(_resident_bytes())
    assert _tensors() <= tensors, f"{_tensors() - tensors} more tensors after {count} samples"
    half = len(memory) // 2
    grown = min(memory[half:]) - min(memory[:half])
    assert grown <= MOST_GROWTH, f"{grown} more bytes after {count} samples"
    return {"samples drawn": count}


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def _resident_bytes() -> int:
    """Without what the allocator keeps of memory that was freed, which comes and goes by itself."""
    with suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_bulk_kills(count: int, seed: int = 0) -> dict[str, int]:
    """Kill bulk sampling `count` times at random moments and go on: no shard is ever damaged, and in the end they are
    those of an unbroken run, bit for bit, with no temporary file beside them.

    Raises:
        AssertionError: they are not.
    """
    rng, kills = random.Random(seed), 0
    bulk = Bulk(replace(CLASSES, seed=seed), 40, 4)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        ended, seconds = _run(bulk, whole)
        assert ended == 0
        expected = _files(whole)
        while kills < count:
            fresh = not broken.exists()
            ended, lasted = _run(bulk, broken, kill_after=rng.uniform(0, seconds))
            assert ended in (0, -signal.SIGKILL)
            kills += ended != 0
            found = {name: data for name, data in _files(broken).items() if not name.startswith(".")}
            assert found.items() <= expected.items(), f"after kill {kills}"
            if ended == 0:  # it was through before it could be killed: begin again, with less time
                shutil.rmtree(broken)
                seconds = min(seconds, lasted) if fresh else seconds
        assert _run(bulk, broken)[0] == 0
        assert _files(broken) == expected
    return {"kills survived": kills, "samples drawn": 2 * bulk.num}


def _run(bulk: Bulk, folder: Path, kill_after: float | None = None) -> tuple[int, float]:
    """Exit code and seconds of a process that draws the images, forked from one that has imported torch already."""
    start = time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["actvar.bulk"])
    process = context.Process(target=_draw, args=(bulk, folder))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, time.monotonic() - start


def _draw(bulk: Bulk, folder: Path) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default one leaves a semaphore behind when its process is killed
    with redirect_stderr(StringIO()):  # no progress bar
        sample_many(load_pretrained("fashion-mnist", "paper")[1], bulk, folder)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}
