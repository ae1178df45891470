"""Make a tiny T5 with a tokenizer of letters, where transformers is installed, and a stand-in where it need not be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

CHANNELS = 128
"""Channels of the features, as `support.infinity.TINY` reads them."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_tiny_t5(folder: Path, channels: int = CHANNELS) -> Path:
    """Write a random T5 as `save_pretrained` does, and return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = dict(vocab_size=len(vocabulary), d_model=channels, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder)
    return folder


class StandIn:
    """Stand for a loaded tokenizer and encoder: a token per letter, with features that follow from it."""

    def __init__(self, channels: int = CHANNELS):
        self.table = torch.randn(256, channels, generator=torch.Generator().manual_seed(0))
        self.moves: list[str] = []
        self.prompts: list[str] = []

    def tokenizer(self, prompt: str, return_tensors: str) -> Any:
        assert return_tensors == "pt"
        self.prompts.append(prompt)
        return SimpleNamespace(input_ids=torch.tensor([[*(ord(letter) % 256 for letter in prompt), 1]]))

    def encoder(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])

    def to(self, device: object) -> None:
        self.moves.append(str(device))

    @property
    def loaded(self) -> tuple[Any, Any]:
        return self.tokenizer, _Encoder(self)


class _Encoder:
    def __init__(self, stand_in: StandIn):
        self.stand_in = stand_in

    def __call__(self, input_ids: torch.Tensor) -> Any:
        self.stand_in.moves.append("run")
        return self.stand_in.encoder(input_ids)

    def to(self, device: object) -> None:
        self.stand_in.to(device)
