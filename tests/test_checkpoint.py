"""Reading checkpoints: what is loaded is what was saved, and sizes come from the tensors."""

from __future__ import annotations

import logging
import os
import struct
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import Tensors, tiny_pair, write
from golden import manifest, meta_tensors
from torch import nn

from actvar.checkpoint import CheckpointError, describe_checkpoint, load_var, read_tensors
from actvar.checkpoint_sizes import autoencoder_sizes, var_sizes

VARIANTS = {
    "separate AdaLN": {},
    "shared AdaLN": dict(shared_aln=True),
    "no QK norm": dict(attn_l2_norm=False),
    "one image channel, three resolutions": dict(image_channels=1, ch_mult=(1, 3, 2), num_res_blocks=2, ch=64),
    "one convolution for all scales": dict(share_quant_resi=1),
    "one convolution per scale": dict(share_quant_resi=0),
}


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensors, Tensors]:
    """State dicts `(vae, var)` of a tiny pair; tests copy the dicts before they change them."""
    vae, var = tiny_pair()
    return vae.state_dict(), var.state_dict()


@pytest.fixture
def files(tmp_path: Path, tensors: tuple[Tensors, Tensors]) -> tuple[Path, Path]:
    """A good `(vae.pth, var.pth)`."""
    return write(tensors[0], tmp_path / "vae.pth"), write(tensors[1], tmp_path / "var.pth")


def assert_same_state(loaded: nn.Module, saved: nn.Module) -> None:
    loaded, saved = loaded.state_dict(), saved.state_dict()
    assert list(loaded) == list(saved)
    for name in saved:
        assert loaded[name].dtype == saved[name].dtype, name
        assert torch.equal(loaded[name], saved[name]), name


# Round trips


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".PTH"])
def test_what_was_saved_is_loaded_whatever_the_format(suffix: str, tmp_path: Path) -> None:
    saved_vae, saved_var = tiny_pair()
    vae_file = write(saved_vae.state_dict(), tmp_path / f"vae{suffix}")
    var_file = write(saved_var.state_dict(), tmp_path / f"var{suffix}")
    vae, var = load_var(var_file, str(vae_file))
    assert_same_state(vae, saved_vae)
    assert_same_state(var, saved_var)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_architecture_is_recognised_and_computes_what_it_did_before(overrides: dict, tmp_path: Path) -> None:
    saved_vae, saved_var = tiny_pair(**overrides)
    vae_file = write(saved_vae.state_dict(), tmp_path / "vae.safetensors")
    var_file = write(saved_var.state_dict(), tmp_path / "var.safetensors")
    vae, var = load_var(var_file, vae_file)
    assert_same_state(vae, saved_vae)
    assert_same_state(var, saved_var)
    image = var.autoregressive_infer_cfg(B=1, label_B=2, g_seed=3, top_k=8)
    assert torch.equal(image, saved_var.autoregressive_infer_cfg(B=1, label_B=2, g_seed=3, top_k=8))


def test_loaded_models_are_in_eval_mode_without_gradients_and_belong_together(files: tuple[Path, Path]) -> None:
    vae, var = load_var(files[1], files[0])
    for module in (vae, var):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    assert var.vae_proxy == (vae,)


def test_a_pickle_in_the_format_before_zip_files_is_read(files: tuple[Path, Path], tensors: tuple) -> None:
    torch.save(tensors[1], files[1], _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(files[1])
    _, var = load_var(files[1], files[0])
    assert torch.equal(var.head.weight, tensors[1]["head.weight"])


def test_saved_parameters_and_strided_tensors_are_read_as_plain_contiguous_ones(
    files: tuple[Path, Path], tensors: tuple
) -> None:
    weight = tensors[1]["head.weight"]
    changed = {"head.weight": nn.Parameter(weight.T.contiguous().T), "word_embed.bias": nn.Parameter(torch.ones(128))}
    _, var = load_var(write({**tensors[1], **changed}, files[1]), files[0])
    assert torch.equal(var.head.weight, weight)
    assert var.head.weight.is_contiguous()
    assert not var.word_embed.bias.requires_grad


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tensors_are_mapped_from_the_file_instead_of_read(suffix: str, tmp_path: Path) -> None:
    needle = torch.full((64 * 1024,), 1.5)
    file = write({"needle": needle}, tmp_path / f"big{suffix}")
    tensor = read_tensors(file)["needle"]
    offset = file.read_bytes().index(needle.numpy().tobytes())
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(struct.pack("<f", 2.5))
    assert tensor[0] == 2.5


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_need_no_conversion_are_not_copied(
    suffix: str, files: tuple[Path, Path], tensors: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {}

    def recording_read(path: Path) -> Tensors:
        found = read_tensors(path)
        read.update({name: tensor.data_ptr() for name, tensor in found.items()})
        return found

    var_file = write(tensors[1], files[1].with_suffix(suffix))
    monkeypatch.setattr("actvar.checkpoint.read_tensors", recording_read)
    for module in load_var(var_file, files[0]):
        for name, tensor in module.state_dict().items():
            assert tensor.data_ptr() == read[name], name


def test_loading_changes_neither_the_random_state_nor_the_file(files: tuple[Path, Path]) -> None:
    before = torch.get_rng_state(), files[1].read_bytes()
    _, var = load_var(files[1], files[0])
    var.head.weight.zero_()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert files[1].read_bytes() == before[1]


def test_loading_is_logged_and_not_printed(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="actvar"):
        load_var(files[1], files[0])
    assert str(files[1]) in caplog.text
    assert "depth=2" in caplog.text
    assert capfd.readouterr() == ("", "")


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_applies_to_the_transformer_and_not_to_the_autoencoder(
    dtype: torch.dtype, files: tuple[Path, Path], tensors: tuple
) -> None:
    vae, var = load_var(files[1], files[0], dtype=dtype)
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float32}
    for name, tensor in var.state_dict().items():
        assert tensor.dtype == (torch.int64 if name == "lvl_1L" else dtype)
        assert torch.equal(tensor, tensors[1][name].to(tensor.dtype)), name


def test_a_bfloat16_transformer_samples_images(files: tuple[Path, Path]) -> None:
    _, var = load_var(files[1], files[0], dtype=torch.bfloat16)
    image = var.autoregressive_infer_cfg(B=2, label_B=1, g_seed=0)
    assert image.shape == (2, 3, 6, 6)
    assert image.dtype == torch.float32
    assert image.isfinite().all()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_files_are_converted_even_if_the_scale_index_is_sixteen_bit_too(
    stored: torch.dtype, suffix: str, tmp_path: Path, tensors: tuple
) -> None:
    half = [{name: tensor.to(stored) for name, tensor in state.items()} for state in tensors]
    vae_file, var_file = write(half[0], tmp_path / f"vae{suffix}"), write(half[1], tmp_path / f"var{suffix}")
    vae, var = load_var(var_file, vae_file)
    assert var.lvl_1L.tolist() == [[0] + [1] * 4 + [2] * 9]
    for module, state in zip((vae, var), half, strict=True):
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == (torch.int64 if name == "lvl_1L" else torch.float32)
            assert torch.equal(tensor, state[name].to(tensor.dtype)), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16", None], ids=str)
def test_a_dtype_that_a_transformer_cannot_have_is_a_type_error(dtype: object, files: tuple[Path, Path]) -> None:
    with pytest.raises(TypeError, match="dtype must be one of"):
        load_var(files[1], files[0], dtype=dtype)


# Sizes


@pytest.mark.parametrize("name", [name for name in manifest() if name.startswith("var_")])
def test_the_sizes_of_every_published_transformer_are_recognised(name: str) -> None:
    entry = manifest()[name]
    config = entry["config"]
    sizes = var_sizes(meta_tensors(entry["state_dict"], config["patch_nums"]))
    depth = config["depth"]
    assert (sizes.depth, sizes.width, sizes.heads) == (depth, 64 * depth, depth)
    assert (sizes.V, sizes.Cvae, sizes.num_classes) == (4096, 32, config["num_classes"])
    assert list(sizes.patch_nums) == config["patch_nums"]
    assert (sizes.shared_aln, sizes.attn_l2_norm) == (config["shared_aln"], config["attn_l2_norm"])


@pytest.mark.parametrize("name", [name for name in manifest() if name.startswith("vae_")])
def test_the_sizes_of_every_published_autoencoder_are_recognised(name: str) -> None:
    entry = manifest()[name]
    sizes = autoencoder_sizes(meta_tensors(entry["state_dict"], entry["config"]["patch_nums"]))
    assert (sizes.V, sizes.Cvae, sizes.ch, sizes.ch_mult) == (4096, 32, 160, (1, 1, 2, 2, 4))
    assert (sizes.num_res_blocks, sizes.image_channels) == (2, 3)
    assert (sizes.share_quant_resi, sizes.scales) == (4, 10)


@pytest.mark.parametrize("patch_nums", [(1, 2), (1, 3, 4, 6)], ids=str)
def test_patch_nums_come_from_the_transformer_if_the_autoencoder_was_trained_with_others(
    patch_nums: tuple[int, ...], files: tuple[Path, Path]
) -> None:
    _, saved_var = tiny_pair(patch_nums=patch_nums)
    vae, var = load_var(write(saved_var.state_dict(), files[1]), files[0])
    assert var.patch_nums == vae.quantize.v_patch_nums == patch_nums
    assert torch.equal(vae.quantize.ema_vocab_hit_SV, torch.zeros(len(patch_nums), 16))
    side = 2 * patch_nums[-1]
    assert var.autoregressive_infer_cfg(B=1, label_B=0, g_seed=0).shape == (1, 3, side, side)


def test_a_transformer_is_described(files: tuple[Path, Path], tensors: tuple) -> None:
    _, var = tiny_pair()
    assert describe_checkpoint(files[1]) == {
        "kind": "var",
        "depth": 2,
        "width": 128,
        "heads": 2,
        "num_classes": 5,
        "V": 16,
        "Cvae": 4,
        "patch_nums": [1, 2, 3],
        "shared_aln": False,
        "attn_l2_norm": True,
        "parameters": sum(parameter.numel() for parameter in var.parameters()),
        "bytes": sum(tensor.nbytes for tensor in tensors[1].values()),
        "dtypes": {"float32": len(tensors[1]) - 1, "int64": 1},
    }


@pytest.mark.parametrize("share_quant_resi", [0, 1, 2])
def test_an_autoencoder_is_described(share_quant_resi: int, tmp_path: Path) -> None:
    vae, _ = tiny_pair(share_quant_resi=share_quant_resi, image_channels=1)
    state = {name: tensor.bfloat16() for name, tensor in vae.state_dict().items()}
    assert describe_checkpoint(write(state, tmp_path / "vae.safetensors")) == {
        "kind": "autoencoder",
        "V": 16,
        "Cvae": 4,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "image_channels": 1,
        "share_quant_resi": share_quant_resi,
        "scales": 3,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "bytes": 2 * sum(tensor.numel() for tensor in state.values()),
        "dtypes": {"bfloat16": len(state)},
    }


def test_an_incomplete_file_is_not_described(files: tuple[Path, Path], tensors: tuple) -> None:
    state = {name: tensor for name, tensor in tensors[0].items() if name != "quant_conv.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing \['quant_conv.bias'\]"):
        describe_checkpoint(write(state, files[0]))


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path]) -> list[dict[str, str]]:
    """A stand-in for `huggingface_hub` that has the repository `owner/repo`; lists the downloads."""
    module, errors, downloads = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors"), []
    errors.EntryNotFoundError = type("EntryNotFoundError", (Exception,), {})
    errors.RepositoryNotFoundError = type("RepositoryNotFoundError", (Exception,), {})

    def hf_hub_download(repo_id: str, filename: str) -> str:
        downloads.append({"repo_id": repo_id, "filename": filename})
        if repo_id != "owner/repo":
            raise errors.RepositoryNotFoundError("404")
        if not (files[0].parent / filename).exists():
            raise errors.EntryNotFoundError("404")
        return str(files[0].parent / filename)

    module.hf_hub_download, module.errors = hf_hub_download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return downloads


def test_a_hub_id_names_a_repository_and_a_file(hub: list, tensors: tuple) -> None:
    vae, var = load_var("owner/repo:var.pth", "owner/repo:vae.pth")
    assert torch.equal(var.head.weight, tensors[1]["head.weight"])
    assert torch.equal(vae.quant_conv.weight, tensors[0]["quant_conv.weight"])
    assert hub == [
        {"repo_id": "owner/repo", "filename": "var.pth"},
        {"repo_id": "owner/repo", "filename": "vae.pth"},
    ]


def test_a_file_of_that_name_is_preferred_to_the_hub(
    hub: list, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    os.rename(files[1], tmp_path / "owner" / "repo:var.pth")
    assert describe_checkpoint("owner/repo:var.pth")["kind"] == "var"
    assert hub == []


@pytest.mark.parametrize("hub_id", ["owner/repo:absent.pth", "owner/absent:var.pth"])
def test_what_the_hub_does_not_have_is_a_missing_file(hub: list, hub_id: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{hub_id}.*hub"):
        read_tensors(hub_id)
    assert len(hub) == 1


def test_a_hub_id_without_the_hub_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install actvar\[hub\]"):
        read_tensors("owner/repo:var.pth")


def test_the_hub_package_is_imported_for_hub_ids_only(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    load_var(files[1], files[0])
