"""Prompts become vectors of words: known words alone, each with the part of the prompt that it is in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actvar.text.words import WordEncoder, load_words

WORDS = ("a", "and", "bag", "beside", "dark", "next", "sandal", "to")


@pytest.fixture
def encoder() -> WordEncoder:
    made = WordEncoder(WORDS, 8)
    made.init_weights(torch.Generator().manual_seed(0))
    return made.eval().requires_grad_(False)


def test_features_are_the_sum_of_a_words_vector_and_its_parts(encoder):
    text, lengths = encoder(["a bag and a sandal", "dark bag"])
    assert lengths == [5, 2]
    numbers = [WORDS.index(word) for word in ("a", "bag", "and", "a", "sandal", "dark", "bag")]
    assert torch.equal(text, encoder.words[numbers] + encoder.parts[[0, 0, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("joint", ["and", "beside", "next to"])
def test_which_garment_comes_first_makes_a_difference(encoder, joint):
    first, _ = encoder([f"bag {joint} sandal"])
    second, _ = encoder([f"sandal {joint} bag"])
    assert not torch.equal(first[0], second[-1]), "a word in the first part has other features than in the second"


def test_case_and_punctuation_do_not_matter(encoder):
    assert torch.equal(encoder(["A dark, bag."])[0], encoder(["a dark bag"])[0])


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (
            ["a dark horse"],
            ValueError,
            "expected words among a, and, bag, beside, dark, next, sandal, to; got 'horse' in 'a dark horse'",
        ),
        ([" ,. "], ValueError, "expected from 1 to 6 words, got 0"),
        (["a bag " * 4], ValueError, "expected from 1 to 6 words, got 8"),
        (["bag and sandal and bag"], ValueError, "at most 2 parts, which and, beside, next join, got 3"),
        (["a bag", "and a \udcff"], ValueError, "expected words among"),
        ("a bag", TypeError, "prompts: expected a sequence of strings, got 'a bag'"),
        ([3], TypeError, "prompts: expected a sequence of strings"),
        ([], ValueError, "prompts: expected one or more, got none"),
    ],
)
def test_other_prompts_are_refused(encoder, prompts, error, message):
    with pytest.raises(error, match=message):
        encoder(prompts, most_tokens=6)


def test_a_file_has_the_words_and_their_vectors_rounded_to_half_precision(encoder, tmp_path: Path):
    encoder.save(tmp_path / "words.safetensors")
    loaded = load_words(tmp_path / "words.safetensors")
    assert loaded.vocabulary == WORDS
    assert torch.equal(loaded.words, encoder.words.half().float())
    assert torch.equal(loaded.parts, encoder.parts.half().float())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (tmp_path / "words.safetensors").stat().st_size < 1000


def test_vectors_are_trained_where_gradients_are_wanted():
    encoder = WordEncoder(WORDS, 8)
    encoder.init_weights(torch.Generator().manual_seed(0))
    encoder(["dark bag"])[0].sum().backward()
    assert encoder.words.grad is not None
    assert encoder.words.grad.count_nonzero() == 2 * 8
