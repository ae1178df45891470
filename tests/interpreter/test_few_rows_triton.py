"""Linear layers of few rows, with the norm ahead or the residual behind in one launch, and dense blocks of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from support.helpers import make_tiny_var
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from actvar import ActVARConfig, Execution, apply_patch
from actvar.models import VAR, VQVAE
from actvar.sparse import block
from actvar_kernels import BackendUnavailableError, Gated, linear, linear_residual, norm_linear
from actvar_kernels.linear import few_rows, triton_few_rows
from actvar_kernels.linear.few_rows import (
    MOST_CHANNELS,
    MOST_ROWS,
    linear_residual_reference,
    norm_linear_reference,
)
from actvar_kernels.linear.tiles import FewRowsTiles
from actvar_kernels.triton_backend.few_rows import using_few_rows
from actvar_kernels.triton_backend.row_form import NormedRows

DTYPES = [torch.float32, torch.float16]
SHAPES = [
    (1, 1, 64, 48),
    (3, 2, 20, 24),
    (2, 1, 72, 33),
    (1, 7, 130, 70),
    (2, 9, 192, 100),
    (2, 25, 320, 64),
    (16, 4, 256, 96),
    (2, 4, 1024, 40),
    (1, 3, 1920, 20),
]
"""Sequences, tokens, channels, outputs."""


def normed(R: int, L: int, C: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, scale and shift as a block has them, views of one tensor, weight and bias."""
    modulation = normal(R, 1, 6, C, seed=2, dtype=dtype).unbind(2)
    layer = normal(D, C, seed=1, std=C**-0.5, dtype=dtype), normal(D, seed=3, dtype=dtype)
    return [normal(R, L, C, dtype=dtype), modulation[2], modulation[4], *layer]


def added(R: int, L: int, D: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """h, weight, bias, rows, and the gate as a block has it, a view."""
    layer = normal(C, D, seed=1, std=D**-0.5, dtype=dtype), normal(C, seed=3, dtype=dtype)
    gamma = normal(R, 1, 6, C, seed=2, dtype=dtype).unbind(2)[1]
    return [normal(R, L, D, dtype=dtype), *layer, normal(R, L, C, seed=5, dtype=dtype), gamma]


def residual(h: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, gamma: Tensor) -> Tensor:
    return linear_residual(h, weight, bias, Gated(rows, gamma))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_gelu", [False, True], ids=["plain", "GELU"])
def test_a_norm_ahead_of_a_layer(shape: tuple[int, ...], dtype: torch.dtype, with_gelu: bool) -> None:
    tensors = normed(*shape, dtype=dtype)
    found = norm_linear(*tensors, with_gelu=with_gelu)
    assert found.dtype == dtype
    reference = functools.partial(norm_linear_reference, with_gelu=with_gelu)
    assert_close(found, *exact_and_tolerance(reference, *tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_residual_behind_a_layer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = added(*shape, dtype=dtype)
    found = residual(*tensors)
    assert found.dtype == dtype
    assert_close(found, *exact_and_tolerance(linear_residual_reference, *tensors))


def test_tiles_of_fewer_rows_and_of_more_parts_give_the_same(monkeypatch) -> None:
    tensors, onto = normed(2, 9, 192, 40), added(2, 9, 192, 40)
    expected = norm_linear(*tensors), residual(*onto)
    tile = FewRowsTiles(rows=8, columns=32, step=8, parts=8, warps=4, stages=1)
    monkeypatch.setattr(triton_few_rows, "norm_linear_tiles", lambda *_: tile)
    monkeypatch.setattr(triton_few_rows, "linear_residual_tiles", lambda *_: tile._replace(step=128))
    for found, due in zip((norm_linear(*tensors), residual(*onto)), expected, strict=True):
        torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-5)


def test_the_product_is_rounded_before_the_gate_as_one_by_itself_is() -> None:
    h, weight, bias, rows, gamma = added(2, 9, 192, 64, torch.float16)
    product = F.linear(h.double(), weight.double(), bias.double()).half().double()
    found = residual(h, weight, bias, rows, 64 * gamma)
    due = (rows.double() + 64 * gamma.double() * product).half()
    assert (found != due).float().mean() < 0.01, "sums in float32 seldom round to another float16"
    unrounded = F.linear(h.double(), weight.double(), bias.double())
    assert ((rows.double() + 64 * gamma.double() * unrounded).half() != due).float().mean() > 0.2


def test_the_rows_are_rounded_before_the_product_as_those_of_a_norm_are() -> None:
    x, scale, shift, *_ = normed(2, 3, 64, 64, torch.float16)
    identity, zeros = torch.eye(64, dtype=torch.float16), torch.zeros(64, dtype=torch.float16)
    exact = F.layer_norm(x.double(), (64,), eps=1e-6) * (1 + scale.double()) + shift.double()
    found = norm_linear(x, scale, shift, 1024 * identity, zeros) / 1024
    assert (found != exact.half()).float().mean() < 0.01, "sums in float32 seldom round to another float16"


def test_views_give_what_copies_give() -> None:
    x, scale, shift, weight, bias = normed(2, 4, 64, 40)
    h, _, _, rows, gamma = added(2, 4, 64, 40)
    expected = (
        norm_linear(x, scale.clone(), shift.clone(), weight, bias),
        residual(h, weight, bias, rows, gamma.clone()),
    )
    wide_x, wide_h, wide_rows = (torch.cat((t * torch.nan, t, t * torch.nan), dim=1)[:, 4:8] for t in (x, h, rows))
    turned = weight.t().contiguous().t()
    assert torch.equal(norm_linear(wide_x, scale, shift, turned, bias), expected[0])
    assert torch.equal(residual(wide_h, turned, bias, wide_rows, gamma), expected[1])
    assert torch.equal(linear(NormedRows(x, scale, shift), weight, bias), expected[0])


def test_nan_in_one_row_leaves_the_others_alone() -> None:
    x, *layer = normed(2, 4, 64, 40)
    h, *onto = added(2, 4, 64, 40)
    for run, rows, others in ((norm_linear, x, layer), (residual, h, onto)):
        clean = run(rows, *others)
        rows = rows.clone()
        rows[1, 2] = torch.nan
        found = run(rows, *others)
        assert found[1, 2].isnan().all()
        found[1, 2] = clean[1, 2]
        assert torch.equal(found, clean)


def test_as_operators_they_are_the_same_and_their_products_are_counted() -> None:
    tensors, onto = normed(2, 4, 64, 40), added(2, 4, 64, 40)
    expected = norm_linear(*tensors, with_gelu=True), residual(*onto)
    with FlopCounterMode(display=False) as counter:
        found = norm_linear(*tensors, with_gelu=True), residual(*onto)
    assert all(map(torch.equal, found, expected))
    assert counter.get_total_flops() == 2 * (2 * 8 * 64 * 40)
    torch.library.opcheck(torch.ops.actvar_kernels.norm_linear, (*tensors, True))
    torch.library.opcheck(torch.ops.actvar_kernels.linear_residual, tuple(onto))


def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    for run, make in ((norm_linear, normed), (residual, added)):
        with pytest.raises(BackendUnavailableError, match=f"up to {MOST_ROWS} rows"):
            run(*make(5, 13, 64, 32))
        tensors = make(1, 2, 64, 32)
        with pytest.raises(BackendUnavailableError, match="rows and layer in one dtype"):
            run(tensors[0].half(), *tensors[1:])
        with pytest.raises(BackendUnavailableError, match="without a gradient"):
            run(tensors[0].requires_grad_(), *tensors[1:])
    with pytest.raises(BackendUnavailableError, match=f"norms of up to {MOST_CHANNELS} channels"):
        norm_linear(*normed(1, 1, MOST_CHANNELS + 1, 8))


@pytest.mark.parametrize(
    ("run", "make", "place", "name"),
    [
        (norm_linear, normed, 1, "scale"),
        (norm_linear, normed, 3, "weight"),
        (norm_linear, normed, 4, "bias"),
        (residual, added, 1, "weight"),
        (residual, added, 2, "bias"),
        (residual, added, 3, "rows"),
        (residual, added, 4, "gamma"),
    ],
)
def test_shapes_that_do_not_fit_are_named(run: Callable, make: Callable, place: int, name: str) -> None:
    tensors = make(2, 3, 64, 32)
    tensors[place] = tensors[place][..., :-1]
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        run(*tensors)


SMALL = dict(depth=2, width=64, patch_nums=(1, 2))
ALL_ON = ActVARConfig(token_rates=(1, 1), ffn_rate=1)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the tokens of blocks that ran in 5 launches, as they run; no image is decoded, and tiles are large."""
    tokens: list[int] = []
    run = block.dense_block_of_few_rows

    def counted(self, x, sample, scale, call):
        tokens.append(scale.tokens)
        return run(self, x, sample, scale, call)

    tile = FewRowsTiles(rows=16, columns=64, step=64, parts=4, warps=4, stages=1)
    monkeypatch.setattr(triton_few_rows, "norm_linear_tiles", lambda *_: tile)
    monkeypatch.setattr(triton_few_rows, "linear_residual_tiles", lambda *_: tile._replace(step=256))
    monkeypatch.setattr(VQVAE, "fhat_to_img", lambda vae, f_hat: f_hat)
    monkeypatch.setattr(block, "dense_block_of_few_rows", counted)
    return tokens


def rows_of_blocks(var: VAR) -> list[Tensor]:
    """Return what the last block returns at every scale, and the features of two images at the end."""
    found: list[Tensor] = []
    run = type(var).run_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(var), "run_blocks", lambda *args: found.append(run(*args)) or found[-1])
        found.append(var.autoregressive_infer_cfg(2, torch.tensor([1, 2]), g_seed=0, cfg=1.5))
    return found


def assert_same(found: list[Tensor], due: list[Tensor]) -> None:
    """Kernels of float32 are as close to each other as two orders of a sum."""
    assert len(found) == len(due) > 1
    for a, b in zip(found, due, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dense_blocks_of_few_rows_give_what_they_give_in_seven_launches(fused: list[int]) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ALL_ON)
    due = rows_of_blocks(var)
    assert fused == [], "nothing was measured"
    with using_few_rows(True):
        assert_same(rows_of_blocks(var), due)
    assert fused == [1, 1, 4, 4]
    fused.clear()
    with using_few_rows(True):
        var.blocks[0].register_forward_hook(lambda *_: None)
        assert_same(rows_of_blocks(var), due)
    assert len(fused) == 4, "a hook on a block sees its input and what it returns"


@pytest.mark.parametrize(("limit", "most"), [("MOST_ROWS", 15), ("MOST_CHANNELS", 63)])
def test_more_rows_and_wider_ones_take_seven_launches(limit: str, most: int, fused: list[int], monkeypatch) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ALL_ON)
    monkeypatch.setattr(few_rows, limit, most)
    with using_few_rows(True):
        rows_of_blocks(var)
    assert fused == ([1, 1] if limit == "MOST_ROWS" else []), "4 sequences of 4 tokens are 16 rows"


def test_blocks_that_choose_tokens_or_experts_take_their_own_launches(fused: list[int]) -> None:
    config = ActVARConfig(scales=(-1,), token_rates=((1.0, 0.5),), ffn_rate=((0.5, 1.0),), num_experts=4)
    var = apply_patch(make_tiny_var(**SMALL), config)
    due = rows_of_blocks(var)
    with using_few_rows(True):
        assert_same(rows_of_blocks(var), due)
    assert fused == [1, 1], "at the last scale one block routes, and the other selects"


def test_rows_without_guidance_are_few_as_well(fused: list[int]) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ActVARConfig(token_rates=(1, 1), ffn_rate=1, guidance_until=-1))
    due = rows_of_blocks(var)
    with using_few_rows(True):
        assert_same(rows_of_blocks(var), due)
    assert len(fused) == 4


def test_a_block_behind_one_of_seven_launches_adds_what_that_one_left(fused: list[int], monkeypatch) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ALL_ON)
    due = rows_of_blocks(var)
    sums = []
    add = block.add_normalize
    monkeypatch.setattr(block, "add_normalize", lambda *args: sums.append(args[0].shape[1]) or add(*args))
    var.blocks[0].ffn.register_forward_hook(lambda *_: None)  # this one is called
    with using_few_rows(True):
        assert_same(rows_of_blocks(var), due)
    assert fused == [1, 4]
    assert sums == [1, 1, 4, 4], "in the first block, and ahead of the second one"


@pytest.mark.parametrize("part", ["attn", "attn.proj", "ffn", "ffn.fc1", "ln_wo_grad"])
def test_layers_that_must_be_called_are(part: str, fused: list[int]) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ALL_ON)
    calls = []
    for each in var.blocks:
        each.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    due = rows_of_blocks(var)
    calls.clear()
    with using_few_rows(True):
        assert_same(rows_of_blocks(var), due)
    assert fused == []
    assert len(calls) >= 4


def test_what_is_changed_in_a_layer_of_adaln_counts(fused: list[int]) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ALL_ON)
    for each in var.blocks:
        each.ada_lin.register_forward_hook(lambda _layer, _inputs, output: 2 * output)
    due = rows_of_blocks(var)
    with using_few_rows(True):
        assert_same(rows_of_blocks(var), due)
    assert len(fused) == 4


def test_blocks_in_eight_bits_and_under_autocast_take_their_own_launches(fused: list[int]) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ALL_ON, Execution(weights="int8"))
    with using_few_rows(True):
        rows_of_blocks(var)
        apply_patch(var, ALL_ON)
        with torch.autocast("cpu", torch.float16):
            rows_of_blocks(var)
    assert fused == []


def test_a_block_with_a_gradient_and_a_compiled_one_take_seven_launches(fused: list[int]) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ALL_ON)
    x, cond = normal(2, 1, 64, dtype=torch.float32), normal(2, 64, dtype=torch.float32)
    run = torch.compile(var.blocks[0], backend="eager", fullgraph=True)

    def out(call: Callable) -> Tensor:
        var.blocks[0].attn.kv_caching(True)
        found = call(x, cond, None)
        var.blocks[0].attn.kv_caching(False)
        return found

    with using_few_rows(True):
        out(var.blocks[0]).sum().backward()
        assert var.blocks[0].ffn.fc1.weight.grad is not None
        with torch.no_grad():
            out(run)
            assert fused == []
            out(var.blocks[0])
    assert fused == [1]
