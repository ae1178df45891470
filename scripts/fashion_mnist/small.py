"""The small model: the same autoencoder and token maps, a transformer with a third of the parameters."""

from __future__ import annotations

from pathlib import Path

from actvar.distill.data import cached_tokens, fashion_mnist_source
from actvar.training.plan import Plan
from actvar.zoo.checksums import save_checksums
from actvar.zoo.fashion_mnist import architecture
from actvar.zoo.pretrained import load_pretrained
from scripts.fashion_mnist.export import save_half
from scripts.fashion_mnist.train import finished, fit_next_scale, restore

STEPS = 1300


def small_plan(work: Path, seed: int, steps: int = STEPS) -> Plan:
    return Plan("small", work, steps, batch=64, lr=2e-3, muon=True, seed=seed)


def train_small(data: Path, plan: Plan) -> None:
    """Train the small transformer on token maps of the shipped autoencoder, which are kept in the plan's folder;
    resumes, like the stages before it.

    Args:
        data: folder of the four idx files.
    """
    if finished(plan):
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    vae, _ = load_pretrained("fashion-mnist")
    _, var = architecture.build(plan.seed, **architecture.SMALL)
    source = fashion_mnist_source(data, vae)
    tokens = cached_tokens(source, var, plan.folder)
    fit_next_scale(vae, var, tokens, source.conditions, plan, lambda side: 1 / side)


def export_small(plan: Plan, folder: Path) -> None:
    """Write the trained transformer to `folder/var.safetensors` in float16, and the table of its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    save_half(restore(architecture.build(**architecture.SMALL)[1], plan), folder / "var.safetensors")
    save_checksums(folder)
