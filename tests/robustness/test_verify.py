from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_var

import actvar.families.var_mixin
import actvar.patching.patch
import actvar.sparse.block
import actvar.sparse.selection
import actvar_kernels
from actvar import ActVARConfig, apply_patch, save_adapter
from actvar.cli import main
from actvar.sampling.request import Sampling
from actvar.verify.operations import OPERATIONS
from actvar.verify.report import Check, Report
from actvar.verify.run import available_backends, verify
from actvar_kernels import BackendUnavailableError, backend, get_backend, normalize_modulate
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu

PAPER = ActVARConfig(num_experts=8)
ONE_IMAGE = Sampling((1,))
LAST = 3
GROUPS = {"rates 1", "rates 1, tokens", "rates 1, forced", "rates 1, forced, tokens", "removal"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Arguments that name the checkpoints of a tiny model and an adapter for it."""
    folder = tmp_path_factory.mktemp("model")
    var = make_tiny_var()
    torch.save(var.state_dict(), folder / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), folder / "vae.pth")
    save_adapter(apply_patch(var, PAPER), folder / "adapter.safetensors")
    names = {"--var": "var.pth", "--vae": "vae.pth", "--adapter": "adapter.safetensors"}
    return [word for option, name in names.items() for word in (option, str(folder / name))]


def tiny(dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    return make_tiny_var(**changes).requires_grad_(False).to(dtype)


def report_of(config: ActVARConfig = PAPER, load: Callable = tiny, **options) -> Report:
    return verify(load, config, None, ONE_IMAGE, **options)


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    return stopped.value.code


def test_the_bundled_model_passes(capsys):
    main(["verify", "--model", "fashion-mnist", "--backend", "reference"])
    out = capsys.readouterr().out
    operations = {"select_tokens", "subset_attention", "add_normalize_route", "expert_ffn_scatter"}
    lines = out.splitlines()[2:-1]
    assert {line.split("  ")[0] for line in lines} == operations | GROUPS
    assert all("ok" in line.split() for line in lines)
    assert out.splitlines()[-1].startswith("ok: ")


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (ActVARConfig(num_experts=8, kv="all", share_cfg_selection=True), {"shared_aln": True}),
        (ActVARConfig(num_experts=8, ffn_rate=1), {"attn_l2_norm": False}),
        (ActVARConfig(num_experts=8, token_rates=(1, 1)), {}),
    ],
    ids=["all keys, shared selection, shared AdaLN", "no experts, no QK norm", "no selection"],
)
def test_every_configuration_passes_in_every_dtype(config, layout):
    dtypes = [torch.bfloat16, torch.float16]
    report = report_of(config, lambda dtype: tiny(dtype, **layout), dtypes=dtypes, backends=["reference"])
    assert report.failures == []
    assert {c.dtype for c in report.checks} == {"float32", "bfloat16", "float16"}
    assert {(c.block, c.scale) for c in report.checks if c.check == "subset_attention"} == {
        (block, scale) for block in (0, 1) for scale in (2, LAST)
    }


def test_every_operation_that_a_block_calls_is_compared():
    called = {
        name
        for name in actvar_kernels.__all__
        if name[0].islower() and (hasattr(actvar.sparse.block, name) or hasattr(actvar.sparse.selection, name))
    }
    assert set(OPERATIONS) == called - {"choose_fused"}


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last element is off by a ten-thousandth of the largest."""
    changed = tensor.clone()
    changed.view(-1)[-1] += 1e-4 * tensor.abs().max()
    return changed


def other_token(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Kept tokens `[R, K]` of `tokens`, with one of the first row exchanged for one that was not kept."""
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
# The reference's result for changed arguments.
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
    """`break_backend(operation, fault)` makes a backend "triton" out of the reference, with `fault` in block 1 at the
    last scale; returns the function that loads the model."""

    def install(broken: str, fault: Callable) -> Callable:
        place: list[int] = []
        monkeypatch.setattr(backend, "triton_installed", lambda: True)
        monkeypatch.setattr(backend, "interpreted", lambda: True)
        monkeypatch.setattr(actvar.models.fused_vae, "kernels_run", lambda *_: False)

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

        for name in OPERATIONS:
            caller = actvar.sparse.block if hasattr(actvar.sparse.block, name) else actvar.sparse.selection
            monkeypatch.setattr(caller, name, as_triton(getattr(caller, name)))
        monkeypatch.setattr(actvar.families.var_mixin, "normalize_modulate", as_triton(normalize_modulate))

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


def test_a_failure_is_one_line_and_exit_code_1(break_backend, files, monkeypatch, capsys, tmp_path):
    load = break_backend("subset_attention", FAULTS["attention"][2])
    monkeypatch.setattr("actvar.cli.verify.load", lambda options, dtype: (None, load(dtype)))
    file = tmp_path / "report.json"
    assert exit_code(*files, "--backend", "triton", "--json", str(file)) == 1
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


def test_json_holds_every_comparison(files, tmp_path, capsys):
    file = tmp_path / "report.json"
    arguments = ["--dtype", "bf16", "--rates", "0.5", "0.75", "1", "--backend", "reference", "--batch", "2"]
    main(["verify", *files, *arguments, "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["config"]["token_rates"] == [0.5, 0.75]
    assert (written["config"]["ffn_rate"], written["config"]["num_experts"]) == (1.0, 8)
    assert (written["batch"], written["device"], written["passed"]) == (2, "cpu", True)
    assert written["summary"] == capsys.readouterr().out.splitlines()[-1]
    scattered = [c for c in written["checks"] if c["check"] == "scatter_rows" and c["what"] == "output"]
    assert [(c["dtype"], c["block"], c["scale"]) for c in scattered] == [
        (dtype, block, scale) for dtype in ("float32", "bfloat16") for scale in (2, LAST) for block in (0, 1)
    ]
    assert all(0 <= c["error"] <= c["tolerance"] < 1 and c["passed"] for c in scattered)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("error", "tolerance"), [(math.nan, 1), (math.inf, math.inf), (0, math.nan), (2, 1)])
def test_numbers_that_are_not_finite_fail_and_are_strings_in_json(error, tolerance):
    report = Report((Check("removal", "float32", "auto", "images", 0.0), Check("x", "y", "z", "w", error, tolerance)))
    assert report.failures == [report.checks[1]]
    assert "FAILED" in report.table().splitlines()[2]
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["checks"][1]["passed"] is False


def test_wrong_rates_dtypes_and_backends_are_errors(monkeypatch):
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "no compiler")
    assert available_backends(torch.device("cpu")) == ("reference",)
    with pytest.raises(BackendUnavailableError, match="no compiler"):
        report_of(backends=["cpu"])
    with pytest.raises(BackendUnavailableError, match="needs CUDA tensors"):
        report_of(backends=["triton"])
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr(backend, "triton_installed", lambda: True)
    with pytest.raises(ValueError, match="interpreter computes it wrongly"):
        report_of(dtypes=[torch.bfloat16])
    with pytest.raises(ValueError, match="divisor of the FFN's hidden size"):
        report_of(ActVARConfig(num_experts=24), backends=["reference"])
    assert get_backend() == "auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model, or --var"),
        (["--var", "x.pth"], "--var needs --vae"),
        (["--var", "x.pth", "--vae", "y.pth"], "x.pth"),
        (["--model", "fashion-mnist", "--backend", "cpu", "--dtype", "fp16"], "does not take float16"),
        (["--model", "fashion-mnist", "--backend", "cuda"], "invalid choice"),
        (["--model", "fashion-mnist", "--dtype", "fp64"], "invalid choice"),
        (["--model", "fashion-mnist", "--rates", "0.5"], "--rates: expected"),
        (["--model", "fashion-mnist", "--rates", "0.5", "2"], "expected a number in (0, 1]"),
        (["--model", "fashion-mnist", "--batch", "0"], "from 1 to 1000000"),
        (["--model", "fashion-mnist", "--device", "nowhere"], "--device"),
        (["--model", "fashion-mnist", "--adapter", "missing.safetensors"], "missing.safetensors"),
        (["--model", "fashion-mnist", "--public-var", "nowhere"], "clone of the public VAR code"),
        (["--model", "fashion-mnist", "--json", f"{__file__}/report.json"], "--json: expected a folder at"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert exit_code(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.public_var
@pytest.mark.parametrize("layout", [{}, {"shared_aln": True, "attn_l2_norm": False}], ids=["", "shared AdaLN"])
def test_the_public_class_gives_the_same_tokens(layout, public_var_folder: Path):
    report = report_of(load=lambda d: tiny(d, **layout), backends=["reference"], public_folder=public_var_folder)
    assert report.failures == []
    assert {"public class", "public class, patched"} <= {c.check for c in report.checks}


@pytest.mark.public_var
def test_a_public_class_that_differs_is_found(public_var_folder: Path, monkeypatch):
    from actvar.models.public_code import public_classes

    VAR, _ = public_classes(public_var_folder)
    get_logits = VAR.get_logits
    monkeypatch.setattr(VAR, "get_logits", lambda *a: get_logits(*a).roll(1, dims=-1))
    failures = report_of(backends=["reference"], public_folder=public_var_folder).failures
    assert {c.check for c in failures} == {"public class", "public class, patched"}
    assert {c.what for c in failures} == {"tokens"}
