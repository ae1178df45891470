"""`actvar verify --infinity`: a good checkpoint passes, a wrong kernel or a wrong file does not."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text

import actvar.sparse.block
from actvar import ActVARConfig, apply_patch, save_adapter
from actvar.cli import main
from actvar.models.infinity import schedules
from actvar.sampling.text_request import TextSampling
from actvar.verify.infinity import verify_infinity


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("infinity")
    tokenizer, infinity = tiny_infinity()
    torch.save(infinity.state_dict(), folder / "model.pth")
    torch.save(tokenizer.state_dict(), folder / "tokenizer.pth")
    save_adapter(apply_patch(infinity, ActVARConfig(num_experts=8)), folder / "adapter.safetensors")
    return ["--infinity", str(folder / "model.pth"), "--tokenizer", str(folder / "tokenizer.pth")]


@pytest.fixture
def few_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest size have three scales."""
    monkeypatch.setitem(schedules.SIZES, "0.06M", 3)


def sampling() -> TextSampling:
    text, lengths = tiny_text([5, 7])
    return TextSampling(("a", "b"), (0, 1), TINY_SCHEDULE, features=text.split(lengths))


def loaded(dtype: torch.dtype) -> torch.nn.Module:
    _, infinity = tiny_infinity()
    for block in infinity.unregistered_blocks:
        block.to(dtype)
    return infinity


@pytest.mark.usefixtures("few_scales")
def test_a_checkpoint_passes_on_all_backends(files, tmp_path, capsys):
    adapter = ["--adapter", str(Path(files[1]).with_name("adapter.safetensors"))]
    main(["verify", *files, *adapter, "--batch", "2", "--dtype", "bf16", "--json", str(tmp_path / "verify.json")])
    printed = capsys.readouterr().out
    assert "images of 64x64 pixels, the template nearest to 1:1; 21 tokens in 3 scales" in printed
    written = json.loads((tmp_path / "verify.json").read_text())
    assert all(check["error"] <= check["tolerance"] for check in written["checks"])
    groups = {(check["check"], check["dtype"]) for check in written["checks"]}
    assert groups >= {("subset_attention", "float32"), ("subset_attention", "bfloat16"), ("removal", "float32")}
    bits = [check for check in written["checks"] if check["what"] == "bits"]
    assert {check["check"] for check in bits} == {"rates 1", "rates 1, forced", "removal"}
    assert {check["scale"] for check in bits} == {0, 1, 2}
    assert printed.splitlines()[-1].startswith("ok: ")


def test_a_wrong_operation_is_found(monkeypatch):
    right = actvar.sparse.block.add_normalize

    @functools.wraps(right)
    def wrong(*args, **kwargs):
        x, u = right(*args, **kwargs)
        return x, -3 * u

    monkeypatch.setattr(actvar.sparse.block, "add_normalize", wrong)
    report = verify_infinity(loaded, ActVARConfig(), None, sampling(), backends=["reference"])
    failed = {check.check for check in report.failures}
    assert "rates 1, forced" in failed
    assert "removal" not in failed


def test_remains_of_a_patch_are_found(monkeypatch):
    from actvar.verify import infinity as module

    right = module.facts_of
    calls = []

    def noted(model):
        calls.append(model)
        if len(calls) == 2:
            model.unregistered_blocks[0].left_behind = True
        return right(model)

    monkeypatch.setattr(module, "facts_of", noted)
    report = verify_infinity(loaded, ActVARConfig(), None, sampling(), backends=["reference"])
    assert [(check.check, check.what) for check in report.failures] == [("removal", "classes and attributes")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--infinity", "no.pth"], "--infinity needs --tokenizer"),
        (["--infinity", "no.pth", "--tokenizer", "no.pth", "--weights", "int8"], "--weights is not for --infinity"),
        (["--infinity", "no.pth", "--tokenizer", "no.pth", "--var", "no.pth"], "--var is not for --infinity"),
        (["--infinity", "no.pth", "--tokenizer", "no.pth"], "no.pth: no such file"),
        (["--model", "fashion-mnist", "--pn", "1M"], "--pn needs --infinity"),
        (["--tokenizer", "no.pth"], "--tokenizer needs --infinity"),
        ([], "give either --model, or --var with --vae, or --infinity with --tokenizer"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert message in error
