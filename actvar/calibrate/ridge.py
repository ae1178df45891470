"""Ridge regression from sums over batches, so that no batch needs to be kept."""

from __future__ import annotations

import torch

STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 1))


class NormalEquations:
    """Sums of `X^T X`, `X^T Y` and `Y^T Y`'s diagonal in float64, where X `[T, C + 1]` has a last column of ones.

    Args:
        inputs: features of a sample, C.
        outputs: targets of a sample, K.
        device: of the sums.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.yy = torch.zeros(outputs, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count samples `x` `[T, C]` with targets `y` `[T, K]`."""
        x = torch.nn.functional.pad(x.double(), (0, 1), value=1.0)
        y = y.double()
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy.add_(y.square().sum(dim=0))

    def solution(self, strength: float) -> torch.Tensor:
        """Return the `w` `[C + 1, K]` float64 that minimises `|X w - Y|^2 + strength * m * |w|^2`.

        `m` is the mean of the diagonal of `X^T X`. The last row of `w`, the bias, is not penalised.
        """
        diagonal = self.xx.diagonal()[:-1]
        penalty = torch.full_like(self.xx.diagonal(), max(strength * diagonal.mean().item(), 1e-12))
        penalty[-1] = 0
        return torch.linalg.solve(self.xx + penalty.diag(), self.xy)

    def squared_error(self, solution: torch.Tensor) -> float:
        """Return `|X w - Y|^2` over the samples counted here, for the `solution` w `[C + 1, K]` float64."""
        cross = 2 * (solution * self.xy).sum(dim=0)
        return (self.yy - cross + (solution * (self.xx @ solution)).sum(dim=0)).sum().item()


def fitted(train: NormalEquations, held_out: NormalEquations) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight `[K, C]` and bias `[K]` float32 of the strength with the least error on the held-out samples.

    Args:
        train: sums over the samples to fit to.
        held_out: sums over other samples.
    """
    solutions = [train.solution(strength) for strength in STRENGTHS]
    best = min(solutions, key=held_out.squared_error)
    return best[:-1].T.float(), best[-1].float()
