"""Reading Infinity's checkpoints: what is loaded is what was saved, and sizes come from the tensors."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import tiny_pair, write, write_shards
from support.infinity import TINY_SCHEDULE, infinity_manifest, tiny_infinity, tiny_text
from torch import nn

import actvar
from actvar.models.checkpoint import CheckpointError, describe_checkpoint, load_infinity
from actvar.models.checkpoint.infinity_sizes import (
    infinity_alone,
    infinity_pair,
    infinity_sizes,
    tokenizer_alone,
    tokenizer_sizes,
)

VARIANTS = {
    "one place a token": {},
    "patchified": dict(patchify=True),
    "one chunk": dict(block_chunks=1),
    "other sizes": dict(bits=6, depth=3, block_chunks=3, embed_dim=96, num_heads=3, text_maxlen=7, ch=64),
}
Files = tuple[Path, Path]


def unique(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with one name per tensor, as safetensors files must have it."""
    return {name: tensor for name, tensor in state.items() if name != "quantize.lfq.mask"}


def assert_same_state(loaded: nn.Module, saved: nn.Module) -> None:
    loaded, saved = loaded.state_dict(), saved.state_dict()
    assert list(loaded) == list(saved)
    for name in saved:
        assert loaded[name].dtype == saved[name].dtype, name
        assert torch.equal(loaded[name], saved[name]), name


@pytest.fixture
def saved() -> tuple[nn.Module, nn.Module]:
    return tiny_infinity()


@pytest.fixture
def files(saved: tuple[nn.Module, nn.Module], tmp_path: Path) -> Files:
    """Write `(infinity.pth, tokenizer.pth)`."""
    model = write(saved[1].state_dict(), tmp_path / "infinity.pth")
    return model, write({"vae": saved[0].state_dict()}, tmp_path / "tokenizer.pth")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_architecture_is_recognised_and_draws_what_it_did_before(changes: dict, tmp_path: Path) -> None:
    tokenizer, infinity = tiny_infinity(**changes)
    model = write(infinity.state_dict(), tmp_path / "infinity.safetensors")
    decoder = write(unique(tokenizer.state_dict()), tmp_path / "tokenizer.safetensors")
    loaded_tokenizer, loaded = actvar.load_infinity(model, decoder)
    assert_same_state(loaded_tokenizer, tokenizer)
    assert_same_state(loaded, infinity)
    assert loaded.vae_proxy == (loaded_tokenizer,)
    assert loaded.spatial_patchify == infinity.spatial_patchify
    arguments = dict(schedule=TINY_SCHEDULE, g_seed=3)
    assert torch.equal(loaded.sample(*tiny_text([2]), **arguments), infinity.sample(*tiny_text([2]), **arguments))


def test_official_formats_are_read(files: Files, saved: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    tokenizer, infinity = saved
    state = {**infinity.state_dict(), "lvl_1L": torch.zeros(1, 3), "attn_bias_for_masking": torch.zeros(1)}
    shards = write_shards(state, tmp_path / "infinity_8b_weights", 3).parent
    pickled = write_shards(state, tmp_path / "pickled", 3, stem="pytorch_model", suffix=".bin").parent
    trainer = {f"module.{name}": tensor for name, tensor in infinity.state_dict().items()}
    nested = write({"trainer": {"gpt_fsdp": trainer, "epoch": 3}}, tmp_path / "ar-ckpt.pth")
    for model in (files[0], shards, str(shards / "model.safetensors.index.json"), pickled, nested):
        loaded_tokenizer, loaded = load_infinity(model, files[1])
        assert_same_state(loaded, infinity)
        assert_same_state(loaded_tokenizer, tokenizer)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not any(part.training for module in (loaded, loaded_tokenizer) for part in module.modules())


def test_both_models_may_be_in_one_file(saved: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    content = {"trainer": {"gpt_fsdp": saved[1].state_dict(), "vae_local": saved[0].state_dict()}}
    path = write(content, tmp_path / "both.pth")
    tokenizer, infinity = load_infinity(path, path, key="trainer")
    assert_same_state(infinity, saved[1])
    assert_same_state(tokenizer, saved[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_applies_to_the_blocks(dtype: torch.dtype, files: Files) -> None:
    tokenizer, infinity = load_infinity(*files, dtype=dtype)
    around = torch.promote_types(dtype, torch.float32)
    for name, tensor in infinity.state_dict().items():
        assert tensor.dtype == (dtype if name.startswith("block_chunks.") else around), name
    assert {t.dtype for t in tokenizer.parameters()} == {torch.float32}
    image, bits = infinity.sample(*tiny_text([2, 3]), TINY_SCHEDULE, g_seed=0, return_bits=True)
    assert image.dtype == torch.float32
    assert image.isfinite().all()
    assert infinity(*tiny_text([2, 3]), infinity.teacher_input(bits), TINY_SCHEDULE).isfinite().all()


def test_what_follows_from_the_sizes_may_be_missing(files: Files, saved: tuple[nn.Module, nn.Module]) -> None:
    derived = ("zero_k_bias", "lfq.mask")
    write({n: t for n, t in saved[1].state_dict().items() if not n.endswith(derived)}, files[0])
    write({n: t for n, t in saved[0].state_dict().items() if not n.endswith(derived)}, files[1])
    tokenizer, _ = load_infinity(*files)
    assert tokenizer.quantizer.lfq.mask.tolist() == [8, 4, 2, 1]


def test_the_files_may_be_written_to_while_the_model_is_in_use(files: Files) -> None:
    _, infinity = load_infinity(*files)
    before = {name: tensor.clone() for name, tensor in infinity.state_dict().items()}
    for file in files:
        file.write_bytes(b"")
    assert all(torch.equal(tensor, before[name]) for name, tensor in infinity.state_dict().items())


def test_files_of_another_kind_or_that_do_not_belong_together_are_refused(files: Files, tmp_path: Path) -> None:
    vae, var = tiny_pair()
    vae_file, var_file = write(vae.state_dict(), tmp_path / "vae.pth"), write(var.state_dict(), tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match=r"expected an Infinity transformer.*found a VAR transformer"):
        load_infinity(var_file, files[1])
    with pytest.raises(CheckpointError, match=r"expected Infinity's tokenizer.*found VAR's autoencoder"):
        load_infinity(files[0], vae_file)
    with pytest.raises(CheckpointError, match=r"expected an Infinity transformer.*the order is load_infinity"):
        load_infinity(files[1], files[0])
    with pytest.raises(CheckpointError, match=r"expected a VAR transformer.*found an Infinity transformer"):
        actvar.load_var(files[0], vae_file)
    other = write(tiny_infinity(bits=5)[0].state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"expected a tokenizer of 4 bits.*found 5 bits"):
        load_infinity(files[0], other)
    with pytest.raises(TypeError, match="dtype"):
        load_infinity(*files, dtype=torch.int8)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "nan", "gap"])
def test_a_damaged_state_dict_is_refused_by_name(damage: str, files: Files, saved: tuple[nn.Module, nn.Module]) -> None:
    name, state = "block_chunks.1.module.1.ca.proj.weight", dict(saved[1].state_dict())
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        state[name := "block_chunks.0.module.0.ca_gamma"] = torch.ones(64)
    elif damage == "shape":
        state[name] = torch.zeros(64, 63)
    elif damage == "nan":
        state[name] = state[name].clone().fill_(torch.nan)
    else:
        state = {n.replace("block_chunks.1", name := "block_chunks.2"): t for n, t in state.items()}
        name = "block_chunks.0"
    write(state, files[0])
    with pytest.raises(CheckpointError, match=name) as caught:
        load_infinity(*files)
    assert str(files[0]) in str(caught.value)


@pytest.mark.parametrize("name", ["infinity_2b", "infinity_8b"])
def test_sizes_of_the_official_files_are_read_from_their_tensors(name: str) -> None:
    entry = infinity_manifest()[name]
    model, decoder = (
        {key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (dtype, shape) in part.items()}
        for part in (entry["model"], entry["tokenizer"])
    )
    sizes, of_tokenizer = infinity_sizes(model), tokenizer_sizes(decoder)
    for size in ("depth", "embed_dim", "num_heads", "block_chunks", "text_channels"):
        assert getattr(sizes, size) == entry[size]
    assert (sizes.text_maxlen, of_tokenizer.bits, of_tokenizer.ch) == (512, entry["bits"], 128)
    tokenizer, infinity = infinity_pair(sizes, of_tokenizer)
    assert infinity.spatial_patchify == bool(entry["spatial_patchify"])
    assert {n: t.shape for n, t in infinity.state_dict().items()} == {n: t.shape for n, t in model.items()}
    assert {n: t.shape for n, t in tokenizer.state_dict().items()} == {n: t.shape for n, t in decoder.items()}
    assert infinity_alone(sizes).state_dict().keys() == model.keys()
    assert tokenizer_alone(of_tokenizer).state_dict().keys() == decoder.keys()


def test_a_checkpoint_is_described(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    model, decoder = map(describe_checkpoint, files)
    facts = dict(kind="infinity", key="", depth=4, embed_dim=64, num_heads=2, block_chunks=2, token_bits=4)
    assert model.items() >= facts.items()
    assert decoder.items() >= dict(kind="infinity_tokenizer", key="vae", bits=4, ch_mult=[1, 2, 4, 4, 4]).items()
    with caplog.at_level(logging.INFO, logger="actvar"):
        load_infinity(*files)
    assert str(files[0]) in caplog.text
    assert "embed_dim=64" in caplog.text
