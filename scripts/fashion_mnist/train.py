"""The stages that rebuild the bundled model, each resumable: features, autoencoder, transformer, decoder, adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from actvar.config import ActVARConfig
from actvar.distill import Stage1
from actvar.distill.data import GUIDANCE
from actvar.models import VQVAE
from actvar.patching.patch import patch_silently
from actvar.sampling.token_maps import drawn_token_maps
from actvar.training.checkpoint import load_trained, save_atomically
from actvar.training.loop import fit
from actvar.training.plan import Plan
from actvar.training.processes import all_gather_rows, rank, run_in_processes, world_size
from actvar.zoo.fashion_mnist import architecture
from actvar.zoo.fashion_mnist.data import CLASSES, load_split
from actvar.zoo.fashion_mnist.features import FeatureNet, training_loss
from actvar_kernels.cpu_backend import cpu
from scripts.fashion_mnist.adversarial import AdversarialTraining
from scripts.fashion_mnist.autoencoder import AutoencoderTraining, DecoderTraining

logger = logging.getLogger(__name__)

DRAWN, DRAWN_AT_ONCE, DRAWN_SEED = 10_000, 250, 1000
"""Token maps drawn for the decoder, and seeds that no measurement takes."""


@dataclass(frozen=True)
class Build:
    """Where to read and write, and how many steps each stage takes.

    Args:
        data: folder of the four idx files.
        work: checkpoints, loss logs and token maps.
    """

    data: Path
    work: Path
    seed: int = 0
    features_steps: int = 2000
    perceptual_steps: int = 1200
    autoencoder_steps: int = 2000
    decoder_steps: int = 1300
    transformer_steps: int = 4200
    finish_steps: int = 4000
    adversarial_steps: int = 2000
    stage1_steps: int = 500

    @property
    def features_plan(self) -> Plan:
        return Plan("features", self.work, self.features_steps, batch=128, lr=2e-3, seed=self.seed + 1)

    @property
    def perceptual_plan(self) -> Plan:
        return Plan("perceptual", self.work, self.perceptual_steps, batch=128, lr=2e-3, seed=self.seed)

    @property
    def autoencoder_plan(self) -> Plan:
        return Plan("autoencoder", self.work, self.autoencoder_steps, batch=64, lr=8e-4, weight_decay=0, seed=self.seed)

    @property
    def decoder_plan(self) -> Plan:
        return Plan(
            "decoder", self.work, self.decoder_steps, batch=64, lr=6e-4, warmup=50, weight_decay=0, seed=self.seed
        )

    @property
    def transformer_plan(self) -> Plan:
        return Plan("transformer", self.work, self.transformer_steps, batch=64, lr=1e-3, seed=self.seed)

    @property
    def finish_plan(self) -> Plan:
        return Plan("finish", self.work, self.finish_steps, batch=64, lr=8e-4, muon=True, seed=self.seed + 1)

    @property
    def adversarial_plan(self) -> Plan:
        how = dict(batch=64, lr=3e-4, warmup=50, weight_decay=0, betas=(0.0, 0.99), clip=10.0)
        return Plan("adversarial", self.work, self.adversarial_steps, **how, seed=self.seed)

    @property
    def stage1_plan(self) -> Plan:
        return Plan("stage1", self.work, self.stage1_steps, batch=64, lr=3e-3, warmup=50, seed=self.seed)

    @property
    def tokens(self) -> Path:
        return self.work / "tokens.pt"

    @property
    def drawn(self) -> Path:
        return self.work / "drawn.pt"


def finished(plan: Plan) -> bool:
    return plan.checkpoint.exists() and torch.load(plan.checkpoint, weights_only=True)["step"] == plan.steps


def restore(model: nn.Module, plan: Plan) -> nn.Module:
    """Load a stage's final weights into `model`; eval mode, no gradients."""
    load_trained(model.requires_grad_(True), plan)
    return model.eval().requires_grad_(False)


def train_features(build: Build) -> None:
    """The network that FID is measured with."""
    _train_classifier(build, build.features_plan)


def train_perceptual(build: Build) -> None:
    """The network of the decoder's perceptual loss: another seed, so that FID is not what the decoder is trained on."""
    _train_classifier(build, build.perceptual_plan)


def _train_classifier(build: Build, plan: Plan) -> None:
    images, labels = load_split(build.data, "train")
    torch.manual_seed(plan.seed)
    fit(FeatureNet(), lambda model, index: training_loss(model, images[index], labels[index]), plan, len(images))


def train_autoencoder(build: Build) -> None:
    images, _ = load_split(build.data, "train")
    vae, _ = architecture.build(build.seed)
    vae.requires_grad_(True)
    training = AutoencoderTraining(vae, images)
    fit(vae, training.loss, build.autoencoder_plan, len(images), after_step=training.restart_dead_codes)


@torch.no_grad()
def encode_tokens(build: Build) -> None:
    """Token maps of the training images, `[N, L]` int16, computed once, each process a part."""
    images, _ = load_split(build.data, "train")
    vae = restore(architecture.build()[0], build.autoencoder_plan)
    parts = []
    for batch in tqdm(images.tensor_split(world_size())[rank()].split(200), desc="tokens", disable=rank() != 0):
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu.multiplies_bfloat16()):
            features = vae.img_to_features(batch * 2 - 1)
        parts.append(torch.cat(vae.quantize.tokens(features.float()), dim=1).int())
    gathered = all_gather_rows(torch.cat(parts))
    if rank() == 0:
        save_atomically(gathered.to(torch.int16), build.tokens)


def split_scales(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[B, L]` token maps as one `[B, p * p]` int64 tensor per scale."""
    return tokens.long().split([p * p for p in architecture.PATCH_NUMS], dim=1)


def train_decoder(build: Build) -> None:
    """Sharpen the decoder; encoder, codebook and tokens stay as they are."""
    images, _ = load_split(build.data, "train")
    tokens = torch.load(build.tokens, weights_only=True)
    vae = restore(architecture.build()[0], build.autoencoder_plan)
    network = restore(FeatureNet(), build.perceptual_plan)
    fit(
        DecoderTraining(vae, network),
        lambda model, index: model(split_scales(tokens[index]), images[index]),
        build.decoder_plan,
        len(images),
    )


def restore_sharpened(build: Build) -> VQVAE:
    """Encoder and codebook of the first training, the decoder of `train_decoder`."""
    vae = restore(architecture.build()[0], build.autoencoder_plan)
    load_trained(DecoderTraining(vae, FeatureNet()), build.decoder_plan)
    return vae.requires_grad_(False)


def restore_autoencoder(build: Build) -> VQVAE:
    """The finished autoencoder: encoder and codebook of the first training, the decoder of the last."""
    vae = restore(architecture.build()[0], build.autoencoder_plan)
    load_trained(AdversarialTraining(vae, FeatureNet()), build.adversarial_plan)
    return vae.requires_grad_(False)


def train_transformer(build: Build) -> None:
    """Next-scale prediction; every token weighs the same."""
    _, var = architecture.build(build.seed)
    _train_next_scale(build, var, build.transformer_plan, lambda side: 1.0)


def finish_transformer(build: Build) -> None:
    """Go on from `train_transformer`; a scale weighs as its side, so that the few early tokens count for more."""
    _, var = architecture.build(build.seed)
    load_trained(var, build.transformer_plan)
    _train_next_scale(build, var, build.finish_plan, lambda side: 1 / side)


def _train_next_scale(build: Build, var: nn.Module, plan: Plan, weight_of_side: Callable[[int], float]) -> None:
    _, labels = load_split(build.data, "train")
    tokens = torch.load(build.tokens, weights_only=True)
    vae = restore(architecture.build()[0], build.autoencoder_plan)
    fit_next_scale(vae, var, tokens, labels, plan, weight_of_side)


def fit_next_scale(
    vae: VQVAE,
    var: nn.Module,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    plan: Plan,
    weight_of_side: Callable[[int], float],
) -> None:
    """Train `var` to predict token maps `[N, L]` of images of classes `[N]`, by their cross-entropy.

    Args:
        weight_of_side: weight of a token in a token map of that side.
    """
    weights = torch.cat([torch.full((side * side,), weight_of_side(side)) for side in architecture.PATCH_NUMS])
    weights = weights / weights.mean()

    def loss(model: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            inputs = vae.quantize.teacher_input(split_scales(tokens[index]))
        logits = model(labels[index], inputs)
        cross_entropy = F.cross_entropy(logits.transpose(1, 2), tokens[index].long(), reduction="none")
        last = architecture.PATCH_NUMS[-1] ** 2
        return {
            "loss": (weights * cross_entropy).mean(),
            "cross_entropy": cross_entropy.mean(),
            "last_scale": cross_entropy[:, -last:].mean(),
        }

    fit(var, loss, plan, len(tokens))


@torch.no_grad()
def draw_tokens(build: Build) -> None:
    """Token maps `[N, L]` int16 that the finished transformer draws with guidance, classes in turn."""
    vae, var = architecture.build()
    restore(vae, build.autoencoder_plan)
    restore(var, build.finish_plan)
    labels = (torch.arange(DRAWN) % var.num_classes).split(DRAWN_AT_ONCE)
    mine = [
        drawn_token_maps(var, labels[index], DRAWN_SEED + index, GUIDANCE)
        for index in tqdm(range(rank(), len(labels), world_size()), desc="drawn", disable=rank() != 0)
    ]
    # process by process; batches are multiples of the classes, so that the classes are in turn again
    gathered = all_gather_rows(torch.cat(mine).int())
    if rank() == 0:
        save_atomically(gathered.to(torch.int16), build.drawn)


def train_adversarial(build: Build) -> None:
    """Train the decoder on token maps of images and on drawn ones; the rest stays as it is."""
    network = restore(FeatureNet(), build.perceptual_plan)
    tokens, drawn = (torch.load(path, weights_only=True) for path in (build.tokens, build.drawn))
    fit_adversarial(restore_sharpened(build), network, tokens, drawn, build.data, build.adversarial_plan)


def fit_adversarial(
    vae: VQVAE, network: FeatureNet, tokens: torch.Tensor, drawn: torch.Tensor, data: Path, plan: Plan
) -> None:
    """`AdversarialTraining` of `vae` in place.

    Args:
        tokens: maps `[N, L]` of the training images in `data`.
        drawn: token maps, classes in turn.
    """
    images, labels = load_split(data, "train")

    def loss(model: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
        half = len(index) // 2
        seen, other = index[:half], index[half:]
        chosen = torch.randint(len(drawn), (half,))
        return model(
            split_scales(tokens[seen]),
            images[seen],
            labels[seen],
            split_scales(drawn[chosen]),
            chosen % len(CLASSES),
            images[other],
            labels[other],
        )

    fit(AdversarialTraining(vae, network), loss, plan, len(tokens))


def train_stage1(build: Build) -> None:
    """Selectors and routers of the paper's configuration, distilled from the dense model."""
    _, labels = load_split(build.data, "train")
    tokens = torch.load(build.tokens, weights_only=True)
    vae, var = architecture.build()
    restore(vae, build.autoencoder_plan)
    restore(var, build.finish_plan)
    patch_silently(var, ActVARConfig())

    def loss(model: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            inputs = vae.quantize.teacher_input(split_scales(tokens[index]))
        return model(labels[index], inputs, tokens[index])

    fit(Stage1(var), loss, build.stage1_plan, len(tokens))


def train(build: Build, processes: int) -> None:
    """Run every stage that is not finished yet."""
    build.work.mkdir(parents=True, exist_ok=True)
    for stage, plan in [
        (train_features, build.features_plan),
        (train_perceptual, build.perceptual_plan),
        (train_autoencoder, build.autoencoder_plan),
        (train_decoder, build.decoder_plan),
        (train_transformer, build.transformer_plan),
        (finish_transformer, build.finish_plan),
        (train_adversarial, build.adversarial_plan),
        (train_stage1, build.stage1_plan),
    ]:
        if plan == build.decoder_plan and not build.tokens.exists():
            run_in_processes(encode_tokens, processes, build)
        if plan == build.adversarial_plan and not build.drawn.exists():
            run_in_processes(draw_tokens, processes, build)
        if not finished(plan):
            run_in_processes(stage, processes, build)
