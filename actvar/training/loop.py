"""A training loop that several processes share, that a kill cannot hurt and that Ctrl-C stops between two steps.

Every step's examples and random numbers follow from (seed, step, rank) alone, so a run that was interrupted and resumed
ends with the same weights as an unbroken one, unless the loss keeps a state of its own.
"""

from __future__ import annotations

import csv
import glob
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from actvar.models.arguments import checked_finite, checked_integer
from actvar.training.muon import Muon
from actvar.utils.files import replacing
from actvar_kernels.checks import as_integer
from actvar_kernels.cpu_backend import cpu

logger = logging.getLogger(__name__)

SEEDS = range(-(2**31), 2**32)
"""Seeds of a training: those of its steps and processes, which are multiples, are still seeds for torch."""


@dataclass(frozen=True)
class Plan:
    """How long and how to train.

    Args:
        folder: where `<name>.checkpoint.pt` and the loss log `<name>.csv` live.
        steps, batch: optimizer steps, and examples per step over all processes together.
        accumulate: parts, equally long, into which each process cuts its share of the batch to save memory.
        lr: peak learning rate; linear warm-up over `warmup` steps, then a cosine to zero.
        ema: decay of the exponential moving average of the weights, which the model ends with; 0 switches it off. At
            step `i` it is at most `(1 + i) / (10 + i)`.
        clip: largest norm of the gradient over all parameters.
        seed: one of `SEEDS`, of the order of the examples and of every step's random numbers.
        muon: train the weight matrices of the transformer blocks with Muon (`actvar.training.muon`), and the rest with
            AdamW. False: AdamW for all.
        bf16: compute in bfloat16 by autocast; by default where the processor has instructions for it.
        checkpoint_seconds: time between checkpoints.

    Numbers of any kind become Python's own.

    Raises:
        TypeError: an argument that is no number.
        ValueError: a number that is not finite, parts below 1, steps below 0, a seed outside `SEEDS`.
    """

    name: str
    folder: Path
    steps: int
    batch: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    muon: bool = False
    seed: int = 0
    bf16: bool = field(default_factory=cpu.multiplies_bfloat16)
    checkpoint_seconds: float = 60.0

    def __post_init__(self):
        for name, least in (("steps", 0), ("accumulate", 1), ("warmup", 0)):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), least))
        object.__setattr__(self, "batch", as_integer("batch", self.batch))
        object.__setattr__(self, "seed", checked_integer("seed", self.seed, SEEDS[0], SEEDS[-1]))
        for name in ("lr", "weight_decay", "clip", "ema", "checkpoint_seconds"):
            object.__setattr__(self, name, checked_finite(name, getattr(self, name)))

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.csv"

    def check(self, num_examples: int) -> None:
        """Raise a ValueError unless batches of so many examples can be cut into equal parts."""
        if not 1 <= self.batch <= num_examples or self.batch % (world_size() * self.accumulate):
            raise ValueError(
                f"batch: expected a multiple of {world_size()} processes x {self.accumulate} parts, from 1 to the "
                f"{num_examples} examples, got {self.batch}"
            )

    def lr_at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


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


def save_atomically(payload: object, path: Path) -> None:
    """`torch.save` under a temporary name, then rename: a reader never sees half a file.

    Raises:
        OSError: the file cannot be written; an older one is as it was.
    """
    with replacing(path) as temporary:
        try:
            torch.save(payload, temporary)
        except RuntimeError as error:  # as which torch reports a full disk
            raise OSError(f"{path}: cannot be written: {error}") from error


def batch_indices(num_examples: int, step: int, batch: int, seed: int) -> torch.Tensor:
    """Indices `[batch / world_size]` of this process at `step`: a fresh permutation per pass over the data."""
    per_epoch = num_examples // batch
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator("cpu").manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(num_examples, generator=generator, device="cpu")
    return order[position * batch : (position + 1) * batch][rank() :: world_size()]


def fit(
    model: nn.Module,
    loss_of: Callable[[nn.Module, torch.Tensor], dict[str, torch.Tensor]],
    plan: Plan,
    num_examples: int,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train `model` in place, resuming from the plan's checkpoint when there is one.

    Args:
        loss_of: maps (model, example indices) to named scalar losses; `"loss"` is minimised, all are logged.
        num_examples: size of the data set that indices point into.
        after_step: called with the step number after each optimizer step.

    Raises:
        ValueError: a batch that is larger than the data or cannot be cut into equal parts, or a checkpoint that is
            damaged or of another model; the model is unchanged.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the step was finished and a checkpoint written.
    """
    plan.check(num_examples)
    trainable = [p for p in model.parameters() if p.requires_grad]
    device = trainable[0].device
    optimizers = _optimizers(model, plan)
    average = [p.detach().clone() for p in trainable] if plan.ema else []
    start = _resume(model, optimizers, average, plan)
    parallel = DistributedDataParallel(model) if world_size() > 1 else model
    model.train()
    saved = time.monotonic()
    steps = range(start, plan.steps)
    bar = tqdm(steps, desc=plan.name, initial=start, total=plan.steps, disable=rank() != 0, mininterval=5)
    with stop_requests() as stop_requested:
        for step in bar:
            torch.manual_seed(((plan.seed * 1_000_003) + step) * world_size() + rank())
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = plan.lr_at(step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            losses = _accumulate_gradients(
                parallel, loss_of, plan, batch_indices(num_examples, step, plan.batch, plan.seed)
            )
            torch.nn.utils.clip_grad_norm_(trainable, plan.clip)
            for optimizer in optimizers:
                optimizer.step()
            if average:
                decay = min(plan.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(average, [p.detach() for p in trainable], 1 - decay)
            if after_step is not None:
                after_step(step)
            done = step + 1
            stopping = stop_requested(device)
            if done % 20 == 0 or done == plan.steps:
                means = mean_over_processes(torch.stack([value.float() for value in losses.values()])).tolist()
                values = dict(zip(losses, means, strict=True))
                if rank() == 0:
                    _log(plan.log, done, values)
                    bar.set_postfix(values, refresh=False)
            due = time.monotonic() - saved > plan.checkpoint_seconds or done == plan.steps
            if rank() == 0 and (due or stopping):
                states = [optimizer.state_dict() for optimizer in optimizers]
                state = {"step": done, "model": trained_tensors(model), "optimizers": states, "average": average}
                save_atomically(state, plan.checkpoint)
                saved = time.monotonic()
            if stopping and done < plan.steps:
                logger.info("%s: stopped after step %d of %d", plan.name, done, plan.steps)
                raise KeyboardInterrupt
    with torch.no_grad():
        for parameter, mean in zip(trainable, average, strict=False):
            parameter.copy_(mean)
    model.eval()


def _accumulate_gradients(
    parallel: nn.Module, loss_of: Callable, plan: Plan, indices: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over this process's share of the batch, averaged over processes with the last part;
    returns the losses."""
    parts = indices.chunk(plan.accumulate)
    device = next(parallel.parameters()).device
    means: dict[str, torch.Tensor] = {}
    for number, part in enumerate(parts, start=1):
        waits = number < len(parts) and isinstance(parallel, DistributedDataParallel)
        with parallel.no_sync() if waits else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16):
                losses = loss_of(parallel, part)
            (losses["loss"] / len(parts)).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / len(parts)
    return means


def _optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_blocks = ("blocks.", "var.blocks.")  # of a VAR, or of one within a stage of the distillation
    matrices = {name: p for name, p in trainable.items() if plan.muon and p.ndim == 2 and name.startswith(in_blocks)}
    rest = [p for name, p in trainable.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(rest, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)]
    if matrices:
        optimizers.append(Muon(matrices.values(), plan.lr, plan.weight_decay))
    return optimizers


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters that require a gradient, and buffers."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trainable | dict(model.named_buffers())


@torch.no_grad()
def load_trained(model: nn.Module, plan: Plan) -> dict:
    """Copy the tensors of the plan's checkpoint into `model`; returns the whole checkpoint.

    Raises:
        ValueError: the file is damaged, or of another model; `model` is unchanged.
    """
    state, tensors = _read_checkpoint(plan.checkpoint), trained_tensors(model)
    for name, tensor in tensors.items():
        found = state["model"].get(name)
        if not isinstance(found, torch.Tensor) or found.shape != tensor.shape:
            got = list(found.shape) if isinstance(found, torch.Tensor) else "none"
            raise ValueError(f"{plan.checkpoint}: {name}: expected a tensor of shape {list(tensor.shape)}, got {got}")
    for name, tensor in tensors.items():
        tensor.copy_(state["model"][name])
    return state


def _read_checkpoint(path: Path) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: expected a training checkpoint, it cannot be read: {error}") from error
    kinds = {"step": int, "model": dict, "optimizers": list}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path}: expected a training checkpoint with {', '.join(kinds)}, found something else")
    return state


def _resume(model: nn.Module, optimizers: list[torch.optim.Optimizer], average: list[torch.Tensor], plan: Plan) -> int:
    """Load the checkpoint if there is one; the step to go on from."""
    if rank() == 0:
        for left_behind in plan.folder.glob(f".{glob.escape(plan.name)}.*"):  # by a process that was killed
            left_behind.unlink(missing_ok=True)
    if not plan.checkpoint.exists():
        if rank() == 0:
            plan.log.unlink(missing_ok=True)
        return 0
    state = load_trained(model, plan)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for mean, saved in zip(average, state["average"], strict=True):
        mean.copy_(saved)
    if rank() == 0 and plan.log.exists():
        _shorten(plan.log, state["step"])
    logger.info("%s: resuming at step %d of %d", plan.name, state["step"], plan.steps)
    return state["step"]


def _shorten(log: Path, step: int) -> None:
    """Keep the header and the rows up to `step`; a row without its line end was being written when the process died."""
    with log.open(newline="") as file:
        header, *rows = [line for line in file if line.endswith("\n")] or [""]
    with replacing(log) as temporary, temporary.open("w", newline="") as file:
        file.writelines([header, *(row for row in rows if int(row.split(",")[0]) <= step)])


def _log(path: Path, step: int, values: dict[str, float]) -> None:
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", *values])
        writer.writerow([step, *(f"{value:.5g}" for value in values.values())])
