"""The stages that rebuild the bundled model of texts, each resumable: tokenizer, transformer with its words."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from actvar.models.infinity import Infinity, InfinityTokenizer
from actvar.text.words import WordEncoder
from actvar.training.checkpoint import load_trained
from actvar.training.loop import fit
from actvar.training.plan import Plan
from actvar.training.processes import run_in_processes
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.fashion_mnist.features import FeatureNet, training_loss
from actvar.zoo.fashion_mnist_text import architecture
from actvar.zoo.pretrained import load_pretrained
from scripts.fashion_mnist_text.captions import vocabulary
from scripts.fashion_mnist_text.tokenizer import TokenizerTraining, start_from
from scripts.fashion_mnist_text.transformer import TextTraining

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Build:
    """Say where to read and write, and how many steps each stage takes.

    Args:
        data: folder of the four idx files.
        work: checkpoints, loss logs and features of the images.
        seed: seed of all stages.
    """

    data: Path
    work: Path
    seed: int = 0
    perceptual_steps: int = 160
    tokenizer_steps: int = 350
    transformer_steps: int = 2200

    @property
    def perceptual_plan(self) -> Plan:
        """Return the plan of the CNN that the tokenizer's perceptual loss uses."""
        return Plan("perceptual", self.work, self.perceptual_steps, batch=64, lr=2e-3, warmup=50, seed=self.seed)

    @property
    def tokenizer_plan(self) -> Plan:
        """Return the plan of the tokenizer."""
        how = dict(batch=32, lr=1e-3, warmup=50, weight_decay=0.0)
        return Plan("tokenizer", self.work, self.tokenizer_steps, **how, seed=self.seed)

    @property
    def transformer_plan(self) -> Plan:
        """Return the plan of the transformer and its words; of 40 images 16 are in pairs."""
        how = dict(batch=40, lr=2e-3, warmup=100, muon=True, ema=0.99)
        return Plan("transformer", self.work, self.transformer_steps, **how, seed=self.seed)


def finished(plan: Plan) -> bool:
    """Return whether a stage has taken all its steps."""
    return plan.checkpoint.exists() and torch.load(plan.checkpoint, weights_only=True)["step"] == plan.steps


def train_perceptual(build: Build) -> None:
    """Train the CNN of the perceptual loss, by another seed than that of the one FID is measured with."""
    images, labels = load_split(build.data, "train")
    torch.manual_seed(build.perceptual_plan.seed)
    network = FeatureNet()
    fit(
        network,
        lambda model, index: training_loss(model, images[index], labels[index]),
        build.perceptual_plan,
        len(images),
    )


def restored_perceptual(build: Build) -> FeatureNet:
    """Return the trained CNN of the perceptual loss, in eval mode."""
    network = FeatureNet()
    load_trained(network, build.perceptual_plan)
    return network.eval().requires_grad_(False)


def train_tokenizer(build: Build) -> None:
    """Train encoder, rounding to bits and decoder together, from the weights of the bundled autoencoder."""
    images, _ = load_split(build.data, "train")
    tokenizer, _ = architecture.build(build.seed)
    start_from(tokenizer, load_pretrained("fashion-mnist")[0])
    training = TokenizerTraining(tokenizer, restored_perceptual(build))
    fit(training, lambda model, index: model(images[index]), build.tokenizer_plan, len(images))


def restored_tokenizer(build: Build) -> InfinityTokenizer:
    """Return the trained tokenizer, in eval mode."""
    training = TokenizerTraining(architecture.build()[0], FeatureNet())
    load_trained(training, build.tokenizer_plan)
    return training.tokenizer.eval().requires_grad_(False)


def train_transformer(build: Build) -> None:
    """Train the transformer and the vectors of its words together; the tokenizer stays as it is."""
    images, labels = load_split(build.data, "train")
    infinity, words = new_transformer(build)
    fit(
        TextTraining(infinity, words, images, labels),
        lambda model, index: model(index),
        build.transformer_plan,
        len(images),
    )


def new_transformer(build: Build) -> tuple[Infinity, WordEncoder]:
    """Return a new transformer with the trained tokenizer, and new vectors of words."""
    tokenizer, infinity = architecture.build(build.seed)
    tokenizer.load_state_dict(restored_tokenizer(build).state_dict())
    words = WordEncoder(vocabulary(), infinity.text_channels)
    words.init_weights(torch.Generator().manual_seed(build.seed))
    return infinity, words


@torch.no_grad()
def restored_transformer(build: Build) -> tuple[Infinity, WordEncoder]:
    """Return the transformer and its words with the means of their weights over the last steps, in eval mode."""
    infinity, words = new_transformer(build)
    no_images, no_labels = torch.empty(0, 1, 32, 32), torch.empty(0, dtype=torch.int64)
    training = TextTraining(infinity, words, no_images, no_labels)
    means = load_trained(training, build.transformer_plan)["average"]
    for parameter, mean in zip(training.parameters(), means, strict=True):
        parameter.copy_(mean)
    training.eval().requires_grad_(False)
    return infinity, words


def train(build: Build, processes: int) -> None:
    """Run every stage that is not finished yet."""
    build.work.mkdir(parents=True, exist_ok=True)
    stages = [
        (train_perceptual, build.perceptual_plan),
        (train_tokenizer, build.tokenizer_plan),
        (train_transformer, build.transformer_plan),
    ]
    for stage, plan in stages:
        if not finished(plan):
            run_in_processes(stage, processes, build)
