"""Measure how near images are to others, by PSNR and SSIM."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

WINDOW, DEVIATION = 11, 1.5
"""Side and standard deviation of SSIM's Gaussian window, in pixels."""
K1, K2 = 0.01, 0.03


def psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, of the mean squared error over all images; infinite if it is 0.

    Args:
        images, others: `[B, C, H, W]` in [0, 1], of any dtype.

    Raises:
        ValueError: images of two shapes.
    """
    _expect_alike(images, others)
    error = (images.double() - others.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(images: torch.Tensor, others: torch.Tensor) -> float:
    """Return the mean structural similarity, at most 1.

    This is the mean SSIM of Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity
    (2004): a Gaussian window, where it lies within the image, over each channel. The window of images of less than 11
    pixels a side is as large as the image.

    Args:
        images, others: `[B, C, H, W]` in [0, 1], of any dtype.

    Raises:
        ValueError: images of two shapes.
    """
    _expect_alike(images, others)
    a, b = (each.double().flatten(0, 1)[:, None] for each in (images, others))
    window = _gaussian(a.shape[2])[:, None] * _gaussian(a.shape[3])
    weight = window.to(a.device)[None, None]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, weight)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (variance_a + variance_b + K2**2)
    return (luminance * structure).mean().item()


def _gaussian(side: int) -> torch.Tensor:
    """Return the weights of SSIM's window along a side of so many pixels, float64 `[min(side, 11)]`."""
    count = min(side, WINDOW)
    places = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    weights = torch.exp(-0.5 * (places / DEVIATION) ** 2)
    return weights / weights.sum()


def _expect_alike(images: torch.Tensor, others: torch.Tensor) -> None:
    """Raise a ValueError unless the images have one shape."""
    if images.shape != others.shape:
        raise ValueError(f"images: expected the shape of the others, {tuple(others.shape)}, got {tuple(images.shape)}")
