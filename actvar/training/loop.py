"""A training loop that several processes share, that a kill cannot hurt and that Ctrl-C stops between two steps.

Every step's examples and random numbers follow from (seed, step, rank) alone. Therefore an interrupted and resumed
run ends with the same weights as an unbroken one, unless the loss keeps a state of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from actvar.families import blocks_of
from actvar.training.checkpoint import append_row, resume, save_atomically, trained_tensors
from actvar.training.muon import Muon
from actvar.training.plan import Plan
from actvar.training.processes import mean_over_processes, rank, stop_requests, world_size
from actvar.utils.progress import progress

logger = logging.getLogger(__name__)


def batch_indices(num_examples: int, step: int, batch: int, seed: int) -> torch.Tensor:
    """Return the indices `[batch / world_size]` int64 of this process at `step`, from a new permutation per pass.

    Args:
        num_examples: size of the data set.
        step: number of the step.
        batch: examples per step over all processes.
        seed: of the permutations.
    """
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
        model: has its trainable parameters on one device.
        loss_of: returns named scalar losses of the model and of example indices, `[n]` int64; `"loss"` is minimised,
            and all are logged.
        plan: of the training.
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
    start = resume(model, optimizers, average, plan)
    parallel = DistributedDataParallel(model) if world_size() > 1 else model
    model.train()
    saved = time.monotonic()
    steps = range(start, plan.steps)
    bar = progress(steps, desc=plan.name, initial=start, total=plan.steps, hidden=rank() != 0, mininterval=5)
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
                # torch has no public name for this call on many tensors at once.
                weights = [p.detach() for p in trainable]
                torch._foreach_lerp_(average, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
            if after_step is not None:
                after_step(step)
            done = step + 1
            stopping = stop_requested(device)
            if done % 20 == 0 or done == plan.steps:
                means = mean_over_processes(torch.stack([value.float() for value in losses.values()])).tolist()
                values = dict(zip(losses, means, strict=True))
                if rank() == 0:
                    append_row(plan.log, done, values)
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
    """Add up gradients over this process's share of the batch, and return the mean losses.

    Gradients are averaged over the processes with the last part.
    """
    parts = indices.chunk(plan.accumulate)
    device = next(parallel.parameters()).device
    means: dict[str, torch.Tensor] = {}
    for number, part in enumerate(parts, start=1):
        is_last = number == len(parts)
        is_shared = isinstance(parallel, DistributedDataParallel)
        with parallel.no_sync() if is_shared and not is_last else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16):
                losses = loss_of(parallel, part)
            (losses["loss"] / len(parts)).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / len(parts)
    return means


def _optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    # A stage of the distillation has its model at `var`.
    blocks = blocks_of(getattr(model, "var", model)) if plan.muon else []
    inside = {p for block in blocks for p in block.parameters()}
    matrices = [p for p in trainable if p.ndim == 2 and p in inside]
    rest = [p for p in trainable if p.ndim != 2 or p not in inside]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay)
    ]
    if matrices:
        optimizers.append(Muon(matrices, plan.lr, plan.weight_decay))
    return optimizers
