"""`verify` passes a model that is right in every configuration, reports what it compared, and refuses bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.verify_runs import LAST, exit_code, report_of, tiny, write_model

import actvar_kernels
from actvar import ActVARConfig
from actvar.cli import main
from actvar.verify.comparisons import CALLERS
from actvar.verify.operations import OPERATIONS
from actvar.verify.report import Check, Report
from actvar.verify.run import available_backends
from actvar_kernels import BackendUnavailableError, backend, get_backend
from actvar_kernels.cpu_backend import cpu

GROUPS = {"rates 1", "rates 1, tokens", "rates 1, forced", "rates 1, forced, tokens", "removal"}


def test_the_bundled_model_passes(capsys):
    main(["verify", "--model", "fashion-mnist", "--backend", "reference"])
    out = capsys.readouterr().out
    operations = {
        "select_tokens",
        "normalize_modulate",
        "subset_attention",
        "add_normalize_route",
        "expert_ffn_scatter",
    }
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
        (ActVARConfig(num_experts=8, guidance_until=-2), {}),
    ],
    ids=["all keys, shared selection, shared AdaLN", "no experts, no QK norm", "no selection", "no guidance"],
)
def test_every_configuration_passes_in_every_dtype(config, layout):
    dtypes = [torch.bfloat16, torch.float16]
    backends = ["reference"] if cpu.why_unavailable() else ["reference", "cpu"]
    report = report_of(config, lambda dtype: tiny(dtype, **layout), dtypes=dtypes, backends=backends)
    assert report.failures == []
    assert {c.dtype for c in report.checks} == {"float32", "bfloat16", "float16"}
    assert {
        (c.block, c.scale) for c in report.checks if c.check == "subset_attention" and c.backend == "reference"
    } == {(block, scale) for block in (0, 1) for scale in (2, LAST)}


def test_every_operation_that_a_block_calls_is_compared():
    called = {
        name
        for name in actvar_kernels.__all__
        if name[0].islower() and any(hasattr(caller, name) for caller in CALLERS)
    }
    assert set(OPERATIONS) == called - {"choose_fused"}


def test_json_holds_every_comparison(tmp_path, tmp_path_factory, capsys):
    file = tmp_path / "report.json"
    arguments = ["--dtype", "bf16", "--rates", "0.5", "0.75", "1", "--backend", "reference", "--batch", "2"]
    main(["verify", *write_model(tmp_path_factory.mktemp("model")), *arguments, "--json", str(file)])
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
