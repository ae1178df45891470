"""Samples of Infinity as graphs, by the stand-in for CUDA graphs: when one is captured, replayed, given up."""

from __future__ import annotations

import logging

import pytest
import torch
from support.graph_card import Card
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text
from torch import Tensor

from actvar import ActVARConfig, Execution, GraphedSampling, accelerate, apply_patch, record, release_cache, summary
from actvar.families import infinity_mixin
from actvar.models import Infinity
from actvar.models.infinity import layers
from actvar.patching.patch import reconfigure
from actvar.sparse import sample_graphs

SPARSE = ActVARConfig(token_rates=(0.5, 0.75), ffn_rate=0.75)
FAST, EAGER, WANTED = (Execution(sampler="fast", cuda_graph=graph) for graph in ("auto", False, True))
TALL = [(1, 1, 1), (1, 3, 2), (1, 5, 3)]


@pytest.fixture(params=[SPARSE, ActVARConfig(**vars(SPARSE) | {"guidance_until": -1})], ids=["guided", "half the rows"])
def infinity(request: pytest.FixtureRequest, card: Card) -> Infinity:
    return apply_patch(tiny_infinity()[1], request.param, FAST)


@pytest.fixture
def plain(card: Card) -> Infinity:
    return accelerate(tiny_infinity()[1], FAST)


def drawn(infinity: Infinity, lengths=(3, 5), seed=0, schedule=TINY_SCHEDULE, **draw) -> list[Tensor]:
    """Return images, then the bits of every scale."""
    text, lengths = tiny_text(list(lengths))
    images, bits = infinity.sample(text, lengths, schedule, g_seed=seed, tau=1.0, **draw, return_bits=True)
    return [images, *bits]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_texts_of_other_lengths_and_words_are_replayed_by_one_graph(infinity, card):
    requests = [dict(lengths=(3, 5)), dict(lengths=(5, 5), seed=1), dict(lengths=(1, 12), seed=2)]
    by_graph = [drawn(infinity, **request) for request in requests]
    assert (card.captures, card.replays) == (1, 3)
    reconfigure(infinity, infinity.actvar.config, EAGER)
    assert all(same(drawn(infinity, **request), got) for request, got in zip(requests, by_graph, strict=True))
    assert not same(by_graph[0], by_graph[1])
    assert card.captures == 1


def test_results_of_a_replay_are_not_those_of_the_next(plain, card):
    first = drawn(plain)
    kept = [result.clone() for result in first]
    drawn(plain, seed=1)
    assert same(first, kept)


@pytest.mark.parametrize(
    "other",
    [
        dict(lengths=(3,)), dict(schedule=TALL), dict(cfg=2.0), dict(cfg=1.0), dict(cfg=(4.0, 4.0, 1.0)),
        dict(top_p=0.5), dict(insertion=(-2,)), dict(seed=[1, 2]),
    ],
    ids=str,
)  # fmt: skip
def test_another_shape_schedule_or_draw_is_captured_anew(plain, card, other):
    first = drawn(plain)
    drawn(plain, **other)
    assert card.captures == 2
    assert len(set(card.pools)) == 1
    assert same(drawn(plain), first)
    assert card.captures == 2


def test_longer_texts_than_the_filled_ones_are_captured_anew(card, monkeypatch):
    monkeypatch.setattr(infinity_mixin, "TEXT_STEP", 4)
    infinity = accelerate(tiny_infinity()[1], FAST)
    for lengths in ((3, 4), (1, 2), (3, 5), (8, 8), (12, 1)):
        drawn(infinity, lengths)
    assert card.captures == 3


def test_filling_up_texts_changes_no_bit(card, monkeypatch):
    """Compare in float64 without the rounding of cross-attention, so that only a wrong mask could change bits."""
    monkeypatch.setattr(layers, "rounded", lambda x: x)
    infinity = accelerate(tiny_infinity()[1].double(), EAGER)
    infinity.vae_proxy[0].double()
    filled = drawn(infinity)
    monkeypatch.setattr(infinity_mixin, "is_on_gpu", lambda model: False)
    images, *bits = drawn(infinity)
    assert all(map(torch.equal, filled[1:], bits))
    torch.testing.assert_close(filled[0], images, rtol=0, atol=1e-9)


def test_seeds_per_image_give_the_bits_drawn_alone(card, monkeypatch):
    monkeypatch.setattr(layers, "rounded", lambda x: x)
    infinity = accelerate(tiny_infinity()[1].double(), FAST)
    together = drawn(infinity, seed=[7, -3])
    text, lengths = tiny_text([3, 5])
    for image, alone in enumerate(text.split(lengths)):
        arguments = dict(g_seed=[(7, -3)[image]], tau=1.0, return_bits=True)
        bits = infinity.sample(alone, [len(alone)], TINY_SCHEDULE, **arguments)[1]
        assert all(torch.equal(a[image : image + 1], b) for a, b in zip(together[1:], bits, strict=True))
    assert card.captures == 2


def double_a_weight(infinity: Infinity) -> None:
    with torch.no_grad():
        infinity.unregistered_blocks[1].ca.mat_kv.weight.mul_(2)


def move_a_weight(infinity: Infinity) -> None:
    infinity.head.weight.data = infinity.head.weight.data.clone()


def change_the_texts(infinity: Infinity) -> None:
    with torch.no_grad():
        infinity.text_proj_for_ca[0].weight.mul_(1.5)


def change_the_decoder(infinity: Infinity) -> None:
    with torch.no_grad():
        infinity.vae_proxy[0].decoder.conv_in.conv.weight.mul_(1.5)


@pytest.mark.parametrize("change", [double_a_weight, move_a_weight, change_the_texts, change_the_decoder])
def test_another_weight_is_captured_anew(plain, card, change):
    before = drawn(plain)
    change(plain)
    after = drawn(plain)
    assert card.captures == 2
    assert same(after, drawn(plain))
    assert same(before, after) == (change is move_a_weight)


def test_released_graphs_are_captured_anew(plain, card):
    first = drawn(plain)
    release_cache(plain)
    assert (plain.actvar.graphs.graphs, plain.actvar.graphs.pool) == ({}, None)
    assert same(drawn(plain), first)
    assert card.captures == 2


def test_a_graph_holds_the_angles_that_it_reads(plain, card):
    drawn(plain)
    (graph,) = plain.actvar.graphs.graphs.values()
    assert graph.request.held[0] is plain.angles(TINY_SCHEDULE)


def hook(infinity: Infinity) -> None:
    infinity.text_norm.register_forward_hook(lambda *_: None)


def replace_a_method(infinity: Infinity) -> None:
    infinity.decode = lambda features: features


def adapt(infinity: Infinity) -> None:
    class Adapted(torch.nn.Linear):
        pass

    infinity.unregistered_blocks[0].ca.mat_q.__class__ = Adapted


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (hook, "hooks of a RMSNorm run in Python"),
        (replace_a_method, "a method of a .*Infinity was replaced"),
        (adapt, "layers that are more than their weight are called"),
    ],
)
def test_what_a_graph_cannot_hold_runs_eagerly_is_said_and_refused_by_true(plain, card, caplog, prepare, reason):
    prepare(plain)
    with caplog.at_level(logging.INFO, "actvar"):
        eager = drawn(plain), drawn(plain)
    assert same(*eager)
    assert card.captures == 0
    assert len([line for line in caplog.messages if line.startswith("sampled without a CUDA graph: ")]) == 1
    assert [line for line in summary(plain).splitlines() if line.startswith("no CUDA graph: ")]
    reconfigure(plain, plain.actvar.config, WANTED)
    with pytest.raises(ValueError, match=rf"cuda_graph: True .*{reason}"):
        drawn(plain)


def test_records_and_the_sampler_of_pytorch_run_eagerly(infinity, card):
    with record(infinity) as records:
        drawn(infinity)
    assert records
    reconfigure(infinity, infinity.actvar.config, Execution())
    drawn(infinity)
    assert "no CUDA graph: sampler: expected 'fast'" in summary(infinity)
    reconfigure(infinity, infinity.actvar.config, Execution(cuda_graph=True))
    with pytest.raises(ValueError, match=r"cuda_graph: True .*sampler: expected 'fast'"):
        drawn(infinity)
    assert card.captures == 0


def test_a_graph_that_draws_other_images_or_fails_is_given_up(plain, card, caplog):
    reconfigure(plain, plain.actvar.config, EAGER)
    expected = drawn(plain)
    for change, said in (
        (dict(off=0.25), "differ from eager ones, by up to 0.25"),
        (dict(error=RuntimeError("x")), "x"),
    ):
        reconfigure(plain, plain.actvar.config, FAST)
        plain.actvar.graphs = sample_graphs.SampleGraphs()
        vars(card).update(change)
        with caplog.at_level(logging.WARNING, "actvar"):
            assert same(drawn(plain), expected)
        assert said in caplog.text
        assert same(drawn(plain), expected)
        assert "no CUDA graph: a graph was tried" in summary(plain)


def test_graphed_sampling_is_refused_by_name(plain):
    with pytest.raises(ValueError, match=r"VAR, got an Infinity, whose sample replays graphs"):
        GraphedSampling(plain)


def test_a_loop_of_another_make_runs_eagerly(plain, card):
    class Other(Infinity):
        def sample(self, *args, **kwargs):
            return super().sample(*args, **kwargs)

    other = tiny_infinity()[1]
    other.__class__ = Other
    drawn(accelerate(other, FAST))
    assert card.captures == 0
    assert "no CUDA graph: model: expected an actvar.models.VAR or Infinity, got" in summary(other)


def test_on_a_cpu_auto_is_eager_without_a_word_and_true_raises(caplog):
    infinity = accelerate(tiny_infinity()[1], FAST)
    with caplog.at_level(logging.INFO, "actvar"):
        drawn(infinity)
    assert "CUDA graph" not in caplog.text + summary(infinity)
    reconfigure(infinity, infinity.actvar.config, WANTED)
    with pytest.raises(ValueError, match=r"cuda_graph: True .*expected one on a GPU, got one on cpu"):
        drawn(infinity)
