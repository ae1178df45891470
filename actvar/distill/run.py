"""One stage of the distillation from start to finish: token maps, training, the adapter file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actvar
from actvar.calibrate import calibrate
from actvar.config import ActVARConfig
from actvar.distill.data import GUIDANCE, Source, cached_tokens, digest, examples
from actvar.distill.recipes import RECIPES, Recipe
from actvar.distill.stage1 import Stage1
from actvar.distill.stage2 import Stage2
from actvar.families.conditions import Texts
from actvar.models.arguments import checked_finite, checked_integer
from actvar.patching.adapter import read_adapter, save_adapter
from actvar.patching.patch import load_adapter, patch_silently, unpatched
from actvar.training.loop import fit
from actvar.training.plan import SEEDS, Plan
from actvar.training.processes import barrier, rank
from actvar.utils.files import replacing
from actvar.utils.pictures import save_loss_plot

EPOCHS = {1: 2.0, 2: 10.0}
CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class Distillation:
    """Settings of a training.

    Args:
        stage: 1 trains selectors and routers, 2 attention, FFN and head.
        recipe: the paper's choices or others; a calibrated stage 1 ignores the fields below except `seed`.
        epochs: passes over the token maps; None for the paper's 2 and 10.
        batch: token maps per step, over all processes.
        lr: peak learning rate, after a warm-up over 2 % of the steps; None for the recipe's.
        accumulate, ema, clip, seed: see `actvar.training.plan.Plan`.
        bf16: compute in bfloat16 by autocast; weights stay float32.
        cfg: guidance strength of the loss `guided`.
        lora: rank of the low-rank changes that stage 2 trains in place of all weights; None: it trains the weights.

    Numbers of any kind become Python's own.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    stage: int
    recipe: Recipe = RECIPES["paper"]
    epochs: float | None = None
    batch: int = 256
    lr: float | None = None
    accumulate: int = 1
    bf16: bool = False
    ema: float = 0.0
    clip: float = 1.0
    seed: int = 0
    cfg: float = GUIDANCE
    lora: int | None = None

    def __post_init__(self):
        numbers = {
            "stage": checked_integer("stage", self.stage, 1, len(EPOCHS)),
            "batch": checked_integer("batch", self.batch, 1),
            "accumulate": checked_integer("accumulate", self.accumulate, 1),
            "seed": checked_integer("seed", self.seed, SEEDS[0], SEEDS[-1]),
            "epochs": None if self.epochs is None else checked_finite("epochs", self.epochs),
            "lr": None if self.lr is None else checked_finite("lr", self.lr),
            "clip": checked_finite("clip", self.clip),
            "cfg": checked_finite("cfg", self.cfg),
            "ema": checked_finite("ema", self.ema),
            "lora": None if self.lora is None else checked_integer("lora", self.lora, 1),
        }
        for name, number in numbers.items():
            object.__setattr__(self, name, number)
        for name in ("epochs", "lr", "clip"):
            if numbers[name] is not None and numbers[name] <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {numbers[name]}")
        if self.lora is not None and self.stage == 1:
            raise ValueError("lora: expected None with stage 1, which changes no weights; give it with stage 2")
        if self.cfg < 0:
            raise ValueError(f"cfg: expected a number from 0 on, got {self.cfg}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a number from 0 to below 1, got {self.ema}")

    def plan(self, examples: int, folder: Path) -> Plan:
        """Return the training plan.

        Args:
            examples: number of token maps.
            folder: of the plan's files.

        Raises:
            ValueError: fewer token maps than a batch, or no step at all.
        """
        epochs = EPOCHS[self.stage] if self.epochs is None else self.epochs
        steps = round(epochs * (examples // self.batch))
        if steps < 1:
            raise ValueError(
                f"epochs: expected a step or more, got {epochs} passes over {examples} token maps in batches of "
                f"{self.batch}"
            )
        return Plan(
            f"stage{self.stage}",
            folder,
            steps,
            self.batch,
            lr=self.recipe.lr(self.stage, self.batch, self.lora is not None) if self.lr is None else self.lr,
            warmup=max(1, steps // 50),
            clip=self.clip,
            accumulate=self.accumulate,
            ema=self.ema,
            muon=self.recipe.muon and self.stage == 2 and self.lora is None,
            seed=self.seed,
            bf16=self.bf16,
            checkpoint_seconds=300.0,
        )


def distill(
    var: Any,
    config: ActVARConfig,
    adapter: Path | None,
    source: Source,
    how: Distillation,
    out: Path,
) -> Path:
    """Train `var`, which ends patched, and write the adapter to `out`.

    Every process of a training calls this with the same arguments.

    Checkpoints, the losses as CSV and their plot go to a folder with the name of `out` and the suffix `.training`;
    token maps are kept beside this folder. After an interruption the same call resumes and ends with the same adapter.

    Args:
        var: the dense model, a VAR or an Infinity, in float32.
        config: rates and number of experts.
        adapter: file to start from; stage 2 needs one for rates below 1.
        source: of the token maps.
        how: the settings.
        out: file of the adapter.

    Returns:
        `out`.

    Raises:
        ValueError: arguments that do not fit each other, or that differ from those that the training in the folder
            began with.
        KeyboardInterrupt: Ctrl-C; a checkpoint is written.
    """
    if how.stage == 2 and adapter is None and config.is_sparse:
        raise ValueError("stage 2 trains the weights for given selectors and routers: give the adapter of stage 1")
    if how.stage == 1 and how.recipe.calibrated:
        return _calibrate(var, config, source, how, out)
    if "guided" in how.recipe.losses and config.guidance_until is not None:
        config = replace(config, guidance_strength=how.cfg)
    folder = out.with_suffix(".training")
    plan = how.plan(len(source.conditions), folder)
    plan.check(len(source.conditions))
    settings = {"stage": how.stage, "config": asdict(config), "adapter": adapter and str(adapter.resolve())}
    settings |= {**asdict(how), **source.facts, "examples": len(source.conditions), "model": digest(var.head.weight)}
    module = prepared(var, config, adapter, how)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _begin(folder / "settings.json", settings, resumes=plan.checkpoint.exists())
    barrier()
    with unpatched(var):
        tokens = cached_tokens(source, var, out.parent)

    def loss(model: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
        return model(*examples(var, source, tokens, index))

    try:
        fit(module, loss, plan, len(tokens))
    finally:
        if rank() == 0 and plan.log.exists():
            save_loss_plot(plan.log, plan.log.with_suffix(".png"))
    module.finish()
    if rank() == 0:
        names = {name: settings[name] and Path(settings[name]).name for name in ("adapter", "data")}
        facts = settings | names | {"steps": plan.steps, "lr": plan.lr, "actvar": actvar.__version__}
        save_adapter(var, out, facts, None if adapter is None else read_adapter(adapter).execution)
    barrier()
    return out


def _calibrate(var: Any, config: ActVARConfig, source: Source, how: Distillation, out: Path) -> Path:
    """Do stage 1 in closed form: every process fits the same adapter, and the first one writes the file."""
    texts = source.conditions if isinstance(source.conditions, Texts) else None
    calibrate(var, config, images=CALIBRATION_IMAGES, seed=how.seed, uniform=how.recipe.uniform, texts=texts)
    if rank() == 0:
        facts = {"stage": 1, "recipe": asdict(how.recipe), "images": CALIBRATION_IMAGES, "seed": how.seed}
        save_adapter(var, out, facts | {"model": digest(var.head.weight), "actvar": actvar.__version__})
    barrier()
    return out


def prepared(var: Any, config: ActVARConfig, adapter: Path | None, how: Distillation) -> Stage1 | Stage2:
    """Patch `var` and return the stage's trainable module.

    Args:
        var: the dense model.
        config: rates and number of experts.
        adapter: file to start from, or None.
        how: the settings.
    """
    patch_silently(var, config)
    if adapter is not None:
        load_adapter(var, adapter)
    return Stage1(var) if how.stage == 1 else Stage2(var, how.recipe.losses, how.cfg, how.lora)


def _begin(path: Path, settings: dict[str, object], resumes: bool) -> None:
    """Write the settings of a training to `path`, or check that a training which resumes has the same ones there."""
    settings = json.loads(json.dumps(settings))
    if not resumes:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
        return
    begun = json.loads(path.read_text())
    differing = [name for name in settings if begun.get(name) != settings[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path.parent} holds a training with {name} {begun.get(name)}, not {settings[name]}: go on with the same "
            "arguments, give another --out, or remove the folder"
        )
