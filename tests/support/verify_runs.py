"""Run `verify` on a tiny model, as a function and as a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actvar import ActVARConfig, apply_patch, save_adapter
from actvar.cli import main
from actvar.models import VAR
from actvar.sampling.request import Sampling
from actvar.verify.report import Report
from actvar.verify.run import verify
from support.helpers import make_tiny_var

PAPER = ActVARConfig(num_experts=8)
ONE_IMAGE = Sampling((1,))
LAST = 3
"""Index of the tiny model's last scale."""


def tiny(dtype: torch.dtype = torch.float32, **changes) -> VAR:
    """Return the tiny model in `dtype`, without gradients."""
    return make_tiny_var(**changes).requires_grad_(False).to(dtype)


def report_of(config: ActVARConfig = PAPER, load: Callable[[torch.dtype], VAR] = tiny, **options) -> Report:
    """Return what `verify` reports of one image; `load` returns the model in a dtype."""
    return verify(load, config, None, ONE_IMAGE, **options)


def exit_code(*arguments: str) -> int:
    """Return the exit code of `actvar verify`, which must not end with success."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    return stopped.value.code


def write_model(folder: Path) -> list[str]:
    """Write the checkpoints of the tiny model and an adapter for it; return the arguments that name them."""
    var = make_tiny_var()
    torch.save(var.state_dict(), folder / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), folder / "vae.pth")
    save_adapter(apply_patch(var, PAPER), folder / "adapter.safetensors")
    names = {"--var": "var.pth", "--vae": "vae.pth", "--adapter": "adapter.safetensors"}
    return [word for option, name in names.items() for word in (option, str(folder / name))]
