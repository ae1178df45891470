"""Turn finished training stages into the files that ship with the package."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from actvar.config import ActVARConfig
from actvar.distill import Stage1
from actvar.patching.adapter import save_adapter
from actvar.patching.patch import patch_silently
from actvar.training.checkpoint import load_trained
from actvar.utils.files import replacing
from actvar.zoo.checksums import save_checksums
from actvar.zoo.fashion_mnist import architecture
from actvar.zoo.fashion_mnist.features import FeatureNet
from scripts.fashion_mnist.train import Build, restore, restore_autoencoder


def export(build: Build, folder: Path) -> None:
    """Write `var`, `vae`, `features`, `adapter-paper-stage1` `.safetensors` in float16, then their table of SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    vae = restore_autoencoder(build)
    var = architecture.build()[1]
    restore(var, build.finish_plan)
    save_half(vae, folder / "vae.safetensors")
    save_half(var, folder / "var.safetensors")
    save_half(restore(FeatureNet(), build.features_plan), folder / "features.safetensors")
    patch_silently(var, ActVARConfig())
    load_trained(Stage1(var), build.stage1_plan)
    var.half()
    save_adapter(var, folder / "adapter-paper-stage1.safetensors")
    save_checksums(folder)


def save_half(module: nn.Module, path: Path) -> None:
    """Write the `state_dict` of a module, in float16."""
    tensors = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in module.state_dict().items()
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary)
