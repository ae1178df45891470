"""Processes that are killed at random moments, and what they leave: bulk sampling and evaluation."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from support.faults import small_model
from torch import nn
from tqdm import tqdm

from actvar import load_pretrained
from actvar.evaluate.methods import chosen_methods, methods_of
from actvar.evaluate.predictions import DensePredictions
from actvar.evaluate.quality import ImageQuality, real_images
from actvar.evaluate.run import Evaluation, evaluate
from actvar.sampling.request import Sampling
from actvar.sampling.shards import Bulk, sample_many
from actvar.utils.parts import Parts

IMPORTED_ONCE = [
    "actvar.sampling.shards",
    "actvar.evaluate.bundled",
    "actvar.evaluate.methods",
    "actvar.evaluate.run",
    "torch._dynamo",
]
"""By the process that all others are forked from; the last one is imported by torch when FLOPs are counted."""


def run_bulk_kills(count: int, seed: int = 0) -> dict[str, int]:
    """Kill bulk sampling `count` times; errors as in `_run_kills`."""
    bulk = Bulk(Sampling(tuple(range(10)), seed=seed), 40, 4)
    return _run_kills(count, seed, sample_bulk, bulk) | {"samples drawn": 2 * bulk.num}


def run_evaluation_kills(count: int, seed: int = 0) -> dict[str, int]:
    """Kill an evaluation of five ways to sample over two seeds `count` times; errors as in `_run_kills`."""
    return _run_kills(count, seed, evaluate_small_model, Evaluation(num=20, batch=10, seed=seed, repeats=2, rounds=0))


def sample_bulk(folder: Path, bulk: Bulk) -> None:
    sample_many(load_pretrained("fashion-mnist", "paper")[1], bulk, folder)


def evaluate_small_model(folder: Path, how: Evaluation) -> None:
    """Parts, and at last what they come to, in `folder`."""
    var, generator = small_model(), torch.Generator().manual_seed(0)
    images = torch.rand(30, 1, 4, 4, generator=generator)
    labels = torch.arange(4)
    maps = [torch.randint(var.V, (4, side * side), generator=generator) for side in var.patch_nums]
    dense = DensePredictions(var, [(labels, var.vae_proxy[0].quantize.teacher_input(maps))], how.cfg)
    network = _Pixels(16, var.num_classes, generator)
    quality = ImageQuality(network, real_images(network, images))
    methods = chosen_methods("dense,skip,unguided", methods_of())
    results = evaluate(var, methods, how, folder, quality, dense)
    Parts(folder).get("results", None, lambda _: [[r.name, r.quality, r.flops, r.divergences] for r in results])


class _Pixels(nn.Module):
    """A network whose features are the pixels."""

    def __init__(self, pixels: int, classes: int, generator: torch.Generator):
        super().__init__()
        self.classifier = nn.Linear(pixels, classes)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def _run_kills(count: int, seed: int, work: Callable, *arguments: object) -> dict[str, int]:
    """Kill `work(folder, *arguments)` `count` times at random moments and go on: no file is ever damaged, and in the
    end they are those of an unbroken run, bit for bit, with no temporary file beside them.

    Raises:
        AssertionError: they are not.
    """
    rng, kills = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        ended, seconds = _run(work, whole, *arguments)
        assert ended == 0
        expected = _files(whole)
        while kills < count:
            fresh = not broken.exists()
            ended, lasted = _run(work, broken, *arguments, kill_after=rng.uniform(0, seconds))
            assert ended in (0, -signal.SIGKILL)
            kills += ended != 0
            found = {name: data for name, data in _files(broken).items() if not name.startswith(".")}
            assert found.items() <= expected.items(), f"after kill {kills}"
            if ended == 0:  # it was through before it could be killed: begin again, with less time
                shutil.rmtree(broken)
                seconds = min(seconds, lasted) if fresh else seconds
        assert _run(work, broken, *arguments)[0] == 0
        assert _files(broken) == expected
        assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}
    return {"kills survived": kills}


def _run(work: Callable, *arguments: object, kill_after: float | None = None) -> tuple[int, float]:
    """Exit code and seconds of a process that works, forked from one that has imported what takes long."""
    start = time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    process = context.Process(target=_quietly, args=(work, *arguments))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, time.monotonic() - start


def _quietly(work: Callable, *arguments: object) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default one leaves a semaphore behind when its process is killed
    with redirect_stderr(StringIO()):  # no progress bar
        work(*arguments)


def _files(folder: Path) -> dict[str, bytes]:
    """Those of `folder` itself: a folder in it holds a part that is not finished."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}
