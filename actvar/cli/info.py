"""`actvar info`: describe a file or this installation."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch

import actvar
from actvar.models.checkpoint import describe_checkpoint
from actvar.patching.adapter import describe_adapter
from actvar_kernels import get_backend
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.sampling import cpu_kernel


def add_to(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "info", help="describe a checkpoint or adapter, or, without a file, this installation"
    )
    command.add_argument(
        "file", nargs="?", help="a file, a folder of safetensors shards, or owner/repo[@revision]:file on the hub"
    )
    command.add_argument("--key", help="which state dict of a checkpoint that has several, e.g. trainer.var_wo_ddp")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.file is None:
        facts = {
            "actvar": actvar.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "backend": get_backend(),
            "C++ kernels": cpu.why_unavailable() or f"{cpu.isa_name(cpu.best_isa())}, from {cpu.library()._name}",
            "C++ samplers": cpu_kernel.why_unavailable() or f"from {cpu_kernel.library()._name}",
        }
    else:
        facts = _describe_file(options.file, options.key)
    if options.json:
        print(json.dumps(facts, indent=1, default=asdict))
        return
    lines = [(f"{name}:", value) for name, value in _flat(facts)]
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        print(f"{name:<{width}}{value}")


def _describe_file(path: str, key: str | None) -> dict[str, object]:
    """Describe an adapter or a checkpoint; when it is neither, the error is the checkpoint reader's."""
    if key is None and Path(path).expanduser().is_file():
        with contextlib.suppress(actvar.AdapterError):
            return describe_adapter(path)
    return describe_checkpoint(path, key)


def _flat(facts: dict[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values for people; a name in a nested mapping has the outer one and a dot before it."""
    for name, value in facts.items():
        if is_dataclass(value):
            value = asdict(value)
        if name == "key":
            yield f"{prefix}key", value or "(top level)"
        elif name == "not_finite":
            yield f"{prefix}values", _finite_or_not(value)
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _finite_or_not(names: list[str]) -> str:
    if not names:
        return "finite"
    return f"NOT FINITE in {len(names)} tensors: {' '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(f"({_text(part)})" if isinstance(part, list | tuple) else _text(part) for part in value)
    return str(value)
