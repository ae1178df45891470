"""Metrics against known values, reports, and the run of an evaluation that may be interrupted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

import actvar
from actvar.config import DENSE
from actvar.evaluate.methods import Method, chosen_methods, methods_of
from actvar.evaluate.precision_recall import precision_recall, radii
from actvar.evaluate.predictions import DensePredictions
from actvar.evaluate.quality import ImageQuality, RealImages, real_images
from actvar.evaluate.report import Mean, Report, save_quality_plot
from actvar.evaluate.run import Evaluation, Result, evaluate, image_seconds
from actvar.evaluate.text_methods import text_methods
from actvar.patching.patch import patched_silently, unpatched
from actvar.utils.parts import Parts
from actvar.zoo import load_feature_network, pretrained
from actvar_kernels import backend


class Pixels(nn.Module):
    """Features are the pixels, logits a linear layer of them."""

    def __init__(self, pixels: int, classes: int):
        super().__init__()
        self.classifier = nn.Linear(pixels, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def random_images(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture
def network() -> Pixels:
    torch.manual_seed(0)
    return Pixels(4, 3).eval()


def test_fid_is_the_formula(network):
    real, generated = random_images(300, 0), random_images(200, 1, 0.8)
    found = ImageQuality(network, real_images(network, real)).of(generated)["fid"]
    a, b = (images.flatten(1).double().numpy() for images in (real, generated))
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found == pytest.approx(distance, rel=1e-4)


def test_the_inception_score_lies_between_one_class_and_all(network):
    quality = ImageQuality(network, real_images(network, random_images(50, 0)))
    images = random_images(300, 1)
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    assert quality.of(images)["is"] == pytest.approx(1)
    with torch.no_grad():  # each image is of the class that its first pixel says
        network.classifier.bias.copy_(torch.tensor([0.0, -1e3, -1e4]))
        network.classifier.weight[:, 0] = torch.tensor([0.0, 3e3, 15e3])
    before = torch.random.get_rng_state()
    first = quality.of(images)
    assert 2.5 < first["is"] < 3
    assert quality.of(images) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_agreement_is_the_share_of_images_in_their_class(network):
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    quality = ImageQuality(network, real_images(network, random_images(50, 0)))
    assert quality.of(random_images(20, 1), torch.tensor([1] * 15 + [0] * 5))["agreement"] == 0.75


def test_precision_and_recall_count_what_lies_in_the_balls():
    line = torch.arange(10.0).unsqueeze(1)
    assert radii(line, 3)[:4].tolist() == [3, 2, 2, 2]
    real_radii = radii(line, 3)
    inside, outside = torch.full((6, 1), 4.2), torch.full((2, 1), 100.0)
    generated = torch.cat((inside, outside))
    # radii of the generated ones: 0 for the six equal ones, 95.8 for the others, which so reach 4.2 and above
    assert precision_recall(line, real_radii, generated, 3) == (0.75, 0.5)
    assert precision_recall(line, real_radii, line, 3) == (1, 1)
    assert precision_recall(line, real_radii, line + 1000, 3) == (0, 0)
    with pytest.raises(ValueError, match="more than 3"):
        radii(line[:3], 3)


def test_precision_and_recall_are_their_definition(monkeypatch):
    monkeypatch.setattr("actvar.evaluate.precision_recall.CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=generator)
    generated = torch.randn(30, 3, generator=generator) * 0.7 + 0.3

    def radius(points, i):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[2]

    def share(points, centres):
        reach = [radius(centres, i) for i in range(len(centres))]
        return sum(any(math.dist(p, c) <= r for c, r in zip(centres, reach, strict=True)) for p in points) / len(points)

    expected = share(generated.tolist(), real.tolist()), share(real.tolist(), generated.tolist())
    assert precision_recall(real, radii(real, 3), generated, 3) == pytest.approx(expected)
    assert 0 < expected[1] < 1


def test_statistics_of_real_images_are_kept_by_network_and_images(network, tmp_path, monkeypatch):
    images = random_images(50, 0)
    first = real_images(network, images, tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(Pixels, "features", lambda *_: pytest.fail("computed again"))
    again = real_images(network, images, tmp_path)
    assert all(torch.equal(getattr(first, name), value) for name, value in vars(again).items())
    monkeypatch.undo()
    file.write_bytes(b"damaged")
    assert torch.equal(real_images(network, images, tmp_path).manifold, first.manifold)
    assert isinstance(real_images(network, images, tmp_path), RealImages)
    real_images(network, images * 0.5, tmp_path)
    with torch.no_grad():
        network.classifier.weight.add_(1)
    real_images(network, images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_quality_falls_with_the_images_of_the_bundled_network():
    images = torch.rand(200, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    network = load_feature_network()
    quality = ImageQuality(network, real_images(network, images))
    found = [quality.of(images * dim) for dim in (1, 0.9, 0.5)]
    assert found[0]["fid"] == pytest.approx(0, abs=1e-2)
    assert found[0]["fid"] < found[1]["fid"] < found[2]["fid"]
    assert (found[0]["precision"], found[0]["recall"]) == (1, 1)
    assert found[2]["precision"] < 1


def test_divergence_is_that_of_the_logits_with_and_without_guidance(tiny_var):
    labels = torch.tensor([1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randint(tiny_var.V, (3, side * side), generator=generator) for side in tiny_var.patch_nums]
    inputs = tiny_var.vae_proxy[0].quantize.teacher_input(maps)
    dense = DensePredictions(tiny_var, [(labels[:2], inputs[:2]), (labels[2:], inputs[2:])], cfg=1.5)
    with patched_silently(tiny_var, DENSE, None):
        assert all(kl == pytest.approx(0, abs=1e-5) for kl in dense.divergences(tiny_var)["kl"])
    with patched_silently(tiny_var, actvar.ActVARConfig(token_rates=(0.5, 0.5)), None):
        found = dense.divergences(tiny_var)
        expected = actvar.evaluate.divergence.divergence_by_scale(tiny_var, [(labels, inputs)])
    assert found["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found["kl_drawn"][0] == pytest.approx(0, abs=1e-5)
    assert found["kl_drawn"][-1] > found["kl"][-1] > 0
    with actvar.baselines.without_guidance(tiny_var, 1):
        found = dense.divergences(tiny_var)
    assert found["kl"][-1] == pytest.approx(0, abs=1e-5)
    assert found["kl_drawn"][-1] > 0.01
    with actvar.baselines.skip_last_scales(tiny_var, 1):
        assert dense.divergences(tiny_var)["kl"][-1] is None


def test_means_have_students_interval():
    assert Mean.of([2.0]) == Mean(2.0, None)
    mean = Mean.of([1.0, 2.0, 3.0])
    assert mean.mean == 2
    assert mean.interval == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert str(mean) == "2 ± 2.5"


def result(name: str, fid: list[float], seconds: float) -> Result:
    of_seeds = [{"fid": value, "is": 2.0, "precision": 0.5, "recall": 0.5, "agreement": 1.0} for value in fid]
    return Result(name, of_seeds, [seconds] * 3, 10**9, {"kl": [0.0, 0.1], "kl_drawn": [0.0, None]})


def test_a_report_pairs_seeds_with_the_dense_model(tmp_path):
    results = [result("dense", [10.0, 20.0], 0.02), result("tome@0.5", [11.0, 21.0], 0.01)]
    report = Report(results, Evaluation(repeats=2), ((1, 1), (2, 2)))
    entry = report.as_dict()["methods"]["tome@0.5"]
    assert entry["fid"] == 16
    assert entry["interval"]["fid"] > 1
    assert entry["minus_dense"]["fid"] == {"mean": 1.0, "interval": 0.0}
    assert entry["kl"] == {"1x1": 0.0, "2x2": 0.1}
    assert (entry["seconds"], entry["flops"]) == (0.01, 10**9)
    assert report.as_dict()["methods"]["dense"]["minus_dense"] == {}
    assert [line.split()[0] for line in report.table().splitlines()[1:]] == ["dense", "tome@0.5"]
    assert save_quality_plot(report, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_parts_are_kept_by_their_facts_and_made_again_when_damaged(tmp_path):
    parts, calls = Parts(tmp_path / "parts"), []

    def get(facts):
        return parts.get("part", facts, lambda _: calls.append(facts) or {"value": len(calls)})

    assert [get("a"), get("a"), get("b")] == [{"value": 1}, {"value": 1}, {"value": 2}]
    for file in parts.folder.iterdir():
        file.write_text("{")
    assert get("a") == {"value": 3}


def test_the_folder_of_a_part_goes_although_a_process_died_before_it_could_remove_it(tmp_path):
    parts = Parts(tmp_path / "parts")
    folders = []

    def images(folder):
        folder.mkdir(parents=True)
        folders.append(folder)
        return "found"

    assert parts.get("part", "facts", images) == "found"
    assert not folders[0].exists()
    folders[0].mkdir()
    (folders[0] / "shard").touch()
    assert parts.get("part", "facts", images) == "found"
    assert len(folders) == 1
    assert not folders[0].exists()


def test_methods_are_timed_in_turn_and_each_is_warm(tiny_var):
    order = []

    def method(name: str) -> Method:
        def applied(var):
            order.append(name)
            return unpatched(var)

        return Method(name, applied)

    seconds = image_seconds(tiny_var, [method("a"), method("b")], Evaluation(batch=2, rounds=2))
    assert order == ["a", "b", "a", "b"]
    assert [len(of_method) for of_method in seconds] == [2, 2]
    assert all(0 < value < 60 for of_method in seconds for value in of_method)


def test_an_interrupted_evaluation_goes_on(tiny_var, tmp_path, monkeypatch):
    methods = chosen_methods("dense,skip", methods_of())
    network = Pixels(tiny_var.patch_nums[-1] ** 2 * 4, 10).eval()
    quality = ImageQuality(network, real_images(network, torch.rand(30, 1, 10, 10)))
    how = Evaluation(num=20, batch=10, repeats=2, rounds=1)
    drawn = []
    of = ImageQuality.of

    def interrupted(self, images, labels):
        drawn.append(len(images))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return of(self, images, labels)

    monkeypatch.setattr(ImageQuality, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_var, methods, how, tmp_path, quality)
    assert not hasattr(tiny_var, "actvar")
    results = evaluate(tiny_var, methods, how, tmp_path, quality)
    assert len(drawn) == 3 + 4, "two of the six were there"
    assert [found.name for found in results] == ["dense", "skip@1", "skip@2"]
    assert [len(found.quality) for found in results] == [2, 2, 2]
    assert results[0].flops > results[1].flops > results[2].flops
    fids = [of_seed["fid"] for found in results for of_seed in found.quality]
    assert len(set(fids)) == 6
    with torch.no_grad():
        tiny_var.head.weight.mul_(2)
    evaluate(tiny_var, methods[:1], how, tmp_path, quality)
    assert len(drawn) == 9, "another model's images are others"


def test_unknown_methods_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"names among dense, accelerated, .*tome@0.5.*, got 'tom'"):
        chosen_methods("dense,tom", methods_of())
    with pytest.raises(FileNotFoundError, match="no such adapter"):
        chosen_methods(str(tmp_path / "none.safetensors"), methods_of())


@pytest.mark.parametrize(("device", "has_bytes"), [("cpu", True), ("cpu", False), ("cuda", True), ("cuda:1", False)])
def test_methods_in_eight_bits_are_those_of_the_device_of_the_model(monkeypatch, caplog, device, has_bytes):
    on_cpu = device == "cpu"
    monkeypatch.setattr(backend.brgemm, "runs", lambda dtype: has_bytes is on_cpu)
    monkeypatch.setattr(backend, "triton_installed", lambda: has_bytes is not on_cpu)
    monkeypatch.setattr(backend, "_why_not_e4m3", lambda: "fp8 needs another GPU")
    assert ("int8" in methods_of(device=device)) is has_bytes
    assert ("int8" in text_methods(5, 1, device=device)) is has_bytes
    assert ("methods in int8 are left out" in caplog.text) is not has_bytes
    assert "fp8" not in methods_of(device=device)
    assert ("fp8 are left out: C++ has no products of fp8" in caplog.text) is on_cpu


def test_with_the_reference_methods_are_in_every_format(reference_backend):
    assert {"int8", "fp8", "best-fp8", "preset-near-fp8"} <= methods_of("fashion-mnist").keys()


def test_families_adapters_and_their_parts_are_methods(tiny_var, tmp_path):
    with actvar.patched(tiny_var, actvar.ActVARConfig()):
        actvar.save_adapter(tiny_var, tmp_path / "mine.safetensors")
    names = [m.name for m in chosen_methods(f"tome,dense,{tmp_path / 'mine.safetensors'},tome@0.5", methods_of())]
    assert names == ["tome@0.75", "tome@0.5", "dense", "mine"]
    known = methods_of("fashion-mnist")
    assert {"paper", "paper-no-experts", "paper-no-selection", "best"} <= known.keys()
    assert {"paper-fixed-tokens", "best-fixed-tokens"} <= known.keys()
    _, var = actvar.load_pretrained("fashion-mnist")
    with known["best"].applied(var):
        kept = [sum(of_block.schedule[-1].keep for of_block in (b.actvar for b in var.blocks))]
    with known["best-fixed-tokens"].applied(var):
        kept.append(len(var.blocks) * var.actvar.schedule[-1].keep)
        assert var.actvar.config.fixed_tokens
    assert kept[0] == pytest.approx(kept[1], abs=len(var.blocks) / 2)
    with known["paper-no-experts"].applied(var):
        assert [(s.select, s.route) for s in var.actvar.schedule][-1] == (True, False)
    with known["paper-no-selection"].applied(var):
        assert [(s.select, s.route) for s in var.actvar.schedule][-1] == (False, True)


def test_without_a_small_model_code_is_left_out_with_a_warning(monkeypatch, caplog):
    monkeypatch.delitem(pretrained.WEIGHTS, "fashion-mnist-small", raising=False)
    assert "code@1" not in methods_of("fashion-mnist")
    assert "code is left out" in caplog.text
