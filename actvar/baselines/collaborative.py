"""CoDe without training: a large VAR draws the first scales, a small one the last.

Source: Chen et al., Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient, CVPR 2025.

Adapted: neither model is fine-tuned for its scales, as in the paper's training-free variant. The small model reads the
large one's token maps scale by scale, so its K/V cache is the one of drawing these maps itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    """Let `small` predict the last `count` scales, after it has read the token maps of the scales before.

    Args:
        var: the large VAR, which predicts the other scales.
        small: a VAR of the same autoencoder.
        count: number of scales, from 1 to one less than the model has.

    Raises:
        TypeError: a model of another kind.
        ValueError: models with other token maps, classes or codes, or a count that leaves `var` no scale.
    """
    large = expect_var(var)
    first, family = expect_last_scales("count", count, large), family_of(small)
    drafter = expect_var(small)
    _expect_same_tokens(large, drafter)
    seen_inputs: list[torch.Tensor | None] = []
    condition: Condition

    def predict(self, scale, inputs, large_condition):
        nonlocal condition
        if scale < first:
            seen_inputs[scale:] = [inputs]
            return type(self).predict(self, scale, inputs, large_condition)
        if scale == first:
            condition = drafter.condition(large_condition.labels)
            for block in blocks_of(drafter):
                family.cache(block).start()
            for seen_scale, seen in enumerate(seen_inputs):
                drafter.run_blocks(seen_scale, seen, condition)
        return drafter.predict(scale, inputs, condition)

    with patched_silently(var, DENSE, None), with_methods(var, predict=predict), _sampling(drafter):
        yield var


@contextmanager
def _sampling(small: VAR) -> Iterator[None]:
    """Accelerate `small` as in its own sampling method; its K/V cache is empty afterwards."""
    with patched_silently(small, DENSE, None), patch_state(small).sampling(small, in_place=False):
        yield


def _expect_same_tokens(var: VAR, small: VAR) -> None:
    wanted, found = (_token_facts(model) for model in (var, small))
    for name in wanted:
        if wanted[name] != found[name]:
            raise ValueError(f"small: expected a model with {name} {wanted[name]}, as the large one, got {found[name]}")
    autoencoders: list[Any] = [family_of(model).autoencoder(model) for model in (var, small)]
    codes, small_codes = (autoencoder.quantize.embedding.weight for autoencoder in autoencoders)
    if not torch.equal(codes, small_codes):
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
