"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), in float32 where a processor multiplies no bfloat16.

`torch.optim.Muon` takes bfloat16 everywhere: on a CPU without instructions for it, its products take longer than
forward and backward of the bundled model together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from actvar_kernels.cpu_backend import cpu

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
"""Jordan's coefficients a, b, c of the Newton-Schulz polynomial `a x + b x^3 + c x^5`, also in `torch.optim.Muon`."""


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonal update: `W <- (1 - lr wd) W - 0.2 lr sqrt(max(rows, columns)) O`.

    `O` is the orthogonalized Nesterov momentum. The factor makes updates as large as those of AdamW (Liu et al. 2025,
    arXiv 2502.16982).

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: wd.
        momentum: decay of the average of gradients.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon: expected matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalized(p.grad.lerp(average, momentum))
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-0.2 * lr * max(p.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Return about `U V^T` of `matrix = U S V^T`, by Newton-Schulz iterations.

    Singular values near the largest become numbers between 0.6 and 1.2.
    """
    a, b, c = COEFFICIENTS
    narrow = matrix.is_cuda or cpu.multiplies_bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(torch.bfloat16 if narrow else torch.float32)
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
