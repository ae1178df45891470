"""Infinity, dense and patched, where a program does more than load and sample: compilers, wrappers, other defaults."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from actvar import ActVARConfig, apply_patch, patched
from actvar.families.infinity import InfinityFamily
from actvar.models import Infinity
from actvar.models.infinity import rotary
from actvar.models.infinity.arguments import checked_draw
from actvar.sparse.schedule import numbered_scale
from actvar.sparse.state import PatchState
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu

FORCED = ActVARConfig(token_rates=(1, 1), ffn_rate=1, always_sparse=True)
SPARSE = ActVARConfig(token_rates=(0.5, 0.75), ffn_rate=0.75)
TALL = [(1, 1, 1), (1, 3, 2), (1, 5, 3)]
LENGTHS = [3, 5]


@pytest.fixture
def infinity() -> Infinity:
    infinity = tiny_infinity()[1].eval()
    infinity.decode = lambda features: features
    return infinity


def drawn(infinity: Infinity, schedule: list[tuple[int, int, int]] = TINY_SCHEDULE) -> list[Tensor]:
    text, lengths = (part.clone() if isinstance(part, Tensor) else part for part in tiny_text(LENGTHS))
    return infinity.sample(text, lengths, schedule, g_seed=1, tau=1.0, return_bits=True)[1]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def pass_of(infinity: Infinity) -> tuple[Tensor, list[int], Tensor, list[tuple[int, int, int]]]:
    """Return arguments of teacher forcing."""
    inputs = torch.randn(2, 16, infinity.token_bits, generator=torch.Generator().manual_seed(0))
    return *tiny_text(LENGTHS), inputs, TINY_SCHEDULE


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "default",
    [lambda: default_dtype(torch.float64), lambda: default_dtype(torch.bfloat16), lambda: torch.device("meta")],
    ids=["float64", "bfloat16", "meta"],
)
def test_angles_do_not_depend_on_defaults(default: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ((1, 1, 1), (1, 3, 4)), 32, torch.device("cpu")
    expected = rotary.rotation(*arguments)
    monkeypatch.setattr(rotary, "_kept", {})
    with default():
        angles = rotary.rotation(*arguments)
    assert angles.dtype == torch.float32
    assert torch.equal(angles, expected)


@pytest.mark.parametrize("config", [None, SPARSE], ids=["dense", "sparse"])
@torch.no_grad()
def test_teacher_forcing_compiles_to_one_graph(infinity: Infinity, config: ActVARConfig | None) -> None:
    if config is not None:
        apply_patch(infinity, config)
    compiled = torch.compile(infinity, backend="eager", fullgraph=True)
    with using_backend("reference"):
        assert torch.equal(compiled(*pass_of(infinity)), infinity(*pass_of(infinity)))


@torch.no_grad()
def test_fake_tensors_have_the_shape_of_the_logits(infinity: Infinity) -> None:
    apply_patch(infinity, SPARSE)
    logits = infinity(*pass_of(infinity))
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake, arguments = copy.deepcopy(infinity), copy.deepcopy(pass_of(infinity))
    with mode:
        assert fake(*arguments).shape == logits.shape
    assert torch.equal(infinity(*pass_of(infinity)), logits)


def test_the_norm_before_cross_attention_is_exact_in_16_bits(infinity: Infinity) -> None:
    block = infinity.bfloat16().unregistered_blocks[0]
    weight = block.ca_norm.weight.detach().uniform_(0, 0.3, generator=torch.Generator().manual_seed(0))
    scale = InfinityFamily().between_norm(block, 1).scale.detach().flatten()
    torch.testing.assert_close(1 + scale, weight.float(), rtol=0, atol=1e-7)


class Louder(nn.Module):
    """Wrap a linear layer and show no weight, as some quantised layers do."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def test_layers_of_the_ffn_without_a_weight_are_called(infinity: Infinity) -> None:
    exact = drawn(infinity)
    for block in infinity.unregistered_blocks:
        block.ffn.fc1 = Louder(block.ffn.fc1)
    dense = drawn(infinity)
    assert not same(dense, exact)
    with patched(infinity, ActVARConfig(token_rates=(1, 1), ffn_rate=1)):
        assert same(drawn(infinity), dense)


@pytest.mark.skipif(not cpu.available(), reason="no compiler")
def test_a_forward_put_on_a_patched_block_may_read_its_input_again(infinity: Infinity) -> None:
    def add_input(block: nn.Module) -> None:
        forward = block.forward
        block.forward = lambda x, context: forward(x, context) + 0.5 * x

    changed = copy.deepcopy(infinity)
    changed.decode = infinity.decode
    for block in changed.unregistered_blocks:
        add_input(block)
    apply_patch(infinity, FORCED)
    for block in infinity.unregistered_blocks:
        add_input(block)
    with using_backend("cpu"):
        assert same(drawn(infinity), drawn(changed))


def test_a_loop_of_ones_own_has_to_tell_its_schedule(infinity: Infinity) -> None:
    apply_patch(infinity, SPARSE)
    text, lengths = tiny_text(LENGTHS)
    draw = checked_draw(len(TALL), infinity.depth, 1.0, 1.0, 0, 0.0, None, (0,))

    def run_second_scale() -> Tensor:
        condition = infinity.condition(text, lengths)
        x = infinity.embedded(1, torch.zeros(2, 6, infinity.token_bits), condition)
        return infinity.run_blocks(TALL, 1, x, condition, draw)

    with pytest.raises(ValueError, match="expected 4 tokens, as planned for scale 1, got 6 tokens"):
        run_second_scale()
    with infinity.sampling(TALL, draw), torch.no_grad():
        assert run_second_scale().shape == (2, 6, infinity.C)
    with pytest.raises(ValueError, match="expected 3 scales in all, as planned for scale 3, got 6 tokens"):
        numbered_scale(infinity.actvar.schedule, 3, 6)


def test_ctrl_c_while_scales_are_planned_leaves_no_half_plan(
    infinity: Infinity, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_patch(infinity, SPARSE)
    bits, tall = drawn(infinity), drawn(infinity, TALL)
    with monkeypatch.context() as patch:
        patch.setattr(PatchState, "_use_schedules", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            drawn(infinity)
    assert same(drawn(infinity, TALL), tall)
    assert same(drawn(infinity), bits)


def _interrupted(_state: PatchState) -> None:
    raise KeyboardInterrupt
