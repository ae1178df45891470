"""The autoencoder's blocks on the CPU: bit for bit PyTorch's operations in turn, and as exact in C++."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actvar.models.basic_vae import AttnBlock, ResnetBlock, Upsample
from actvar.models.fused_vae import Fused, Map, decoded, encoded
from actvar.models.quantizer import VectorQuantizer, upsampled_by_axis, upsampled_by_products
from actvar.models.vqvae import VQVAE
from actvar_kernels import BackendUnavailableError, cpp_runs
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("side", "larger"), [(1, 16), (2, 16), (5, 16), (13, 16), (24, 32), (6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bicubic_by_axis_gives_the_same_numbers(side: int, larger: int, dtype: torch.dtype) -> None:
    maps = normal(3, 32, side, side, dtype=dtype)
    found = upsampled_by_axis(maps, larger)
    expected = F.interpolate(maps, size=(larger, larger), mode="bicubic")
    assert found.dtype == dtype
    assert found.is_contiguous()
    exact = F.interpolate(maps.double(), size=(larger, larger), mode="bicubic")
    error = (expected.double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 1.01 * error


@pytest.mark.parametrize("side", [1, 2, 5, 13, 16])
def test_codes_are_enlarged_and_convolved_by_two_products(side: int) -> None:
    quantizer = VectorQuantizer(16, 8, (1, 2, 5, 13, 16))
    quantizer.double()
    conv, codes = quantizer.quant_resi.at(0.3), normal(3, 8, side, side, dtype=torch.float64)
    with torch.no_grad():
        expected = conv(codes if side == 16 else F.interpolate(codes, size=(16, 16), mode="bicubic"))
        found = upsampled_by_products(codes, 16, conv, quantizer.embedding.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_on_the_cpu_codes_are_added_as_the_public_code_does() -> None:
    quantizer = VectorQuantizer(16, 8, (1, 2, 4))
    codes, partial = normal(3, 8, 2, 2), normal(3, 8, 4, 4)
    with torch.no_grad():
        expected = partial + quantizer.upsampled(codes, 1)
        assert torch.equal(quantizer.add_scale(1, partial, codes)[0], expected)


def blocks_in_turn(x, resnet, attention, upsample) -> list[torch.Tensor]:
    """What the modules compute, by PyTorch's own."""

    def conv(module, x):
        return F.conv2d(x, module.weight, module.bias, padding=module.padding)

    h = conv(resnet.conv1, F.silu(resnet.norm1(x)))
    h = conv(resnet.conv2, F.silu(resnet.norm2(h)))
    q, k, v = attention.qkv(attention.norm(x)).reshape(2, 3, 32, 36).unbind(1)
    weights = (torch.bmm(q.transpose(1, 2), k) * 32**-0.5).softmax(dim=2)
    attended = x + attention.proj_out(torch.bmm(v, weights.transpose(1, 2)).view(x.shape))
    enlarged = conv(upsample.conv, F.interpolate(x, scale_factor=2, mode="nearest"))
    return [resnet.nin_shortcut(x) + h, attended, enlarged]


@pytest.mark.parametrize("width", [32, 64])
@torch.no_grad()
def test_blocks_on_the_cpu_are_the_modules_in_turn(width: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = (ResnetBlock(32, width), AttnBlock(32), Upsample(32))
    x = normal(2, 32, 6, 6)
    before = x.clone()
    resnet, attention, upsample = modules
    wanted = blocks_in_turn(x, *modules)
    assert all(torch.equal(module(x), due) for module, due in zip(modules, wanted, strict=True))

    def fused(in_cpp: bool) -> list[torch.Tensor]:
        kernels = Fused(on_triton=False, in_cpp=in_cpp)
        maps = kernels.resnet(resnet, Map(x)), kernels.attention(attention, Map(x)), kernels.upsample(upsample, x)
        assert all(found.offset is found.moments is None for found in maps)
        return [found.x for found in maps]

    with using_backend("reference"):
        assert all(map(torch.equal, fused(False), wanted))
    found_in_cpp = fused(cpp_runs(x))
    exact = blocks_in_turn(x.double(), *(module.double() for module in modules))
    assert torch.equal(x, before)
    for found, reference, true in zip(found_in_cpp, wanted, exact, strict=True):
        error, unit = (reference.double() - true).norm(), torch.finfo(torch.float32).eps * true.norm()
        assert (found.double() - true).norm() <= 4 * error + unit / 4


@torch.no_grad()
def test_a_decoder_in_cpp_errs_at_most_four_times_as_much_as_by_pytorch() -> None:
    """By large tiles at its larger maps, which err more than a direct convolution each."""
    vae = VQVAE(vocab_size=16, z_channels=16, ch=64, patch_nums=(1, 16), ch_mult=(1, 2, 2))
    vae.init_weights(torch.Generator().manual_seed(0))
    features = normal(2, 16, 16, 16)
    images = {}
    for backend in ("auto", "reference"):
        with using_backend(backend):
            images[backend] = vae.fhat_to_img(features).double()
    exact = vae.double().fhat_to_img(features.double())
    assert (images["auto"] - exact).abs().max() <= 4 * (images["reference"] - exact).abs().max()


@pytest.fixture
def vae() -> VQVAE:
    vae = VQVAE(vocab_size=16, z_channels=16, ch=32, patch_nums=(1, 4), ch_mult=(1, 2), num_res_blocks=1)
    vae.init_weights(torch.Generator().manual_seed(0))
    return vae.eval()


def both_ways(vae: VQVAE) -> list[torch.Tensor]:
    """An image's features, and the image of them."""
    features = encoded(vae.encoder, vae.quant_conv, normal(2, 3, 8, 8))
    return [features, decoded(vae.post_quant_conv, vae.decoder, features)]


def test_with_gradients_pytorch_computes_it(vae: VQVAE) -> None:
    features = vae.quant_conv(vae.encoder(normal(2, 3, 8, 8)))
    image = vae.decoder(vae.post_quant_conv(features))
    assert image.requires_grad
    assert all(map(torch.equal, both_ways(vae), (features, image)))


def test_frozen_weights_need_no_context_without_gradients(vae: VQVAE) -> None:
    with torch.no_grad():
        due = both_ways(vae)
    assert all(map(torch.equal, both_ways(vae.requires_grad_(False)), due))
    assert torch.is_grad_enabled()


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
def test_the_cpp_backend_asked_for_by_name_has_no_gradient(vae: VQVAE) -> None:
    with using_backend("cpu"):
        with pytest.raises(BackendUnavailableError, match=r"'cpu' backend has no gradient.*use 'auto'"):
            both_ways(vae)
        with torch.no_grad():
            found = both_ways(vae)
    with torch.no_grad():
        assert all(map(torch.equal, found, both_ways(vae)))


@pytest.mark.parametrize(
    "name",
    [
        *("encoder", "encoder.down.0", "encoder.down.0.downsample", "encoder.conv_in", "quant_conv"),
        *("post_quant_conv", "decoder", "decoder.mid", "decoder.mid.block_1", "decoder.mid.attn_1"),
        *("decoder.up.0", "decoder.up.1.upsample", "decoder.norm_out"),
    ],
)
def test_every_module_with_a_hook_is_called(vae: VQVAE, name: str) -> None:
    with torch.no_grad():
        due = both_ways(vae)
    handle = vae.get_submodule(name).register_forward_hook(lambda module, inputs, output: output.flip(3))
    flipped = both_ways(vae)
    with torch.no_grad():
        found = both_ways(vae)
        handle.remove()
        again = both_ways(vae)
    assert not torch.allclose(found[1], due[1], rtol=1e-2, atol=1e-2)
    for of_kernels, of_torch in zip(found, flipped, strict=True):
        torch.testing.assert_close(of_kernels, of_torch, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, again, due))
