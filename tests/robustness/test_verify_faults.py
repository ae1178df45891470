"""`verify` finds a fault and names the operation, block, scale and backend it is in."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable

import pytest
import torch
from support.verify_runs import LAST, exit_code, report_of, tiny, write_model

import actvar.families.var_layers
import actvar.families.var_mixin
import actvar.models.quantizer
import actvar.patching.patch
import actvar.sparse.block
import actvar.sparse.selection
import actvar_kernels
from actvar.verify.comparisons import CALLERS
from actvar.verify.operations import OPERATIONS
from actvar_kernels import add_codes, backend, get_backend, linears, normalize_modulate
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy whose last element is off by a ten-thousandth of the largest."""
    changed = tensor.clone()
    changed.view(-1)[-1] += 1e-4 * tensor.abs().max()
    return changed


def other_token(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return kept tokens `[R, K]` of `tokens`, where the first row keeps one that it did not keep before."""
    changed = index.clone()
    changed[0, 0] = min(set(range(tokens)) - set(index[0].tolist()))
    return changed.sort(dim=1).values


def fail(_result, _arguments):
    raise RuntimeError("out of shared memory")


def write_to_rows(result, arguments):
    arguments["update"].view(-1)[0] += 1
    return result


def overwrite_a_row_left_alone(result, arguments):
    left = min(set(range(result.shape[1])) - set(arguments["index"][0].tolist()))
    changed = result.clone()
    changed[0, left, 0] = torch.nextafter(changed[0, left, 0], torch.tensor(9.0))
    return changed


def of_bfloat16(*names: str) -> Callable[[dict], dict]:
    return lambda arguments: {name: arguments[name].bfloat16().float() for name in names}


def without(name: str) -> Callable[[dict], dict]:
    return lambda arguments: {name: torch.zeros_like(arguments[name])}


def with_the_next_row(name: str) -> Callable[[dict], dict]:
    return lambda arguments: {name: arguments[name].roll(1, dims=-2)}


FAULTS = {
    "score": ("select_tokens", "scores", lambda r, a: r._replace(scores=nudged(r.scores))),
    "token": (
        "select_tokens",
        "index",
        lambda r, a: r._replace(index=other_token(r.index, a["x"].shape[1])),
    ),
    "modulation": ("select_tokens", "modulated rows", lambda r, a: r._replace(modulated=nudged(r.modulated))),
    "stale base": ("select_tokens", "base", lambda r, a: r._replace(rest=torch.zeros_like(r.rest))),
    "attention": ("subset_attention", "output", lambda r, a: (nudged(r[0]), *r[1:])),
    "not a number": ("subset_attention", "output", lambda r, a: (r[0] * math.nan, *r[1:])),
    "precision": ("subset_attention", "shapes and dtypes", lambda r, a: (r[0].half(), *r[1:])),
    "error": ("subset_attention", "raised RuntimeError('out of shared memory')", fail),
    "residual": ("add_normalize_route", "normalised rows", lambda r, a: r._replace(u=nudged(r.u))),
    "logit": ("add_normalize_route", "logits", lambda r, a: r._replace(logits=nudged(r.logits))),
    "expert": ("add_normalize_route", "experts", lambda r, a: r._replace(mask=r.mask.roll(1, dims=-1))),
    "written argument": ("add_normalize_route", "arguments left alone", write_to_rows),
    "experts' sum": ("expert_ffn_scatter", "output", lambda r, a: nudged(r)),
    "row left alone": ("expert_ffn_scatter", "rows left alone", overwrite_a_row_left_alone),
}
# Faults that the reference makes when it gets other arguments.
ARGUMENT_FAULTS = {
    "experts of bfloat16": ("expert_ffn_scatter", "output", of_bfloat16("u", "fc1_weight", "fc2_weight")),
    "first bias skipped": ("expert_ffn_scatter", "output", without("fc1_bias")),
    "last bias skipped": ("expert_ffn_scatter", "output", without("fc2_bias")),
    "row of another token": ("expert_ffn_scatter", "output", with_the_next_row("u")),
    "queries of bfloat16": ("subset_attention", "output", of_bfloat16("q")),
    "values of bfloat16": ("subset_attention", "output", of_bfloat16("v")),
    "key of another token": ("subset_attention", "output", with_the_next_row("k")),
    "shift skipped": ("add_normalize_route", "normalised rows", without("shift")),
    "router of bfloat16": ("add_normalize_route", "logits", of_bfloat16("weight")),
    "selector of bfloat16": ("select_tokens", "scores", of_bfloat16("weight")),
}


def with_changed_arguments(operation: str, change: Callable[[dict], dict]) -> Callable:
    def fault(_result, arguments):
        with using_backend("reference"):
            return getattr(actvar_kernels, operation)(**arguments | change(arguments))

    return fault


for name, (operation, what, change) in ARGUMENT_FAULTS.items():
    FAULTS[name] = operation, what, with_changed_arguments(operation, change)


@pytest.fixture
def break_backend(monkeypatch) -> Callable[[str, Callable], Callable]:
    """Return a function that makes a backend "triton" out of the reference, with a fault.

    It takes the name of an operation and the fault, which is in block 1 at the last scale, and returns the function
    that loads the model.
    """

    def install(broken: str, fault: Callable) -> Callable:
        place: list[int] = []
        monkeypatch.setattr(backend, "triton_installed", lambda: True)
        monkeypatch.setattr(backend, "interpreted", lambda: True)
        monkeypatch.setattr(actvar.models.fused_vae, "fused_for", lambda *_: None)

        def as_triton(operation: Callable) -> Callable:
            @functools.wraps(operation)
            def call(*args, **kwargs):
                asked = get_backend()
                with using_backend("reference"):
                    result = operation(*args, **kwargs)
                if (operation.__name__, asked, place) == (broken, "triton", [1, LAST]):
                    bound = inspect.signature(operation).bind(*args, **kwargs)
                    return fault(result, bound.arguments)
                return result

            return call

        for caller in CALLERS:
            for name in OPERATIONS:
                if hasattr(caller, name):
                    monkeypatch.setattr(caller, name, as_triton(getattr(caller, name)))
        for caller, operation in (
            (actvar.families.var_mixin, normalize_modulate),
            (actvar.families.var_layers, linears),
            (actvar.models.quantizer, add_codes),
        ):
            monkeypatch.setattr(caller, operation.__name__, as_triton(operation))

        def load(dtype: torch.dtype) -> torch.nn.Module:
            var = tiny(dtype)
            for index, block in enumerate(var.blocks):

                def enter(_block, _args, inputs, index=index):
                    place[:] = index, [side**2 for side in var.patch_nums].index(inputs["x"].shape[1])

                block.register_forward_pre_hook(enter, with_kwargs=True)
            return var

        return load

    return install


def test_a_backend_without_a_fault_passes_and_is_among_the_defaults(break_backend, monkeypatch):
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "no compiler")
    report = report_of(load=break_backend("none", lambda r, a: r))
    assert report.failures == []
    compared = {(c.backend, c.block, c.scale) for c in report.checks if c.check == "subset_attention"}
    dense_too = {("triton", block, scale) for block in (0, 1) for scale in range(LAST + 1)}
    assert compared == dense_too | {("reference", block, scale) for block in (0, 1) for scale in (2, LAST)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_backend_is_found_in_its_block_and_operation(fault, break_backend):
    operation, what, change = FAULTS[fault]
    report = report_of(load=break_backend(operation, change), backends=["reference", "triton"])
    first = report.failures[0]
    assert (first.check, first.block, first.scale, first.backend) == (operation, 1, LAST, "triton")
    assert any(c.what.startswith(what) for c in report.failures if c.check == operation)
    assert {(c.block, c.scale) for c in report.failures if c.check in OPERATIONS} == {(1, LAST)}
    assert {c.backend for c in report.failures} == {"triton"}


def test_a_failure_is_one_line_and_exit_code_1(break_backend, monkeypatch, capsys, tmp_path):
    load = break_backend("subset_attention", FAULTS["attention"][2])
    monkeypatch.setattr("actvar.cli.verify.load", lambda options, dtype: (None, load(dtype)))
    file = tmp_path / "report.json"
    assert exit_code(*write_model(tmp_path), "--backend", "triton", "--json", str(file)) == 1
    *table, summary = capsys.readouterr().out.splitlines()
    failed = [line for line in table if "FAILED" in line]
    assert any(line.startswith("subset_attention") for line in failed)
    assert summary.startswith("FAILED: ")
    assert "first block 1, scale 3, subset_attention, output (float32, triton): error " in summary
    written = json.loads(file.read_text())
    assert not written["passed"]
    assert written["summary"] == summary


def test_what_the_reference_gets_wrong_at_rates_of_1_is_found(monkeypatch):
    right = actvar.sparse.block.subset_attention

    @functools.wraps(right)
    def wrong(*args, **kwargs):
        out, keys, values = right(*args, **kwargs)
        return nudged(out), keys, values

    monkeypatch.setattr(actvar.sparse.block, "subset_attention", wrong)
    failures = report_of(backends=["reference"]).failures
    assert {c.check for c in failures} <= {"rates 1, forced", "rates 1, forced, tokens"}
    assert (failures[0].what, failures[0].block, failures[0].scale) == ("output", 0, 2)


def leave_an_attribute(var):
    var.blocks[1].leftover = True


def change_a_weight(var):
    weight = var.head.bias.data
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))


@pytest.mark.parametrize(
    ("change", "what"),
    [(leave_an_attribute, "classes and attributes"), (change_a_weight, "state_dict tensors")],
)
def test_a_removal_that_leaves_something_is_found(change, what, monkeypatch):
    remove = actvar.patching.patch.take_off

    def remove_badly(var):
        remove(var)
        change(var)
        return var

    monkeypatch.setattr(actvar.patching.patch, "take_off", remove_badly)
    failures = report_of(backends=["reference"]).failures
    assert next((c.what, c.error) for c in failures if c.check == "removal") == (what, 1)


def test_other_tokens_after_removal_are_found(monkeypatch):
    remove = actvar.patching.patch.take_off

    def remove_badly(var):
        var.lvl_embed.weight.data.mul_(1.5)
        return remove(var)

    monkeypatch.setattr(actvar.patching.patch, "take_off", remove_badly)
    failures = report_of(backends=["reference"]).failures
    assert {"state_dict tensors", "images", "tokens"} <= {c.what for c in failures if c.check == "removal"}
