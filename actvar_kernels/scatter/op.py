"""Put updated rows back among the tokens that keep their value."""

from __future__ import annotations

import torch

from actvar_kernels.backend import implementation
from actvar_kernels.checks import expect_shape
from actvar_kernels.scatter import reference


def scatter_rows(
    x: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """A copy of x with `x[r, index[r, j]] = rows[r, j] + gamma[r] * update[r, j]`.

    Args:
        x: `[R, L, C]`.
        index: `[R, K]` int64 without repeats.
        rows, update: `[R, K, C]`.
        gamma: AdaLN gate of the branch, `[R, 1, C]`.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("x", x, (None, None, None))
    R, _, C = x.shape
    expect_shape("index", index, (R, None))
    expect_shape("rows", rows, (R, index.shape[1], C))
    expect_shape("update", update, (R, index.shape[1], C))
    expect_shape("gamma", gamma, (R, 1, C))
    return implementation("scatter_rows", {"reference": reference.scatter_rows})(x, index, rows, update, gamma)
