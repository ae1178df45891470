"""CoDe without training: a large VAR draws the first scales, a small one the last.

Source: Chen et al., Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient, CVPR 2025.

Adapted: neither model is fine-tuned for its scales, as in the paper's training-free variant. The small model fills its
K/V cache with the large one's token maps scale by scale, as if it had drawn them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from actvar.baselines.replacing_methods import expect_last_scales, expect_var, with_methods
from actvar.config import DENSE
from actvar.models import VAR
from actvar.models.var import Condition
from actvar.patching.patch import patched_silently
from actvar.sparse.state import shared_state


@contextmanager
def collaborative_decoding(var: nn.Module, small: nn.Module, count: int) -> Iterator[nn.Module]:
    """The last `count` scales are predicted by `small`, which first reads the token maps of the scales before.

    Args:
        small: a VAR of the same autoencoder.

    Raises:
        TypeError: a model of another kind.
        ValueError: models with other token maps, classes or codes, or a count that leaves `var` no scale.
    """
    first = expect_last_scales("count", count, expect_var(var))
    _expect_same_tokens(var, expect_var(small))
    drawn: list[torch.Tensor | None] = []
    condition: Condition | None = None

    def predict(self, scale, inputs, of_large):
        nonlocal condition
        if scale < first:
            drawn[scale:] = [inputs]
            return type(self).predict(self, scale, inputs, of_large)
        if scale == first:
            condition = small.condition(of_large.labels)
            for block in small.blocks:
                block.attn.kv_caching(True)
            for earlier, seen in enumerate(drawn):
                small.run_blocks(earlier, seen, condition)
        return small.predict(scale, inputs, condition)

    with patched_silently(var, DENSE, None), with_methods(var, predict=predict), _sampling(small):
        yield var


@contextmanager
def _sampling(small: VAR) -> Iterator[None]:
    """`small` accelerated, as within its own sampling method; its K/V cache is empty afterwards."""
    with patched_silently(small, DENSE, None), shared_state(small).during(rows_are_guided=True, reuses_room=True):
        try:
            yield
        finally:
            for block in small.blocks:
                block.attn.kv_caching(False)


def _expect_same_tokens(var: VAR, small: VAR) -> None:
    for name in ("patch_nums", "num_classes", "V", "Cvae"):
        wanted, found = getattr(var, name), getattr(small, name)
        if wanted != found:
            raise ValueError(f"small: expected a model with {name} {wanted}, as the large one, got {found}")
    codes = [model.vae_proxy[0].quantize.embedding.weight for model in (var, small)]
    if not torch.equal(*codes):
        raise ValueError("small: expected a model of the same autoencoder, got one with other codes")
