"""Put updated rows back among the tokens that keep their value."""

from __future__ import annotations

import torch

from actvar_kernels.backend import backend_of
from actvar_kernels.checks import expect_shape
from actvar_kernels.scatter import reference


def scatter_rows(
    rest: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """`rest` with `rest[r, index[r, j]] = rows[r, j] + gamma[r] * update[r, j]`.

    Args:
        rest: `[R, L, C]`, the rows that stay; may be written to and returned, or copied.
        index: `[R, K]` int64 without repeats.
        rows, update: `[R, K, C]`.
        gamma: AdaLN gate of the branch, `[R, 1, C]`.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("rest", rest, (None, None, None))
    R, _, C = rest.shape
    expect_shape("index", index, (R, None))
    expect_shape("rows", rows, (R, index.shape[1], C))
    expect_shape("update", update, (R, index.shape[1], C))
    expect_shape("gamma", gamma, (R, 1, C))
    backend_of("scatter_rows", rest, ("reference",))
    return reference.scatter_rows(rest, index, rows, update, gamma)
