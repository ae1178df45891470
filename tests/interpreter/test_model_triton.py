"""Whole models on the Triton backend: the same tokens as on the reference."""

from __future__ import annotations

import pytest
import torch
from support.helpers import make_tiny_var

from actvar import ActVARConfig, Execution, apply_patch, load_pretrained, remove_patch
from actvar.models import VAR, VQVAE
from actvar.models.token_draw import guided
from actvar.models.var import Condition
from actvar.sparse import selection
from actvar_kernels.backend import using_backend
from actvar_kernels.constants import FORMATS


@pytest.fixture(autouse=True)
def _features_in_place_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder has its own test, and takes the interpreter long."""
    monkeypatch.setattr(VQVAE, "fhat_to_img", lambda vae, f_hat: f_hat)


def sampled_tokens(var: VAR, monkeypatch: pytest.MonkeyPatch, backend: str, labels: torch.Tensor) -> list[torch.Tensor]:
    """Tokens of every scale."""
    tokens = []
    original = type(var).draw
    with monkeypatch.context() as patch:
        patch.setattr(type(var), "draw", lambda *args: tokens.append(original(*args)) or tokens[-1])
        with using_backend(backend):
            var.autoregressive_infer_cfg(len(labels), labels, g_seed=0, cfg=1.5)
    return tokens


SLOW = pytest.mark.slow
CASES = {
    "paper": (ActVARConfig(num_experts=8), {}),
    "shared AdaLN, no QK norm": (ActVARConfig(num_experts=8), {"shared_aln": True, "attn_l2_norm": False}),
    "all keys, shared selection": (ActVARConfig(num_experts=8, kv="all", share_cfg_selection=True), {}),
    "dense": (ActVARConfig(token_rates=(1, 1), ffn_rate=1), {}),
    "forced": (ActVARConfig(token_rates=(1, 1), ffn_rate=1, num_experts=8, always_sparse=True), {}),
    "no experts": (ActVARConfig(token_rates=(0.5, 0.5), ffn_rate=1), {}),
    "no selection": (ActVARConfig(token_rates=(1, 1), ffn_rate=0.5, num_experts=4), {}),
}
EXECUTIONS = {"no selection": Execution(expert_execution="tile_list")}


@pytest.mark.parametrize("case", [case if case == "paper" else pytest.param(case, marks=SLOW) for case in CASES])
def test_a_small_model_draws_the_reference_tokens(case, monkeypatch):
    config, layout = CASES[case]
    var = apply_patch(make_tiny_var(depth=1, **layout), config, EXECUTIONS.get(case))
    labels = torch.tensor([1, 2])
    expected = sampled_tokens(var, monkeypatch, "reference", labels)
    assert all(map(torch.equal, sampled_tokens(var, monkeypatch, "triton", labels), expected))


@pytest.mark.parametrize("case", ["paper", pytest.param("dense", marks=SLOW), pytest.param("no experts", marks=SLOW)])
@pytest.mark.parametrize("weights", FORMATS)
@torch.no_grad()
def test_a_model_in_eight_bits_errs_as_the_reference_does(case, weights):
    config, layout = CASES[case]
    var = make_tiny_var(depth=1, **layout)
    labels, inputs = (
        torch.tensor([1, 2]),
        torch.randn(2, var.L - 1, var.Cvae, generator=torch.Generator().manual_seed(0)),
    )

    def logits(backend: str, execution: Execution) -> torch.Tensor:
        apply_patch(var, config, execution)
        with using_backend(backend), var.actvar.during(rows_stand_alone=True):
            return torch.cat([scale for _, scale in var.actvar.family.scale_logits(var, labels, inputs)], dim=1)

    plain, due = (logits("reference", Execution(weights=asked)) for asked in (None, weights))
    found = logits("triton", Execution(weights=weights))
    assert (found - due).norm() <= 0.3 * (due - plain).norm()


@SLOW
def test_the_bundled_model_draws_the_reference_tokens(monkeypatch):
    _, var = load_pretrained("fashion-mnist", adapter="paper")
    labels = torch.tensor([7])
    expected = sampled_tokens(var, monkeypatch, "reference", labels)
    assert all(map(torch.equal, sampled_tokens(var, monkeypatch, "triton", labels), expected))


def test_dense_scales_too_run_on_the_kernels_and_removal_is_exact(monkeypatch):
    var = make_tiny_var(depth=1)
    before = var.autoregressive_infer_cfg(1, 3, g_seed=0)
    apply_patch(var, ActVARConfig(num_experts=8))
    cache = []
    var.blocks[0].register_forward_hook(lambda block, *_: cache.append(block.attn.cached_k))
    sampled_tokens(var, monkeypatch, "triton", torch.tensor([3]))
    assert len({keys.data_ptr() for keys in cache}) == 1, "the cache is one preallocated buffer from the first scale on"
    var.blocks[0]._forward_hooks.clear()
    remove_patch(var)
    assert torch.equal(var.autoregressive_infer_cfg(1, 3, g_seed=0), before)


@pytest.mark.parametrize("hooked", [False, pytest.param(True, marks=SLOW)])
def test_blocks_write_into_their_input_only_where_no_hook_sees_it(hooked, monkeypatch):
    var = apply_patch(make_tiny_var(depth=2), ActVARConfig(num_experts=8))
    schedule, seen = var.actvar.schedule, []
    select = selection.select_tokens

    def selecting(x, *args, **kwargs):
        selected = select(x, *args, **kwargs)
        seen.append(selected.rest is x)
        return selected

    monkeypatch.setattr(selection, "select_tokens", selecting)
    outputs = []
    if hooked:
        var.blocks[0].register_forward_hook(lambda _, args, output: outputs.append((output, output.clone())))
    sampled_tokens(var, monkeypatch, "triton", torch.tensor([3]))
    assert seen == [not hooked] * 2 * sum(scale.select for scale in schedule)
    assert len(outputs) == hooked * len(schedule)
    assert all(torch.equal(*pair) for pair in outputs)


@SLOW
def test_the_fast_sampler_is_reproducible_and_stays_in_the_vocabulary(monkeypatch):
    var = apply_patch(make_tiny_var(depth=1), ActVARConfig(num_experts=8), Execution(sampler="fast"))
    labels = torch.tensor([1, 2])
    first, second = (sampled_tokens(var, monkeypatch, "triton", labels) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(int(tokens.min()) >= 0 and int(tokens.max()) < var.V for tokens in first)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_patched_block_compiles_without_a_graph_break(backend):
    var = apply_patch(make_tiny_var(depth=1), ActVARConfig(num_experts=8))
    block, schedule = var.blocks[0], var.actvar.schedule
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, scale.tokens, var.C, generator=generator) for scale in schedule]
    cond = torch.randn(2, var.C, generator=generator)

    @torch.no_grad()
    def outputs(run) -> list[torch.Tensor]:
        block.attn.kv_caching(True)
        found = [run(x, cond, None) for x in xs]
        block.attn.kv_caching(False)
        return found

    with using_backend(backend):
        compiled = outputs(torch.compile(block, backend="eager", fullgraph=True))
        assert all(map(torch.equal, compiled, outputs(block)))


def test_guidance_before_the_head_gives_the_guided_logits(monkeypatch):
    var = apply_patch(make_tiny_var(depth=1), ActVARConfig(num_experts=8), Execution(sampler="fast"))
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(4, 5, var.C, generator=generator), torch.randn(4, var.C, generator=generator)
    monkeypatch.setattr(var, "run_blocks", lambda *_: x)
    drawn = []
    monkeypatch.setattr(var, "draw", lambda logits, guidance, *_: drawn.append((logits, guidance)))
    condition = Condition(None, cond, None, None)
    with using_backend("triton"), torch.no_grad():
        var.next_tokens(0, None, condition, 1.5, 0, 0.0, None)
        expected = guided(var.get_logits(x, cond), 1.5)
    ((logits, guidance),) = drawn
    assert guidance is None
    torch.testing.assert_close(logits, expected, atol=2e-6, rtol=1e-5)
