"""When a sample is replayed as a graph and when not, by a stand-in for CUDA graphs; `test_gpu.py` has the real ones."""

from __future__ import annotations

import copy
import logging
import pickle
import re

import pytest
import torch
from support.helpers import sample

from actvar import ActVARConfig, Execution, GraphedSampling, apply_patch, refresh, release_cache, summary
from actvar.patching.patch import patched_silently, reconfigure
from actvar.sampling.timing import block_seconds
from actvar.sparse import sample_graphs
from actvar.sparse.contexts import record

CONFIG = ActVARConfig(num_experts=8)
FAST = Execution(sampler="fast")
LABELS = torch.tensor([1, 2])


def drawn(var, seeds=0, labels=LABELS, **draw):
    return var.autoregressive_infer_cfg(len(labels), labels, g_seed=seeds, **draw)


@pytest.fixture
def var(tiny_var):
    return apply_patch(tiny_var, CONFIG, FAST)


# With graphs


def test_the_first_sample_captures_and_later_ones_replay(var, card):
    reconfigure(var, CONFIG, Execution(sampler="fast", cuda_graph=False))
    expected = [drawn(var, seed, labels) for seed, labels in ((0, LABELS), (1, LABELS), (2, LABELS.flip(0)))]
    assert (card.captures, card.replays) == (0, 0)
    reconfigure(var, CONFIG, FAST)
    got = [drawn(var, seed, labels) for seed, labels in ((0, LABELS), (1, LABELS), (2, LABELS.flip(0)))]
    assert all(map(torch.equal, got, expected))
    assert (card.warm_ups, card.captures, card.replays) == (1, 1, 3)


def test_images_of_a_replay_are_not_those_of_the_next(var, card):
    first = drawn(var, 0)
    kept = first.clone()
    drawn(var, 1)
    assert torch.equal(first, kept)


def test_seeds_per_image_are_a_graph_of_their_own_and_give_the_images_drawn_alone(var, card):
    var.double()
    var.vae_proxy[0].double()
    together = drawn(var, [7, -3])
    assert torch.equal(drawn(var, [7, -3]), together)
    assert card.captures == 1
    reconfigure(var, CONFIG, Execution(sampler="fast", cuda_graph=False))
    alone = torch.cat([drawn(var, [seed], LABELS[i : i + 1]) for i, seed in enumerate((7, -3))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_every_shape_and_filter_has_a_graph_and_all_share_one_pool(var, card):
    for draw in ({}, {}, {"cfg": 2.0}, {"top_k": 9}, {"top_p": 0.9}):
        drawn(var, **draw)
    drawn(var, labels=LABELS[:1])
    assert card.captures == 5
    assert len(set(card.pools)) == 1


def test_no_more_graphs_are_kept_than_that(var, card):
    for strength in range(sample_graphs.MOST_GRAPHS + 1):
        drawn(var, cfg=float(strength))
    assert len(var.actvar.graphs.graphs) == sample_graphs.MOST_GRAPHS
    drawn(var, cfg=0.0)
    assert card.captures == sample_graphs.MOST_GRAPHS + 2


def double_a_weight(var):
    with torch.no_grad():
        var.head.weight.mul_(2)


def move_a_weight(var):
    var.head.weight.data = var.head.weight.data.clone()


def change_the_decoder(var):
    with torch.no_grad():
        var.vae_proxy[0].decoder.conv_in.weight.mul_(1.5)


@pytest.mark.parametrize("change", [double_a_weight, move_a_weight, change_the_decoder])
def test_another_weight_is_captured_anew(var, card, change):
    before = drawn(var)
    change(var)
    after = drawn(var)
    assert card.captures == 2
    assert torch.equal(after, drawn(var))
    assert torch.equal(before, after) == (change is move_a_weight)


@pytest.mark.parametrize("release", [release_cache, refresh], ids=["release_cache", "refresh"])
def test_released_graphs_are_captured_anew_in_another_pool(var, card, release):
    drawn(var)
    release(var)
    assert (var.actvar.graphs.graphs, var.actvar.graphs.pool) == ({}, None)
    drawn(var)
    assert card.captures == 2
    assert len(set(card.pools)) == 2


def test_another_patch_has_graphs_of_its_own_and_the_first_ones_stay(var, card):
    drawn(var)
    with patched_silently(var, ActVARConfig(num_experts=8, ffn_rate=0.5), None, FAST):
        drawn(var)
    drawn(var)
    assert card.captures == 2


def test_a_graph_under_autocast_is_another_one(var, card):
    drawn(var)
    with torch.autocast("cpu", torch.bfloat16):
        drawn(var)
    assert card.captures == 2


def test_without_a_seed_pytorch_draws_one_for_the_sample(var, card):
    torch.manual_seed(3)
    first = drawn(var, None)
    assert not torch.equal(drawn(var, None), first)
    torch.manual_seed(3)
    assert torch.equal(drawn(var, None), first)
    torch.manual_seed(4)
    assert torch.isfinite(var.autoregressive_infer_cfg(2, None, g_seed=None)).all()
    assert card.captures == 1


def test_copies_and_pickles_have_no_graphs(var, card):
    drawn(var)
    for other in (copy.deepcopy(var), pickle.loads(pickle.dumps(var))):
        assert other.actvar.graphs.graphs == {}
    assert len(var.actvar.graphs.graphs) == 1


@pytest.mark.parametrize("labels", [3, -2, torch.tensor([1, -1]), torch.tensor([-5, 2], dtype=torch.int32)], ids=str)
def test_classes_of_every_kind_are_those_of_eager_sampling(var, card, labels):
    by_graph = [var.autoregressive_infer_cfg(2, labels, g_seed=seed) for seed in (0, 1)]
    reconfigure(var, CONFIG, Execution(sampler="fast", cuda_graph=False))
    assert torch.equal(by_graph[1], var.autoregressive_infer_cfg(2, labels, g_seed=1))
    reconfigure(var, CONFIG, FAST)
    if isinstance(labels, torch.Tensor):
        assert torch.equal(GraphedSampling(var)(labels, 1), by_graph[1])


# Eagerly


def hooked(var):
    return var.blocks[0].attn.register_forward_hook(lambda *_: None).remove


def replaced(var):
    vae = var.vae_proxy[0]
    decode = vae.fhat_to_img
    vae.fhat_to_img = lambda f_hat: decode(f_hat)
    return lambda: delattr(vae, "fhat_to_img")


WATCHING = {"hooks of a .* run in Python": hooked, "a method of a VQVAE was replaced": replaced}


@pytest.mark.parametrize("reason", WATCHING)
def test_what_watches_a_sample_runs_eagerly_and_the_summary_says_so(var, card, reason, caplog):
    stop = WATCHING[reason](var)
    with caplog.at_level(logging.INFO, "actvar"):
        drawn(var), drawn(var)
    assert card.captures == 0
    assert len([r for r in caplog.messages if r.startswith("sampled without a CUDA graph: ")]) == 1
    (line,) = [line for line in summary(var).splitlines() if line.startswith("no CUDA graph: ")]
    assert re.search(reason, line)
    stop()
    drawn(var)
    assert card.captures == 1
    assert "a sample is one CUDA graph" in summary(var)


class Switched(torch.nn.Linear):
    is_on = True

    def forward(self, x):
        return super().forward(x) if self.is_on else torch.zeros_like(super().forward(x))


def test_a_layer_of_an_unknown_class_runs_eagerly_wherever_it_is(var, card):
    var.word_embed.__class__ = Switched
    first = drawn(var)
    var.word_embed.is_on = False  # which no weight tells
    assert not torch.equal(drawn(var), first)
    assert card.captures == 0
    assert "no CUDA graph: layers that are more than their weight are called" in summary(var)


def test_records_and_timed_blocks_run_eagerly(var, card):
    with record(var) as records:
        drawn(var)
    with block_seconds(var) as seconds:
        drawn(var)
    assert records
    assert seconds
    assert card.captures == 0


def test_the_sampler_of_pytorch_and_smooth_mixtures_run_eagerly(tiny_var, card):
    apply_patch(tiny_var, CONFIG)
    sample(tiny_var)
    assert "no CUDA graph: sampler: expected 'fast'" in summary(tiny_var)
    reconfigure(tiny_var, CONFIG, FAST)
    drawn(tiny_var, more_smooth=True)
    assert card.captures == 0


def test_a_graph_that_draws_other_images_is_given_up(var, card, caplog):
    expected = drawn(apply_patch(copy.deepcopy(var), CONFIG, Execution(sampler="fast", cuda_graph=False)))
    card.off = 0.25
    with caplog.at_level(logging.WARNING, "actvar"):
        assert torch.equal(drawn(var), expected)
    assert "its first images differ from eager ones, by up to 0.25" in caplog.text
    assert torch.equal(drawn(var), expected)
    assert card.captures == 1
    assert "no CUDA graph: a graph was tried" in summary(var)


def test_a_capture_that_fails_is_given_up(var, card, caplog):
    card.error = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING, "actvar"):
        first = drawn(var)
    assert "it could not be captured (operation not permitted" in caplog.text
    assert torch.equal(drawn(var), first)


# Asked for by name


WANTED = Execution(sampler="fast", cuda_graph=True)


@pytest.mark.parametrize(
    ("execution", "prepare", "message"),
    [
        (Execution(cuda_graph=True), lambda var: None, "cuda_graph: True .*sampler: expected 'fast'"),
        (WANTED, hooked, "cuda_graph: True .*hooks of a .* run in Python"),
        (WANTED, replaced, "a method of a VQVAE was replaced"),
    ],
    ids=["sampler", "hook", "method"],
)
def test_true_raises_where_it_cannot_and_says_why(tiny_var, card, execution, prepare, message):
    apply_patch(tiny_var, CONFIG, execution)
    prepare(tiny_var)
    with pytest.raises(ValueError, match=message):
        drawn(tiny_var)
    assert card.captures == 0


def test_true_does_not_look_at_the_first_images_and_names_a_capture_that_fails(tiny_var, card):
    apply_patch(tiny_var, CONFIG, WANTED)
    card.off = 0.25
    drawn(tiny_var)
    assert len(tiny_var.actvar.graphs.graphs) == 1
    card.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="could not be captured as a graph: out of memory"):
        drawn(tiny_var, labels=LABELS[:1])


def test_graphed_sampling_draws_by_the_graphs_of_the_model(var, card):
    sampled = GraphedSampling(var, top_k=9)
    assert torch.equal(sampled(LABELS, seed=5), drawn(var, 5, top_k=9))
    assert card.captures == 1


# On a CPU


def test_on_a_cpu_auto_is_eager_without_a_word_and_true_raises(tiny_var, caplog):
    apply_patch(tiny_var, CONFIG, FAST)
    with caplog.at_level(logging.INFO, "actvar"):
        drawn(tiny_var)
    assert "CUDA graph" not in caplog.text + summary(tiny_var)
    reconfigure(tiny_var, CONFIG, WANTED)
    with pytest.raises(ValueError, match=r"cuda_graph: True .*expected one on a GPU, got one on cpu"):
        drawn(tiny_var)
