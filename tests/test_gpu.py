"""The kernels on a real GPU: what `benchmarks/gpu.py` checks, and whole models."""

from __future__ import annotations

import pytest
import torch

from actvar import ActVARConfig, apply_patch, load_pretrained
from actvar_kernels.backend import using_backend
from benchmarks.gpu import graphs, numerics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, torch found none"),
]


@pytest.mark.parametrize("check", [numerics, graphs])
def test_every_operation_on_the_gpu(check):
    rows = check()
    assert rows
    assert [row for row in rows if not row["passed"]] == []


@pytest.mark.parametrize("schedule", ["dense", "tile_list", "snap"])
def test_the_bundled_model_gives_the_reference_logits_on_the_gpu(schedule):
    """At rates of 1, so that rounding cannot choose other tokens or experts."""
    vae, var = load_pretrained("fashion-mnist")
    vae.cuda()
    var.cuda().double()
    apply_patch(var, ActVARConfig(token_rates=(1, 1), ffn_rate=1, always_sparse=True, expert_schedule=schedule))
    labels = torch.arange(10, device="cuda")
    tokens = torch.randint(var.V, (10, var.L), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    inputs = vae.quantize.teacher_input(tokens.split([side * side for side in var.patch_nums], dim=1))
    with torch.no_grad():
        exact = logits_on("reference", var, labels, inputs.double())
        var.float()
        reference = (logits_on("reference", var, labels, inputs) - exact).abs().max()
        assert (logits_on("triton", var, labels, inputs) - exact).abs().max() <= 4 * reference


def logits_on(backend: str, var: torch.nn.Module, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    with using_backend(backend):
        return var(labels, inputs).double()
