"""A checkpoint that cannot be loaded gives one error that says why, and no code in it runs."""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import Tensors, tiny_pair, write
from torch import Tensor, nn

from actvar.models.checkpoint import CheckpointError, load_var, read_tensors


def assert_refused(file: Path, *fragments: str, var: Path | None = None, vae: Path | None = None) -> None:
    """Loading gives a CheckpointError that names `file` and says the given things."""
    with pytest.raises(CheckpointError) as caught:
        load_var(var or file, vae or file)
    assert str(file) in str(caught.value)
    for fragment in ("expected", "found", *fragments):
        assert fragment in str(caught.value)


def test_an_autoencoder_with_a_convolution_per_scale_does_not_take_other_patch_nums(tmp_path: Path) -> None:
    vae_file = write(tiny_pair(share_quant_resi=0)[0].state_dict(), tmp_path / "vae.pth")
    var_file = write(tiny_pair(patch_nums=(1, 2))[1].state_dict(), tmp_path / "var.pth")
    assert_refused(vae_file, str(var_file), "2 scales", "3 scales", var=var_file)


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


@pytest.mark.parametrize("suffix", [".npz", "", ".json"])
def test_an_unknown_file_name_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"var{suffix}"
    file.write_bytes(b"content")
    assert_refused(file, ".pth", ".ckpt", ".safetensors", f"`{suffix}`")


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
    "no scale index, and positions that fit no scales": (
        lambda s: (s.pop("lvl_1L"), s.update({"pos_1LC": torch.zeros(1, 15, 128)})),
        ["`lvl_1L`", "15 tokens", "none is possible"],
    ),
    "a buffer of another shape": (
        put("blocks.1.attn.zero_k_bias", lambda s: torch.zeros(64)),
        ["`blocks.1.attn.zero_k_bias`", "(128,)", "(64,)"],
    ),
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
    "a scalar in place of hit counts": (
        put("quantize.ema_vocab_hit_SV", lambda s: torch.tensor(1.0)),
        ["`quantize.ema_vocab_hit_SV`"],
    ),
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
