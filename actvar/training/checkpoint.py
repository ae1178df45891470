"""Save the state of a training whole or not at all, and resume from it."""

from __future__ import annotations

import csv
import glob
import logging
from pathlib import Path

import torch
from torch import nn

from actvar.training.plan import Plan
from actvar.training.processes import rank
from actvar.utils.files import replacing

logger = logging.getLogger(__name__)


def save_atomically(payload: object, path: Path) -> None:
    """Save with `torch.save` under a temporary name, then rename, so that a reader never sees half a file.

    Args:
        payload: the value.
        path: the file.

    Raises:
        OSError: the file cannot be written; an older one is unchanged.
    """
    with replacing(path) as temporary:
        try:
            torch.save(payload, temporary)
        except RuntimeError as error:  # torch reports a full disk so
            raise OSError(f"{path}: cannot be written: {error}") from error


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that training changes, by name: parameters that require a gradient, and buffers."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trainable | dict(model.named_buffers())


@torch.no_grad()
def load_trained(model: nn.Module, plan: Plan) -> dict:
    """Copy the tensors of the plan's checkpoint into `model`, and return the whole checkpoint.

    Args:
        model: with the trainable parameters and buffers of the checkpoint.
        plan: of the training.

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


def resume(model: nn.Module, optimizers: list[torch.optim.Optimizer], average: list[torch.Tensor], plan: Plan) -> int:
    """Load the checkpoint if there is one, and return the number of steps that are done.

    Args:
        model: to train.
        optimizers: of the model.
        average: means of the trainable parameters, or an empty list.
        plan: of the training.
    """
    if rank() == 0:
        for left_behind in plan.folder.glob(f".{glob.escape(plan.name)}.*"):  # from a killed process
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
    """Keep the header and the rows up to `step`, and remove a row whose line end is missing."""
    with log.open(newline="") as file:
        # A process that died while it wrote a row leaves no line end.
        header, *rows = [line for line in file if line.endswith("\n")] or [""]
    with replacing(log) as temporary, temporary.open("w", newline="") as file:
        file.writelines([header, *(row for row in rows if int(row.split(",")[0]) <= step)])


def append_row(path: Path, step: int, values: dict[str, float]) -> None:
    """Append the `values` of a step to the CSV file `path`, which a new file begins with their names."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", *values])
        writer.writerow([step, *(f"{value:.5g}" for value in values.values())])
