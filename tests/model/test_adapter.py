"""An adapter is saved and loaded as it was, with its configuration, or refused with the reason."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import CONFIG, assert_refused, rewritten
from support.helpers import sample

from actvar import (
    ActVARConfig,
    AdapterError,
    apply_patch,
    load_adapter,
    patched,
    read_adapter_config,
    remove_patch,
    save_adapter,
)
from actvar.models import VAR
from actvar.patching.adapter import describe_adapter


def test_a_loaded_adapter_gives_the_images_it_was_saved_from(trained, adapter, tiny_var):
    apply_patch(tiny_var, CONFIG)
    assert not torch.equal(sample(tiny_var), sample(trained))
    assert load_adapter(tiny_var, adapter) is tiny_var
    assert torch.equal(sample(tiny_var), sample(trained))


def test_the_context_loads_an_adapter_without_the_warning(trained, adapter, tiny_var, caplog):
    image = sample(trained)
    with caplog.at_level(logging.WARNING), patched(tiny_var, CONFIG, adapter=adapter):
        assert torch.equal(sample(tiny_var), image)
    assert caplog.records == []


def test_the_file_describes_itself(adapter):
    assert read_adapter_config(adapter) == CONFIG
    facts = describe_adapter(adapter)
    assert facts["kind"] == "adapter"
    assert (facts["depth"], facts["width"], facts["patch_nums"]) == (2, 128, [1, 2, 3, 5])
    assert facts["parameters"] == 2 * (128 + 1 + 8 * 128 + 8)
    assert sorted(load_file(adapter))[:2] == ["blocks.0.router.bias", "blocks.0.router.weight"]


def loaded_after_patching(var, config, path):
    return load_adapter(apply_patch(var, config), path)


def loaded_in_a_context(var, config, path):
    with patched(var, config, path):
        return sample(var)


OTHER_FIELDS = {
    "token_rates: trained with (0.5, 0.75), used with (0.75, 0.75)": dict(token_rates=(0.75, 0.75)),
    "token_rates: trained with (0.5, 0.75), used with (0.5 to 1 by block, 0.75)": dict(token_rates=((0.5, 1), 0.75)),
    "ffn_rate: trained with 0.5, used with 1.0": dict(ffn_rate=1),
    "scales: trained with (-2, -1), used with (-3, -1)": dict(scales=(-3, -1)),
    "kv: trained with compact, used with all": dict(kv="all"),
    "share_cfg_selection: trained with False, used with True": dict(share_cfg_selection=True),
    "ffn_rate: trained with 0.5, used with 0.25; fixed_tokens: trained with False, used with True": dict(
        ffn_rate=0.25, fixed_tokens=True
    ),
    "": {},
}


@pytest.mark.parametrize("load", [loaded_after_patching, loaded_in_a_context])
@pytest.mark.parametrize(("message", "fields"), OTHER_FIELDS.items(), ids=[str(f) for f in OTHER_FIELDS.values()])
def test_fields_that_differ_from_the_adapters_own_are_logged_in_one_line(
    adapter, tiny_var, caplog, load, message, fields
):
    load(tiny_var, replace(CONFIG, **fields), adapter)
    lines = [r.getMessage() for r in caplog.records if r.name == "actvar.patching.adapter"]
    assert lines == ([f"{adapter}: {message}"] if message else [])


def test_rates_of_blocks_that_differ_within_one_range_are_logged_in_full(make_var, tmp_path, caplog):
    rates = [((0.5, 1.0), 0.75), ((1.0, 0.5), 0.75)]
    own, other = (replace(CONFIG, token_rates=of_scales) for of_scales in rates)
    save_adapter(apply_patch(make_var(), own), tmp_path / "adapter.safetensors")
    loaded_after_patching(make_var(), other, tmp_path / "adapter.safetensors")
    assert f"token_rates: trained with {rates[0]}, used with {rates[1]}" in caplog.messages[-1]


def loaded(var, path):
    return load_adapter(var, path)


def loaded_into_a_compiled_one(var, path):
    return load_adapter(torch.compile(var, backend="eager"), path)._orig_mod


@pytest.mark.parametrize("load", [loaded, loaded_into_a_compiled_one])
@pytest.mark.parametrize(
    "own",
    [
        CONFIG,
        ActVARConfig(),
        ActVARConfig(token_rates=((0.5, 1), 1), ffn_rate=((1, 0.5), 0.25), num_experts=32),
        ActVARConfig(scales=(1,), token_rates=(0.5,), kv="all", fixed_tokens=True, share_cfg_selection=True),
    ],
    ids=str,
)
def test_an_unpatched_model_gets_the_configuration_of_the_adapter(make_var, tmp_path, caplog, load, own):
    var, path = make_var(), tmp_path / "adapter.safetensors"
    save_adapter(apply_patch(var, own), path)
    caplog.clear()
    other = load(make_var(), path)
    assert other.actvar.config == own
    assert torch.equal(sample(other), sample(var))
    remove_patch(other)
    with patched(other, adapter=path):
        assert other.actvar.config == own
        assert torch.equal(sample(other), sample(var))
    assert type(other) is VAR
    assert caplog.records == []


def test_the_context_puts_back_an_earlier_patch_after_the_adapters_own(adapter, tiny_var):
    image = sample(apply_patch(tiny_var, ActVARConfig(token_rates=(0.25, 0.25))))
    with patched(tiny_var, adapter=adapter):
        assert tiny_var.actvar.config == CONFIG
    assert torch.equal(sample(tiny_var), image)


def test_without_an_adapter_the_context_takes_the_papers_configuration(tiny_var, caplog):
    with patched(tiny_var):
        assert tiny_var.actvar.config == ActVARConfig()
    assert "untrained" in caplog.text


FILES_THAT_DO_NOT_FIT = {
    "nothing": (lambda path: path.unlink(), FileNotFoundError, "no such adapter"),
    "text": (lambda path: path.write_text("text"), AdapterError, "expected a safetensors file"),
    "another size": (
        lambda path: rewritten(path, model=json.dumps({"depth": 3, "width": 128, "hidden": 512, "patch_nums": [1, 2]})),
        AdapterError,
        "'depth': 3",
    ),
    "scales": (lambda path: rewritten(path, config=replace(CONFIG, scales=(0, 9)).to_json()), AdapterError, "4 scales"),
    "rates of three blocks": (
        lambda path: rewritten(path, config=replace(CONFIG, ffn_rate=((0.5,) * 3, 1)).to_json()),
        AdapterError,
        "2 blocks, got 3 rates",
    ),
    "experts": (
        lambda path: rewritten(path, config=replace(CONFIG, num_experts=7).to_json()),
        AdapterError,
        "divisor of the FFN's hidden size 512, got 7",
    ),
    "gates of other experts": (
        lambda path: rewritten(path, config=replace(CONFIG, num_experts=16).to_json()),
        AdapterError,
        r"router.*expected shape \[16",
    ),
}


@pytest.mark.parametrize("context", [False, True], ids=["load_adapter", "patched"])
@pytest.mark.parametrize("name", FILES_THAT_DO_NOT_FIT)
def test_after_an_error_an_unpatched_model_is_unpatched(adapter, tiny_var, name, context):
    spoil, error, message = FILES_THAT_DO_NOT_FIT[name]
    spoil(adapter)
    before, image = tiny_var.state_dict(), sample(tiny_var)
    with pytest.raises(error, match=message) as caught:
        loaded_in_a_context(tiny_var, None, adapter) if context else load_adapter(tiny_var, adapter)
    assert str(caught.value).startswith(f"{adapter}: ")
    assert type(tiny_var) is VAR
    assert not any(name.endswith("actvar") for name, _ in tiny_var.named_modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_var.state_dict().items())
    assert torch.equal(sample(tiny_var), image)


def test_a_model_of_another_kind_is_named_before_the_file_is_read(tmp_path):
    with pytest.raises(TypeError, match="Linear cannot be patched"):
        load_adapter(torch.nn.Linear(2, 2), tmp_path / "none.safetensors")


def test_a_half_precision_adapter_loads_into_float32_gates(trained, tmp_path, tiny_var):
    path = tmp_path / "half.safetensors"
    save_adapter(trained.half(), path)
    apply_patch(tiny_var, CONFIG)
    load_adapter(tiny_var, path)
    weight = tiny_var.blocks[0].actvar.router.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, trained.blocks[0].actvar.router.weight.float())


def test_saving_replaces_the_old_file_only_when_complete(trained, adapter, monkeypatch):
    before = adapter.read_bytes()

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("actvar.patching.adapter.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained, adapter)
    assert adapter.read_bytes() == before
    assert [p.name for p in adapter.parent.iterdir()] == [adapter.name]


def test_an_unpatched_model_cannot_be_saved(tiny_var, adapter):
    with pytest.raises(ValueError, match=r"patched by actvar.apply_patch"):
        save_adapter(tiny_var, adapter)


def test_a_missing_file_is_named(tiny_var, tmp_path):
    apply_patch(tiny_var, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"none.safetensors"):
        load_adapter(tiny_var, tmp_path / "none.safetensors")


def test_an_adapter_of_another_model_is_refused(adapter, make_var):
    assert_refused(apply_patch(make_var(depth=3), CONFIG), adapter, "'depth': 2.*'depth': 3")
    assert_refused(apply_patch(make_var(patch_nums=(1, 2, 3, 4)), CONFIG), adapter, "patch_nums")


def test_another_number_of_experts_is_refused(adapter, tiny_var):
    assert_refused(apply_patch(tiny_var, ActVARConfig()), adapter, "num_experts=8.*patched with 16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.router.bias"), "blocks.1.router.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update({"blocks.0.selector.weight": torch.zeros(1, 64)}), r"expected shape \[1, 128\], got"),
        (lambda t: t["blocks.0.router.weight"].fill_(float("nan")), "finite"),
        (lambda t: t["blocks.1.selector.bias"].fill_(float("inf")), "finite"),
        (lambda t: t.update({"blocks.0.router.bias": torch.zeros(8, dtype=torch.int64)}), "floating-point"),
    ],
)
def test_wrong_tensors_are_refused(adapter, tiny_var, change, message):
    tensors = load_file(adapter)
    change(tensors)
    assert_refused(apply_patch(tiny_var, CONFIG), rewritten(adapter, tensors), message)


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "other"},
        {"version": "99"},
        {"config": "{"},
        {"config": '{"kv": "x"}'},
        {"config": '{"new": 1}'},
        {"model": "["},
        {"model": json.dumps({"depth": 2})},
    ],
)
def test_wrong_metadata_is_refused(adapter, tiny_var, metadata):
    assert_refused(apply_patch(tiny_var, CONFIG), rewritten(adapter, **metadata), "expected|damaged|made for")


@pytest.mark.parametrize("content", [b"", b"garbage" * 10, b"\xff" * 8])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, tiny_var, content):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content)
    assert_refused(apply_patch(tiny_var, CONFIG), path, "expected a safetensors file")


def test_a_truncated_file_is_refused(adapter, tiny_var):
    adapter.write_bytes(adapter.read_bytes()[:-100])
    assert_refused(apply_patch(tiny_var, CONFIG), adapter, "expected a safetensors file")
