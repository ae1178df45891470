"""Residual, LayerNorm, modulation and routing on Triton against float64, and against the reference at ties."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from actvar_kernels import BackendUnavailableError, add_normalize, add_normalize_route, route_experts
from actvar_kernels.residual_norm import reference, triton_kernel
from actvar_kernels.residual_norm.op import add_normalize_route_flops
from actvar_kernels.routing import reference as routing_reference
from actvar_kernels.routing import triton_kernel as routing_kernel
from actvar_kernels.routing.op import route_experts_flops
from actvar_kernels.triton_backend.tiles import RouteTiles, RowTiles

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 1, 20), (2, 9, 192), (3, 5, 65)]
"""Rows, kept tokens, width."""
EXPERTS = [(1, 1), (5, 2), (16, 12), (32, 32)]
"""Experts, active experts."""


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Four rows a program; a test may set another number, and in how many parts bfloat16 is summed."""

    def choose(rows: int, splits: int = 1) -> None:
        def route_tiles(arch: int, tokens: int, width: int, dtype: torch.dtype) -> RouteTiles:
            return RouteTiles(rows, warps=4, splits=splits if dtype == torch.bfloat16 else 0)

        monkeypatch.setattr(triton_kernel, "row_tiles", lambda tokens, width: RowTiles(rows, warps=4))
        for module in (triton_kernel, routing_kernel):
            monkeypatch.setattr(module, "route_tiles", route_tiles)

    choose(4)
    return choose


def inputs(R: int, K: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """x, no index, update; gamma, scale and shift as a block has them, views of one tensor."""
    modulation = normal(R, 1, 6, C, seed=2, dtype=dtype).unbind(2)
    x, update = normal(R, K, C, dtype=dtype), normal(R, K, C, seed=1, dtype=dtype)
    return [x, None, update, modulation[0], modulation[3], modulation[5]]


def router(C: int, experts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(experts, C, seed=7, dtype=dtype), normal(experts, seed=8, dtype=dtype)]


def assert_routes(mask: Tensor, logits: Tensor, u: Tensor, weight: Tensor, bias: Tensor, active: int) -> None:
    """The logits of `u` to float32's rounding, and the mask of exactly these logits."""
    exact = F.linear(u.double(), weight.double(), bias.double())
    error = (routing_reference.route_experts(u, weight, bias, active)[1] - exact).abs().max().item()
    assert logits.dtype == torch.float32
    assert_close(logits, exact, 4 * error)
    order = reference_order(logits)[..., :active]
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, order, True))


def reference_order(logits: Tensor) -> Tensor:
    """Return the experts from the highest logit to the lowest."""
    return logits.sort(dim=-1, descending=True, stable=True).indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "K", "C"), SHAPES)
def test_add_normalize_in_any_grid_order(R: int, K: int, C: int, dtype: torch.dtype, grid_order: str) -> None:
    tensors = inputs(R, K, C, dtype)
    outputs = add_normalize(*tensors)
    for part, output in enumerate(outputs):
        assert output.dtype == dtype
        assert_close(output, *exact_and_tolerance(lambda *t, part=part: reference.add_normalize(*t)[part], *tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "active"), EXPERTS)
def test_add_normalize_route_in_any_grid_order(experts: int, active: int, dtype: torch.dtype, grid_order: str) -> None:
    tensors, gate = inputs(2, 5, 65, dtype), router(65, experts, dtype)
    routed = add_normalize_route(*tensors, *gate, active)
    rows, u = add_normalize(*tensors)
    assert torch.equal(routed.rows, rows)
    assert torch.equal(routed.u, u)
    assert_routes(routed.mask, routed.logits, u, *gate, active)


@pytest.mark.parametrize("as_operator", [False, True], ids=["launched", "operator"])
def test_a_deferred_sum_is_not_made_and_the_rest_is_the_same(as_operator: bool, grid_order: str) -> None:
    (x, _, *others), gate = inputs(2, 5, 65), router(65, 5)
    index = torch.tensor([[0, 1, 2, 4, 3], [4, 2, 0, 1, 3]])
    expected = add_normalize_route(x, index, *others, *gate, 3)
    with FlopCounterMode(display=False) if as_operator else nullcontext():
        deferred = add_normalize_route(x, index, *others, *gate, 3, deferred=True)
    assert [a is b for a, b in zip(deferred.rows, (x, *others[:2]), strict=True)] == [True] * 3
    torch.testing.assert_close(deferred.rows.rows(index), expected.rows)
    assert all(map(torch.equal, deferred[1:], expected[1:]))


@pytest.mark.parametrize(("R", "K", "C"), SHAPES)
def test_add_normalize_route_of_other_shapes(R: int, K: int, C: int) -> None:
    tensors, gate = inputs(R, K, C), router(C, 5)
    routed = add_normalize_route(*tensors, *gate, 3)
    assert torch.equal(routed.rows, add_normalize(*tensors)[0])
    assert_routes(routed.mask, routed.logits, routed.u, *gate, 3)


def test_the_sum_is_normalised_as_it_is_stored() -> None:
    rows, _, update, gamma, scale, shift = inputs(2, 5, 192, torch.float16)
    rows, update = rows + 100, update / 100
    out, u = add_normalize(rows, None, update, gamma, scale, shift)
    once_rounded = (rows.double() + gamma.double() * update.double()).half()
    assert (out != once_rounded).float().mean() < 0.01, "float32 sums and float64 sums seldom round to another float16"
    normalized = F.layer_norm(out.double(), out.shape[-1:], eps=1e-6)
    exact = normalized * (1 + scale.double()) + shift.double()
    assert ((u.double() - exact).abs() <= 2**-11 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("rows_at_once", [1, 4, 16])
def test_the_tiles_do_not_change_the_experts(rows_at_once: int, tiles: Callable[[int], None]) -> None:
    u, gate = normal(1, 6, 20, dtype=torch.float32), router(20, 6)
    tiles(rows_at_once)
    assert_routes(*route_experts(u, *gate, 3), u, *gate, 3)


def test_equal_tokens_get_equal_logits_and_ties_go_to_the_lower_expert() -> None:
    tokens = normal(3, 192, dtype=torch.float32)
    which = torch.arange(2 * 11).view(2, 11) * 5 % 3
    weight, bias = router(192, 16)
    weight, bias = weight[torch.arange(16) % 5], bias[torch.arange(16) % 5]
    zeros = torch.zeros(2, 1, 192)
    for mask, logits in (
        route_experts(tokens[which], weight, bias, 9),
        add_normalize_route(tokens[which], None, torch.zeros(2, 11, 192), zeros, zeros, zeros, weight, bias, 9)[2:],
    ):
        for value in range(3):
            of_token = logits[which == value]
            assert (of_token == of_token[0]).all()
            assert (of_token[0] == of_token[0][torch.arange(16) % 5]).all()
        order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :9]
        assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, order, True))


@pytest.mark.parametrize("active", [1, 3, 6])
def test_logits_are_ranked_as_by_a_stable_descending_sort(active: int) -> None:
    inf, nan = float("inf"), float("nan")
    for biases in ([0.0, -0.0, 0.0, -0.0, 1.0, -1.0], [1.0, nan, inf, -nan, -inf, inf], [2.0] * 6):
        u, weight, bias = torch.ones(1, 1, 4), torch.zeros(6, 4), torch.tensor(biases)
        mask, logits = route_experts(u, weight, bias, active)
        assert torch.equal(logits[0, 0].nan_to_num(7.0), bias.nan_to_num(7.0))
        assert torch.equal(mask, routing_reference.route_experts(u, weight, bias, active)[0])


def test_nan_in_one_sequence_leaves_the_others_alone() -> None:
    tensors, gate = inputs(3, 5, 20), router(20, 5)
    clean = add_normalize_route(*tensors, *gate, 3)
    tensors[0], tensors[2] = tensors[0].clone(), tensors[2].clone()
    tensors[0][1], tensors[2][1] = torch.nan, torch.inf
    routed = add_normalize_route(*tensors, *gate, 3)
    assert routed.rows[1].isnan().all()
    for row in (0, 2):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(routed, clean, strict=True))


def test_views_give_what_copies_give() -> None:
    tensors, gate = inputs(2, 5, 20), router(20, 5)
    x, _, update, *modulation = tensors
    rows, updates = (torch.cat((t * torch.nan, t, t * torch.nan), dim=1)[:, 5:10] for t in (x, update))
    copied = add_normalize_route(x, None, update, *(t.clone() for t in modulation), *gate, 3)
    views = add_normalize_route(rows, None, updates, *modulation, *gate, 3)
    assert all(map(torch.equal, views, copied))
    assert all(map(torch.equal, route_experts(rows, *gate, 3), route_experts(tensors[0], *gate, 3)))
    shared = [t[:1].expand(t.shape) for t in modulation]
    expected = add_normalize(x, None, update, *(t.contiguous() for t in shared))
    assert all(map(torch.equal, add_normalize(x, None, update, *shared), expected))


@pytest.mark.parametrize(("R", "L", "K", "C"), [(1, 1, 1, 20), (2, 9, 5, 65), (3, 6, 6, 20)])
def test_rows_by_their_index_are_those_that_were_gathered_before(
    R: int, L: int, K: int, C: int, grid_order: str
) -> None:
    x, gate = normal(R, L, C, dtype=torch.float32), router(C, 5)
    index = torch.stack([torch.randperm(L, generator=torch.Generator().manual_seed(r))[:K] for r in range(R)])
    _, _, *others = inputs(R, K, C)
    gathered = torch.stack([x[row, kept] for row, kept in enumerate(index)])
    x[torch.ones(R, L, dtype=torch.bool).scatter(1, index, False)] = torch.nan  # must not be read
    expected = add_normalize_route(gathered, None, *others, *gate, 3)
    assert all(map(torch.equal, add_normalize_route(x, index, *others, *gate, 3), expected))
    assert all(map(torch.equal, add_normalize(x, index, *others), add_normalize(gathered, None, *others)))


def test_under_autocast_the_update_is_of_another_dtype_than_the_rows() -> None:
    x, _, update, gamma, scale, shift = inputs(2, 5, 65)
    tensors, gate = [x, None, update.half(), gamma.half(), scale.half(), shift], router(65, 5)
    routed = add_normalize_route(*tensors, *gate, 3)
    assert routed.rows.dtype == routed.u.dtype == torch.float32
    for part, output in enumerate(routed[:2]):
        assert_close(output, *exact_and_tolerance(lambda *t, part=part: reference.add_normalize(*t)[part], *tensors))
    assert_routes(routed.mask, routed.logits, routed.u, *gate, 3)


def test_rows_keep_their_dtype_also_where_the_gate_is_of_a_wider_one() -> None:
    x, _, update, gamma, scale, shift = inputs(2, 5, 20, torch.float16)
    tensors = [x, None, update, gamma.float(), scale.float(), shift.float()]
    for actual, expected in zip(add_normalize(*tensors), reference.add_normalize(*tensors), strict=True):
        assert actual.dtype == expected.dtype == torch.float16


def test_bfloat16_rows_are_routed_in_float32_as_they_are_stored() -> None:
    tensors, gate = inputs(2, 5, 192, torch.bfloat16), router(192, 16)
    routed = add_normalize_route(*tensors, *gate, 12)
    rows, update, gamma = (t.double() for t in (tensors[0], *tensors[2:4]))
    # the interpreter cuts bfloat16 off where a GPU rounds it: an error of up to 2^-7 instead of 2^-8
    assert ((routed.rows.double() - rows - gamma * update).abs() <= 2**-7 * (rows + gamma * update).abs() + 1e-6).all()
    assert_routes(routed.mask, routed.logits, routed.u, *gate, 12)


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "active"), EXPERTS)
@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (16, 4)])
def test_bfloat16_rows_are_routed_by_every_digit_of_the_weights(
    rows: int, splits: int, experts: int, active: int, gate_dtype: torch.dtype, tiles: Callable[..., None]
) -> None:
    tiles(rows, splits)
    for C in (200, 1000):  # of the second one half follows the other
        u, gate = normal(19, C, dtype=torch.bfloat16), router(C, experts, gate_dtype)
        assert_routes(*route_experts(u, *gate, active), u, *gate, active)


@pytest.mark.parametrize("exponent", [-100, 100])
def test_weights_far_from_one_lose_no_digits_to_bfloat16(exponent: int, tiles: Callable[..., None]) -> None:
    tiles(16, 2)
    u, (weight, bias) = normal(5, 64, dtype=torch.bfloat16), router(64, 5)
    weight, bias = weight * 2.0**exponent, bias * 2.0**exponent
    assert_routes(*route_experts(u, weight, bias, 3), u, weight, bias, 3)


def test_equal_tokens_of_bfloat16_get_equal_logits(tiles: Callable[..., None]) -> None:
    tiles(16, 2)
    which = torch.arange(2 * 11).view(2, 11) * 5 % 3
    weight, bias = router(192, 16)
    weight, bias = weight[torch.arange(16) % 5], bias[torch.arange(16) % 5]
    mask, logits = route_experts(normal(3, 192, dtype=torch.bfloat16)[which], weight, bias, 9)
    for value in range(3):
        of_token = logits[which == value]
        assert (of_token == of_token[0]).all()
        assert (of_token[0] == of_token[0][torch.arange(16) % 5]).all()
    assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, reference_order(logits)[..., :9], True))


def test_route_experts_takes_any_leading_shape() -> None:
    u, gate = normal(2, 3, 2, 20, dtype=torch.float16), router(20, 5)
    mask, logits = route_experts(u, *gate, 3)
    assert mask.shape == logits.shape == (2, 3, 2, 5)
    assert_routes(mask, logits, u, *gate, 3)


def test_the_operators_pass_the_checks_of_torch() -> None:
    x, _, *tensors = inputs(2, 3, 8)
    x, *tensors, weight, bias = (t.detach().requires_grad_() for t in (x, *tensors, *router(8, 3)))
    operators = torch.ops.actvar_kernels
    for index in (None, torch.tensor([[0, 1, 2], [2, 0, 1]])):
        torch.library.opcheck(operators.add_normalize.default, (x, index, *tensors))
        for deferred in (False, True):
            routed = (x, index, *tensors, weight, bias, 2, deferred)
            torch.library.opcheck(operators.add_normalize_route.default, routed)
    torch.library.opcheck(operators.route_experts.default, (x, weight, bias, 2))


def test_a_compiled_call_gives_the_same() -> None:
    tensors, gate = inputs(2, 3, 8), router(8, 3)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (*add_normalize_route(*tensors, 2), *add_normalize(*tensors[:6]), *route_experts(tensors[0], *gate, 2))

    eager = (*add_normalize_route(*tensors, *gate, 2), *add_normalize(*tensors), *route_experts(tensors[0], *gate, 2))
    assert all(map(torch.equal, compiled(*tensors, *gate), eager))


def gradients(function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> list[Tensor]:
    """Of the outputs that have one, weighted by fixed random numbers."""
    leaves = [
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
    ]
    outputs = [output for output in function(*leaves) if output.requires_grad]
    weights = [normal(*output.shape, seed=99 + i, dtype=output.dtype) for i, output in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, [t for t in leaves if t is not None and t.requires_grad], weights))


def test_the_gradients_are_those_of_the_reference() -> None:
    tensors, gate = inputs(2, 3, 20), router(20, 5)
    for operation, of_reference, arguments in (
        (lambda *t: add_normalize(*t), reference.add_normalize, tensors),
        (lambda *t: add_normalize_route(*t, 3), lambda *t: reference.add_normalize_route(*t, 3), [*tensors, *gate]),
        (
            lambda *t: add_normalize_route(*t, 3, deferred=True)[1:],
            lambda *t: reference.add_normalize_route(*t, 3)[1:],
            [*tensors, *gate],
        ),
        (
            lambda *t: add_normalize(*t),
            reference.add_normalize,
            [normal(2, 7, 20, dtype=torch.float32), torch.tensor([[6, 2, 3], [0, 5, 1]]), *tensors[2:]],
        ),
        (
            lambda *t: route_experts(*t, 3),
            lambda *t: routing_reference.route_experts(*t, 3),
            [normal(2, 3, 20, dtype=torch.float32), *gate],
        ),
    ):
        assert all(map(torch.equal, gradients(operation, arguments), gradients(of_reference, arguments)))


def test_the_routers_flops_are_counted_as_those_of_a_matrix_product() -> None:
    rows = torch.Size((2, 9, 192))
    others = [torch.Size((2, 1, 192))] * 3
    assert (
        add_normalize_route_flops(
            torch.Size((2, 12, 192)), torch.Size((2, 9)), rows, *others, torch.Size((16, 192)), torch.Size((16,)), 12
        )
        == 2 * 18 * 192 * 16
    )
    assert route_experts_flops(rows, torch.Size((16, 192)), torch.Size((16,)), 12) == 2 * 18 * 192 * 16


def test_what_triton_cannot_run_raises_when_it_is_asked_for_by_name() -> None:
    tensors, gate = inputs(1, 2, 4), router(4, 33)
    with pytest.raises(BackendUnavailableError, match=r"add_normalize_route .*up to 32 experts"):
        add_normalize_route(*tensors, *gate, 3)
    with pytest.raises(BackendUnavailableError, match=r"route_experts .*up to 32 experts"):
        route_experts(tensors[0], *gate, 3)
    with pytest.raises(BackendUnavailableError, match=r"add_normalize .*float32, float16 and bfloat16"):
        add_normalize(*(t if t is None else t.double() for t in tensors))
