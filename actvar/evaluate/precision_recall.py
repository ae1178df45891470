"""Precision and recall of generated images by neighbourhoods in feature space, which torchmetrics does not have.

Source: Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, 2019.
"""

from __future__ import annotations

import torch

CHUNK = 1000


def precision_recall(
    real: torch.Tensor, real_radii: torch.Tensor, generated: torch.Tensor, neighbours: int = 3
) -> tuple[float, float]:
    """Return the share of generated features in the real manifold, and of real features in the generated manifold.

    A manifold is the union of balls around its features that reach to their k-th neighbour.

    Args:
        real: features of real images, `[M, F]`.
        real_radii: `radii(real, neighbours)`, `[M]` float64.
        generated: features of generated images, `[N, F]`.
        neighbours: k.
    """
    return _within(generated, real, real_radii), _within(real, generated, radii(generated, neighbours))


def radii(features: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return the distance of each feature to its k-th nearest other feature, `[N]` float64.

    Args:
        features: `[N, F]`.
        neighbours: k.

    Raises:
        ValueError: too few features to have k neighbours.
    """
    if len(features) <= neighbours:
        raise ValueError(f"expected more than {neighbours} features, got {len(features)}")
    all_ = features.double()
    found = []
    for start in range(0, len(all_), CHUNK):
        distance = torch.cdist(all_[start : start + CHUNK], all_)
        rows = torch.arange(len(distance), device=distance.device)
        distance[rows, start + rows] = torch.inf
        found.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(found)


def _within(features: torch.Tensor, centres: torch.Tensor, radius: torch.Tensor) -> float:
    """Return the share of `features` that lie within the radius of at least one centre."""
    chunks = features.double().split(CHUNK)
    return (
        torch.cat([(torch.cdist(chunk, centres.double()) <= radius).any(dim=1) for chunk in chunks])
        .double()
        .mean()
        .item()
    )
