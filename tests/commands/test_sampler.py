"""`Sampler` draws the model's own images as pictures, whatever the batch; `actvar models` lists what is bundled."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.helpers import make_tiny_var

import actvar
from actvar import ActVARConfig, Sampler
from actvar.cli import main
from actvar.utils.pictures import pixel_values


def test_pictures_are_the_models_images_in_every_batch_size():
    var = make_tiny_var()
    vae = var.vae_proxy[0]
    actvar.apply_patch(var, ActVARConfig(num_experts=8, guidance_until=-1))
    labels, seeds = [1, 0, 3, 2, 1], [5, 6, 7, 8, 9]
    pictures = Sampler(vae, var, batch=2)(labels, seeds, cfg=2.0, top_k=9)
    assert [np.array(p).tolist() for p in Sampler(vae, var)(labels, 5, cfg=2.0, top_k=9)] == [
        np.array(p).tolist() for p in pictures
    ]
    for label, seed, picture in zip(labels, seeds, pictures, strict=True):
        image = var.autoregressive_infer_cfg(1, torch.tensor([label]), g_seed=[seed], cfg=2.0, top_k=9)
        expected = pixel_values(image)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(np.array(picture).reshape(expected.shape), expected)


def test_grey_models_give_grey_pictures_and_the_summary_is_that_of_now():
    vae, var = actvar.load_pretrained("fashion-mnist-small")
    sampler = Sampler(vae, var)
    (picture,) = sampler([3])
    assert (picture.mode, picture.size) == ("L", (32, 32))
    assert sampler.summary().startswith("dense")
    actvar.accelerate(var)
    assert sampler.summary() == actvar.summary(var)


def test_what_does_not_fit_is_refused():
    var = make_tiny_var()
    with pytest.raises(ValueError, match="vae: expected the autoencoder that var decodes by"):
        Sampler(make_tiny_var().vae_proxy[0], var)
    with pytest.raises(ValueError, match="batch: expected"):
        Sampler(var.vae_proxy[0], var, batch=0)
    sampler = Sampler(var.vae_proxy[0], var)
    with pytest.raises(ValueError, match="seeds: expected one per label, 2 of them, got 1"):
        sampler([0, 1], [3])
    with pytest.raises(TypeError, match="labels"):
        sampler(["shirt"])


def test_models_lists_presets_and_adapters(capsys):
    main(["models"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "fashion-mnist",
        "  size:      6 blocks, width 192, 10 classes",
        "  classes:   T-shirt, trousers, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot",
        "  presets:   lossless, fast, fastest, near",
    ]
    main(["models", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fashion-mnist-small"]["presets"] == ["lossless"]
    assert "best" in found["fashion-mnist"]["adapters"]
