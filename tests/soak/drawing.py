"""Many samples in one process."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress
from pathlib import Path

import torch

from actvar import load_pretrained
from actvar.sampling.request import Sampling
from actvar.sampling.shards import Bulk

MOST_GROWTH = 8 * 2**20
"""Bytes. The K/V cache of a batch has more; tensors that stay behind are counted apart."""


def run_samples(count: int, seed: int = 0, batch: int = 20, warm_up: int = 3) -> dict[str, int]:
    """`count` images of the bundled model, batches dense and with ActVAR in turn; after `warm_up` batches of each there
    are no more tensors, and memory stays as it is.

    Raises:
        AssertionError: there are, or the process has grown.
    """
    models = [load_pretrained("fashion-mnist", adapter)[1] for adapter in (None, "paper")]
    bulk = Bulk(Sampling(tuple(range(10)), seed=seed), count, batch)
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
