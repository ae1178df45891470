"""A training loop that several processes share and that a kill cannot hurt.

Every step's examples and random numbers follow from (seed, step, rank) alone, so a run that was interrupted and resumed
ends with the same weights as an unbroken one, unless the loss keeps a state of its own.
"""

from __future__ import annotations

import csv
import glob
import logging
import math
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from actvar.files import replacing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How long and how to train.

    Args:
        folder: where `<name>.checkpoint.pt` and the loss log `<name>.csv` live.
        steps, batch: optimizer steps, and examples per step over all processes together.
        lr: peak learning rate; linear warm-up over `warmup` steps, then a cosine to zero.
        muon: train the weight matrices of the transformer blocks with Muon (Jordan et al. 2024; torch >= 2.9), its
            updates scaled to the size of AdamW's, and the rest with AdamW. False: AdamW for all.
        checkpoint_seconds: time between checkpoints.
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
    muon: bool = False
    seed: int = 0
    bf16: bool = True
    checkpoint_seconds: float = 60.0

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.csv"

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
    """`torch.save` under a temporary name, then rename: a reader never sees half a file."""
    with replacing(path) as temporary:
        torch.save(payload, temporary)


def batch_indices(num_examples: int, step: int, batch: int, seed: int) -> torch.Tensor:
    """Indices `[batch / world_size]` of this process at `step`: a fresh permutation per pass over the data."""
    per_epoch = num_examples // batch
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
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
        ValueError: a batch that is larger than the data set or cannot be split evenly over the processes, or a
            checkpoint that is damaged or of another model; the model is unchanged.
    """
    if not 1 <= plan.batch <= num_examples or plan.batch % world_size():
        raise ValueError(
            f"batch: expected from 1 to the {num_examples} examples, a multiple of the {world_size()} processes, "
            f"got {plan.batch}"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(model, plan)
    start = _resume(model, optimizers, plan)
    parallel = DistributedDataParallel(model) if world_size() > 1 else model
    model.train()
    saved = time.monotonic()
    steps = range(start, plan.steps)
    bar = tqdm(steps, desc=plan.name, initial=start, total=plan.steps, disable=rank() != 0, mininterval=5)
    autocast = torch.autocast("cpu", torch.bfloat16) if plan.bf16 else nullcontext()
    for step in bar:
        torch.manual_seed(((plan.seed * 1_000_003) + step) * world_size() + rank())
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = plan.lr_at(step)
        with autocast:
            losses = loss_of(parallel, batch_indices(num_examples, step, plan.batch, plan.seed))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trainable, plan.clip)
        for optimizer in optimizers:
            optimizer.step()
        if after_step is not None:
            after_step(step)
        if rank() == 0:
            done = step + 1
            if done % 20 == 0 or done == plan.steps:
                values = {name: float(value.detach()) for name, value in losses.items()}
                _log(plan.log, done, values)
                bar.set_postfix(values, refresh=False)
            if time.monotonic() - saved > plan.checkpoint_seconds or done == plan.steps:
                states = [optimizer.state_dict() for optimizer in optimizers]
                state = {"step": done, "model": trained_tensors(model), "optimizers": states}
                save_atomically(state, plan.checkpoint)
                saved = time.monotonic()
    model.eval()


def _optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trainable.items() if plan.muon and p.ndim == 2 and name.startswith("blocks.")}
    rest = [p for name, p in trainable.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(rest, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)]
    if matrices:
        muon = torch.optim.Muon(
            matrices.values(), lr=plan.lr, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
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
        state = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: expected a training checkpoint, it cannot be read: {error}") from error
    kinds = {"step": int, "model": dict, "optimizers": list}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path}: expected a training checkpoint with {', '.join(kinds)}, found something else")
    return state


def _resume(model: nn.Module, optimizers: list[torch.optim.Optimizer], plan: Plan) -> int:
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
