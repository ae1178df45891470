"""The program's help and version come without torch, and its public names on their first use."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support.helpers import ROOT

import actvar
from actvar.cli import COMMANDS, main


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_printed(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([option])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"actvar {actvar.__version__}\n")


def test_without_a_command_the_help_is_printed(capsys):
    main([])
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: actvar ")
    assert all(f"\n    {name} " in shown.out for name in COMMANDS)
    assert shown.err == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["no-such-command"]], ids=str)
def test_torch_is_not_imported_for_what_needs_no_command(arguments):
    code = f"""
import sys
from actvar.cli import main
try:
    main({arguments})
except SystemExit:
    pass
assert not {{"torch", "matplotlib", "numpy"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_matplotlib_is_not_imported_before_a_figure_is_drawn():
    code = "import sys; " + "; ".join(f"import actvar.cli.{command}" for command in COMMANDS)
    code += "; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_options_and_a_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: actvar {command} ")


def test_an_unknown_option_is_an_error_of_its_command(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--model", "fashion-mnist", "--stage", "1", "--out", "a.safetensors", "--no", "1"])
    expected = "actvar distill: unrecognized arguments: --no 1 (try actvar distill --help)\n"
    assert capsys.readouterr().err.endswith(expected)


def test_every_module_of_a_command_is_a_command():
    files = (ROOT / "actvar" / "cli").glob("*.py")
    assert {file.stem for file in files if "\ndef run(" in file.read_text("utf-8")} == set(COMMANDS)


def test_the_names_that_a_type_checker_sees_are_those_at_run_time():
    (seen,) = (node for node in ast.parse(Path(actvar.__file__).read_text("utf-8")).body if isinstance(node, ast.If))
    modules = {name.name: node.module for node in seen.body for name in node.names}
    assert sorted(modules) == actvar.__all__
    for name, module in modules.items():
        assert getattr(actvar, name) is getattr(import_module(module), name)
    assert set(actvar.__all__) <= set(dir(actvar))


def test_modules_are_there_after_the_package_is_imported():
    code = "import actvar; actvar.models.build_vae_var; actvar.config.DENSE"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        actvar.__getattr__("nonsense")
    with pytest.raises(ImportError, match="nonsense"):
        from actvar import nonsense  # noqa: F401
