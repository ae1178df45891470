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
from actvar.families import blocks_of, family_of
from actvar.models import VAR
from actvar.models.var import Condition
from actvar.patching.patch import patched_silently
from actvar.sparse.state import patch_state


@contextmanager
def collaborative_decoding(var: nn.Module, small: nn.Module, count: int) -> Iterator[nn.Module]:
    """The last `count` scales are predicted by `small`, which first reads the token maps of the scales before.

    Args:
        small: a VAR of the same autoencoder.

    Raises:
        TypeError: a model of another kind.
        ValueError: models with other token maps, classes or codes, or a count that leaves `var` no scale.
    """
    first, family = expect_last_scales("count", count, expect_var(var)), family_of(small)
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
            for block in blocks_of(small):
                family.cache(block).start()
            for earlier, seen in enumerate(drawn):
                small.run_blocks(earlier, seen, condition)
        return small.predict(scale, inputs, condition)

    with patched_silently(var, DENSE, None), with_methods(var, predict=predict), _sampling(small):
        yield var


@contextmanager
def _sampling(small: VAR) -> Iterator[None]:
    """`small` accelerated, as within its own sampling method; its K/V cache is empty afterwards."""
    with patched_silently(small, DENSE, None), patch_state(small).sampling(small, in_place=False):
        yield


def _expect_same_tokens(var: VAR, small: VAR) -> None:
    wanted, found = (_token_facts(model) for model in (var, small))
    for name in wanted:
        if wanted[name] != found[name]:
            raise ValueError(f"small: expected a model with {name} {wanted[name]}, as the large one, got {found[name]}")
    codes = [family_of(model).autoencoder(model).quantize.embedding.weight for model in (var, small)]
    if not torch.equal(*codes):
        raise ValueError("small: expected a model of the same autoencoder, got one with other codes")


def _token_facts(var: VAR) -> dict[str, object]:
    """Return what two models must have in common to read each other's tokens."""
    family = family_of(var)
    sizes = family.sizes(var)
    return {
        "token maps": family.maps(var),
        "num_classes": var.num_classes,
        "V": sizes.vocabulary,
        "Cvae": sizes.code_size,
    }
