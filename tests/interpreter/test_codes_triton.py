"""The codes of a scale enlarged, convolved, added and averaged on Triton, against float64 and whole samples."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from support.helpers import make_tiny_var
from torch import Tensor

from actvar.models import VQVAE, quantizer
from actvar_kernels import BackendUnavailableError, add_codes
from actvar_kernels.backend import using_backend
from actvar_kernels.conv3x3.codes import MOST_CHANNELS, reference

DTYPES = [torch.float32, torch.float16]
SIZES = {
    "one code": (2, 32, 16, 1, 2),
    "odd sides": (1, 5, 9, 4, 5),
    "as large": (2, 32, 8, 8, 0),
    "the last step": (1, 32, 16, 13, 16),
    "few channels": (1, 3, 7, 2, 3),
}
"""Images, channels, side of the features, of the codes, and of the next grid."""


def inputs(B: int, C: int, side: int, of_scale: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    tokens = torch.randint(11, (B, of_scale**2), generator=torch.Generator().manual_seed(0))
    weight, bias = normal(C, C, 3, 3, seed=2, std=(9 * C) ** -0.5, dtype=dtype), normal(C, seed=3, dtype=dtype)
    return [normal(B, C, side, side, dtype=dtype), tokens, normal(11, C, seed=1, dtype=dtype), weight, bias]


def added(features: Tensor, *others, function=reference) -> Tensor:
    """Return the sum, then its average, in one row."""
    features = features.clone()
    out = function(features, *others)
    return torch.cat((features.flatten(), out.flatten().to(features.dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES)
def test_the_sum_and_its_average_are_those_of_the_reference(case: str, dtype: torch.dtype, grid_order: str) -> None:
    *sizes, following = SIZES[case]
    tensors = inputs(*sizes, dtype=dtype)

    def exact(features: Tensor, *others: Tensor) -> Tensor:
        return added(features, *others, 0.4, following, features.dtype)

    found = added(*tensors, 0.4, following, function=add_codes)
    assert_close(found, *exact_and_tolerance(exact, *tensors))


def test_the_average_is_written_in_the_dtype_asked_for_as_rows_of_channels() -> None:
    tensors = inputs(2, 32, 8, 3)
    out = add_codes(*tensors, 0.5, 4, torch.float16)
    assert (out.dtype, out.shape) == (torch.float16, (2, 32, 4, 4))
    assert out.flatten(2).transpose(1, 2).is_contiguous()
    assert add_codes(*tensors, 0.5).numel() == 0, "after the last scale there is none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=torch.zeros(1, 3, dtype=torch.int64)), "tokens: expected a square of up to 8 x 8"),
        (dict(tokens=torch.zeros(1, 81, dtype=torch.int64)), "got 81"),
        (dict(weight=torch.ones(4, 4, 1, 1)), "weight"),
        (dict(following=9), "following: expected 0 to 8, got 9"),
    ],
    ids=["no square", "too many", "convolution", "next grid"],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    arguments: dict = dict(zip(("features", "tokens", "codebook", "weight", "bias"), inputs(1, 4, 8, 2), strict=True))
    with pytest.raises(ValueError, match=message):
        add_codes(**arguments | dict(ratio=0.5) | change)


def test_more_channels_than_a_program_holds_are_refused_by_name() -> None:
    with pytest.raises(BackendUnavailableError, match=f"up to {MOST_CHANNELS} channels"):
        add_codes(*inputs(1, MOST_CHANNELS + 1, 2, 1), 0.5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sides of the next grids as they are averaged; no image is decoded."""
    found: list[int] = []

    def counted(*arguments):
        found.append(arguments[6])
        return add_codes(*arguments)

    monkeypatch.setattr(quantizer, "add_codes", counted)
    monkeypatch.setattr(VQVAE, "fhat_to_img", lambda vae, f_hat: f_hat)
    return found


def features_of(var, backend: str) -> Tensor:
    with using_backend(backend):
        return var.autoregressive_infer_cfg(2, torch.tensor([1, 2]), g_seed=0, cfg=1.5)


def test_a_sample_adds_every_scale_by_the_kernels(calls) -> None:
    var = make_tiny_var(depth=1)
    found = features_of(var, "triton")
    assert calls == [*var.patch_nums[1:], 0]
    assert_close(found, features_of(var, "reference").double(), 1e-5)


@pytest.mark.parametrize("what", ["hook of the codes", "hook of the convolution", "watched"])
def test_layers_with_hooks_are_called(calls, what) -> None:
    var = make_tiny_var(depth=1)
    quantize = var.vae_proxy[0].quantize
    seen = []
    if what == "hook of the codes":
        quantize.embedding.register_forward_hook(lambda *_: seen.append(1))
    elif what == "hook of the convolution":
        quantize.quant_resi.at(0).register_forward_hook(lambda *_: seen.append(1))
    else:
        own = quantize.add_scale
        quantize.add_scale = lambda *arguments: seen.append(1) or own(*arguments)
    features_of(var, "triton")
    assert seen
    assert len(calls) < len(var.patch_nums)
