"""The bundled model of texts: it loads, draws what its prompts say, one garment or two, and is rebuilt by scripts."""

from __future__ import annotations

import random
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import write_idx

import actvar
from actvar.distill.data import examples
from actvar.models.infinity import InfinityTokenizer
from actvar.zoo import load_feature_network, load_pretrained, load_text_encoder
from actvar.zoo.checksums import checked
from actvar.zoo.fashion_mnist.data import CLASSES
from actvar.zoo.fashion_mnist_text.architecture import DRAW, SQUARE, WIDE, nearest_schedule
from actvar.zoo.fashion_mnist_text.prompts import NOUNS, PAIRS, schedule_of_prompts
from actvar.zoo.fashion_mnist_text.prompts import PROMPTS as ALONE
from actvar.zoo.pretrained import TEXT_MODEL, weights_folder
from scripts.fashion_mnist_text import presets
from scripts.fashion_mnist_text.captions import attributes, caption, caption_of_pair, vocabulary
from scripts.fashion_mnist_text.export import export
from scripts.fashion_mnist_text.train import Build, train
from scripts.fashion_mnist_text.transformer import corrupted

PROMPTS = ("a t-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag")
PROMPTS += ("an ankle boot",)
LOOKALIKES = {0, 2, 3, 4, 6}
"""Classes of clothes for the upper body, which the network that judges confuses most."""


@pytest.fixture(scope="module")
def model():
    return load_pretrained(TEXT_MODEL)


def drawn(infinity, prompts, schedule, seeds, **numbers) -> torch.Tensor:
    text, lengths = load_text_encoder()(prompts)
    return infinity.sample(text, lengths, schedule, g_seed=seeds, **DRAW | numbers)


def classes_of(images: torch.Tensor) -> torch.Tensor:
    return load_feature_network().logits(images.mean(dim=1, keepdim=True)).argmax(dim=1)


def test_it_loads_offline_as_tokenizer_and_infinity(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_args: pytest.fail("a bundled model must load offline"))
    tokenizer, infinity = load_pretrained(TEXT_MODEL)
    assert isinstance(tokenizer, InfinityTokenizer)
    assert infinity.vae_proxy[0] is tokenizer
    parameters = sum(p.numel() for p in infinity.parameters())
    assert 2e6 < parameters < 3e6
    assert load_text_encoder().words.shape[1] == infinity.text_channels


def test_what_ships_is_half_precision_and_small():
    files = list(weights_folder(TEXT_MODEL).glob("*.safetensors"))
    assert {file.stem for file in files} >= {"infinity", "tokenizer", "words"}
    assert sum(file.stat().st_size for file in files) < 8e6
    for name in ("infinity", "tokenizer", "words"):
        tensors = load_file(checked(weights_folder(TEXT_MODEL) / f"{name}.safetensors"))
        assert {t.dtype for t in tensors.values()} <= {torch.float16, torch.int64}


def test_a_garment_is_what_its_prompt_says(model):
    labels = torch.arange(len(PROMPTS)).repeat(6)
    images = drawn(model[1], [PROMPTS[label] for label in labels], SQUARE, list(range(len(labels))))
    assert images.shape == (60, 3, 32, 32)
    found = classes_of(images)
    alike = torch.tensor([a == b or {a, b} <= LOOKALIKES for a, b in zip(found.tolist(), labels.tolist(), strict=True)])
    assert (found == labels).float().mean() > 0.7
    assert alike.float().mean() > 0.85


def test_two_garments_are_side_by_side_in_the_order_of_the_prompt(model):
    pairs = [(8, 5), (1, 9), (9, 1), (5, 8), (3, 7), (7, 1)] * 4
    prompts = [f"{PROMPTS[left]} and {PROMPTS[right]}" for left, right in pairs]
    images = drawn(model[1], prompts, WIDE, list(range(len(pairs))))
    assert images.shape == (24, 3, 32, 64)
    labels = torch.tensor(pairs)
    found = torch.stack([classes_of(half) for half in images.chunk(2, dim=3)], dim=1)
    assert (found == labels).float().mean() > 0.7


def test_a_dark_garment_is_darker_than_a_bright_one(model):
    nouns = ["coat", "pullover", "bag", "t-shirt"]
    tones = [drawn(model[1], [f"a {tone} {noun}" for noun in nouns], SQUARE, 3) for tone in ("dark", "bright")]
    brightness = [images[images > 0.1].mean() for images in tones]
    assert brightness[1] > 1.3 * brightness[0]


def test_an_image_follows_from_its_prompt_and_seed(model):
    both = drawn(model[1], ["a bag", "a dress"], SQUARE, [4, 5])
    assert torch.equal(both, drawn(model[1], ["a bag", "a dress"], SQUARE, [4, 5]))
    assert torch.allclose(both[1:], drawn(model[1], ["a dress"], SQUARE, [5]), atol=1e-5)
    assert not torch.equal(both[:1], drawn(model[1], ["a bag"], SQUARE, [5]))


def test_the_patch_keeps_the_images_and_comes_off(model):
    _, infinity = model
    before = drawn(infinity, ["a sandal"], SQUARE, [0])
    actvar.accelerate(infinity)
    accelerated = drawn(infinity, ["a sandal"], SQUARE, [0])
    actvar.remove_patch(infinity)
    assert torch.equal(drawn(infinity, ["a sandal"], SQUARE, [0]), before)
    assert (accelerated - before).abs().mean() < 0.01
    _, lossless = load_pretrained(TEXT_MODEL, preset="lossless")
    assert torch.equal(drawn(lossless, ["a sandal"], SQUARE, [0]), accelerated)


def test_the_schedule_is_the_nearest_to_a_ratio():
    assert nearest_schedule(1.0) == SQUARE
    assert nearest_schedule(0.5) == WIDE
    assert [w for _, _, w in WIDE[1:]] == [2 * h for _, h, _ in WIDE[1:]]


def test_all_words_of_captions_are_known_and_tell_the_schedule_that_they_were_trained_with():
    encoder, rng = load_text_encoder(), random.Random(0)
    assert list(encoder.vocabulary) == vocabulary()
    for number in range(300):
        facts = [rng.choice((-1, 0, 1)) for _ in range(3)]
        alone, pair = caption(number % 10, facts, rng), caption_of_pair((number % 10, 3), (facts, facts), rng)
        encoder([alone, pair], 16)
        assert schedule_of_prompts([alone], encoder) == SQUARE
        assert schedule_of_prompts([pair], encoder) == WIDE
    assert len(NOUNS) == len(CLASSES)


def test_texts_to_fit_to_are_of_one_garment_or_of_every_pair():
    encoder = load_text_encoder()
    assert schedule_of_prompts(ALONE, encoder) == SQUARE
    assert schedule_of_prompts(PAIRS, encoder) == WIDE
    assert (len(set(ALONE)), len(set(PAIRS))) == (40, 100)
    kinds = {tuple(" ".join(part.split()[-1:]) for part in prompt.split(" and ")) for prompt in PAIRS}
    assert len(kinds) == 100


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a bag", "a horse"], "expected words among .*got 'horse'"),
        (["a bag", "a bag and a dress"], "one garment in each or two in each.*got 'a bag' and 'a bag and a dress'"),
        (["dark"], "expected a garment, or two that one of and, beside, next joins.*got 'dark'"),
        (["a bag a dress"], "expected a garment, or two that .*got 'a bag a dress'"),
        (["beside a bag"], "expected a garment, or two that .*got 'beside a bag'"),
        (["a bag and a dress and a coat"], "expected at most 2 parts"),
        ([" ".join(["dark"] * 16 + ["bag"])], "expected from 1 to 16 words, got 17"),
    ],
)
def test_prompts_that_no_image_was_trained_with_are_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        schedule_of_prompts(prompts, load_text_encoder())


def test_attributes_are_low_middling_and_high_within_a_class():
    generator = torch.Generator().manual_seed(0)
    shades = torch.rand(200, 1, 1, 1, generator=generator) * 0.5 + 0.3
    images = torch.zeros(200, 1, 32, 32)
    images[:, :, 8:24, 8:24] = shades
    found = attributes(images, torch.zeros(200, dtype=torch.int64))
    assert found.dtype == torch.int8
    order = found[shades.flatten().argsort(), 0].tolist()
    assert order == [-1] * 60 + [0] * 80 + [1] * 60
    assert (found[:, 1] == 0).all(), "all are equally wide"


def test_wrong_bits_change_what_is_to_be_predicted_at_later_scales_only(model, monkeypatch):
    tokenizer, infinity = model
    features = torch.randn(4, tokenizer.bits, 8, 8, generator=torch.Generator().manual_seed(0))
    bits = tokenizer.quantizer.bits_of(features, SQUARE)
    monkeypatch.setattr("scripts.fashion_mnist_text.transformer.MOST_WRONG", 0.0)
    inputs, wanted = corrupted(infinity, features, SQUARE)
    assert torch.equal(wanted, torch.cat([b.flatten(1, 2) for b in bits], dim=1).long())
    assert torch.allclose(inputs, infinity.teacher_input(bits), atol=1e-6)
    monkeypatch.setattr("scripts.fashion_mnist_text.transformer.MOST_WRONG", 1.0)
    torch.manual_seed(0)
    _, corrected = corrupted(infinity, features, SQUARE)
    assert torch.equal(corrected[:, 0], wanted[:, 0])
    assert not torch.equal(corrected[:, 1:], wanted[:, 1:])


@pytest.mark.slow
def test_the_scripts_rebuild_the_files(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (80, 28, 28), generator=generator, dtype=torch.uint8).numpy()
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", (torch.arange(80, dtype=torch.uint8) % 10).numpy())
    build = Build(tmp_path, tmp_path / "work", perceptual_steps=1, tokenizer_steps=2, transformer_steps=2)
    train(build, 1)
    export(build, tmp_path / "weights")
    names = {checked(path).stem for path in (tmp_path / "weights").glob("*.safetensors")}
    assert names == {"infinity", "tokenizer", "words"}
    actvar.load_infinity(tmp_path / "weights" / "infinity.safetensors", tmp_path / "weights" / "tokenizer.safetensors")


@pytest.mark.slow
def test_an_interrupted_preset_ends_as_one_that_was_not_and_ships_in_half_precision(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(presets, "SAMPLES", 32)
    monkeypatch.setattr(presets, "HOW", replace(presets.HOW, batch=8, epochs=1))
    folder, calls = tmp_path / "weights", []
    shutil.copytree(weights_folder(TEXT_MODEL), folder)

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return examples(*arguments)

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = presets.train_preset("fast", folder, tmp_path / "whole")
    monkeypatch.setattr("actvar.distill.run.examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        presets.train_preset("fast", folder, tmp_path / "cut")
    assert len(calls) == 2
    resumed = presets.train_preset("fast", folder, tmp_path / "cut")
    assert len(calls) == 4, "it goes on with the third step"
    expected, found = load_file(whole), load_file(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    presets.ship(resumed, folder)
    assert {tensor.dtype for tensor in load_file(checked(folder / resumed.name)).values()} & {torch.float16}
