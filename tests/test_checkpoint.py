"""Reading checkpoints: what is loaded is what was saved, sizes come from the tensors, and bad files give one error."""

from __future__ import annotations

import logging
import math
import os
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import manifest, meta_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from actvar.checkpoint import CheckpointError, describe_checkpoint, load_var, read_tensors
from actvar.checkpoint_sizes import autoencoder_sizes, var_sizes
from actvar.models import VAR, VQVAE, build_vae_var

TINY = dict(
    V=16, Cvae=4, ch=32, share_quant_resi=2, patch_nums=(1, 2, 3), num_classes=5, depth=2, width=128,
    shared_aln=False, attn_l2_norm=True, ch_mult=(1, 2), num_res_blocks=1, image_channels=3,
)  # fmt: skip
VARIANTS = {
    "separate AdaLN": {},
    "shared AdaLN": dict(shared_aln=True),
    "no QK norm": dict(attn_l2_norm=False),
    "one image channel, three resolutions": dict(image_channels=1, ch_mult=(1, 3, 2), num_res_blocks=2, ch=64),
    "one convolution for all scales": dict(share_quant_resi=1),
    "one convolution per scale": dict(share_quant_resi=0),
}
Tensors = dict[str, Tensor]


def tiny_pair(seed: int = 0, **overrides: object) -> tuple[VQVAE, VAR]:
    vae, var = build_vae_var(**{**TINY, **overrides}, seed=seed)
    hit_counts = vae.quantize.ema_vocab_hit_SV
    hit_counts.copy_(torch.arange(hit_counts.numel()).view_as(hit_counts))
    return vae, var


def write(state: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


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


def assert_refused(file: Path, *fragments: str, var: Path | None = None, vae: Path | None = None) -> None:
    """Loading gives a CheckpointError that names `file` and says the given things."""
    with pytest.raises(CheckpointError) as caught:
        load_var(var or file, vae or file)
    assert str(file) in str(caught.value)
    for fragment in ("expected", "found", *fragments):
        assert fragment in str(caught.value)


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


def test_an_autoencoder_with_a_convolution_per_scale_does_not_take_other_patch_nums(tmp_path: Path) -> None:
    vae_file = write(tiny_pair(share_quant_resi=0)[0].state_dict(), tmp_path / "vae.pth")
    var_file = write(tiny_pair(patch_nums=(1, 2))[1].state_dict(), tmp_path / "var.pth")
    assert_refused(vae_file, str(var_file), "2 scales", "3 scales", var=var_file)


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


# Bad files


def test_a_missing_file_is_a_file_not_found_error(files: tuple[Path, Path], tmp_path: Path) -> None:
    missing = tmp_path / "absent.pth"
    for arguments in ((missing, files[0]), (files[1], missing)):
        with pytest.raises(FileNotFoundError, match=r"absent\.pth.*owner/repo:file\.pth"):
            load_var(*arguments)


def test_a_folder_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(tmp_path, "folder", vae=files[0])


def test_swapped_files_are_refused_and_the_order_is_named(files: tuple[Path, Path]) -> None:
    vae_file, var_file = files
    assert_refused(vae_file, "VAR's autoencoder", "load_var(var_checkpoint, vae_checkpoint)", vae=var_file)


def test_a_transformer_in_place_of_the_autoencoder_is_refused(files: tuple[Path, Path]) -> None:
    assert_refused(files[1], "found a VAR transformer")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_empty_file_is_refused(suffix: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / f"empty{suffix}"
    file.touch()
    assert_refused(file, "empty", vae=files[0])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, suffix: str, tmp_path: Path, tensors: tuple) -> None:
    file = write(tensors[1], tmp_path / f"var{suffix}")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert_refused(file, "complete", f"{file.stat().st_size} bytes")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>Not found</html>", b"\x80", b"\0" * 4096, b"PK\x05\x06" + b"\0" * 18]
)
def test_a_file_of_something_else_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"other{suffix}"
    file.write_bytes(content)
    assert_refused(file, repr(content[:16]))


@pytest.mark.parametrize("suffix", [".ckpt", ""])
def test_an_unknown_file_name_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"var{suffix}"
    file.write_bytes(b"content")
    assert_refused(file, ".pth", ".safetensors", repr(suffix))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_unrelated_model_is_refused(suffix: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    file = write(nn.Linear(2, 3).state_dict(), tmp_path / f"linear{suffix}")
    assert_refused(file, "VAR transformer", "autoencoder", "`weight`", vae=files[0])
    assert_refused(file, "VAR transformer", "autoencoder", "`weight`", var=files[1])


def test_another_transformer_with_blocks_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    vit = {"pos_embed": torch.zeros(1, 5, 64), "blocks.0.attn.qkv.weight": torch.zeros(192, 64)}
    assert_refused(write(vit, tmp_path / "vit.pth"), "word_embed.weight", vae=files[0])


def test_a_file_without_tensors_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(write({}, tmp_path / "nothing.pth"), "no tensors", vae=files[0])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.zeros(3), "found a Tensor"),
        ([torch.zeros(3)], "found a list"),
        ({"epoch": 3, "head.weight": torch.zeros(3)}, "'epoch' with a value of type int"),
        ({"trainer": {"head.weight": torch.zeros(3)}}, "'trainer' with a value of type dict"),
        ({0: torch.zeros(3)}, "0 with a value of type Tensor"),
    ],
)
def test_a_pickle_that_is_not_a_flat_state_dict_is_refused(content: object, found: str, tmp_path: Path) -> None:
    assert_refused(write(content, tmp_path / "var.pth"), found)


class Payload:
    """Creates a file when it is unpickled by anything that runs what a pickle says."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("form", ["zip", "before zip", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_never_runs(form: str, tmp_path: Path, tensors: tuple) -> None:
    proof, file = tmp_path / "proof", tmp_path / "var.pth"
    state = {**tensors[1], "blocks.0.payload": Payload(proof)}
    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"blocks.0.payload": Payload(proof)}, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    assert_refused(file, "without Python objects other than tensors")
    assert not proof.exists()
    if form == "plain pickle":
        pickle.loads(file.read_bytes())
        assert proof.exists()


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda state: state.pop(name)


def put(name: str, change: Callable[[Tensors], Tensor]) -> Callable[[Tensors], None]:
    return lambda state: state.update({name: change(state)})


def rename_block(state: Tensors) -> None:
    for name in [name for name in state if name.startswith("blocks.1.")]:
        state[name.replace("blocks.1.", "blocks.999999999.")] = state.pop(name)


BAD_TRANSFORMERS = {
    "a missing bias": (drop("head.bias"), ["1 missing ['head.bias']", "0 unexpected"]),
    "a missing scale index": (drop("lvl_1L"), ["`lvl_1L`"]),
    "a missing codebook head": (drop("head.weight"), ["`head.weight`"]),
    "an extra tensor": (put("extra", lambda s: torch.zeros(2)), ["1 unexpected ['extra']"]),
    "a gap in the blocks": (rename_block, ["blocks.", "[0, 999999999]"]),
    "a transposed weight": (
        put("blocks.1.ffn.fc1.weight", lambda s: s["blocks.1.ffn.fc1.weight"].T.contiguous()),
        ["`blocks.1.ffn.fc1.weight`", "(512, 128)", "(128, 512)"],
    ),
    "a width that is not a multiple of 64": (
        lambda s: s.update({"word_embed.weight": torch.zeros(100, 4), "word_embed.bias": torch.zeros(100)}),
        ["heads of size 64", "2 heads for width 100"],
    ),
    "other heads": (put("blocks.0.attn.scale_mul_1H11", lambda s: torch.zeros(1, 4, 1, 1)), ["4 heads"]),
    "a scalar in place of a matrix": (put("class_emb.weight", lambda s: torch.tensor(1.0)), ["`class_emb.weight`"]),
    "an empty tensor": (put("class_emb.weight", lambda s: torch.zeros(0, 128)), ["`class_emb.weight`", "(0, 128)"]),
    "a scale that is not a square": (put("lvl_1L", lambda s: s["lvl_1L"].clamp(max=1)), ["[0, 1]", "[1, 13]"]),
    "scales in another order": (put("lvl_1L", lambda s: s["lvl_1L"].flip(1)), ["[2, 1, 0]"]),
    "a scale index that is not a number": (put("lvl_1L", lambda s: s["lvl_1L"] * math.nan), ["nan"]),
    "integers in place of weights": (
        put("head.weight", lambda s: s["head.weight"].to(torch.int8)),
        ["`head.weight`", "torch.int8"],
    ),
    "a weight that is not a number": (put("head.bias", lambda s: s["head.bias"] * math.nan), ["nan"]),
    "a weight of infinity": (put("head.bias", lambda s: torch.tensor([math.inf] + [0.0] * 15)), ["`head.bias`", "inf"]),
    "a weight of minus infinity": (
        put("head.bias", lambda s: torch.tensor([-math.inf] + [0.0] * 15)),
        ["`head.bias`", "-inf"],
    ),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("change", "fragments"), BAD_TRANSFORMERS.values(), ids=BAD_TRANSFORMERS.keys())
def test_a_transformer_is_refused_that_has(
    change: Callable, fragments: list[str], suffix: str, files: tuple[Path, Path], tensors: tuple
) -> None:
    state = dict(tensors[1])
    change(state)
    assert_refused(write(state, files[1].with_suffix(suffix)), *fragments, vae=files[0])


BAD_AUTOENCODERS = {
    "a missing bias": (drop("quant_conv.bias"), ["1 missing ['quant_conv.bias']"]),
    "no hit counts": (drop("quantize.ema_vocab_hit_SV"), ["`quantize.ema_vocab_hit_SV`"]),
    "no codebook": (drop("quantize.embedding.weight"), ["`quantize.embedding.weight`"]),
    "a gap in the levels": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith("encoder.down.0.")],
        ["encoder.down.", "[1]"],
    ),
    "no convolutions after the codebook": (
        lambda s: [s.pop(name) for name in list(s) if ".quant_resi." in name],
        ["quantize.quant_resi."],
    ),
    "an odd width": (put("encoder.conv_in.weight", lambda s: torch.zeros(33, 3, 3, 3)), ["33", "[32, 64]"]),
    "a width that GroupNorm cannot split": (
        put("encoder.conv_in.weight", lambda s: torch.zeros(16, 3, 3, 3)),
        ["multiple of 32", "found 16"],
    ),
    "a weight that is not a number": (put("quant_conv.bias", lambda s: s["quant_conv.bias"] * math.nan), ["nan"]),
}


@pytest.mark.parametrize(("change", "fragments"), BAD_AUTOENCODERS.values(), ids=BAD_AUTOENCODERS.keys())
def test_an_autoencoder_is_refused_that_has(
    change: Callable, fragments: list[str], files: tuple[Path, Path], tensors: tuple
) -> None:
    state = dict(tensors[0])
    change(state)
    assert_refused(write(state, files[0]), *fragments, var=files[1])


@pytest.mark.parametrize("overrides", [dict(V=32), dict(Cvae=8)], ids=str)
def test_an_autoencoder_with_another_codebook_is_refused(overrides: dict, files: tuple[Path, Path]) -> None:
    write(tiny_pair(**overrides)[0].state_dict(), files[0])
    codebook = {**dict(V=16, Cvae=4), **overrides}
    assert_refused(
        files[0],
        str(files[1]),
        "16 codes of dimension 4",
        f"{codebook['V']} codes of dimension {codebook['Cvae']}",
        "trained together",
        var=files[1],
    )


def test_weights_too_large_for_the_requested_dtype_are_refused(files: tuple[Path, Path], tensors: tuple) -> None:
    write({**tensors[1], "head.bias": torch.full((16,), 1e6)}, files[1])
    load_var(files[1], files[0], dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"`head.bias` in torch.float16.*inf"):
        load_var(files[1], files[0], dtype=torch.float16)


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("lvl_1L", torch.zeros(1, dtype=torch.int64).expand(1, 2**40)),
        ("head.weight", torch.zeros(1).expand(2**20, 128)),
        ("head.weight", torch.zeros(2**20, 128, device="meta")),
        ("head.weight", torch.eye(16).to_sparse()),
    ],
    ids=["a repeated index", "a repeated weight", "a tensor without memory", "a sparse tensor"],
)
def test_a_small_pickle_that_claims_large_tensors_is_refused(
    name: str, lie: Tensor, files: tuple[Path, Path], tensors: tuple
) -> None:
    assert_refused(write({**tensors[1], name: lie}, files[1]), f"`{name}`", vae=files[0])


def test_a_safetensors_header_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    header = b'{"head.weight":{"dtype":"F32","shape":[1048576,1024],"data_offsets":[0,4294967296]}}'
    file = tmp_path / "var.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    assert_refused(file, "complete safetensors file")


def test_a_zip_whose_tensor_claims_more_than_its_record_is_refused(tmp_path: Path, tensors: tuple) -> None:
    file, forged = write({"blocks.0.x": torch.zeros(777)}, tmp_path / "var.pth"), tmp_path / "forged.pth"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(forged, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert content.count(struct.pack("<H", 777)) == 2
                content = content.replace(struct.pack("<H", 777), struct.pack("<H", 60000))
            target.writestr(name, content)
    assert_refused(forged, "complete")


def test_every_error_keeps_its_cause(tmp_path: Path) -> None:
    file = tmp_path / "var.safetensors"
    file.write_bytes(b"no tensors in here")
    with pytest.raises(CheckpointError) as caught:
        read_tensors(file)
    assert type(caught.value.__cause__).__name__ == "SafetensorError"
