"""PSNR and SSIM by hand and by loops, and where `actvar sample --compare` says them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from actvar.cli import main
from actvar.evaluate.similarity import psnr, ssim
from actvar.sampling.request import Sampling
from actvar.zoo.pretrained import load_pretrained


def ssim_by_loops(image: np.ndarray, other: np.ndarray) -> float:
    """Return the SSIM of two grey images, window by window."""
    places = np.arange(11) - 5.0
    line = np.exp(-(places**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for top in range(image.shape[0] - 10):
        for left in range(image.shape[1] - 10):
            a, b = (each[top : top + 11, left : left + 11] for each in (image, other))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 1e-4)
                * (2 * both + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
            )
    return float(np.mean(values))


def test_psnr_by_hand():
    black = torch.zeros(2, 1, 4, 4)
    assert psnr(black, black + 0.1) == pytest.approx(20)
    half_wrong = black.clone()
    half_wrong[0] = 1
    assert psnr(black, half_wrong) == pytest.approx(10 * math.log10(2))
    assert psnr(black, black) == math.inf


def test_ssim_of_flat_images_by_hand():
    """Without variance the structure is 1, and what is left is (2ab + c) / (a² + b² + c) with c = 0.0001."""
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert ssim(flat, flat * 2) == pytest.approx((2 * 0.5 + 1e-4) / (1.25 + 1e-4))
    assert ssim(flat, flat) == pytest.approx(1)


@pytest.mark.parametrize("size", [(11, 11), (13, 18)], ids=str)
def test_ssim_is_that_of_loops(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64)
    others = (images + 0.2 * torch.rand(images.shape, generator=generator)).clamp(0, 1)
    expected = np.mean(
        [ssim_by_loops(a.numpy(), b.numpy()) for a, b in zip(images.flatten(0, 1), others.flatten(0, 1), strict=True)]
    )
    assert ssim(images, others) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1


def test_images_smaller_than_the_window_are_one_window():
    images = torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    assert ssim(images, images) == pytest.approx(1)
    assert ssim(images, 1 - images) < 0


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_images_of_two_shapes_are_refused(measure):
    with pytest.raises(ValueError, match=r"expected the shape of the others, \(1, 1, 8, 8\), got \(2, 1, 8, 8\)"):
        measure(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_compare_says_how_near_the_images_are_to_the_dense_ones(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sample", "--model", "fashion-mnist", "--labels", "sandal,Ankle boot", "--adapter", "best"]
    main([*command, "--compare", "--out", str(out), "--json", str(tmp_path / "a" / "compare.json")])
    shown = capsys.readouterr().out
    facts = json.loads((tmp_path / "a" / "compare.json").read_text("utf-8"))
    sampling = Sampling((5, 9))
    dense = sampling.run(load_pretrained("fashion-mnist")[1])
    sparse = sampling.run(load_pretrained("fashion-mnist", adapter="best")[1])
    assert facts["psnr"]["actvar"] == pytest.approx(psnr(sparse, dense), rel=1e-3)
    assert facts["ssim"]["actvar"] == pytest.approx(ssim(sparse, dense), rel=1e-3)
    assert facts["ssim"]["accelerated"] > 0.999 > facts["ssim"]["actvar"]
    for name, digits in (("PSNR", 1), ("SSIM", 4)):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{name} to the dense images"))
        assert line.split()[-1] == f"{facts[name.lower()]['actvar']:.{digits}f}"
    assert facts["seconds"].keys() == {"dense", "accelerated", "actvar"}
    assert all((tmp_path / file).exists() for file in facts["files"])


def test_equal_images_are_json_without_infinity(tmp_path):
    from actvar.reports.compare import Comparison

    once = {"dense": 1.0, "accelerated": 1.0, "actvar": 1.0}
    flops = {"dense": 2, "actvar": 1}
    comparison = Comparison(1, once, {}, flops, flops, {"accelerated": math.inf, "actvar": 20.0}, once)
    json.dumps(comparison.as_dict(), allow_nan=False)
    assert comparison.as_dict()["psnr"] == {"accelerated": None, "actvar": 20.0}
    assert "inf" in comparison.table()
