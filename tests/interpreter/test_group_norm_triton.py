"""GroupNorm with SiLU and residuals on Triton against float64, and an autoencoder on both backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor
from torch.nn import functional as F

from actvar.models.vqvae import VQVAE
from actvar_kernels import BackendUnavailableError, add_residual, add_residual_moments, group_norm_silu
from actvar_kernels.backend import using_backend
from actvar_kernels.group_norm import reference, triton_kernel
from actvar_kernels.group_norm.tiles import GroupNormTiles, group_norm_tiles

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 160, 9, 7, 32), (2, 20, 5, 3, 4), (3, 7, 1, 1, 7), (2, 12, 4, 6, 1), (1, 320, 3, 3, 32)]
"""Images, channels, height, width, groups."""
EPS = 1e-6


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts in small images: 16 positions a part, of which the last has fewer."""

    def tiles(images: int, positions: int, width: int) -> GroupNormTiles:
        channels = group_norm_tiles(images, positions, width).channels
        return GroupNormTiles(channels, rows=8, loads=2, parts=-(-positions // 16), part=16)

    monkeypatch.setattr(triton_kernel, "group_norm_tiles", tiles)


def inputs(B: int, C: int, H: int, W: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x in channels_last; weight, bias and offset."""
    x = normal(B, H, W, C, dtype=dtype).permute(0, 3, 1, 2)
    return [x, *(normal(C, seed=seed, dtype=dtype) for seed in (1, 2, 3))]


def of_reference(groups: int, silu: bool = True) -> Callable[..., Tensor]:
    return lambda x, weight, bias, offset=None: reference.group_norm_silu(x, weight, bias, groups, EPS, silu, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "C", "H", "W", "groups"), SHAPES)
def test_group_norm_silu_in_any_grid_order(
    B: int, C: int, H: int, W: int, groups: int, dtype: torch.dtype, grid_order: str
) -> None:
    x, weight, bias, offset = inputs(B, C, H, W, dtype)
    exact, tolerance = exact_and_tolerance(of_reference(groups), x, weight, bias, offset)
    out = group_norm_silu(x, weight, bias, groups, EPS, offset=offset)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, exact, tolerance)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_offset", [True, False])
def test_what_is_left_out_is_not_computed(silu: bool, with_offset: bool) -> None:
    x, weight, bias, offset = inputs(2, 20, 5, 5)
    offset = offset if with_offset else None
    exact, tolerance = exact_and_tolerance(of_reference(4, silu), x, weight, bias, offset)
    assert_close(group_norm_silu(x, weight, bias, 4, EPS, silu=silu, offset=offset), exact, tolerance)


@pytest.mark.parametrize("mean", [100.0, -3000.0])
def test_a_mean_far_above_the_deviation_costs_no_more_than_its_rounding(mean: float) -> None:
    x, weight, bias, _ = inputs(2, 160, 9, 7)
    x = x * 0.1 + mean
    exact = of_reference(32)(*(t.double() for t in (x, weight, bias)))
    # the normalised values are off by the rounding of a mean in float32, over the deviation
    rounding = abs(mean) * torch.finfo(torch.float32).eps / 0.1
    assert_close(group_norm_silu(x, weight, bias, 32, EPS), exact, 4 * rounding * weight.abs().max().item())


def test_equal_numbers_are_normalised_to_the_bias() -> None:
    _, weight, bias, _ = inputs(1, 20, 1, 1)
    out = group_norm_silu(torch.full((1, 20, 5, 7), 1000.0), weight, bias, 4, EPS)
    assert_close(out, F.silu(bias.double())[:, None, None].expand(1, 20, 5, 7), 1e-6)


def test_the_tiles_that_are_chosen_cover_images_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "group_norm_tiles", group_norm_tiles)
    for B, C, side in ((1, 160, 24), (3, 640, 5), (2, 48, 17), (1, 20, 33)):
        x, weight, bias, offset = inputs(B, C, side, side + 1)
        exact, tolerance = exact_and_tolerance(of_reference(4), x, weight, bias, offset)
        assert_close(group_norm_silu(x, weight, bias, 4, EPS, offset=offset), exact, tolerance)
        assert torch.equal(add_residual(x, x, offset), x + (x + offset[:, None, None]))


@pytest.mark.parametrize("images", [1, 8, 64, 1000])
@pytest.mark.parametrize("width", [7, 20, 160, 320, 640, 1000])
@pytest.mark.parametrize("positions", [1, 9, 256, 65536])
def test_the_parts_of_an_image_are_none_of_them_empty(images: int, width: int, positions: int) -> None:
    tiles = group_norm_tiles(images, positions, width)
    assert 0 < positions - (tiles.parts - 1) * tiles.part <= tiles.part
    assert tiles.part % tiles.rows == 0
    assert tiles.channels * tiles.rows == 4096


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "C", "H", "W", "groups"), SHAPES)
def test_add_residual_in_any_grid_order(
    B: int, C: int, H: int, W: int, groups: int, dtype: torch.dtype, grid_order: str
) -> None:
    x, bias, _, _ = inputs(B, C, H, W, dtype)
    update = normal(B, C, H, W, seed=5, dtype=dtype)
    out = add_residual(x, update, bias)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, (x.float() + (update.float() + bias.float()[:, None, None])).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "C", "H", "W", "groups"), SHAPES)
def test_a_residual_with_moments_is_the_residual_and_spares_the_norm_a_launch(
    B: int, C: int, H: int, W: int, groups: int, dtype: torch.dtype, grid_order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, _ = inputs(B, C, H, W, dtype)
    update = normal(B, C, H, W, seed=5, dtype=dtype)
    out, moments = add_residual_moments(x, update, bias)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, add_residual(x, update, bias))
    parts = out.double().flatten(2).split(16, dim=2)
    means = torch.stack([part.mean(dim=2) for part in parts], dim=1)
    deviations = torch.stack([part.var(dim=2, correction=0) * part.shape[2] for part in parts], dim=1)
    torch.testing.assert_close(moments, torch.stack((means, deviations), dim=1).float(), rtol=1e-5, atol=1e-4)
    expected = group_norm_silu(out, weight, bias, groups, EPS)
    monkeypatch.setattr(triton_kernel, "_channel_moments", None)  # which is not launched
    exact, tolerance = exact_and_tolerance(of_reference(groups), out, weight, bias)
    assert_close(group_norm_silu(out, weight, bias, groups, EPS, moments=moments), exact, tolerance)
    assert expected.shape == exact.shape


def test_moments_of_a_large_mean_keep_their_digits() -> None:
    x, weight, bias, _ = inputs(2, 20, 9, 7)
    x, update = x * 0.1 - 3000, torch.zeros(2, 20, 9, 7)
    out, moments = add_residual_moments(x, update, torch.zeros(20))
    exact = of_reference(4)(*(t.double() for t in (out, weight, bias)))
    rounding = 3000 * torch.finfo(torch.float32).eps / 0.1
    found = group_norm_silu(out, weight, bias, 4, EPS, moments=moments)
    assert_close(found, exact, 4 * rounding * weight.abs().max().item())


@pytest.mark.parametrize(("B", "C", "positions"), [(1, 160, 576), (3, 640, 25), (2, 20, 1)])
def test_the_reference_measures_the_same_parts(B: int, C: int, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "group_norm_tiles", group_norm_tiles)
    x, _, bias, _ = inputs(B, C, positions, 1)
    (out, moments), (plain, of_reference_) = (
        run(x, x, bias) for run in (add_residual_moments, reference.add_residual_moments)
    )
    assert torch.equal(out, plain)
    torch.testing.assert_close(moments, of_reference_, rtol=1e-5, atol=1e-3)


def test_a_residual_is_in_the_wider_dtype() -> None:
    x, bias, _, _ = inputs(1, 20, 3, 3)
    for one, other in ((x, x.half()), (x.half(), x)):
        out = add_residual(one, other, bias)
        assert out.dtype == torch.float32
        assert torch.equal(out, one.float() + (other.float() + bias[:, None, None]))


def test_bfloat16_is_normalised_in_float32_and_rounded_once() -> None:
    x, weight, bias, offset = inputs(2, 20, 5, 5, torch.bfloat16)
    exact = of_reference(4)(*(t.double() for t in (x, weight, bias, offset)))
    out = group_norm_silu(x, weight, bias, 4, EPS, offset=offset)
    # the interpreter cuts bfloat16 off where a GPU rounds it: an error of up to 2^-7 instead of 2^-8
    assert ((out.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("layout", ["contiguous", "a part of a wider one", "a part of more channels"])
def test_other_layouts_give_what_channels_last_gives(layout: str) -> None:
    x, weight, bias, offset = inputs(2, 20, 4, 6)
    expected = group_norm_silu(x, weight, bias, 4, EPS), add_residual(x, x, bias)
    if layout == "contiguous":
        other = x.contiguous()
    elif layout == "a part of a wider one":
        other = F.pad(x, (1, 2), value=torch.nan)[:, :, :, 1:-2]
    else:
        other = torch.cat((x * torch.nan, x, x * torch.nan), dim=1)[:, 20:40]
    assert other.stride() != x.stride()
    assert torch.equal(group_norm_silu(other, weight, bias, 4, EPS), expected[0])
    assert torch.equal(add_residual(other, other, bias), expected[1])
    weight, offset = (torch.stack((t, t * torch.nan), dim=1)[:, 0] for t in (weight, offset))
    assert torch.equal(group_norm_silu(other, weight, bias, 4, EPS), expected[0])


def test_nan_in_one_image_leaves_the_others_alone() -> None:
    x, weight, bias, _ = inputs(3, 20, 5, 5)
    clean = group_norm_silu(x, weight, bias, 4, EPS)
    x[1] = torch.nan
    out = group_norm_silu(x, weight, bias, 4, EPS)
    assert out[1].isnan().all()
    assert all(torch.equal(out[image], clean[image]) for image in (0, 2))


def test_no_images_give_none() -> None:
    x, weight, bias, _ = inputs(0, 20, 5, 5)
    assert group_norm_silu(x, weight, bias, 4, EPS).shape == add_residual(x, x, bias).shape == x.shape


def test_the_operators_pass_the_checks_of_torch() -> None:
    x, *vectors = (t.detach().requires_grad_() for t in inputs(2, 8, 3, 2))
    operators = torch.ops.actvar_kernels
    torch.library.opcheck(operators.group_norm_silu.default, (x, *vectors[:2], 4, EPS, True, vectors[2], None, None))
    torch.library.opcheck(
        operators.group_norm_silu.default, (x.contiguous(), *vectors[:2], 4, EPS, False, None, None, None)
    )
    torch.library.opcheck(operators.add_residual.default, (x, x.detach().half(), vectors[0]))
    torch.library.opcheck(operators.add_residual_moments.default, (x, x.detach().half(), vectors[0]))
    moments = add_residual_moments(x.detach(), x.detach(), vectors[0].detach())[1]
    torch.library.opcheck(operators.group_norm_silu.default, (x, *vectors[:2], 4, EPS, True, None, moments, None))


def test_the_gradients_are_those_of_the_reference() -> None:
    tensors = inputs(2, 8, 3, 2)

    def gradients(operation: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        output = operation(*leaves)
        return torch.autograd.grad(output, leaves, normal(*output.shape, seed=99).float())

    def ours(x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, 4, EPS, offset=offset)

    assert all(map(torch.equal, gradients(ours), gradients(of_reference(4))))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_gives_the_same(backend: str) -> None:
    x, weight, bias, offset = inputs(2, 8, 3, 2)

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        return add_residual(x, group_norm_silu(x, weight, bias, 4, EPS, offset=offset), bias) + 1

    expected = add_residual(x, group_norm_silu(x, weight, bias, 4, EPS, offset=offset), bias) + 1
    assert torch.equal(compiled(x), expected)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight, bias, offset = inputs(2, 8, 3, 2)
    for match, run in (
        (r"groups: expected a divisor of 8 channels, got 3", lambda: group_norm_silu(x, weight, bias, 3, EPS)),
        (r"weight: expected shape \[8\], got \[7\]", lambda: group_norm_silu(x, weight[:7], bias, 4, EPS)),
        (r"offset: expected shape \[8\]", lambda: group_norm_silu(x, weight, bias, 4, EPS, offset=offset[:7])),
        (r"x: expected shape \[any, any, any, any\]", lambda: group_norm_silu(x[0], weight, bias, 4, EPS)),
        (r"moments: expected shape \[2, 2, any, 8\]", lambda: group_norm_silu(x, weight, bias, 4, EPS, moments=x)),
        (r"update: expected shape \[2, 8, 3, 2\]", lambda: add_residual(x, x[:1], bias)),
        (r"bias: expected shape \[8\]", lambda: add_residual(x, x, bias[:1])),
    ):
        with pytest.raises(ValueError, match=match):
            run()
    for run in (lambda: group_norm_silu(x.double(), weight, bias, 4, EPS), lambda: add_residual(x.double(), x, bias)):
        with pytest.raises(BackendUnavailableError, match="float32, float16 and bfloat16"):
            run()


@pytest.fixture
def vae() -> VQVAE:
    """Widths of 32 and 64 in groups of 1 and 2, biases that matter."""
    vae = VQVAE(64, 32, 32, (1, 2, 3), ch_mult=(1, 2, 2), num_res_blocks=1)
    generator = torch.Generator().manual_seed(0)
    vae.init_weights(generator)
    for parameter in vae.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return vae.eval()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@torch.no_grad()
def test_an_autoencoder_gives_what_the_reference_gives(vae: VQVAE, dtype: torch.dtype) -> None:
    features, image = normal(2, 32, 3, 3).float(), normal(1, 3, 12, 12, seed=1).float()

    def outputs(backend: str) -> list[Tensor]:
        with using_backend(backend), torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            return [vae.fhat_to_img(features), vae.img_to_features(image)]

    reference, kernels = outputs("reference"), outputs("triton")
    vae.double()
    with using_backend("reference"):
        exact = [vae.fhat_to_img(features.double()), vae.img_to_features(image.double())]
    assert kernels[0].is_contiguous()
    for found, plain, true in zip(kernels, reference, exact, strict=True):
        assert found.dtype == plain.dtype
        assert_close(found, true, 4 * (plain - true).abs().max().item())


def test_with_gradients_the_autoencoder_is_the_reference(vae: VQVAE) -> None:
    image = normal(1, 3, 12, 12).float()
    outputs = {}
    for backend in ("reference", "triton"):
        with using_backend(backend):
            outputs[backend] = vae(image)
    assert torch.equal(outputs["triton"][0], outputs["reference"][0])
