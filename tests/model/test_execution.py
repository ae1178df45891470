"""A patched model runs as the caller chooses or as an adapter recommends, and keeps that choice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.helpers import sample

from actvar import (
    ActVARConfig,
    AdapterError,
    Execution,
    accelerate,
    apply_patch,
    load_adapter,
    load_pretrained,
    patched,
    read_adapter_config,
    save_adapter,
)
from actvar.evaluate.methods import adapter_method
from actvar.patching.adapter import describe_adapter
from actvar.patching.patch import unpatched
from actvar.reports.compare import all_ways
from actvar.zoo.pretrained import adapter_path

CONFIG = ActVARConfig(num_experts=8)
FAST = Execution(sampler="fast", decoder_dtype="bfloat16", expert_execution="dense")
OTHER = Execution(expert_execution="tile_list")
OLD_FIELDS = {"expert_schedule": "dense", "sampler": "fast", "decoder_dtype": "bfloat16"}
"""The fields that `FAST` was in the configuration of adapters before `Execution`."""


@pytest.fixture
def plain(make_var, tmp_path):
    """Write an adapter that recommends nothing."""
    path = tmp_path / "plain.safetensors"
    save_adapter(apply_patch(make_var(), CONFIG), path)
    return path


@pytest.fixture
def recommending(make_var, tmp_path):
    """Write an adapter that recommends `FAST`."""
    path = tmp_path / "recommending.safetensors"
    save_adapter(apply_patch(make_var(), CONFIG), path, execution=FAST)
    return path


def old(path, **fields):
    """Rewrite the adapter at `path` as it was before `Execution`, with fields of its configuration."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | fields)
    save_file(load_file(path), path, metadata)
    return path


# The class


@pytest.mark.parametrize("execution", [Execution(), FAST, OTHER], ids=str)
def test_json_gives_it_back(execution):
    assert Execution.from_json(execution.to_json()) == execution


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(cudnn_benchmark="yes"), TypeError, "cudnn_benchmark: expected a bool, got 'yes'"),
        (dict(cuda_graph="always"), ValueError, "cuda_graph: expected one of .*'auto', True, False"),
        (dict(cuda_graph=None), ValueError, "cuda_graph: expected"),
        (dict(cuda_graph=1), TypeError, "cuda_graph: expected"),
        (dict(sampler="slow"), ValueError, r"sampler: expected one of \('torch', 'fast'\), got 'slow'"),
        (dict(sampler=None), ValueError, "sampler: expected"),
        (dict(sampler=3), TypeError, "sampler: expected"),
        (dict(decoder_dtype="float32"), ValueError, "decoder_dtype: expected"),
        (dict(decoder_dtype=torch.bfloat16), TypeError, "decoder_dtype: expected"),
        (dict(expert_execution=["auto"]), TypeError, "expert_execution: expected"),
        (dict(expert_execution="snap"), ValueError, "'snap' was removed.*'dense' or 'tile_list'"),
    ],
    ids=str,
)
def test_another_value_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Execution(**fields)


@pytest.mark.parametrize("text", ["null", "3", "[]", '{"scales": [1]}', '{"sampler": 3}', "[" * 100_000])
def test_json_that_is_no_execution_is_refused(text):
    with pytest.raises((TypeError, ValueError), match="expected"):
        Execution.from_json(text)


@pytest.mark.parametrize(
    ("once", "now"), [("expert_schedule", "expert_execution"), ("sampler", "sampler"), ("decoder_dtype",) * 2]
)
def test_a_configuration_with_one_of_its_fields_says_where_it_belongs(once, now):
    message = rf"{once}: .*actvar\.Execution\({now}=\.\.\.\)"
    with pytest.raises(TypeError, match=message):
        ActVARConfig(**{once: "auto"})
    with pytest.raises(TypeError, match=message):
        replace(CONFIG, **{once: "auto"})
    with pytest.raises(TypeError, match=message):
        ActVARConfig.from_json(json.dumps({once: "auto"}))


# Which one a model is run by


def test_patching_takes_the_one_given_or_the_default(tiny_var):
    assert apply_patch(tiny_var, CONFIG).actvar.execution == Execution()
    assert apply_patch(tiny_var, CONFIG, FAST).actvar.execution == FAST
    assert accelerate(tiny_var).actvar.execution == Execution()
    assert accelerate(tiny_var, FAST).actvar.execution == FAST


def test_an_unpatched_model_takes_the_recommended_one_unless_another_is_given(plain, recommending, make_var):
    assert load_adapter(make_var(), plain).actvar.execution == Execution()
    assert load_adapter(make_var(), recommending).actvar.execution == FAST
    assert load_adapter(make_var(), recommending, OTHER).actvar.execution == OTHER


@pytest.mark.parametrize("config", [None, replace(CONFIG, ffn_rate=0.5)], ids=["its configuration", "another"])
def test_the_context_takes_the_recommended_one_unless_another_is_given(recommending, tiny_var, config):
    with patched(tiny_var, config, recommending):
        assert tiny_var.actvar.execution == FAST
    with patched(tiny_var, config, recommending, OTHER):
        assert tiny_var.actvar.execution == OTHER
    with patched(tiny_var, config):
        assert tiny_var.actvar.execution == Execution()
    with patched(tiny_var, config, execution=OTHER):
        assert tiny_var.actvar.execution == OTHER


def test_a_patched_model_keeps_its_own_unless_another_is_given(recommending, tiny_var):
    apply_patch(tiny_var, CONFIG, OTHER)
    assert load_adapter(tiny_var, recommending).actvar.execution == OTHER
    assert load_adapter(tiny_var, recommending, FAST).actvar.execution == FAST


@pytest.mark.parametrize("context", [unpatched, patched, lambda var: patched(var, execution=OTHER)])
def test_a_context_puts_it_back(tiny_var, context):
    image = sample(apply_patch(tiny_var, CONFIG, FAST))
    with context(tiny_var):
        assert not torch.equal(sample(tiny_var), image)
    assert tiny_var.actvar.execution == FAST
    assert torch.equal(sample(tiny_var), image)


def test_an_adapter_that_is_refused_leaves_it_alone(plain, tiny_var):
    apply_patch(tiny_var, ActVARConfig(num_experts=4), OTHER)
    with pytest.raises(AdapterError, match="num_experts"):
        load_adapter(tiny_var, plain, FAST)
    assert tiny_var.actvar.execution == OTHER


def test_a_bundled_adapter_is_run_by_the_default_or_by_the_one_given():
    assert load_pretrained("fashion-mnist", "paper")[1].actvar.execution == Execution()
    assert load_pretrained("fashion-mnist", "paper", execution=FAST)[1].actvar.execution == FAST
    assert describe_adapter(adapter_path("fashion-mnist", "paper"))["execution"] == Execution()
    with pytest.raises(ValueError, match=r"execution: expected an adapter.*actvar\.accelerate"):
        load_pretrained("fashion-mnist", execution=FAST)


def test_another_object_is_refused_before_anything_changes(plain, tiny_var, tmp_path):
    message = r"execution: expected an actvar\.Execution, got dict"
    for patch in (lambda: apply_patch(tiny_var, CONFIG, {}), lambda: load_adapter(tiny_var, plain, {})):
        with pytest.raises(TypeError, match=message):
            patch()
        assert not hasattr(tiny_var, "actvar")
    apply_patch(tiny_var, CONFIG)
    with pytest.raises(TypeError, match=message):
        load_adapter(tiny_var, plain, {})
    with pytest.raises(TypeError, match=message):
        save_adapter(tiny_var, tmp_path / "none.safetensors", execution={})
    assert not (tmp_path / "none.safetensors").exists()


def test_the_accelerated_model_of_a_comparison_is_run_alike(recommending, tiny_var):
    with patched(tiny_var, adapter=recommending):
        ways = all_ways(tiny_var, lambda: getattr(tiny_var, "actvar", None))
        found = {name: way() for name, way in ways.items()}
    assert found["dense"] is None
    assert found["accelerated"].execution == found["actvar"].execution == FAST
    assert not found["accelerated"].config.is_sparse


def test_a_method_is_run_as_its_adapter_recommends(plain, recommending, tiny_var):
    with adapter_method("it", recommending, ffn_rate=0.5).applied(tiny_var):
        assert tiny_var.actvar.execution == FAST
    assert adapter_method("it", recommending).facts != adapter_method("it", plain).facts


# Adapters written before there was an `Execution`


def test_an_old_adapter_recommends_what_its_configuration_said(plain, make_var):
    own = sample(apply_patch(make_var(), CONFIG, FAST))
    path = old(plain, **OLD_FIELDS)
    assert read_adapter_config(path) == CONFIG
    var = load_adapter(make_var(), path)
    assert (var.actvar.config, var.actvar.execution) == (CONFIG, FAST)
    assert torch.equal(sample(var), own)


def test_an_execution_that_is_given_wins_over_an_old_adapters(plain, tiny_var):
    path = old(plain, **OLD_FIELDS)
    with patched(tiny_var, adapter=path, execution=OTHER):
        assert tiny_var.actvar.execution == OTHER
    assert load_adapter(tiny_var, path, OTHER).actvar.execution == OTHER


def test_an_old_adapter_with_snap_is_refused_unless_an_execution_is_given(plain, tiny_var):
    path = old(plain, expert_schedule="snap")
    message = rf"{path.name}: recommends expert_execution 'snap', which was removed; give 'dense' or 'tile_list'"
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_var, path)
    assert not hasattr(tiny_var, "actvar")
    assert load_adapter(tiny_var, path, OTHER).actvar.execution == OTHER
    assert read_adapter_config(path) == CONFIG


@pytest.mark.parametrize("fields", [{"sampler": 3}, {"decoder_dtype": "int8"}, {"expert_schedule": None}], ids=str)
def test_an_old_adapter_with_another_value_is_damaged(plain, tiny_var, fields):
    with pytest.raises(AdapterError, match=r"its metadata is damaged: .*expected one of"):
        load_adapter(tiny_var, old(plain, **fields))


@pytest.mark.parametrize("timed", [True, False])
def test_the_decoder_runs_under_the_flag_of_cudnn_which_is_put_back(tiny_var, monkeypatch, timed):
    vae, seen = tiny_var.vae_proxy[0], []
    decode = type(vae).fhat_to_img

    def noted(self, f_hat):
        seen.append(torch.backends.cudnn.benchmark)
        return decode(self, f_hat)

    monkeypatch.setattr(type(vae), "fhat_to_img", noted)
    apply_patch(tiny_var, CONFIG, Execution(cudnn_benchmark=timed))
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        sample(tiny_var)
        assert torch.backends.cudnn.benchmark == before
    assert seen == ([True, True] if timed else [False, True])

    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(type(vae), "fhat_to_img", fails)
    with pytest.raises(ZeroDivisionError):
        sample(tiny_var)
    assert torch.backends.cudnn.benchmark
