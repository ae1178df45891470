"""The expert FFN's kernels: against float64, and bit for bit where schedules and orders must not matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor

from actvar_kernels import BackendUnavailableError, Residual, add_normalize, expert_ffn, expert_ffn_scatter
from actvar_kernels.expert_ffn import reference, triton_kernel
from actvar_kernels.expert_ffn.op import expert_ffn_flops, expert_ffn_scatter_flops
from actvar_kernels.expert_ffn.triton_sort import sort_by_experts
from actvar_kernels.scatter.reference import scatter_rows
from actvar_kernels.triton_backend import tiles
from actvar_kernels.triton_backend.tiles import ExpertTiles, ProductTiles, SortTiles
from actvar_kernels.triton_backend.tuning_table import Entry

# Experts of 48 hidden units: 32 and 16 beside them in the first product, three steps of 16 in the second.
PRODUCTS = dict(up=ProductTiles(32, 16, 64, 4, 1), down=ProductTiles(64, 0, 16, 4, 1), parts=2)
VARIANTS = {
    "pointers": ExpertTiles(rows=128, **PRODUCTS, descriptors=False),
    "descriptors": ExpertTiles(rows=128, **PRODUCTS, descriptors=True),
    "smaller tiles": ExpertTiles(rows=64, **PRODUCTS, descriptors=False),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tiles, "expert_ffn_tiles", lambda *_: VARIANTS[request.param])
    return request.param


@pytest.fixture
def small_sort_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SORT", SortTiles(rows=64, chunk=128, warps=4))


def ffn_weights(C: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """fc1 weight and bias, fc2 weight and bias."""
    shapes = [((D, C), C**-0.5), ((D,), 0.3), ((C, D), D**-0.5), ((C,), 0.3)]
    return [normal(*shape, seed=20 + seed, std=std, dtype=dtype) for seed, (shape, std) in enumerate(shapes)]


def random_mask(*shape: int, active: int, seed: int = 30) -> Tensor:
    order = normal(*shape, seed=seed).argsort(dim=-1)
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, order[..., :active], True)


def block_inputs(R: int, L: int, K: int, C: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """rest, index, rows, gamma, u and the weights; gamma as a block passes it, one of six in a row."""
    gamma = normal(R, 1, 6, C, seed=1, dtype=dtype).unbind(2)[2]
    index = normal(R, L, seed=2).argsort(dim=1)[:, :K]
    rest, rows, u = (normal(R, size, C, seed=seed, dtype=dtype) for seed, size in ((3, L), (4, K), (5, K)))
    return [rest, index, rows, gamma, u, *ffn_weights(C, D, dtype)]


def scattered(mask: Tensor, active: int, schedule: str = "auto") -> Callable[..., Tensor]:
    def run(rest, index, rows, gamma, u, *weights) -> Tensor:
        rest = None if rest is None else rest.clone()
        return expert_ffn_scatter(rest, index, rows, u, mask, active, *weights, gamma, schedule)

    return run


def scattered_by_reference(mask: Tensor) -> Callable[..., Tensor]:
    def run(rest, index, rows, gamma, u, *weights) -> Tensor:
        update = reference.expert_ffn(u, mask, *weights)
        return rows + gamma * update if index is None else scatter_rows(rest, index, rows, update, gamma)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["dense", "tile_list"])
@pytest.mark.parametrize("of_all_tokens", [False, True], ids=["scattered", "of all tokens"])
def test_the_result_is_the_reference_in_float64(variant, dtype, schedule, of_all_tokens):
    tensors = block_inputs(2, 90, 75, 72, 4 * 48, dtype)
    mask = random_mask(2, 75, 4, active=3)
    if of_all_tokens:
        tensors[:2] = None, None
    exact, tolerance = exact_and_tolerance(scattered_by_reference(mask), *tensors)
    actual = scattered(mask, 3, schedule)(*tensors)
    assert actual.dtype == dtype
    assert_close(actual, exact, tolerance)


@pytest.mark.parametrize("schedule", ["dense", "tile_list"])
@pytest.mark.parametrize(
    ("tokens", "C", "experts", "width", "active"),
    [
        (1, 64, 4, 48, 3),
        (1, 5, 1, 3, 1),
        (70, 33, 1, 20, 1),
        (70, 65, 4, 12, 1),
        (70, 40, 16, 20, 12),
        (70, 64, 32, 12, 24),
    ],
)
def test_any_number_of_tokens_channels_and_experts(schedule, tokens, C, experts, width, active):
    tensors = [None, None, *block_inputs(1, tokens, tokens, C, experts * width)[2:]]
    mask = random_mask(1, tokens, experts, active=active)
    exact, tolerance = exact_and_tolerance(scattered_by_reference(mask), *tensors)
    assert_close(scattered(mask, active, schedule)(*tensors), exact, tolerance)


def test_neither_tiles_nor_the_order_of_programs_change_a_bit(variant, grid_order):
    tensors = block_inputs(1, 150, 140, 64, 4 * 48)
    mask = random_mask(1, 140, 4, active=2)
    exact, tolerance = exact_and_tolerance(scattered_by_reference(mask), *tensors)
    assert_close(scattered(mask, 2, "dense")(*tensors), exact, tolerance)
    assert_close(scattered(mask, 2, "tile_list")(*tensors), exact, tolerance)


def test_the_order_of_the_tokens_changes_no_bit(variant):
    _, _, rows, gamma, u, *weights = block_inputs(1, 200, 200, 64, 4 * 48)
    mask, order = random_mask(1, 200, 4, active=2), normal(200, seed=9).argsort()
    expected = scattered(mask, 2, "tile_list")(None, None, rows, gamma, u, *weights)[:, order]
    mixed = scattered(mask[:, order], 2, "tile_list")(None, None, rows[:, order], gamma, u[:, order], *weights)
    assert torch.equal(mixed, expected)


def test_an_expert_that_no_token_of_a_tile_wants_is_not_read(variant):
    """The first half of the sorted tokens wants experts 0 and 2, the other half 1 and 2, none wants expert 3."""
    *tensors, fc1_weight, fc1_bias, fc2_weight, fc2_bias = block_inputs(1, 256, 256, 64, 4 * 48)
    mask = torch.zeros(1, 256, 4, dtype=torch.bool)
    mask[..., 2] = mask[:, ::2, 0] = mask[:, 1::2, 1] = True
    expected = scattered(mask, 2, "tile_list")(*tensors, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    for weight in (fc1_weight, fc1_bias, fc2_weight.T):
        weight[3 * 48 :] = torch.nan
    assert torch.equal(scattered(mask, 2, "tile_list")(*tensors, fc1_weight, fc1_bias, fc2_weight, fc2_bias), expected)
    for weight in (fc1_weight, fc1_bias, fc2_weight.T):
        weight[48 : 2 * 48] = torch.nan
    poisoned = scattered(mask, 2, "tile_list")(*tensors, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    touched = poisoned.isnan().any(dim=-1)[0, tensors[1][0]]
    assert torch.equal(touched, mask[0, :, 1])
    assert torch.equal(poisoned[~poisoned.isnan()], expected[~poisoned.isnan()])


def test_the_first_product_leaves_out_what_no_token_of_a_tile_wants(variant, monkeypatch):
    tensors = block_inputs(1, 256, 256, 64, 4 * 48)
    mask = torch.zeros(1, 256, 4, dtype=torch.bool)
    mask[..., 2] = mask[:, ::2, 0] = mask[:, 1::2, 1] = True
    hidden = []

    class Capture:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda h, *_, **__: hidden.append(h if isinstance(h, Tensor) else h.base)

    monkeypatch.setattr(triton_kernel, "_down", Capture())
    scattered(mask, 2, "tile_list")(*tensors)
    by_expert = hidden[0].unflatten(1, (4, 48))
    ran = reference.sort_key(mask[0]).sort(stable=True).indices
    assert torch.equal(by_expert.isnan().all(dim=2), ~mask[0, ran])
    assert torch.equal(by_expert.isnan().any(dim=2), ~mask[0, ran])


def test_tokens_may_want_every_expert_or_none(variant):
    tensors = block_inputs(1, 150, 140, 64, 4 * 48)
    for mask in (torch.ones(1, 140, 4, dtype=torch.bool), torch.zeros(1, 140, 4, dtype=torch.bool)):
        exact, tolerance = exact_and_tolerance(scattered_by_reference(mask), *tensors)
        for schedule in ("tile_list", "dense"):
            assert_close(scattered(mask, 4, schedule)(*tensors), exact, max(tolerance, 1e-6))


MASKS = {
    "random": lambda T, N: random_mask(T, N, active=max(1, 3 * N // 4)),
    "any number of experts": lambda T, N: normal(T, N, seed=7) > 0,
    "few kinds": lambda T, N: random_mask(3, N, active=(N + 1) // 2)[torch.arange(T) % 3],
    "all equal": lambda T, N: torch.ones(T, N, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(1, 4), (64, 1), (65, 16), (300, 5), (300, 32), (256, 16)],
)
def test_the_sort_is_the_stable_sort_by_key(small_sort_blocks, grid_order, kind, tokens, experts):
    mask = MASKS[kind](tokens, experts)
    order, bits = sort_by_experts(mask.view(torch.uint8))
    expected = reference.sort_key(mask).sort(stable=True).indices
    assert torch.equal(order.long(), expected)
    powers = 2 ** torch.arange(experts)
    assert torch.equal(bits.long() % 2**32, (mask[expected] * powers).sum(dim=1))


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
def test_expert_ffn_takes_any_leading_shape(shape):
    u, weights, mask = normal(*shape, 24, dtype=torch.float32), ffn_weights(24, 96), random_mask(*shape, 4, active=2)
    exact, tolerance = exact_and_tolerance(lambda u, *w: reference.expert_ffn(u, mask, *w), u, *weights)
    assert_close(expert_ffn(u, mask, 2, *weights), exact, tolerance)


@pytest.mark.parametrize("schedule", ["dense", "tile_list"])
def test_expert_ffn_runs_on_both_schedules(variant, monkeypatch, schedule):
    entry = Entry("float32", 140, 64, 48, schedule, rows=128, columns=64, milliseconds=1.0)
    monkeypatch.setattr(triton_kernel, "tuned_expert_ffn", lambda *_: entry)
    u, weights, mask = normal(140, 64, dtype=torch.float32), ffn_weights(64, 4 * 48), random_mask(140, 4, active=2)
    exact, tolerance = exact_and_tolerance(lambda u, *w: reference.expert_ffn(u, mask, *w), u, *weights)
    assert_close(expert_ffn(u, mask, 2, *weights), exact, tolerance)


def test_rows_are_put_into_rest_in_place_whatever_the_strides():
    rest, index, rows, gamma, u, *weights = block_inputs(2, 9, 5, 24, 48)
    mask = random_mask(2, 5, 4, active=3)
    expected = scattered_by_reference(mask)(rest.clone(), index, rows, gamma, u, *weights)
    longer = torch.cat((rest, rest), dim=1)
    view = longer[:, :9]
    strided = (
        index.repeat_interleave(2, dim=1)[:, ::2],
        rows.transpose(0, 1).contiguous().transpose(0, 1),
        u.repeat_interleave(2, dim=2)[..., ::2],
        mask.transpose(1, 2).contiguous().transpose(1, 2),
    )
    out = expert_ffn_scatter(view, strided[0], *strided[1:], 3, *weights, gamma.repeat_interleave(2, dim=2)[..., ::2])
    assert out is view
    torch.testing.assert_close(out, expected)
    assert torch.equal(longer[:, 9:], rest)
    untouched = torch.ones(2, 9, dtype=torch.bool).scatter_(1, index, False)
    assert torch.equal(out[untouched], rest[untouched])


def deferred_sum(R: int, L: int, K: int, C: int, dtype: torch.dtype = torch.float32) -> Residual:
    """Of an x of L tokens and an update of K; gamma as a block has it, one of six in a row."""
    x, update = (normal(R, size, C, seed=seed, dtype=dtype) for seed, size in ((40, L), (41, K)))
    return Residual(x, update, normal(R, 1, 6, C, seed=42, dtype=dtype).unbind(2)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["dense", "tile_list"])
@pytest.mark.parametrize("kept", [75, 90], ids=["scattered", "of all tokens"])
def test_a_deferred_sum_gives_what_its_rows_give(variant, dtype, schedule, kept):
    rest, index, _, gamma, u, *weights = block_inputs(2, 90, kept, 72, 4 * 48, dtype)
    residual, mask = deferred_sum(2, 90, kept, 72, dtype), random_mask(2, kept, 4, active=3)
    if kept == 90:
        rest = index = None
    rows = add_normalize(residual.x, index, residual.update, residual.gamma, gamma, gamma)[0]
    run = scattered(mask, 3, schedule)
    assert torch.equal(run(rest, index, residual, gamma, u, *weights), run(rest, index, rows, gamma, u, *weights))


@pytest.mark.parametrize("schedule", ["dense", "tile_list"])
def test_the_sum_may_be_of_the_tensor_that_is_written_to(schedule, grid_order):
    _, index, _, gamma, u, *weights = block_inputs(2, 90, 75, 72, 4 * 48)
    residual, mask = deferred_sum(2, 90, 75, 72), random_mask(2, 75, 4, active=3)
    expected = scattered(mask, 3, schedule)(residual.x, index, residual, gamma, u, *weights)
    out = expert_ffn_scatter(residual.x, index, residual, u, mask, 3, *weights, gamma, schedule)
    assert out is residual.x
    assert torch.equal(out, expected)


def test_a_deferred_sum_of_views_is_that_of_copies():
    rest, index, _, gamma, u, *weights = block_inputs(2, 9, 5, 24, 48)
    residual, mask = deferred_sum(2, 9, 5, 24), random_mask(2, 5, 4, active=3)
    views = Residual(
        torch.cat((residual.x, residual.x * torch.nan), dim=1)[:, :9],
        residual.update.transpose(0, 1).contiguous().transpose(0, 1),
        residual.gamma.repeat_interleave(2, dim=2)[..., ::2],
    )
    run = scattered(mask, 3)
    assert torch.equal(run(rest, index, views, gamma, u, *weights), run(rest, index, residual, gamma, u, *weights))


def test_a_deferred_sum_that_does_not_fit_is_refused():
    rest, index, _, gamma, u, *weights = block_inputs(2, 9, 5, 24, 48)
    residual, mask = deferred_sum(2, 9, 5, 24), random_mask(2, 5, 4, active=3)
    for name, bad in (("x", residual.x[..., :5]), ("update", residual.update[:, :4]), ("gamma", gamma[:1])):
        with pytest.raises(ValueError, match=rf"rows\.{name}: expected"):
            scattered(mask, 3)(rest, index, residual._replace(**{name: bad}), gamma, u, *weights)
    with pytest.raises(ValueError, match=r"rows\.x: expected"):
        scattered(mask, 3)(None, None, residual, gamma, u, *weights)


def test_under_autocast_the_products_run_in_its_dtype():
    rest, index, rows, gamma, u, *weights = block_inputs(2, 9, 5, 24, 48)
    mask = random_mask(2, 5, 4, active=3)
    low = [t.half() for t in (u, *weights)]
    with torch.autocast("cpu", torch.float16):
        update = expert_ffn(u, mask, 3, *weights)
        out = scattered(mask, 3)(rest, index, rows, gamma, u, *weights)
        alone = scattered(mask, 3)(None, None, rows, gamma, u, *weights)
    assert torch.equal(update, expert_ffn(low[0], mask, 3, *low[1:]))
    assert out.dtype == alone.dtype == torch.float32
    assert torch.equal(out, scattered(mask, 3)(rest, index, rows, gamma, *low))
    assert torch.equal(alone, scattered(mask, 3)(None, None, rows, gamma, *low))


def operator_inputs() -> tuple[list[Tensor], Tensor]:
    """As `block_inputs`, few; and a mask."""
    return block_inputs(2, 4, 3, 16, 32), random_mask(2, 3, 2, active=1)


def test_the_operators_pass_the_checks_of_torch():
    (rest, index, rows, gamma, u, *weights), mask = operator_inputs()
    torch.library.opcheck(torch.ops.actvar_kernels.expert_ffn.default, (u, mask, 1, *weights))
    scatter, deferred = torch.ops.actvar_kernels.expert_ffn_scatter.default, deferred_sum(2, 4, 3, 16)
    for out, kept in ((rest, index), (torch.zeros_like(rows), None)):
        torch.library.opcheck(scatter, (out, kept, rows, None, None, u, mask, 1, *weights, gamma, "tile_list"))
    torch.library.opcheck(scatter, (rest, index, *deferred, u, mask, 1, *weights, gamma, "tile_list"))


@pytest.mark.parametrize("schedule", ["dense", "tile_list"])
def test_the_operations_compile_without_a_break(schedule):
    (rest, *tensors), mask = operator_inputs()
    run = scattered(mask, 1, schedule)

    def both(rest, index, rows, gamma, u, *weights) -> tuple[Tensor, Tensor, Tensor]:
        ffn = expert_ffn(u, mask, 1, *weights)
        return run(rest, index, rows, gamma, u, *weights), run(None, None, rows, gamma, u, *weights), ffn

    compiled = torch.compile(both, backend="eager", fullgraph=True)(rest, *tensors)
    assert all(map(torch.equal, compiled, both(rest, *tensors)))


@pytest.mark.parametrize("schedule", ["auto", "tile_list"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_those_of_the_reference(schedule, compiled):
    (rest, index, rows, gamma, u, *weights), mask = operator_inputs()
    weighting = normal(*rest.shape, seed=8, dtype=torch.float32)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (rest, rows, gamma, u, *weights)]
        output = run(leaves[0], index, *leaves[1:])
        return [output.detach(), *torch.autograd.grad((output * weighting).sum(), leaves)]

    run = scattered(mask, 1, schedule)
    actual = gradients(torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)
    torch.testing.assert_close(actual, gradients(scattered_by_reference(mask)))


def test_gradients_reach_a_deferred_sum():
    (rest, index, _, gamma, u, *weights), mask = operator_inputs()
    leaves = [t.detach().clone().requires_grad_() for t in deferred_sum(2, 4, 3, 16)]
    run = scattered(mask, 1)

    def gradients(rows: Residual | Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(rest, index, rows, gamma, u, *weights).square().sum(), leaves)

    residual = Residual(*leaves)
    torch.testing.assert_close(gradients(residual), gradients(residual.rows(index)))


def test_a_call_that_the_kernels_cannot_take_raises():
    (rest, index, rows, gamma, u, *weights), mask = operator_inputs()
    for operation, arguments in (
        ("expert_ffn", lambda u, mask, weights: expert_ffn(u, mask, 1, *weights)),
        ("expert_ffn_scatter", lambda u, mask, weights: scattered(mask, 1)(rest, index, rows, gamma, u, *weights)),
    ):
        for gates in (mask.float(), random_mask(2, 3, 64, active=1)):
            wide = ffn_weights(16, 64)
            with pytest.raises(BackendUnavailableError, match=rf"{operation} has no 'triton' .* bool mask of up to 32"):
                arguments(u, gates, wide)
        with pytest.raises(BackendUnavailableError, match=f"{operation} has no 'triton' .*float32"):
            arguments(u.double(), mask, [w.double() for w in weights])
        with pytest.raises(TypeError, match=r"u: expected the dtype of the weights, .*32, .* got .*16"):
            arguments(u.half(), mask, weights)


def test_flops_of_the_scattering_operator_are_those_of_its_ffn():
    (rest, index, rows, gamma, u, *weights), mask = operator_inputs()
    ffn = (u.shape, mask.shape, 1, *(w.shape for w in weights))
    scatter = (rest.shape, index.shape, rows.shape, None, None, *ffn, gamma.shape, "auto")
    assert expert_ffn_scatter_flops(*scatter, out_shape=None) == expert_ffn_flops(*ffn) == 2 * 2 * 6 * 16 * 16


@pytest.mark.parametrize("arch", [*tiles.ARCHITECTURES, tiles.RDNA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_give_tiles_that_fit_any_model(arch, dtype):
    for C in (64, 192, 1024, 1280, 1536, 1920, 2304):
        for experts in (1, 4, 16, 32):
            width = 4 * C // experts
            for tokens in (1, 384, 3072, 24576):
                tile = tiles.expert_ffn_tiles(arch, dtype, tokens, C, width, True, 132)
                columns = tile.up.columns + tile.up.tail
                if tile.descriptors:
                    assert arch in (90, 100)
                    assert width % columns == width % tile.down.depth == 0
                elif width % 32 == 0:
                    assert columns <= width or columns == 16
                assert not tiles.expert_ffn_tiles(arch, dtype, tokens, C, width, False, 132).descriptors
