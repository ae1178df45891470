"""Reading checkpoints: what is loaded is what was saved, and sizes come from the tensors."""

from __future__ import annotations

import logging
import math
import zipfile
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoint_files import tiny_pair, write
from support.golden import manifest, meta_tensors
from torch import nn

from actvar.models.build import OFFICIAL_PATCH_NUMS
from actvar.models.checkpoint import CheckpointError, describe_checkpoint, load_var
from actvar.models.checkpoint.sizes import _patch_nums as patch_nums_of
from actvar.models.checkpoint.sizes import autoencoder_sizes, var_sizes

VARIANTS = {
    "separate AdaLN": {},
    "shared AdaLN": dict(shared_aln=True),
    "no QK norm": dict(attn_l2_norm=False),
    "one image channel, three resolutions": dict(image_channels=1, ch_mult=(1, 3, 2), num_res_blocks=2, ch=64),
    "one convolution for all scales": dict(share_quant_resi=1),
    "one convolution per scale": dict(share_quant_resi=0),
}


def assert_same_state(loaded: nn.Module, saved: nn.Module) -> None:
    loaded, saved = loaded.state_dict(), saved.state_dict()
    assert list(loaded) == list(saved)
    for name in saved:
        assert loaded[name].dtype == saved[name].dtype, name
        assert torch.equal(loaded[name], saved[name]), name


# Round trips


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".PTH"])
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
        "key": "",
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
        "not_finite": [],
    }


@pytest.mark.parametrize("share_quant_resi", [0, 1, 2])
def test_an_autoencoder_is_described(share_quant_resi: int, tmp_path: Path) -> None:
    vae, _ = tiny_pair(share_quant_resi=share_quant_resi, image_channels=1)
    state = {name: tensor.bfloat16() for name, tensor in vae.state_dict().items()}
    assert describe_checkpoint(write(state, tmp_path / "vae.safetensors")) == {
        "kind": "autoencoder",
        "key": "",
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
        "not_finite": [],
    }


def test_an_incomplete_file_is_not_described(files: tuple[Path, Path], tensors: tuple) -> None:
    state = {name: tensor for name, tensor in tensors[0].items() if name != "quant_conv.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing \['quant_conv.bias'\]"):
        describe_checkpoint(write(state, files[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path, tensors: tuple) -> None:
    for state, name in zip(tensors, ("decoder.conv_in.bias", "blocks.1.ffn.fc1.bias"), strict=True):
        bad = state[name].clone()
        bad[-1] = value
        file = write({**state, name: bad}, tmp_path / "bad.safetensors")
        assert describe_checkpoint(file)["not_finite"] == [name]


# Buffers that follow from the sizes

DERIVED = {
    "var": ["lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias", "blocks.1.attn.zero_k_bias"],
    "vae": ["quantize.ema_vocab_hit_SV"],
}
SIDES = [(1, 2), (1, 2, 3), (2, 3, 5), (1, 2, 3, 4, 6, 8), OFFICIAL_PATCH_NUMS, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("left_out", [DERIVED["var"], *([name] for name in DERIVED["var"])], ids=lambda names: names[0])
def test_buffers_of_a_transformer_may_be_left_out(left_out: list, sides: tuple, tmp_path: Path) -> None:
    vae, var = tiny_pair(patch_nums=sides)
    vae.quantize.ema_vocab_hit_SV.zero_()
    state = {name: tensor for name, tensor in var.state_dict().items() if name not in left_out}
    assert len(state) == len(var.state_dict()) - len(left_out)
    file = write(state, tmp_path / "var.safetensors")
    loaded_vae, loaded = load_var(file, write(vae.state_dict(), tmp_path / "vae.pth"))
    assert_same_state(loaded, var)
    assert_same_state(loaded_vae, vae)
    assert describe_checkpoint(file)["patch_nums"] == list(sides)


@pytest.mark.parametrize("share_quant_resi", [0, 1, 2])
def test_hit_counts_may_be_left_out(share_quant_resi: int, files: tuple[Path, Path], tmp_path: Path) -> None:
    saved, _ = tiny_pair(share_quant_resi=share_quant_resi)
    state = {name: tensor for name, tensor in saved.state_dict().items() if name not in DERIVED["vae"]}
    file = write(state, tmp_path / "vae.safetensors")
    vae, _ = load_var(files[1], file)
    saved.quantize.ema_vocab_hit_SV.zero_()
    assert_same_state(vae, saved)
    assert describe_checkpoint(file)["scales"] == (3 if share_quant_resi == 0 else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_buffers_that_were_left_out_have_the_dtype_of_those_in_a_file(dtype: torch.dtype, files: tuple) -> None:
    _, expected = load_var(files[1], files[0], dtype=dtype)
    state = torch.load(files[1], weights_only=True)
    write({name: tensor for name, tensor in state.items() if name not in DERIVED["var"]}, files[1])
    _, var = load_var(files[1], files[0], dtype=dtype)
    assert_same_state(var, expected)


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(1, 14), min_size=2, max_size=4).map(sorted))
def test_sides_without_an_index_are_the_only_possible_ones_or_refused(sides: list[int]) -> None:
    tokens, (first, *others) = sum(side * side for side in sides), sides
    sizes = {"lvl_embed.weight": (len(sides), 1), "pos_1LC": (1, tokens, 1), "pos_start": (1, first**2, 1)}
    tensors = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    larger = range(first + 1, math.isqrt(tokens) + 1)
    same = [chosen for chosen in combinations(larger, len(others)) if sum(s * s for s in (first, *chosen)) == tokens]
    if same == [tuple(others)]:
        assert patch_nums_of(tensors) == tuple(sides)
    else:
        with pytest.raises(ValueError, match=r"`lvl_1L`.*several are possible"):
            patch_nums_of(tensors)


@pytest.mark.parametrize(
    ("scales", "tokens", "first"), [(1, 1, 1), (3, 14, 2), (3, 15, 1), (2, 1, 1), (10**6, 10**6, 1), (9, 10**4, 100)]
)
def test_totals_that_no_sides_have_are_refused(scales: int, tokens: int, first: int) -> None:
    sizes = {"lvl_embed.weight": (scales, 1), "pos_1LC": (1, tokens, 1), "pos_start": (1, first, 1)}
    with pytest.raises(ValueError, match="`lvl_1L`"):
        patch_nums_of({name: torch.empty(size, device="meta") for name, size in sizes.items()})
