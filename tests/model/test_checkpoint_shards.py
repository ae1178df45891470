"""Sharded checkpoints: by their index or folder the same weights as from one file, or an error that names the shard."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import Tensors, tiny_pair, write, write_shards

from actvar.models.checkpoint import CheckpointError, describe_checkpoint, load_var, read_tensors

SHARD = "model-00002-of-00003.safetensors"
PICKLED = dict(stem="pytorch_model", suffix=".bin")
PICKLED_SHARD = "pytorch_model-00002-of-00003.bin"


@pytest.fixture(scope="module")
def state() -> Tensors:
    """State dict of a tiny transformer."""
    return tiny_pair()[1].state_dict()


def refused(path: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        describe_checkpoint(path)
    for fragment in (str(path), "expected", "found", *fragments):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("form", ["index", "folder with an index", "folder without an index", "other names"])
def test_shards_give_what_one_file_gives(form: str, count: int, state: Tensors, tmp_path: Path) -> None:
    index = write_shards(state, tmp_path / "shards", count)
    path = index if form == "index" else index.parent
    if form in ("folder without an index", "other names"):
        index.unlink()
    if form == "other names":
        for number, shard in enumerate(sorted(path.glob("*.safetensors"))):
            shard.rename(path / f"part {number}.safetensors")
    found = read_tensors(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    vae = write(tiny_pair()[0].state_dict(), tmp_path / "vae.pth")
    assert torch.equal(load_var(str(path), vae)[1].head.weight, state["head.weight"])


def test_other_files_in_the_folder_are_left_alone(state: Tensors, tmp_path: Path) -> None:
    folder = write_shards(state, tmp_path, 2).parent
    (folder / "config.json").write_text("{}")
    torch.save({}, folder / "optimizer.pt")
    write({"head.weight": torch.zeros(3)}, folder / "old.safetensors")
    assert describe_checkpoint(folder)["depth"] == 2


def test_a_folder_may_hold_both_models(state: Tensors, tmp_path: Path) -> None:
    saved, _ = tiny_pair()
    write(state, tmp_path / "var.safetensors")
    write(saved.state_dict(), tmp_path / "vae.safetensors")
    vae, var = load_var(tmp_path, tmp_path)
    assert torch.equal(var.head.weight, state["head.weight"])
    assert torch.equal(vae.quant_conv.weight, saved.quant_conv.weight)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(index: bool, state: Tensors, tmp_path: Path) -> None:
    path = write_shards(state, tmp_path, 3, index)
    (tmp_path / SHARD).unlink()
    refused(path, *([SHARD, "3 shards", "1 of them missing"] if index else ["3 shards of model", "[2]"]))


def test_a_folder_without_shards_or_with_two_indices_is_refused(state: Tensors, tmp_path: Path) -> None:
    refused(tmp_path, "folder without any .safetensors file")
    index = write_shards(state, tmp_path, 2)
    shutil.copy(index, tmp_path / "other.safetensors.index.json")
    refused(tmp_path, "one index", "model.safetensors.index.json", "other.safetensors.index.json")


def test_a_tensor_in_two_shards_is_named_with_both(state: Tensors, tmp_path: Path) -> None:
    write(state, tmp_path / "a.safetensors")
    write({"head.weight": state["head.weight"]}, tmp_path / "b.safetensors")
    refused(tmp_path, "`head.weight` in both a.safetensors and b.safetensors")


def test_a_tensor_that_the_index_puts_elsewhere_is_named(state: Tensors, tmp_path: Path) -> None:
    index = write_shards(state, tmp_path, 3)
    changed = json.loads(index.read_text())
    name = next(name for name, shard in changed["weight_map"].items() if shard != SHARD)
    changed["weight_map"][name] = SHARD
    index.write_text(json.dumps(changed))
    refused(index, SHARD, name)


def test_a_damaged_shard_is_named(state: Tensors, tmp_path: Path) -> None:
    index = write_shards(state, tmp_path, 3)
    content = (tmp_path / SHARD).read_bytes()
    for damaged in (b"", content[:100], content[:-1]):
        (tmp_path / SHARD).write_bytes(damaged)
        for path in (index, tmp_path):
            refused(path, SHARD, "complete safetensors file")


OUTSIDE = [
    "../outside.safetensors", "/outside.safetensors", "sub/inside.safetensors", "sub/../y.safetensors", "..", ".", "",
    "a\\..\\b.safetensors", "C:x.safetensors", "x\0.safetensors", "./y.safetensors", "//h/x.safetensors", "model.pth",
    3, None, ["x.safetensors"], {},
]  # fmt: skip


@pytest.mark.parametrize("shard", OUTSIDE, ids=repr)
def test_an_index_names_only_files_beside_it(shard: object, state: Tensors, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    index = write_shards(state, folder, 1)
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors", folder / "y.safetensors"):
        place.parent.mkdir(exist_ok=True)
        write(state, place)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, shard)}))
    refused(index, "beside the index", repr(shard))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe", b'{"weight_map": {}}', b'{"weight_map": []}', b"{}"],
)
def test_an_index_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    for path in (index, tmp_path):
        with pytest.raises(CheckpointError, match=r"expected (an index of shards|a checkpoint)"):
            describe_checkpoint(path)


@pytest.mark.parametrize("form", ["index", "folder"])
def test_pickled_shards_with_an_index_give_what_one_file_gives(form: str, state: Tensors, tmp_path: Path) -> None:
    index = write_shards(state, tmp_path / "shards", 3, **PICKLED)
    torch.save({"epoch": 3}, tmp_path / "shards" / "training_args.bin")
    found = read_tensors(index if form == "index" else index.parent)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_safetensors_are_preferred_to_pickled_shards(state: Tensors, tmp_path: Path) -> None:
    write_shards({name: tensor.double() for name, tensor in state.items()}, tmp_path, 2, **PICKLED)
    write_shards(state, tmp_path, 3)
    assert read_tensors(tmp_path)["head.weight"].dtype == torch.float32


def test_pickled_shards_are_mapped(state: Tensors, tmp_path: Path) -> None:
    index = write_shards(state, tmp_path, 1, **PICKLED)
    weight = read_tensors(index)["head.weight"]
    with (tmp_path / "pytorch_model-00001-of-00001.bin").open("r+b") as file:  # a mapped tensor changes with its file
        place = file.read().index(weight.numpy().tobytes())
        file.seek(place)
        file.write(bytes(8))
    assert weight.flatten()[:2].tolist() == [0, 0]


class Runs:
    """Make a pickle that would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("damage", ["missing", "truncated", "without a tensor", "code"])
def test_a_damaged_pickled_shard_is_named(damage: str, state: Tensors, tmp_path: Path) -> None:
    index = write_shards(state, tmp_path, 3, **PICKLED)
    shard = tmp_path / PICKLED_SHARD
    content = torch.load(shard, weights_only=True)
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "without a tensor":
        content.popitem()
        torch.save(content, shard)
    else:
        torch.save(content | {"more": Runs(tmp_path / "ran")}, shard)
    for path in (index, tmp_path):
        refused(path, PICKLED_SHARD)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../outside.bin", "model.safetensors", "model.pth", "a:b.bin", 3], ids=repr)
def test_an_index_of_pickled_shards_names_only_such_files_beside_it(
    shard: object, state: Tensors, tmp_path: Path
) -> None:
    index = write_shards(state, tmp_path, 1, **PICKLED)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, shard)}))
    refused(index, ".bin shards beside the index", repr(shard))
