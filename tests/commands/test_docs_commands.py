"""Run the commands of README and docs as they stand there, except those of which this module says why they do not."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import PAGES, ROOT

from actvar.cli import main
from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER
from actvar.zoo.pretrained import adapter_path
from actvar_kernels import backend

# Why a command does not run here, by what it contains.
NOT_RUN = {
    r"^make |^pip |^python3 |^git |^pre-commit ": "it downloads, or changes an environment or a clone",
    r"var_d16\.pth|infinity_2b_reg\.pth|^source=|\$source": "it needs an official checkpoint, which is a download",
    r"--num 50000": "it draws for an hour",
    r"mine\.safetensors|gpu\.json": "it reads a file that the reader made",
    r"ACTVAR_PUBLIC_(VAR|INFINITY)": "it needs the public code, which is a download",
    r"actvar_kernels\.tools\.tune": "it needs a GPU",
    r"test_aarch64": "it needs a cross-compiler and an emulator",
    r"actvar demo": "it serves a page until Ctrl-C",
    r"actvar bench": "it measures time, and its exit code is that of the measurement",
    r"ACTVAR_TUNED=table": "it reads a table that actvar bench wrote",
    r"benchmarks\.sampling|benchmarks\.scaling --axes|pytest benchmarks": "it measures time, for minutes to hours",
}
# Commands that would train or draw for hours, and what runs instead.
SMALLER = {
    "actvar info FILE": f"actvar info {adapter_path('fashion-mnist', 'best')}",
    "actvar distill --model fashion-mnist --stage 1 --out adapter.safetensors": (
        "actvar distill --model fashion-mnist --stage 1 --out adapter.safetensors --epochs 0.01"
    ),
    "actvar evaluate --model fashion-mnist --methods all --num 5000 --seeds 3 --json evaluation.json"
    " --plot evaluation.png": (
        "actvar evaluate --model fashion-mnist --methods dense,best --num 50 --seeds 1 --json evaluation.json"
        " --plot evaluation.png"
    ),
}
SMALLER["PYTHONPATH=tests .venv/bin/python -m support.fuzz --inputs 100000"] = (
    f"PYTHONPATH={ROOT}:{ROOT / 'tests'} python -m support.fuzz --inputs 20"
)
NEEDS_DATA = re.compile(r"^actvar (distill|evaluate) --model")
NEEDS_TRITON = re.compile(r"benchmarks\.(virtual_gpu|scaling)")
SLOW = re.compile(r"--compare|flops|calibrate|distill|evaluate|benchmarks\.|reports\.figures|support\.fuzz")


def commands() -> list[str]:
    """Return every command of the pages' blocks of shell code, once, without its comment, its lines joined."""
    blocks = "".join(
        block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    )
    lines = blocks.replace("\\\n", " ").splitlines()
    found = (" ".join(re.sub(r"(^|\s)#\s.*", "", line).split()) for line in lines)
    return list(dict.fromkeys(filter(None, found)))


def why_not_run(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


RUN = [command for command in commands() if why_not_run(command) is None]


def marked(command: str):
    marks = [pytest.mark.slow] if SLOW.search(command) else []
    if NEEDS_DATA.search(command):
        missing = not DEBIAN_FOLDER.is_dir()
        marks.append(pytest.mark.skipif(missing, reason=f"Fashion-MNIST is not in {DEBIAN_FOLDER}"))
    if NEEDS_TRITON.search(command):
        marks.append(pytest.mark.skipif(not backend.triton_installed(), reason="Triton is not installed"))
    return pytest.param(command, marks=marks)


@pytest.fixture
def shell(tmp_path, monkeypatch) -> Path:
    """An empty folder to run commands in, where `actvar` and `python` are those of this environment."""
    programs, folder = tmp_path / "bin", tmp_path / "here"
    programs.mkdir()
    (folder / "docs" / "images").mkdir(parents=True)
    for name, start in (
        ("actvar", f"{shlex.quote(sys.executable)} -m actvar"),
        ("python", shlex.quote(sys.executable)),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec {start} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder


@pytest.mark.parametrize("command", [marked(command) for command in RUN])
def test_a_command_runs_as_it_stands(command, shell):
    done = subprocess.run(SMALLER.get(command, command), shell=True, cwd=shell, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    assert "Traceback" not in done.stderr
    for file in re.findall(r"--(?:out|json|plot) (\S+)", command):
        assert (shell / file).stat().st_size > 0


def test_every_exception_is_of_a_command_that_is_shown():
    found = commands()
    assert set(SMALLER) <= set(RUN)
    assert all(any(re.search(pattern, command) for command in found) for pattern in NOT_RUN)
    assert "actvar verify --model fashion-mnist" in RUN
    assert "verify" not in SLOW.pattern


def parse_alone(arguments: list[str], monkeypatch) -> None:
    """Read the arguments as the command does, and run nothing."""
    command = arguments[0]
    monkeypatch.setattr(f"actvar.cli.{command}.run", lambda options: None)
    main(arguments)


@pytest.mark.parametrize(
    "command",
    [
        *(c for c in commands() if why_not_run(c) is not None and re.search(r"\bactvar (?!=)\w+ ", c)),
        *(c for c in SMALLER.values() if c.startswith("actvar ")),
    ],
)
def test_a_command_that_does_not_run_here_has_arguments_that_exist(command, monkeypatch):
    words = shlex.split(command.replace("$source", "--model fashion-mnist"))
    parse_alone(words[words.index("actvar") + 1 :], monkeypatch)


def test_an_argument_that_does_not_exist_would_be_found(monkeypatch):
    with pytest.raises(SystemExit):
        parse_alone(["verify", "--model", "fashion-mnist", "--no-such-option"], monkeypatch)


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "--model", "fashion-mnist", "--stage", "1", "--out", "adapter.safetensors"],
        ["evaluate", "--model", "fashion-mnist", "--methods", "dense", "--num", "10"],
    ],
    ids=["distill", "evaluate"],
)
def test_without_the_images_a_command_says_where_they_are_from(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for module in ("distill", "evaluate"):
        monkeypatch.setattr(f"actvar.cli.{module}.DEBIAN_FOLDER", tmp_path / "nowhere")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Debian package dataset-fashion-mnist, or put the four idx files" in error
    assert "--data" in error
