"""Several linear layers in one launch, and AdaLN of all blocks by it."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from support.helpers import make_tiny_var, sample
from torch import Tensor, nn

from actvar import ActVARConfig, accelerate, apply_patch, remove_patch
from actvar.families import var_layers
from actvar.families.var import VARFamily
from actvar.models import VQVAE
from actvar_kernels import BackendUnavailableError, linears
from actvar_kernels.linear.linears import MOST_LAYERS, reference

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 1, 64, 64), (3, 5, 72, 33), (2, 40, 130, 70), (2, 130, 64, 64)]
"""Layers, rows, inputs, outputs."""
SMALL = dict(depth=2, width=64, patch_nums=(1, 2, 3))


def layers(N: int, R: int, C: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list, list]:
    weights = [normal(D, C, seed=1 + n, std=C**-0.5, dtype=dtype) for n in range(N)]
    return normal(R, C, dtype=dtype), weights, [normal(D, seed=50 + n, dtype=dtype) for n in range(N)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layer_is_that_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype, grid_order: str) -> None:
    x, weights, biases = layers(*shape, dtype=dtype)
    N = len(weights)
    exact = exact_and_tolerance(lambda x, *both: reference(x, both[:N], both[N:]), x, *weights, *biases)
    assert_close(linears(x, weights, biases), *exact)


def test_weights_without_neighbouring_inputs_are_read_as_they_are_meant() -> None:
    x, weights, biases = layers(2, 3, 16, 8)
    turned = [weight.t().contiguous().t() for weight in weights]
    assert torch.equal(linears(x, turned, biases), linears(x, weights, biases))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights=[]), "weights: expected as many as biases"),
        (dict(biases=[torch.ones(8)]), "got 2 and 1"),
        (dict(weights=[torch.ones(8, 16), torch.ones(8, 15)]), r"weights\[1\]"),
        (dict(biases=[torch.ones(8), torch.ones(7)]), r"biases\[1\]"),
    ],
    ids=["none", "count", "inputs", "outputs"],
)
def test_layers_that_do_not_fit_are_named(change: dict, message: str) -> None:
    arguments: dict = dict(zip(("x", "weights", "biases"), layers(2, 3, 16, 8), strict=True))
    with pytest.raises(ValueError, match=message):
        linears(**arguments | change)


def test_what_the_kernel_does_not_take_is_refused_by_name() -> None:
    x, weights, biases = layers(1, 3, 16, 8)
    with pytest.raises(BackendUnavailableError, match="one dtype for all"):
        linears(x.half(), weights, biases)
    with pytest.raises(BackendUnavailableError, match="without a gradient"):
        linears(x, [weights[0].requires_grad_()], biases)
    with pytest.raises(BackendUnavailableError, match=f"up to {MOST_LAYERS} layers"):
        linears(x, [torch.ones(8, 16)] * (MOST_LAYERS + 1), biases * (MOST_LAYERS + 1))


@pytest.fixture
def joint_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of layers of the joint products, as they happen; no image is decoded."""
    counts: list[int] = []

    def counted(x, weights, biases):
        counts.append(len(weights))
        return linears(x, weights, biases)

    monkeypatch.setattr(var_layers, "linears", counted)
    monkeypatch.setattr(VQVAE, "fhat_to_img", lambda vae, f_hat: f_hat)
    return counts


def alone(blocks, cond):
    """Stand in for `VARFamily.modulations` where every block is asked by itself."""
    return None


@pytest.mark.parametrize("shared_aln", [False, True], ids=["a projection each", "shared"])
def test_a_sample_computes_adaln_of_all_blocks_at_once(joint_products, monkeypatch, shared_aln) -> None:
    var = make_tiny_var(**SMALL, shared_aln=shared_aln)
    plain = sample(var)
    accelerate(var)
    asked = []
    modulation = VARFamily.modulation
    monkeypatch.setattr(VARFamily, "modulation", lambda *arguments: asked.append(1) or modulation(*arguments))
    together = sample(var)
    assert (joint_products, asked) == ([] if shared_aln else [2], [])
    monkeypatch.setattr(VARFamily, "modulations", lambda *_: None)
    assert_close(together, sample(var).double(), 1e-5)
    assert len(asked) == 2
    assert torch.equal(sample(remove_patch(var)), plain)


class Doubled(nn.Linear):
    """Stand for a layer that is more than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("what", ["hook", "subclass", "early weights"])
def test_a_projection_that_must_be_called_leaves_every_block_to_itself(joint_products, what) -> None:
    var = make_tiny_var(**SMALL)
    last = var.blocks[1].ada_lin[1]
    if what == "hook":
        last.register_forward_hook(lambda layer, inputs, output: 2 * output)
    elif what == "subclass":
        last.__class__ = Doubled
    plain = sample(var)
    apply_patch(var, ActVARConfig(token_rates=(1, 1), ffn_rate=1, weights_from=1 if what == "early weights" else 0))
    assert_close(sample(var), plain.double(), 1e-4)
    assert joint_products == []


def test_changed_weights_count_at_the_next_sample(joint_products) -> None:
    var = make_tiny_var(**SMALL)
    accelerate(var)
    sample(var)
    for block in var.blocks:
        block.ada_lin[1].weight.data.mul_(3)
    changed = sample(var)
    remove_patch(var)
    assert_close(changed, sample(var).double(), 1e-4)
    assert joint_products == [2, 2]
