"""Make faults on purpose: killed training, full disks, threads, leaks; interruptions are in `interruptions.py`.

Every `run_...` returns counts and raises AssertionError where a promise is broken. The tests run
few rounds, a soak many.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import actvar
from actvar import ActVARConfig
from actvar.config import KV_MODES
from actvar.families.var import VARFamily
from actvar.models import VAR, build_vae_var
from actvar.patching.adapter import gate_parameters
from actvar.patching.patch import patch_silently
from actvar.sparse.block_state import set_order_and_gates
from actvar.training.checkpoint import save_atomically
from actvar.training.loop import fit
from actvar.training.plan import Plan
from actvar.utils.files import replacing
from actvar.utils.low_rank import Factors, merged
from actvar.utils.pictures import save_grid
from actvar.utils.weight_override import replace_parameters
from actvar_kernels.cpu_backend import packing

CONFIG = ActVARConfig(num_experts=8)


def small_model(seed: int = 0) -> VAR:
    """Return two blocks of width 64 and three scales, with random weights of such a size that every branch matters."""
    vae, var = build_vae_var(
        V=32, Cvae=4, ch=32, patch_nums=(1, 2, 4), num_classes=5, depth=2, width=64, ch_mult=(1,), num_res_blocks=1,
        image_channels=1, share_quant_resi=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*vae.parameters(), *var.parameters()):
        size = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size**-0.5)
    return var.requires_grad_(False)


def random_factors(shape: torch.Size, generator: torch.Generator, rank: int = 3) -> Factors:
    """Return random factors of a change of a matrix."""
    outputs, inputs = shape
    A, B = (torch.randn(size, generator=generator) / size[-1] ** 0.5 for size in ((rank, inputs), (outputs, rank)))
    return Factors(A, B)


def save_whole_adapter(path: Path, seed: int = 0) -> Path:
    """Save an adapter of the small model under `CONFIG`: random gates, hidden orders, some changed weights.

    For an odd `seed` its matrices are changed by low-rank factors.
    """
    var, generator = small_model(), torch.Generator().manual_seed(seed)
    patch_silently(var, CONFIG)
    for index, block in enumerate(var.blocks):
        gates = gate_parameters(var).items()
        values = {p: torch.randn(p.shape, generator=generator) for name, p in gates if f"blocks.{index}" in name}
        set_order_and_gates(block, torch.randperm(block.ffn.fc1.out_features, generator=generator), values)
    own = {name: var.get_parameter(name) for name in ("head.weight", *VARFamily().finetuned_names(var)[seed::2])}
    tuned = {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in own.items()}
    matrices = [name for name, weight in own.items() if weight.ndim == 2 and seed % 2]
    factors = {name: random_factors(own[name].shape, generator) for name in matrices}
    tuned |= {name: merged(own[name], pair) for name, pair in factors.items()}
    replace_parameters(var, {name: nn.Parameter(weight) for name, weight in tuned.items()}, factors)
    actvar.save_adapter(var, path)
    return path


def draw(var: nn.Module, seed: int = 0) -> torch.Tensor:
    return var.autoregressive_infer_cfg(2, torch.tensor([1, -1]), g_seed=seed, top_k=20, top_p=0.95)


def state_of(module: nn.Module) -> dict[str, tuple]:
    """Return classes, attributes and values of every submodule, to compare before and after."""
    return {
        name: (type(part), sorted(part.__dict__), list(part._modules), copy.deepcopy(part.__dict__.get("_parameters")))
        for name, part in module.named_modules()
    }


def expect_same_state(module: nn.Module, before: dict[str, tuple]) -> None:
    after = state_of(module)
    assert after.keys() == before.keys(), sorted(after.keys() ^ before.keys())
    for name, (kind, attributes, children, parameters) in before.items():
        assert after[name][:3] == (kind, attributes, children), name
        for key, value in parameters.items():
            assert (value is None) == (after[name][3][key] is None), f"{name}.{key}"
            assert value is None or torch.equal(value, after[name][3][key]), f"{name}.{key}"


def expect_free(var: nn.Module) -> None:
    """Check that no block holds keys, values or anything else that belongs to a sample."""
    for block in var.blocks:
        assert not block.attn.caching
        assert block.attn.cached_k is None
        assert block.attn.cached_v is None
        if hasattr(block, "actvar"):
            assert block.actvar.cache.state is None
            assert block.actvar.cache.version is None


# Training that is killed

STEPS, EXAMPLES = 40, 32


def _train(folder: Path, seconds_a_step: float) -> None:
    """Train a small network with noise, and save its state after every step."""
    net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    data = torch.randn(EXAMPLES, 6, generator=generator)

    def loss(model: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
        noise = torch.randn(len(index), 1)
        return {"loss": (model(data[index]) - data[index].sum(1, keepdim=True) - 0.1 * noise).square().mean()}

    plan = Plan("net", folder, STEPS, batch=8, lr=0.05, warmup=4, bf16=False, checkpoint_seconds=0)
    fit(net, loss, plan, EXAMPLES, after_step=lambda _: time.sleep(seconds_a_step))


def run_kills(count: int, seed: int = 0) -> dict[str, int]:
    """Kill a training `count` times at random moments, and resume it every time.

    Weights, optimizer and log are those of an unbroken run, bit for bit, and no temporary file is left.
    """
    rng, kills, starts = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        whole.mkdir()
        broken.mkdir()
        _train(whole, 0)
        expected = torch.load(whole / "net.checkpoint.pt", weights_only=True)
        worker = _TrainingProcess(broken)
        try:
            while kills < count:
                worker.start()
                starts += 1
                time.sleep(rng.uniform(0, 0.25))
                kills += worker.kill()
                if not worker.finished():
                    continue
                for file in broken.iterdir():  # it was through before it could be killed: begin again
                    file.unlink()
            worker.start()
            worker.wait()
        finally:
            worker.close()
        found = torch.load(broken / "net.checkpoint.pt", weights_only=True)
        assert found["step"] == STEPS
        for name, value in expected["model"].items():
            assert torch.equal(found["model"][name], value), name
        for name, value in expected["optimizers"][0]["state"].items():
            assert all(torch.equal(found["optimizers"][0]["state"][name][key], value[key]) for key in value)
        assert (broken / "net.csv").read_bytes() == (whole / "net.csv").read_bytes()
        assert sorted(f.name for f in broken.iterdir()) == ["net.checkpoint.pt", "net.csv"]
    return {"kills survived": kills, "starts": starts}


class _TrainingProcess:
    """Fork a training on request from a process that has imported torch once, so that a round takes no seconds."""

    CODE = (
        "import os, sys, signal; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from support import faults\n"
        "for line in sys.stdin:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        faults._train(Path(sys.argv[2]), 0.005)\n"
        "        os._exit(0)\n"
        "    print(child, flush=True)\n"
        "    print(os.waitpid(child, 0)[1], flush=True)\n"
    )

    def __init__(self, folder: Path):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(Path(__file__).parents[1]), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def start(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.child = int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())

    def kill(self) -> bool:
        """Kill the training; return whether it was still at work."""
        os.kill(self.child, signal.SIGKILL)
        return self.wait() == signal.SIGKILL

    def finished(self) -> bool:
        checkpoint = self.folder / "net.checkpoint.pt"
        return checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] == STEPS

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# Files


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file of this process grow beyond `room` bytes: writes fail in the kernel, whoever makes them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def writers(var: nn.Module) -> dict[str, Callable[[Path], object]]:
    """Return all that the package writes, by the file's name; `var` is patched."""

    def text(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text("x" * 100_000)

    images = torch.rand(60, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    return {
        "adapter.safetensors": lambda path: actvar.save_adapter(var, path),
        "training.pt": lambda path: save_atomically(var.state_dict(), path),
        "report.json": text,
        "grid.png": lambda path: save_grid(images, path, 10),
    }


def run_full_disk() -> dict[str, int]:
    """Run every writer of files on a disk that is full at once or after some bytes.

    Every write gives an error and leaves the old file, and no other file is there.
    """
    var, failures = small_model(), 0
    patch_silently(var, CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        for name, write in writers(var).items():
            path = Path(folder) / name
            write(path)
            before = path.read_bytes()
            for room in (0, 1, len(before) // 2, len(before) - 1):
                try:
                    with full_disk(room):
                        write(path)
                except OSError:
                    failures += 1
                else:
                    raise AssertionError(f"{name} was written on a disk with room for {room} of {len(before)} bytes")
                assert path.read_bytes() == before, name
                assert sorted(os.listdir(folder)) == sorted({name, *os.listdir(folder)} & set(writers(var))), name
    return {"failed writes": failures}


# Threads


def run_threads(rounds: int, seed: int = 0) -> dict[str, int]:
    """Sample from two patched models in two threads at once; the images are those of one after the other."""
    models = [small_model(0), small_model(1)]
    for var, kv in zip(models, KV_MODES, strict=True):
        patch_silently(var, ActVARConfig(num_experts=8, kv=kv))
    expected = [[draw(var, seed + i) for i in range(rounds)] for var in models]
    found: list[list[torch.Tensor]] = [[], []]
    together = threading.Barrier(2)

    def work(number: int) -> None:
        together.wait()
        found[number] = [draw(models[number], seed + i) for i in range(rounds)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) == rounds, "a thread failed"
        assert all(map(torch.equal, mine, theirs))
    return {"samples in two threads": 2 * rounds}


# Leaks


def run_patching(count: int, most_growth: int = 16 * 2**20) -> dict[str, int]:
    """Patch, load an adapter, sample now and then, and unpatch `count` times: nothing changes and nothing is left.

    The adapter has an order and changed weights. The model is bit for bit the same. There are no more objects, packed
    weights or classes than before, and memory stays as it is.
    """
    var = small_model()
    before, image = state_of(var), draw(var)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)

    def round(number: int, path: Path) -> None:
        patch_silently(var, ActVARConfig(num_experts=(4, 8)[number % 2], kv=KV_MODES[number // 2 % 2]))
        if number % 2 and number % 3:
            actvar.load_adapter(var, path)
        if number % 10 in (0, 5):
            draw(var)
        actvar.remove_patch(var)

    with tempfile.TemporaryDirectory() as folder:
        path = save_whole_adapter(Path(folder) / "adapter.safetensors")
        for number in range(20):
            round(number, path)
        objects, packed, memory = _objects(), len(packing._cache), _memory()
        for number in range(count):
            round(number, path)
    logging.disable(level)
    assert _objects() <= objects, f"{_objects() - objects} more objects after {count} patches"
    assert len(packing._cache) <= packed
    grown = _memory() - memory
    assert grown <= most_growth, f"{grown} more bytes after {count} patches"
    expect_same_state(var, before)
    assert torch.equal(draw(var), image)
    return {"patches": count, "leaks": 0}


def _objects() -> int:
    """Count the tensors, modules and classes that are alive."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor | nn.Module | type) for thing in gc.get_objects())


def _memory() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
