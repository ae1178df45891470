"""Encode prompts by trained vectors of words, for models that know few of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from actvar.text.encoder import MOST_TOKENS
from actvar.utils.files import replacing

JOINING = ("and", "beside", "next")
"""Words that begin the next part of a prompt, such as the second garment of `a bag and a sandal`."""
_VOCABULARY, _WORD = "vocabulary", re.compile(r"[^\s,.;:!?]+")


class WordEncoder(nn.Module):
    """Encode prompts as the sum of two vectors for each word: that of the word, and that of its part of the prompt.

    It is called as a `TextEncoder` is. Its vectors are parameters, which are trained together with a transformer.

    Args:
        vocabulary: the words that it knows, in lower case.
        channels: size of the vectors.
        parts: number of parts that a prompt may have.
    """

    name = "the model's own words"

    def __init__(self, vocabulary: Sequence[str], channels: int, parts: int = 2):
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.numbers = {word: number for number, word in enumerate(self.vocabulary)}
        self.words = nn.Parameter(torch.empty(len(self.vocabulary), channels))
        self.parts = nn.Parameter(torch.empty(parts, channels))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all vectors from `generator`, those of parts half as long."""
        self.words.normal_(generator=generator)
        self.parts.normal_(std=0.5, generator=generator)

    def forward(self, prompts: Sequence[str], most_tokens: int = MOST_TOKENS) -> tuple[torch.Tensor, list[int]]:
        """Return the features of all prompts behind each other, `[sum of lengths, channels]`, and the words of each.

        Args:
            prompts: one text or more.
            most_tokens: words that a prompt may have.

        Raises:
            TypeError: prompts that are no sequence of strings.
            ValueError: no prompt, or one without words, with too many words or parts, or with an unknown word; the
                message lists the known words.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts: expected a sequence of strings, got {prompts!r:.100}")
        if not prompts:
            raise ValueError("prompts: expected one or more, got none")
        texts = [self.words_of(prompt, most_tokens) for prompt in prompts]
        numbers = [self.numbers[word] for words in texts for word in words]
        parts = [part for words in texts for part in parts_of(words)]
        return self.words[numbers] + self.parts[parts], [len(words) for words in texts]

    def words_of(self, prompt: str, most_tokens: int) -> list[str]:
        """Return the known words of a prompt, without punctuation; errors are those of a call."""
        words = _WORD.findall(prompt.lower())
        unknown = [word for word in words if word not in self.numbers]
        if unknown:
            known = ", ".join(self.vocabulary)
            raise ValueError(f"prompt: expected words among {known}; got {unknown[0]!r:.60} in {prompt!r:.100}")
        if not 1 <= len(words) <= most_tokens:
            raise ValueError(f"prompt: expected from 1 to {most_tokens} words, got {len(words)} in {prompt!r:.100}")
        parts = parts_of(words)[-1] + 1
        if parts > len(self.parts):
            raise ValueError(
                f"prompt: expected at most {len(self.parts)} parts, which {', '.join(JOINING)} join, got {parts} in "
                f"{prompt!r:.100}"
            )
        return words

    def save(self, path: Path) -> None:
        """Write the vectors in float16, with the words."""
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {_VOCABULARY: json.dumps(self.vocabulary)})


def load_words(path: Path, device: str | torch.device = "cpu") -> WordEncoder:
    """Return the encoder of a file that `WordEncoder.save` wrote, in float32, eval mode and without gradients."""
    with safe_open(path, "pt") as file:
        vocabulary = json.loads(file.metadata()[_VOCABULARY])
        words, parts = file.get_tensor("words"), file.get_tensor("parts")
    encoder = WordEncoder(vocabulary, words.shape[1], len(parts))
    encoder.load_state_dict({"words": words, "parts": parts})
    return encoder.to(device).eval().requires_grad_(False)


def parts_of(words: Sequence[str]) -> list[int]:
    """Return the number of the part that each word is in, from 0 on; a joining word begins the next part."""
    part, parts = 0, []
    for word in words:
        part += word in JOINING
        parts.append(part)
    return parts
