"""Turn the trained model of texts into the files that ship with the package."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from actvar.utils.files import replacing
from actvar.zoo.checksums import save_checksums
from scripts.fashion_mnist_text.train import Build, restored_transformer


def export(build: Build, folder: Path) -> None:
    """Write `infinity`, `tokenizer` and `words` `.safetensors` in float16, then their table of SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    infinity, words = restored_transformer(build)
    save_half(infinity, folder / "infinity.safetensors")
    save_half(infinity.vae_proxy[0], folder / "tokenizer.safetensors")
    words.save(folder / "words.safetensors")
    save_checksums(folder)


def save_half(module: nn.Module, path: Path) -> None:
    """Write parameters and buffers of a module, floating ones in float16; one with two names is written once."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in named.items()}
    with replacing(path) as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary)
