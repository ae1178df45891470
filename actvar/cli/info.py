"""`actvar info`: describe a file or this installation."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch

import actvar
from actvar.adapter import describe_adapter
from actvar.checkpoint import describe_checkpoint
from actvar_kernels import cpu, get_backend
from actvar_kernels.sampling import cpu_kernel


def add_to(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "info", help="describe a checkpoint or adapter, or, without a file, this installation"
    )
    command.add_argument("file", nargs="?", help="a file, or owner/repo:file on the hub")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.file is None:
        facts = {
            "actvar": actvar.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "backend": get_backend(),
            "C++ kernels": cpu.why_unavailable() or f"{cpu.level_name(cpu.best_level())}, from {cpu.library()._name}",
            "C++ samplers": cpu_kernel.why_unavailable() or f"from {cpu_kernel.library()._name}",
        }
    else:
        facts = _describe_file(options.file)
    for name, value in facts.items():
        print(f"{name:<16}{value}")


def _describe_file(path: str) -> dict[str, object]:
    """An adapter or a checkpoint; when it is neither, the checkpoint reader's error."""
    if Path(path).is_file():
        with contextlib.suppress(actvar.AdapterError):
            return describe_adapter(path)
    return describe_checkpoint(path)
