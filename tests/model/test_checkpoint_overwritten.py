"""A file may be written to after its weights were loaded: the model stays as it was, and the file is what was saved."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import tiny_pair, write, write_shards
from support.faults import small_model
from torch import nn

import actvar
from actvar import ActVARConfig, load_adapter, load_var, save_adapter
from actvar.patching.patch import patch_silently
from actvar.sparse.block_state import set_order_and_gates
from actvar.utils.weight_override import replace_parameters

FORMS = [".pth", ".ckpt", ".safetensors", "before zip", "nested", "shards"]


def saved(form: str, folder: Path) -> tuple[Path, Path]:
    """Checkpoints `(vae, var)` of a tiny pair."""
    paths = []
    for name, module in zip(("vae", "var"), tiny_pair(), strict=True):
        state, path = module.state_dict(), folder / f"{name}.pth"
        if form == "shards":
            path = write_shards(state, folder / name, 2)
        elif form == "before zip":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        elif form == "nested":
            write({"ema": state, "epoch": 3}, path)
        else:
            path = write(state, folder / f"{name}{form}")
        paths.append(path)
    return tuple(paths)


def files_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.safetensors")) if path.suffix == ".json" else [path]


def change_all_bytes(path: Path) -> None:
    """In place and at the same size: a mapped tensor would show it, and nothing else happens to the process."""
    for file in files_of(path):
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.write(b"\x7f" * size)


def weights(*modules: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_does_not_change_with_its_files(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    vae_file, var_file = saved(form, tmp_path)
    loaded = load_var(var_file, vae_file, dtype=dtype)
    before = weights(*loaded)
    for path in (vae_file, var_file):
        change_all_bytes(path)
    assert all(map(torch.equal, weights(*loaded), before))


def tuned_model(path: Path) -> tuple[nn.Module, Callable[[], list[torch.Tensor]]]:
    """A model with an adapter that has gates, orders and changed weights, and all that an adapter changes."""
    other, var = small_model(1), small_model()
    for model in (other, var):
        patch_silently(model, ActVARConfig(num_experts=8))
    set_order_and_gates(other.blocks[1], torch.arange(256).flip(0))
    names = ("head.weight", "blocks.0.ffn.fc1.weight")
    replace_parameters(other, {name: nn.Parameter(other.get_parameter(name) + 1, False) for name in names})
    save_adapter(other, path)
    load_adapter(var, path)
    gates = actvar.patching.adapter.gate_parameters(var)
    state = [*gates.values(), *(var.get_parameter(name) for name in names), var.blocks[1].actvar.hidden_order]
    return var, lambda: [tensor.detach().clone() for tensor in state]


def test_a_model_does_not_change_with_its_adapters_file(tmp_path: Path) -> None:
    var, state = tuned_model(tmp_path / "adapter.safetensors")
    before = state()
    change_all_bytes(tmp_path / "adapter.safetensors")
    assert all(map(torch.equal, state(), before))
    save_adapter(var, tmp_path / "adapter.safetensors")
    load_adapter(var, tmp_path / "adapter.safetensors")
    assert all(map(torch.equal, state(), before))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("form", FORMS)
def test_no_file_stays_mapped(form: str, tmp_path: Path) -> None:
    paths = saved(form, tmp_path)
    kept = load_var(paths[1], paths[0]), tuned_model(tmp_path / "adapter.safetensors")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(errors="backslashreplace")
    del kept


def save_to_a_stream(state: dict, path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(state, stream)


def copy_over(state: dict, path: Path) -> None:
    shutil.copyfile(write(state, path.with_name(f"other{path.suffix}")), path)


WRITERS = [
    (".pth", torch.save),
    (".pth", save_to_a_stream),
    (".pth", copy_over),
    (".safetensors", save_file),
    (".safetensors", copy_over),
]


@pytest.mark.parametrize(("suffix", "writer"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_saving_over_the_loaded_file_saves_the_model(suffix: str, writer: Callable, tmp_path: Path) -> None:
    vae_file, var_file = saved(suffix, tmp_path)
    _, var = load_var(var_file, vae_file)
    var.head.bias.add_(1)
    expected = weights(var)
    writer(var.state_dict(), var_file)
    _, again = load_var(var_file, vae_file)
    assert all(map(torch.equal, weights(again), expected))


CUT_SHORT = """
import os, sys
import actvar
models = [module for pair in zip(sys.argv[1::2], sys.argv[2::2]) for module in actvar.load_var(pair[1], pair[0])]
for path in sys.argv[1:]:
    os.truncate(path, 0)
print(*(float(m.state_dict()[n].double().sum()) for m in models for n in sorted(m.state_dict()) if "masking" not in n))
"""


def test_a_file_that_is_cut_short_does_not_end_the_process(tmp_path: Path) -> None:
    paths = [*saved(".pth", tmp_path), *saved(".safetensors", tmp_path)]
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sums = [
        float(module.state_dict()[name].double().sum())
        for module in tiny_pair()
        for name in sorted(module.state_dict())
        if "masking" not in name
    ]
    assert list(map(float, done.stdout.split())) == pytest.approx(sums * 2, rel=1e-9, abs=1e-9)
