"""Checkpoints as training runs save them: weights are found under every nesting and prefix, or all that could be meant
are named."""

from __future__ import annotations

import argparse
import functools
import logging
import pathlib
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoint_files import Tensors, tiny_pair, write, write_shards

from actvar.models.checkpoint import CheckpointError, describe_checkpoint, load_var
from actvar.models.checkpoint.states import as_keys, state_dicts

KINDS = {"autoencoder": 0, "var": 1}


@pytest.fixture(scope="module")
def states() -> tuple[Tensors, Tensors]:
    """State dicts `(vae, var)` of a tiny pair."""
    vae, var = tiny_pair()
    return vae.state_dict(), var.state_dict()


@pytest.fixture(scope="module")
def others() -> tuple[Tensors, Tensors]:
    """State dicts `(vae, var)` of another pair, such as an average of the weights."""
    vae, var = tiny_pair(seed=1)
    return vae.state_dict(), var.state_dict()


def prefixed(state: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_loaded(files: tuple[Path, Path], states: tuple[Tensors, Tensors], **options: object) -> None:
    """The files `(vae, var)` give these weights."""
    for module, state in zip(load_var(files[1], files[0], **options), states, strict=True):
        loaded = module.state_dict()
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(loaded[name], tensor), name


def public_trainer(states: tuple[Tensors, Tensors]) -> dict[str, object]:
    """What train.py of the public VAR code saves as `ar-ckpt-last.pth`."""
    vae, var = states
    moments = {
        index: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.ones_like(tensor)}
        for index, tensor in enumerate(var.values())
    }
    config = {"patch_nums": (1, 2, 3), "resos": (2, 4, 6), "label_smooth": 0.0, "prog_it": 0, "last_prog_si": -1}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.95), "params": list(moments), "wd_sc": 1.0}]
    optimizer = {"scaler": {"scale": 65536.0}, "optimizer": {"state": moments, "param_groups": groups}}
    return {
        "epoch": 5,
        "iter": 0,
        "trainer": {
            "config": config | {"first_prog": False},
            "var_wo_ddp": OrderedDict(var),
            "vae_local": OrderedDict(vae),
            "var_opt": optimizer,
        },
        "args": OrderedDict(data_path="/data", exp_name="text", bs=768, patch_nums=(1, 2, 3), saln=False, fp16=1),
    }


def test_one_file_of_the_public_trainer_is_both_checkpoints(states: tuple, tmp_path: Path) -> None:
    file = write(public_trainer(states), tmp_path / "ar-ckpt-last.pth")
    assert_loaded((file, file), states)
    assert describe_checkpoint(file, "trainer.var_wo_ddp")["kind"] == "var"
    assert describe_checkpoint(file, "trainer.vae_local")["kind"] == "autoencoder"
    with pytest.raises(CheckpointError) as caught:
        describe_checkpoint(file)
    for fragment in ("`trainer.var_wo_ddp` (var)", "`trainer.vae_local` (autoencoder)", "key=", "--key"):
        assert fragment in str(caught.value)


NESTINGS = [(), ("model",), ("ema",), ("state_dict",), ("trainer", "var_wo_ddp"), ("module",), ("a", "b", "c", "d")]
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module.", "model.", "lit.var.module."]


@pytest.mark.parametrize("nesting", NESTINGS, ids=".".join)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_nesting_and_prefix_is_found(prefix: str, nesting: tuple, states: tuple, tmp_path: Path) -> None:
    files = []
    for name, state in zip(("vae", "var"), states, strict=True):
        content: object = prefixed(state, prefix)
        for key in reversed(nesting):
            content = {"epoch": 3, key: content, "loss": torch.zeros(2)}
        files.append(write(content, tmp_path / f"{name}.ckpt"))
    assert_loaded(tuple(files), states)
    assert describe_checkpoint(files[1])["key"] == ".".join((*nesting, *filter(None, prefix.split("."))))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["one file", "index", "folder"])
def test_safetensors_with_a_prefix_are_found(form: str, prefix: str, states: tuple, tmp_path: Path) -> None:
    files = []
    for name, state in zip(("vae", "var"), states, strict=True):
        state = prefixed(state, prefix)
        if form == "one file":
            files.append(write(state, tmp_path / f"{name}.safetensors"))
        else:
            files.append(write_shards(state, tmp_path / name, 3, index=form == "index"))
    assert_loaded(tuple(files), states)


words = st.sampled_from(["model", "module", "_orig_mod", "net", "ema", "0", "var", "state_dict", "x" * 30])


@st.composite
def wrappings(draw: st.DrawFn) -> tuple[list[str], str, set[int]]:
    """Keys of the mappings around, a prefix, and the depths at which other things stand beside."""
    keys, prefix = draw(st.lists(words, max_size=6)), draw(st.lists(words, max_size=3))
    return keys, "".join(f"{part}." for part in prefix), draw(st.sets(st.integers(0, 5)))


@settings(deadline=None, max_examples=60)
@given(wrappings(), st.sampled_from(sorted(KINDS)))
def test_whatever_is_around_the_weights_the_same_are_found(wrapping: tuple, kind: str) -> None:
    keys, prefix, crowded = wrapping
    state = meta_state(kind)
    content: object = prefixed(state, prefix)
    for depth, key in reversed(list(enumerate(keys))):
        content = {key: content}
        if depth in crowded:
            content |= {"step": 3, "opt": {"state": {0: {"exp_avg": torch.zeros(1)}}}, 7: torch.zeros(1), "rng": b"x"}
    (found,) = state_dicts("file", content)
    assert found.kind == kind
    assert found.key == ".".join((*keys, *filter(None, prefix.split("."))))
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {n: t.shape for n, t in state.items()}


@functools.cache
def meta_state(kind: str) -> Tensors:
    module = tiny_pair()[KINDS[kind]]
    return module.to("meta").state_dict()


# Wrappers inside of the model


def test_prefixes_inside_the_names_are_taken_off(states: tuple, tmp_path: Path) -> None:
    vae, var = states
    compiled = {
        name.replace("blocks.", "blocks._orig_mod.").replace(".attn.", ".module.attn."): var[name] for name in var
    }
    files = write(prefixed(vae, "module."), tmp_path / "vae.pth"), write(compiled, tmp_path / "var.pth")
    assert_loaded(files, states)


def test_a_name_with_and_without_a_prefix_is_refused(states: tuple, tmp_path: Path) -> None:
    twice = states[1] | {"blocks.0.module.ffn.fc1.bias": torch.zeros(512)}
    with pytest.raises(CheckpointError, match=r"`blocks.0.ffn.fc1.bias` once.*`blocks.0.module.ffn.fc1.bias`"):
        describe_checkpoint(write(twice, tmp_path / "var.pth"))


def test_an_averaged_model_with_its_counter_is_found(states: tuple, others: tuple, tmp_path: Path) -> None:
    files = []
    for name, state in zip(("vae", "var"), states, strict=True):
        files.append(write(prefixed(state, "module.") | {"n_averaged": torch.tensor(9)}, tmp_path / f"{name}.pth"))
    assert_loaded(tuple(files), states)


# Several models in one file


def test_one_flat_file_may_hold_both_models(states: tuple, tmp_path: Path) -> None:
    lightning = {"state_dict": prefixed(states[0], "vae.") | prefixed(states[1], "var.") | {"loss.w": torch.zeros(1)}}
    for content in (lightning, {**states[0], **states[1]}):
        file = write(content, tmp_path / "both.ckpt")
        assert_loaded((file, file), states)


@pytest.mark.parametrize(
    ("first", "second"),
    [("model", "ema"), ("state_dict", "ema_state_dict"), ("trainer.var_wo_ddp", "trainer.ema"), ("", "ema")],
)
@pytest.mark.parametrize("chosen", [0, 1])
def test_of_several_candidates_the_key_chooses_and_without_one_all_are_named(
    chosen: int, first: str, second: str, states: tuple, others: tuple, tmp_path: Path
) -> None:
    files = []
    for name, pair in zip(("vae", "var"), zip(states, others, strict=True), strict=True):
        content: dict[str, object] = {}
        for key, state in zip((first, second), pair, strict=True):
            place = content
            for part in filter(None, key.split(".")):
                place = place.setdefault(part, {})
            place.update(state)
        files.append(write(content, tmp_path / f"{name}.pth"))
    key = (first, second)[chosen]
    assert_loaded(tuple(files), (states, others)[chosen], key=key)
    assert describe_checkpoint(files[1], key)["key"] == key
    for call in (lambda: load_var(files[1], files[0]), lambda: describe_checkpoint(files[1])):
        with pytest.raises(CheckpointError) as caught:
            call()
        for fragment in (f"`{first}`" if first else "the top level", f"`{second}`", "key=", "--key"):
            assert fragment in str(caught.value)


def test_each_file_may_have_a_key_of_its_own(states: tuple, others: tuple, tmp_path: Path) -> None:
    vae = write({"gen": states[0], "gen_ema": others[0]}, tmp_path / "vae.pth")
    var = write({"model": states[1], "ema": others[1]}, tmp_path / "var.pth")
    assert_loaded((vae, var), (others[0], states[1]), key=("model", "gen_ema"))
    with pytest.raises(CheckpointError, match=r"vae.pth: expected one state dict.*`gen`.*`gen_ema`"):
        load_var(var, vae, key="ema")
    flat = write(states[0], tmp_path / "flat.pth")
    assert_loaded((flat, var), (states[0], others[1]), key="ema")


@pytest.mark.parametrize("key", ["absent", "mod", "ema.", "model.blocks", "EMA"])
def test_a_key_that_leads_nowhere_is_refused(key: str, states: tuple, others: tuple, tmp_path: Path) -> None:
    vae = write(states[0], tmp_path / "vae.pth")
    var = write({"model": states[1], "ema": others[1]}, tmp_path / "var.pth")
    for call in (lambda: load_var(var, vae, key=key), lambda: describe_checkpoint(var, key)):
        with pytest.raises(CheckpointError, match=f"the key '{key}', found `model`.*`ema`"):
            call()


@pytest.mark.parametrize("key", [3, ["ema", 3], b"ema", Path("ema")])
def test_a_key_that_is_not_a_string_is_a_type_error(key: object) -> None:
    with pytest.raises(TypeError, match="key: expected a string"):
        as_keys(key)


def test_the_only_candidate_is_taken_and_logged(
    states: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write({"ema": states[0]}, tmp_path / "vae.pth"), write({"net": {"best": states[1]}}, tmp_path / "var.pth")
    with caplog.at_level(logging.INFO, logger="actvar"):
        assert_loaded(files, states)
    assert "`ema`" in caplog.text
    assert "`net.best`" in caplog.text


# What is not loaded

OBJECTS = {
    "argparse.Namespace": argparse.Namespace(lr=1.0),
    "multiarray.scalar": np.float64(3),
    "multiarray._reconstruct": np.zeros(3),
    "pathlib": pathlib.PurePosixPath("x"),
    "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("form", ["zip", "before zip"])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_refused_global_is_named_with_how_to_save_anew(name: str, form: str, states: tuple, tmp_path: Path) -> None:
    file = tmp_path / "var.pth"
    content = {"model": states[1], "args": OBJECTS[name]}
    torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as caught:
        describe_checkpoint(file)
    message = str(caught.value)
    assert name in message
    assert "PK" not in message
    assert "Only if you trust" in message
    commands = (
        message.partition("anew: ")[2].partition(", with the key")[0].replace("weights.pth", str(tmp_path / "w.pth"))
    )
    exec(commands, {})
    assert describe_checkpoint(tmp_path / "w.pth")["kind"] == "var"


def test_mappings_that_hold_themselves_or_one_another_often_end(tmp_path: Path) -> None:
    loop: dict[str, object] = {"head.weight": torch.zeros(2)}
    loop["self"] = loop
    wide: dict[str, object] = {"x": torch.zeros(1)}
    for _ in range(12):
        wide = {str(index): wide for index in range(50)}
    deep: dict[str, object] = {"blocks.0.x": torch.zeros(1)}
    for _ in range(5000):
        deep = {"a": deep}
    for name, content in (("loop", loop), ("wide", wide), ("deep", deep)):
        if name != "deep":
            content = pickle.loads(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"expected a state dict of a VAR transformer.*autoencoder"):
            state_dicts(name, content)
    file = write(loop, tmp_path / "loop.pth")
    with pytest.raises(CheckpointError, match="'self' with a value of type dict"):
        describe_checkpoint(file)


def test_what_stands_beside_may_be_of_any_kind_that_torch_loads(states: tuple, tmp_path: Path) -> None:
    beside = {
        "sparse": torch.eye(4).to_sparse(),
        "expanded": torch.zeros(1).expand(2**40),
        "nested": [{"blocks.0.x": torch.zeros(1)}],
        "size": torch.Size([3]),
        "dtype": torch.float16,
    }
    files = []
    for name, state in zip(("vae", "var"), states, strict=True):
        files.append(write(beside | {"model": state}, tmp_path / f"{name}.pth"))
    assert_loaded(tuple(files), states)
