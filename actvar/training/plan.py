"""The settings of a training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from actvar.models.arguments import checked_finite, checked_integer
from actvar.training.processes import world_size
from actvar_kernels.checks import as_integer
from actvar_kernels.cpu_backend import cpu

SEEDS = range(-(2**31), 2**32)
"""Seeds of a training; the multiples of these for its steps and processes are still seeds for torch."""


@dataclass(frozen=True)
class Plan:
    """The settings of a training loop.

    Args:
        name: of the files.
        folder: of the checkpoint `<name>.checkpoint.pt` and the loss log `<name>.csv`.
        steps: optimizer steps.
        batch: examples per step over all processes.
        lr: peak learning rate; linear warm-up over `warmup` steps, then a cosine to zero.
        warmup: steps of the warm-up.
        weight_decay: of AdamW and Muon.
        betas: of AdamW.
        clip: largest norm of the gradient over all parameters.
        accumulate: parts, equally long, into which each process cuts its share of the batch to save memory.
        ema: decay of the exponential moving average of the weights, which the model ends with; 0 switches it off. The
            decay at step `i` is at most `(1 + i) / (10 + i)`.
        muon: train the weight matrices of the transformer blocks with Muon (`actvar.training.muon`), and the rest with
            AdamW. False: AdamW for all.
        seed: one of `SEEDS`, of the order of the examples and of every step's random numbers.
        bf16: compute in bfloat16 by autocast; by default where the processor has instructions for it.
        checkpoint_seconds: seconds between checkpoints.

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
        """Return the file of the checkpoint."""
        return self.folder / f"{self.name}.checkpoint.pt"

    @property
    def log(self) -> Path:
        """Return the CSV file of the losses."""
        return self.folder / f"{self.name}.csv"

    def check(self, num_examples: int) -> None:
        """Check that batches can be drawn from `num_examples` examples and cut into equal parts.

        Raises:
            ValueError: that is not so.
        """
        if not 1 <= self.batch <= num_examples or self.batch % (world_size() * self.accumulate):
            raise ValueError(
                f"batch: expected a multiple of {world_size()} processes x {self.accumulate} parts, from 1 to the "
                f"{num_examples} examples, got {self.batch}"
            )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
