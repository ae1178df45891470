"""Scale schedules, rotary angles and the tokenizer of Infinity."""

from __future__ import annotations

import math

import pytest
import torch
from support.infinity import CASES, load_infinity_golden, tiny_infinity

from actvar.models import scale_schedule
from actvar.models.infinity import ASPECTS, SIZES
from actvar.models.infinity.rotary import rotation
from actvar.models.infinity.schedules import largest_map
from actvar_kernels import rotate_heads


def test_there_are_eight_aspect_ratios_and_their_inverses_in_four_sizes() -> None:
    assert ASPECTS == (
        0.333, 0.4, 0.5, 0.571, 0.666, 0.75, 0.8, 1.0, 1.25, 1.333, 1.5, 1.75, 2.0, 2.5, 3.0,
    )  # fmt: skip
    assert SIZES == {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_schedule_has_its_aspect_ratio_and_its_number_of_pixels(aspect: float, size: str) -> None:
    schedule = scale_schedule(aspect, size)
    assert len(schedule) == SIZES[size]
    assert schedule[:2] == [(1, 1, 1), (1, 2, 2)]
    assert all(a[1] <= b[1] and a[2] <= b[2] for a, b in zip(schedule, schedule[1:], strict=False))
    _, h, w = schedule[-1]
    assert h / w == pytest.approx(aspect, abs=0.01)
    assert 0.9 < 256 * h * w / 1e6 / float(size[:-1]) < 1.4
    assert largest_map(schedule) == scale_schedule(aspect, "1M")[-1][1:]
    turned = [(1, w, h) for _, h, w in scale_schedule(1 / aspect, size)]
    assert schedule == turned


def test_schedules_have_the_tokens_of_the_public_ones() -> None:
    assert sum(h * w for _, h, w in scale_schedule(1.0, "1M")) == 10521
    for case in CASES:
        golden = load_infinity_golden(case)
        assert golden.schedule == scale_schedule(golden.facts["aspect"], golden.facts["pn"])


def test_the_nearest_aspect_ratio_is_taken_and_wrong_arguments_are_named() -> None:
    assert scale_schedule(9 / 16) == scale_schedule(0.571)
    assert scale_schedule(100) == scale_schedule(3.0)
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="aspect: expected"):
            scale_schedule(wrong)
    with pytest.raises(ValueError, match=r"size: expected one of 0\.06M.*got '2M'"):
        scale_schedule(1.0, "2M")


def test_angles_follow_the_place_in_the_image_at_all_scales() -> None:
    schedule = scale_schedule(0.5, "0.06M")
    cosine, sine = rotation(tuple(schedule), 16, torch.device("cpu"))
    assert cosine.shape == (sum(h * w for _, h, w in schedule), 8)
    angle, start = torch.atan2(sine.double(), cosine.double()), 0
    height, width = scale_schedule(0.5, "1M")[-1][1:]
    for _, h, w in schedule:
        for token in range(h * w):
            row, column = round(token // w * height / h), round(token % w * width / w)
            steps = [place * 10000 ** (-i / 4) for place in (row, column) for i in range(4)]
            turns = (angle[start + token] - torch.tensor(steps, dtype=torch.float64)) / (2 * math.pi)
            torch.testing.assert_close(turns, turns.round(), rtol=0, atol=1e-5)
        start += h * w


def test_rotation_makes_products_depend_on_differences_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    angles = rotation(tuple(scale_schedule(1.0, "1M")), 16, torch.device("cpu")).double()[:, -64 * 64 :]
    at = lambda row, column: angles[:, 64 * row + column][:, None]  # noqa: E731
    near = (rotate_heads(q, at(5, 7)) * rotate_heads(k, at(2, 3))).sum()
    torch.testing.assert_close(
        near, (rotate_heads(q, at(35, 27)) * rotate_heads(k, at(32, 23))).sum(), rtol=0, atol=1e-5
    )
    assert abs(near - (rotate_heads(q, at(5, 7)) * rotate_heads(k, at(2, 4))).sum()) > 1e-3


@pytest.mark.parametrize("patchify", [False, True])
def test_the_tokenizer_quantizes_the_residual_of_all_scales_before(patchify: bool) -> None:
    tokenizer, infinity = tiny_infinity(patchify)
    schedule = infinity.tokenizer_schedule([(1, 1, 1), (1, 2, 2), (1, 3, 4)])
    image = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bits = tokenizer.encode(image, schedule)
    assert [tuple(b.shape) for b in bits] == [(2, h, w, 4) for _, h, w in schedule]
    with torch.no_grad():
        features = tokenizer.encoder(image)
    _, h, w = schedule[0]
    mean = torch.nn.functional.adaptive_avg_pool2d(features, (h, w))
    assert torch.equal(bits[0], (mean > 0).permute(0, 2, 3, 1).to(torch.uint8))
    codes = tokenizer.quantizer.lfq.to_codes(bits[-1])
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, *schedule[-1][1:]))
    assert torch.equal(tokenizer.quantizer.lfq.to_bits(codes), bits[-1])
    error = [(features - tokenizer.quantizer.features_of(bits[:n] + bits[-1:])).norm() for n in (0, 2)]
    assert error[1] < error[0]
    decoded = tokenizer.decode_bits(bits)
    assert decoded.shape == image.shape
    assert decoded.abs().max() <= 1
    inputs = infinity.teacher_input(bits)
    assert inputs.shape == (2, 16, infinity.token_bits)
    with pytest.raises(ValueError, match="schedule"):
        tokenizer.encode(image, schedule[:-1])
