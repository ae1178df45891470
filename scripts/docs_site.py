"""Build the documentation as a site, without a network: `python -m scripts.docs_site`. It needs the extra `docs`.

The pages are README.md and docs/ as they are, a page of the commands from their parsers, and pages of the public names
from their docstrings. All are copied to build/docs, which keeps the links between them, and become site/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import actvar
import actvar_kernels
from actvar.cli import COMMANDS

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "build" / "docs"
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"\]\(([^)\s#:]+)[)#]")
MODULES = {
    "Calibration": ["actvar.calibrate.calibrate", "actvar.calibrate.plan.plan", "actvar.calibrate.goal.Goal"],
    "Quality": [
        "actvar.evaluate.divergence.divergence_by_scale",
        "actvar.evaluate.similarity.psnr",
        "actvar.evaluate.similarity.ssim",
    ],
    "Prompts": ["actvar.text.FeatureCache", "actvar.zoo.load_text_encoder"],
    "Many images": [
        "actvar.sampling.request.Sampling",
        "actvar.sampling.text_request.TextSampling",
        "actvar.sampling.shards.Bulk",
        "actvar.sampling.shards.sample_many",
        "actvar.sampling.shards.read_images",
        "actvar.sampling.shards.write_npz",
    ],
}
"""Names that the pages use beside those of `actvar` itself, by heading."""

EXIT_CODES = """| exit code | meaning |
|---|---|
| 0 | the work was done |
| 1 | a check found a difference, or no plan meets the goal |
| 2 | the work was not done; one line on standard error says why, and what to do |
| 130 | Ctrl-C |"""


def stage(folder: Path) -> None:
    """Fill `folder` with the pages, laid out as in the repository."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in PAGES:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    for page in sorted(folder.rglob("*.md")):
        for link in LINK.findall(page.read_text("utf-8")):
            target = (page.parent / link).resolve()
            file = ROOT / target.relative_to(folder.resolve())
            if file.is_file() and not target.exists():  # such as a script of examples/
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
    (folder / "docs" / "cli.md").write_text(cli_page(), "utf-8")
    (folder / "docs" / "api").mkdir()
    for name, text in api_pages().items():
        (folder / "docs" / "api" / name).write_text(text, "utf-8")


def cli_page() -> str:
    """Return the page of the commands, from their parsers."""
    parts = ["# Command line", "`actvar COMMAND --help` prints the same.", EXIT_CODES]
    for name, purpose in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"actvar {name}", add_help=False)
        import_module(f"actvar.cli.{name}").add_options(parser)
        parser.add_argument("--quiet", action="store_true", help="no progress bars, and no line about the device")
        parts += [f"## actvar {name}", f"{purpose[0].upper()}{purpose[1:]}.", *_tables(parser)]
    return "\n\n".join(parts) + "\n"


def _tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a table for each group of a parser's options, with the group's title above it."""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        if actions:
            title = (group.title or "").replace("positional arguments", "arguments")
            yield f"**{title[:1].upper()}{title[1:]}**"
            lines = [f"| {_call(action)} | {_cell(action.help or '')} |" for action in actions]
            yield "\n".join(["| option | meaning |", "|---|---|", *lines])


def _call(action: argparse.Action) -> str:
    """Return how an option is given, such as `--num NUM`, as code."""
    value = ""
    if action.nargs != 0:
        value = "{" + ", ".join(map(str, action.choices)) + "}" if action.choices else action.metavar or action.dest
        value = f" {value if action.choices else str(value).upper()}{' ...' if action.nargs == '+' else ''}"
    if not action.option_strings:
        return f"`{value.strip()}`"
    needed = " (needed)" if action.required else ""
    return ", ".join(f"`{name}{value}`" for name in action.option_strings) + needed


def _cell(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")


def api_pages() -> dict[str, str]:
    """Return the pages of the public names, by file name."""
    own = {name: f"actvar.{actvar._MODULE_OF[name]}.{name}" for name in actvar.__all__}
    parts = ["# actvar", "Every name of `actvar` itself, in alphabetical order.", *map(_entry, own, own.values())]
    more = ["# Other names", "Names that the pages import from the folders of `actvar`."]
    for title, paths in MODULES.items():
        more += [f"## {title}", *(_entry(path.rpartition(".")[2], path, 3) for path in paths)]
    kernels = ["# actvar_kernels", "Operations on tensors. [Kernels](../kernels.md) says who runs them."]
    for name in actvar_kernels.__all__:
        kernels.append(_entry(name, f"{getattr(actvar_kernels, name).__module__}.{name}"))
    pages = {"actvar.md": parts, "more.md": more, "actvar_kernels.md": kernels}
    return {name: "\n\n".join(text) + "\n" for name, text in pages.items()}


def _entry(name: str, path: str, level: int = 2) -> str:
    """Return the directive that puts a heading, the signature and the docstring of a name."""
    return f"::: {path}\n    options:\n      heading: {name}\n      heading_level: {level}"


def main() -> None:
    """Build the site, and exit with the code of mkdocs, which is not 0 after a warning."""
    stage(SOURCE)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    quiet = {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement of another program
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=os.environ | quiet).returncode)


if __name__ == "__main__":
    main()
