"""Gradients under activation checkpointing are those without it, or there is an error that says what to do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from support.helpers import NUM_CLASSES, sample
from torch import nn
from torch.utils.checkpoint import checkpoint

from actvar import ActVARConfig, apply_patch, guided_rows, record
from actvar.distill.stage1 import Stage1
from actvar.families.var import VARFamily
from actvar.patching.adapter import gate_parameters

RATES = dict(token_rates=(0.5, 0.75), ffn_rate=0.5, num_experts=8)
CONFIGS = {
    "own tokens": dict(),
    "fixed tokens": dict(fixed_tokens=True),
    "fixed tokens, kv all": dict(fixed_tokens=True, kv="all"),
    "shared selection": dict(share_cfg_selection=True),
    "both": dict(fixed_tokens=True, share_cfg_selection=True, kv="all"),
}
DEPTH = 3
SEGMENTS = {"each block": ((0,), (1,), (2,)), "all but the last": ((0, 1), (2,)), "all but the first": ((0,), (1, 2))}
SHARED = [name for name, fields in CONFIGS.items() if "share_cfg_selection" in fields]
FIXED = [name for name, fields in CONFIGS.items() if "fixed_tokens" in fields]


def embedded(var, labels, inputs):
    """Return the first block's input and condition."""
    call, _ = VARFamily().embedded(var, labels, inputs)
    return call.x, call.cond


@pytest.fixture
def make_patched(make_var, reference_backend) -> Callable[[str], nn.Module]:
    """A model in float64, so that no rounding hides tokens of another pass; all of it is trained."""
    return lambda name: apply_patch(
        make_var(depth=DEPTH).double(), ActVARConfig(**RATES, **CONFIGS[name])
    ).requires_grad_(True)


def batches_of(var: nn.Module, count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labels, the second half of them unconditional, and inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, var.L - 1, var.Cvae)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    labels = [torch.tensor([i, 9 - i, NUM_CLASSES, NUM_CLASSES]) for i in range(count)]
    return list(zip(labels, inputs, strict=True))


class Walk:
    """One pass through the blocks, a segment at a time, each under a checkpoint if `reentrant` is not None."""

    def __init__(self, var, x, cond, segments, reentrant, between=lambda x: x):
        self.var, self.x, self.cond, self.segments = var, x, cond, list(segments)
        self.reentrant, self.between = reentrant, between

    def step(self) -> None:
        blocks = [self.var.blocks[index] for index in self.segments.pop(0)]

        def run(x, cond):
            for block in blocks:
                x = block(x=x, cond_BD=cond, attn_bias=self.var.attn_bias_for_masking)
            return x

        x = self.between(self.x)
        again = self.reentrant is not None
        self.x = checkpoint(run, x, self.cond, use_reentrant=self.reentrant) if again else run(x, self.cond)

    def finish(self) -> torch.Tensor:
        while self.segments:
            self.step()
        return self.x


def in_turn(walks: list[Walk]) -> None:
    for walk in walks:
        walk.finish()


def interleaved(walks: list[Walk]) -> None:
    while walks[0].segments:
        for walk in walks:
            walk.step()


def gradients(var, guided, walk_all, segments, reentrant, one_condition=False, **options) -> dict[str, torch.Tensor]:
    """Of two passes in one loss; that their rows are guided is said in the forward passes alone."""
    var.zero_grad()
    walks = [Walk(var, *embedded(var, *batch), segments, reentrant, **options) for batch in batches_of(var)]
    if one_condition:
        walks[1].cond = walks[0].cond
    with guided_rows(var) if guided else nullcontext():
        walk_all(walks)
    sum(walk.x.square().mean() for walk in walks).backward()
    return {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert any(name.startswith("blocks.1.") for name in expected)
    for name in expected:
        error = (actual[name] - expected[name]).norm()
        assert error <= 1e-6 * expected[name].norm() + 1e-12, name  # gates compute in float32


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_passes_before_one_backward_have_the_gradients_without_checkpointing(
    make_patched, name, segments, reentrant
):
    var, guided = make_patched(name), name in SHARED
    for one_condition in (False, True):
        expected = gradients(var, guided, in_turn, segments, None, one_condition)
        for walk_all in (in_turn, interleaved):
            assert_same(gradients(var, guided, walk_all, segments, reentrant, one_condition), expected)


def test_whether_rows_are_guided_makes_a_difference_here(make_patched):
    """Otherwise the test above would show nothing about it."""
    var = make_patched("shared selection")
    some, others = (gradients(var, guided, in_turn, SEGMENTS["each block"], None) for guided in (False, True))
    assert any(not torch.allclose(some[name], others[name]) for name in some)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in SHARED])
@pytest.mark.parametrize("whole", [False, True], ids=["each block", "the whole model"])
def test_the_models_own_pass_has_the_gradients_without_checkpointing(make_patched, name, whole, reentrant):
    """In train mode, where labels are dropped at random."""
    var = make_patched(name).train()
    var.cond_drop_rate = 0.5

    def of_all(run: Callable) -> dict[str, torch.Tensor]:
        var.zero_grad()
        torch.manual_seed(0)
        sum(run(labels, inputs.requires_grad_(True)).square().mean() for labels, inputs in batches_of(var)).backward()
        return {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}

    expected = of_all(var)
    if whole:
        return assert_same(of_all(lambda *batch: checkpoint(var, *batch, use_reentrant=reentrant)), expected)
    for block in var.blocks:
        block.forward = lambda x, cond_BD, attn_bias, f=block.forward: checkpoint(
            f, x, cond_BD, attn_bias, use_reentrant=reentrant
        )
    assert_same(of_all(var), expected)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_a_block_may_get_a_changed_copy_of_the_output_before_it(make_patched, name, reentrant):
    var, segments = make_patched(name), SEGMENTS["each block"]
    options = dict(between=lambda x: 0.9 * x)
    expected = gradients(var, name in SHARED, in_turn, segments, None, **options)
    assert_same(gradients(var, name in SHARED, in_turn, segments, reentrant, **options), expected)


def test_memory_that_is_written_to_again_is_not_taken_for_that_of_an_earlier_pass(make_patched):
    var, bias = make_patched("fixed tokens"), make_patched("fixed tokens").attn_bias_for_masking
    starts = [embedded(var, *batch) for batch in batches_of(var)]
    buffer = torch.empty_like(starts[0][0])
    with torch.no_grad():
        for x, cond in starts:
            expected = Walk(var, x, cond, SEGMENTS["each block"], None).finish()
            for block in var.blocks:
                x = buffer.copy_(block(x, cond, bias))
            assert torch.equal(buffer, expected)


@pytest.mark.parametrize("name", FIXED)
def test_what_is_moved_between_the_passes_is_refused(make_patched, name):
    """As by a checkpoint that keeps its inputs on another device."""
    var = make_patched(name)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
        pytest.raises(RuntimeError, match=r"fixed_tokens, share_cfg_selection: .* checkpoint the blocks one by one"),
    ):
        gradients(var, name in SHARED, in_turn, SEGMENTS["each block"], False)


def test_guidance_that_is_not_known_is_refused(make_patched):
    var = make_patched("shared selection")

    def run(labels, inputs):
        x, cond = embedded(var, labels, inputs)
        return Walk(var, x, cond, SEGMENTS["each block"], None).finish()

    with guided_rows(var):
        out = checkpoint(run, *batches_of(var)[0], use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"share_cfg_selection: .* checkpoint the blocks one by one"):
        out.square().mean().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kept", [False, True], ids=["cache dropped", "cache kept"])
def test_a_sampling_loop_under_checkpoints_is_refused(make_patched, name, kept, reentrant):
    var = make_patched(name)
    cond = var.class_emb(torch.tensor([1, 2, NUM_CLASSES, NUM_CLASSES]))
    for block in var.blocks:
        block.attn.kv_caching(True)
    loss = 0
    for side in var.patch_nums:
        x = torch.randn(4, side * side, 128, dtype=torch.float64)
        for block in var.blocks:
            x = checkpoint(block, x, cond, None, use_reentrant=reentrant)
        loss = loss + x.square().mean()
    for block in var.blocks:
        if not kept:
            block.attn.kv_caching(False)
    with pytest.raises(RuntimeError, match=r"K/V cache is no longer what it was.* pass attn_bias"):
        loss.backward()


def test_blocks_out_of_order_are_refused(make_patched):
    var = make_patched("fixed tokens")
    x, cond = embedded(var, *batches_of(var)[0])
    with pytest.raises(ValueError, match=r"fixed_tokens: .* for 4 rows at scale 2, got none; run the blocks in order"):
        var.blocks[1](x, cond, var.attn_bias_for_masking)
    out = var.blocks[0](x, cond, var.attn_bias_for_masking)
    with pytest.raises(ValueError, match="for 2 rows at scale 2, got "):
        var.blocks[1](out[:2], cond, var.attn_bias_for_masking)


def test_a_record_has_each_choice_once(make_patched):
    var = make_patched("fixed tokens")
    with record(var) as records:
        gradients(var, False, in_turn, SEGMENTS["each block"], False)
    assert [(r.block, r.scale.index) for r in records] == 2 * [(b, s) for b in range(DEPTH) for s in (2, 3)]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in SHARED])
def test_gates_are_trained_with_the_gradients_without_checkpointing(make_patched, name):
    var = make_patched(name)
    stage = Stage1(var)
    (labels, inputs), tokens = batches_of(var)[0], torch.zeros(4, var.L, dtype=torch.int64)

    def of_gates() -> dict[str, torch.Tensor]:
        var.zero_grad()
        stage(labels, inputs, tokens)["loss"].backward()
        return {name: gate.grad.clone() for name, gate in gate_parameters(var).items() if gate.grad is not None}

    expected = of_gates()
    assert len(expected) >= 2 + 2 * DEPTH
    for block in var.blocks:
        block.forward = lambda x, cond_BD, attn_bias, f=block.forward: checkpoint(
            f, x, cond_BD, attn_bias, use_reentrant=False
        )
    assert_same(of_gates(), expected)


def test_gates_that_a_reentrant_checkpoint_hides_from_the_loss_are_refused(make_patched):
    var = make_patched("own tokens")
    stage = Stage1(var)
    labels, inputs = batches_of(var)[0]
    for block in var.blocks:
        block.forward = lambda x, cond_BD, attn_bias, f=block.forward: checkpoint(
            f, x.requires_grad_(True), cond_BD, attn_bias, use_reentrant=True
        )
    with pytest.raises(RuntimeError, match="use use_reentrant=False"):
        stage(labels, inputs, torch.zeros(4, var.L, dtype=torch.int64))
    with torch.no_grad():
        assert stage(labels, inputs, torch.zeros(4, var.L, dtype=torch.int64))["loss"].isfinite()


@pytest.mark.parametrize("name", CONFIGS)
def test_transforms_give_the_gradients_of_backward(make_patched, name):
    var = make_patched(name)
    batch = batches_of(var)[0]
    parameters = {name: p for name, p in var.named_parameters() if name.startswith("blocks.1.ffn")}

    def loss(parameters):
        return torch.func.functional_call(var, parameters, batch).square().mean()

    actual = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    var(*batch).square().mean().backward()
    assert_same(actual, {name: p.grad for name, p in parameters.items()})


@pytest.mark.parametrize("compiled", ["model", "blocks"])
def test_compiled_models_have_the_gradients_of_others(make_var, reference_backend, compiled):
    var = apply_patch(make_var().double(), ActVARConfig(**RATES, fixed_tokens=True)).requires_grad_(True)

    def of_both(run: Callable) -> dict[str, torch.Tensor]:
        var.zero_grad()
        sum(run(*batch).square().mean() for batch in batches_of(var)).backward()
        return {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}

    expected = of_both(var)
    if compiled == "model":
        return assert_same(of_both(torch.compile(var, backend="eager")), expected)
    for block in var.blocks:
        compiled_block = torch.compile(block.forward, backend="eager")
        block.forward = lambda x, cond_BD, attn_bias, f=compiled_block: checkpoint(
            f, x, cond_BD, attn_bias, use_reentrant=True
        )
    assert_same(of_both(var), expected)


def test_copies_and_pickles_sample_the_same_and_know_no_pass(make_patched):
    var = make_patched("both")
    logits = var(*batches_of(var)[0])  # alive, and its passes with it
    image = sample(var)
    for other in (copy.deepcopy(var.requires_grad_(False)), pickle.loads(pickle.dumps(var))):
        assert torch.equal(sample(other), image)
    assert logits.requires_grad


@pytest.mark.parametrize("name", FIXED)
def test_tokens_are_in_memory_no_longer_than_their_pass(make_patched, name):
    var = make_patched(name)
    with record(var) as records:
        sample(var)
        out = var(*batches_of(var)[0])
    indices = [weakref.ref(r.index) for r in records if r.block == 0]
    assert all(index() is not None for index in indices)
    records.clear()
    del out
    gc.collect()
    assert all(index() is None for index in indices)
