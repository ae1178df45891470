"""Describe a file or this installation, by `actvar info`."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import actvar
from actvar.models.checkpoint import describe_checkpoint
from actvar.patching.adapter import describe_adapter
from actvar.text.encoder import HOW_TO_INSTALL, is_installed
from actvar_kernels import get_backend
from actvar_kernels.backend import why_not_in_eight_bits
from actvar_kernels.cpu_backend import brgemm, choices, cpu
from actvar_kernels.token_draw import cpu_kernel


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `info` to its parser."""
    command.add_argument("file", nargs="?", help="a file, a folder of shards, or owner/repo[@revision]:file on the hub")
    command.add_argument("--key", help="which state dict of a checkpoint that has several, e.g. trainer.var_wo_ddp")
    command.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Print the description as lines or as JSON."""
    if options.file is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        facts = {
            "actvar": actvar.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "backend": get_backend(),
            "C++ kernels": cpu.why_unavailable() or f"{cpu.isa_name(cpu.best_isa())}, from {cpu.library()._name}",
            "kernels chosen": choices.description(),
            "products": brgemm.description(),
            "fp8": why_not_in_eight_bits(torch.float8_e4m3fn, torch.device(device)) or "yes",
            "prompts": f"by transformers {version('transformers')}" if is_installed() else f"no, {HOW_TO_INSTALL}",
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
    """Describe an adapter or a checkpoint; a file that is neither raises the errors of `describe_checkpoint`."""
    if key is None and Path(path).expanduser().is_file():
        with contextlib.suppress(actvar.AdapterError):
            return describe_adapter(path)
    return describe_checkpoint(path, key)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values as text; a name in a nested mapping follows the outer name and a dot."""
    for name, value in facts.items():
        shown: Any = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if name == "key":
            yield f"{prefix}key", shown or "(top level)"
        elif name == "not_finite":
            yield f"{prefix}values", _finite_or_not(shown)
        elif isinstance(shown, dict):
            yield from _flat(shown, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(shown)


def _finite_or_not(names: list[str]) -> str:
    """Return a text about the tensors `names`, whose values are not finite."""
    if not names:
        return "finite"
    return f"NOT FINITE in {len(names)} tensors: {' '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


def _text(value: object) -> str:
    """Return a value as text: a sequence as its items, a nested one in parentheses."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(f"({_text(part)})" if isinstance(part, list | tuple) else _text(part) for part in value)
    return str(value)
