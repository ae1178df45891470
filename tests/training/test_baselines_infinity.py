"""Every baseline that takes Infinity against plain code, its lossless end, and its removal."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from support.infinity import tiny_infinity, tiny_text
from support.infinity_oracle import oracle_logits
from torch import Tensor
from torch.nn import functional as F

from actvar import baselines
from actvar.baselines.fastvar import PUBLIC_INFINITY
from actvar.baselines.skipvar import LEFT_OUT, UNGUIDED, Choice, edges, high_frequencies, public_decision
from actvar.config import DENSE
from actvar.evaluate.text_predictions import drawn_bits, forced_logits
from actvar.models import Infinity
from actvar.models.infinity import layers
from actvar.patching.patch import patched_silently
from actvar.sampling.text_request import TextSampling

SCHEDULE = [(1, 1, 1), (1, 2, 2), (1, 3, 4), (1, 4, 5), (1, 5, 6), (1, 6, 8)]
LENGTHS = [3, 5]
DEPTH = 11  # of which FastVAR leaves the first and the last block whole
RATES = {-3: 0.6, -2: 0.5}


@pytest.fixture(params=[False, True], ids=["one place a token", "patchified"])
def infinity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Infinity:
    """Return a model that does not round in cross-attention, where sums in another order may fall to the other side."""
    monkeypatch.setattr(layers, "rounded", lambda x: x)
    return tiny_infinity(request.param, depth=DEPTH, block_chunks=1)[1]


@functools.cache
def request_of(images: int = 2, **changes) -> TextSampling:
    text, lengths = tiny_text(LENGTHS[:images])
    features = tuple(text.split(lengths))
    numbers = dict(tau=1.0, seed=(1, 2)[:images]) | changes
    return TextSampling(("a", "b")[:images], tuple(range(images)), SCHEDULE, features=features, **numbers)


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5 * float(theirs.abs().max()))


def accelerated(infinity: Infinity) -> Tensor:
    with patched_silently(infinity, DENSE, None):
        return request_of(1).run(infinity)


METHODS = {
    "fastvar": lambda infinity: baselines.fastvar(infinity, **PUBLIC_INFINITY),
    "skip": lambda infinity: baselines.skip_last_scales(infinity, 2),
    "unguided": lambda infinity: baselines.without_guidance(infinity, 3),
    "skipvar, scales": lambda infinity: baselines.skipvar(infinity, lambda *_: Choice(2, 0)),
    "skipvar, guidance": lambda infinity: baselines.skipvar(infinity, lambda *_: Choice(0, 3)),
}


def test_plain_code_computes_what_the_model_does(infinity):
    request = request_of()
    bits = drawn_bits(infinity, request)
    expected = oracle_logits(infinity, request, bits, lambda number, scale, name, x, sublayer: sublayer(x))
    assert_near([each.logits for each in bits], expected)
    assert_near(list(forced_logits(infinity, request, bits)), expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_baseline_changes_the_image_repeats_it_and_comes_off_bit_for_bit(infinity, name):
    request = request_of(1)
    dense, before = request.run(infinity), copy.deepcopy(infinity.state_dict())
    with METHODS[name](infinity):
        first, second = request.run(infinity), request.run(infinity)
    assert torch.equal(first, second)
    assert first.shape == dense.shape
    assert not torch.equal(first, dense)
    assert torch.equal(request.run(infinity), dense)
    assert all(torch.equal(value, before[key]) for key, value in infinity.state_dict().items())
    assert not {"scales", "add_scale", "actvar", "draw_bits"} & vars(infinity).keys()
    assert not any("forward" in vars(block) for block in infinity.unregistered_blocks)


def test_with_nothing_left_out_the_image_is_the_accelerated_one_bit_for_bit(infinity):
    expected = accelerated(infinity)
    for applied in (baselines.fastvar(infinity, 1.0), baselines.skipvar(infinity, lambda *_: Choice(0, 0))):
        with applied:
            assert torch.equal(request_of(1).run(infinity), expected)


def test_fastvar_is_its_definition(infinity):
    """Scores, the rows that are kept, their positions, and what is restored, by loops."""
    request = request_of()
    bits = drawn_bits(infinity, request)
    kept: dict[tuple[int, str], Tensor] = {}
    (source, *_), rates = range(len(SCHEDULE))[2:], {len(SCHEDULE) + scale: rate for scale, rate in RATES.items()}

    def update(number, scale, name, x, sublayer):
        if scale not in rates or number in (0, DEPTH - 1):
            out = sublayer(x)
            if scale == source:
                kept[number, name] = out
            return out
        _, height, width = SCHEDULE[scale]
        count = math.floor(rates[scale] * height * width + 0.5)
        chosen = []
        for row in x:
            mean = sum(row) / len(row)
            score = [float((token - mean).square().sum()) for token in row]
            chosen.append(sorted(range(len(row)), key=lambda i: -score[i])[:count])
        rows = torch.stack([row[of_row] for row, of_row in zip(x, chosen, strict=True)])
        computed = sublayer(rows, torch.tensor(chosen))
        maps = kept[number, name].transpose(1, 2).unflatten(2, SCHEDULE[source][1:])
        out = F.interpolate(maps, size=(height, width), mode="area").flatten(2).transpose(1, 2).clone()
        for row, of_row in enumerate(chosen):
            out[row, of_row] = computed[row]
        return out

    expected = oracle_logits(infinity, request, bits, update)
    with baselines.fastvar(infinity, [*RATES.values()], tuple(RATES), left_out=1):
        assert_near(list(forced_logits(infinity, request, bits)), expected[:-1])


def test_fastvar_has_the_numbers_of_its_authors_on_square_images_of_1024_pixels():
    infinity = tiny_infinity(depth=32, block_chunks=1)[1]
    with baselines.fastvar(infinity, **PUBLIC_INFINITY):
        schedules = [block.actvar.schedule for block in infinity.unregistered_blocks]
    pruned = {(s.height, block): s.keep for block, schedule in enumerate(schedules) for s in schedule if s.select}
    blocks = range(3, 28)
    assert pruned == {(32, b): 1024 - int(1024 * 0.4) for b in blocks} | {
        (40, b): 1600 - int(1600 * 0.5) for b in blocks
    }
    assert [s.height for s in schedules[0] if s.left_out] == [48, 64]


def test_leaving_out_scales_decodes_the_features_so_far(infinity):
    features = []
    own = infinity.add_scale
    infinity.add_scale = lambda *arguments: features.append(own(*arguments).clone()) or features[-1].clone()
    with patched_silently(infinity, DENSE, None):
        request_of().run(infinity)
    del infinity.add_scale
    with baselines.skip_last_scales(infinity, 2):
        found = request_of().run(infinity)
    torch.testing.assert_close(found, infinity.decode(features[-3]).add(1).mul(0.5))


def test_without_guidance_the_logits_are_those_of_the_text(infinity):
    bits = drawn_bits(infinity, request_of())
    text = oracle_logits(infinity, request_of(cfg=1.0), bits, lambda number, scale, name, x, sublayer: sublayer(x))
    with baselines.without_guidance(infinity, 2):
        found = list(forced_logits(infinity, request_of(), bits))
    assert_near(found, [*(each.logits for each in bits[:-2]), *text[-2:]])


@pytest.mark.parametrize("choice", [Choice(2, 0), Choice(0, 3), Choice(0, 0)], ids=str)
def test_skipvar_does_what_it_chooses_from_the_images_of_two_scales(infinity, choice):
    """The decision is after the fourth scale from the end, of the features before and after it in a small size."""
    request, seen, features = request_of(1), [], []
    bits = drawn_bits(infinity, request)
    own = infinity.add_scale
    infinity.add_scale = lambda *arguments: features.append(own(*arguments).clone()) or features[-1].clone()
    list(forced_logits(infinity, request, bits))
    del infinity.add_scale
    fixed = {"left_out": baselines.skip_last_scales, "unguided": baselines.without_guidance}
    expected = [each.logits for each in bits]
    for name, method in fixed.items():
        if count := getattr(choice, name):
            with method(infinity, count):
                expected = list(forced_logits(infinity, request, bits))
    with baselines.skipvar(infinity, lambda *numbers: seen.append(numbers) or choice):
        assert_near(list(forced_logits(infinity, request, bits)), expected)
        assert_near(list(forced_logits(infinity, request, bits)), expected)  # the choice is one image's
    size = [side * (2 if infinity.spatial_patchify else 1) for side in SCHEDULE[4 * 6 // 13][1:]]
    small = [F.interpolate(f, size, mode="bilinear") for f in features[1:3]]
    before, after = (infinity.decode(f) for f in small)
    assert seen[0] == seen[1]
    assert seen[0][0] == pytest.approx((edges(after) - edges(before)).abs().mean().item(), rel=1e-4)
    assert seen[0][1] == pytest.approx(high_frequencies(after).item(), rel=1e-4)


def test_edges_and_high_frequencies_are_their_definitions():
    ramp = torch.arange(6.0).expand(1, 3, 5, 6) / 8  # rises by 1/8 from column to column
    assert edges(ramp)[0, 0, 1:-1, 1:-1].tolist() == [[1.0] * 4] * 3
    assert high_frequencies(torch.ones(1, 3, 8, 8)).item() == 0
    board = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    assert high_frequencies(board.expand(1, 3, 8, 8)).item() == pytest.approx(1)
    assert high_frequencies(board.expand(1, 3, 8, 8) + 1).item() == pytest.approx(0.5)


def test_the_public_decision_saves_more_of_smoother_images():
    """Few details are at the means of the classifiers' numbers less two deviations, many at as much above."""
    assert public_decision(0.0, 0.34) == Choice(3, 0)
    assert public_decision(0.1153, 0.4892) == Choice(2, 0)
    assert public_decision(0.24, 0.64) == Choice(0, 2)
    for classifier in (LEFT_OUT, UNGUIDED):
        assert len(classifier.weights) == len(classifier.biases) == 4 - classifier.first


@pytest.mark.parametrize(
    ("make", "images", "message"),
    [
        (
            lambda infinity: baselines.skip_last_scales(infinity, 6),
            1,
            "scales_until: expected at least the first scale",
        ),
        (lambda infinity: baselines.without_guidance(infinity, 8), 1, "guidance_until: the model has 6 scales"),
        (lambda infinity: baselines.skip_last_scales(infinity, 13), 1, "count: expected from 1 to 12"),
        (lambda infinity: baselines.fastvar(infinity, 0.5, (-6, -1)), 1, "a scale before them"),
        (lambda infinity: baselines.skipvar(infinity), 2, "expected one image at a time"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(infinity, make, images, message):
    dense = request_of(images).run(infinity)
    with pytest.raises(ValueError, match=message), make(infinity):
        request_of(images).run(infinity)
    assert torch.equal(request_of(images).run(infinity), dense)


def test_skipvar_takes_infinity_and_schedules_with_enough_scales(tiny_var, infinity):
    with pytest.raises(TypeError, match=r"infinity: expected actvar\.models\.Infinity"), baselines.skipvar(tiny_var):
        pass
    short = TextSampling(("a",), (0,), SCHEDULE[:4], features=request_of(1).features)
    with pytest.raises(ValueError, match="at least 5 scales for SkipVAR, got 4"), baselines.skipvar(infinity):
        short.run(infinity)
