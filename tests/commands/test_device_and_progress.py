"""Commands run on a GPU where there is one, say so once, and show bars in a terminal only."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from support.helpers import ROOT

import actvar
from actvar.cli import COMMANDS, main
from actvar.utils.progress import progress, quiet

SAMPLE = ["sample", "--model", "fashion-mnist-small"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def devices(monkeypatch) -> list[str]:
    """The devices that models are asked for; what is loaded is on the CPU."""
    asked, load = [], actvar.load_pretrained

    def noted(model, device, dtype):
        asked.append(str(device))
        return load(model, device="cpu", dtype=dtype)

    monkeypatch.setattr(actvar, "load_pretrained", noted)
    return asked


@pytest.mark.parametrize(
    ("there_is_one", "options", "expected"),
    [(False, [], "cpu"), (True, [], "cuda"), (True, ["--device", "cpu"], "cpu")],
)
def test_the_device_is_the_gpu_where_there_is_one_and_is_said_once(
    there_is_one, options, expected, devices, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("actvar.cli.options.usable_device", torch.device)
    main([*SAMPLE, "--labels", "0", "--dense", *options, "--out", str(tmp_path)])
    assert devices == [expected]
    out = capsys.readouterr().out
    assert out.startswith(f"device {expected}\nwrote {tmp_path}/dense.png\n")
    assert out.count(f"device {expected}") == 1


def test_of_several_processes_one_says_the_device(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    main([*SAMPLE, "--num", "10", "--batch", "5", "--dense", "--device", "cpu", "--out", str(tmp_path)])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [[], ["--quiet"]], ids=str)
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_bars_are_for_terminals_and_not_for_quiet(stream, options, tmp_path, monkeypatch, capsys):
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    main([*SAMPLE, "--num", "10", "--dense", "--device", "cpu", "--out", str(tmp_path), *options])
    assert ("sampling" in shown.getvalue()) == (stream is Terminal and not options)
    if stream is io.StringIO:
        assert shown.getvalue() == ""
    assert ("device cpu" in capsys.readouterr().out) == (not options)


def test_a_bar_within_quiet_is_hidden_and_one_after_it_is_not(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with quiet():
        assert list(progress(range(3))) == [0, 1, 2]
    assert shown.getvalue() == ""
    assert list(progress(range(3), hidden=True)) == [0, 1, 2]
    assert shown.getvalue() == ""
    assert list(progress(range(3), desc="steps")) == [0, 1, 2]
    assert "steps" in shown.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_quiet(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--quiet" in capsys.readouterr().out


def test_no_module_shows_a_bar_of_its_own():
    files = [file for file in (ROOT / "actvar").rglob("*.py") if "import tqdm" in file.read_text("utf-8")]
    assert files == [ROOT / "actvar" / "utils" / "progress.py"]
