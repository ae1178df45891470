"""Define the filters and the draw of the public VAR code in plain PyTorch.

Equal seeds give the tokens that this code gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def filter_(logits: torch.Tensor, top_k: int, top_p: float) -> None:
    """Set logits that the filters remove to -inf, in place.

    The first filter keeps the k largest. The second then keeps the smallest set of tokens whose probability reaches p.

    Args:
        logits: `[..., V]`, floating-point.
        top_k: k; 0 keeps all.
        top_p: p; 0 keeps all.
    """
    if top_k > 0:
        threshold = logits.topk(top_k, largest=True, sorted=False, dim=-1)[0].amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < threshold, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, descending=False)
        remove = ascending.softmax(dim=-1).cumsum_(dim=-1) <= (1 - top_p)
        remove[..., -1:] = False
        logits.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)


def draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return one token for each distribution, `[...]` int64.

    Args:
        probabilities: `[..., V]`, floating-point.
        generator: source of random numbers; None: the global one.
    """
    rows = probabilities.flatten(0, -2)
    tokens = torch.multinomial(rows, num_samples=1, replacement=True, generator=generator)
    return tokens.view(probabilities.shape[:-1])


def draw_by_image(probabilities: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return tokens `[B, L]` int64, those of `draw` of each image alone with its generator.

    This takes a few calls for all images and one for each, where `torch.multinomial` takes a dozen and waits for the
    GPU.

    Args:
        probabilities: `[B, L, V]`, floating-point.
        generators: one for each image.

    Raises:
        RuntimeError: a number is no probability.
    """
    if not ((probabilities >= 0) & (probabilities < torch.inf)).all():
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    noise = torch.empty_like(probabilities, memory_format=torch.contiguous_format)
    for of_image, generator in zip(noise, generators, strict=True):
        of_image.exponential_(generator=generator)
    return (probabilities / noise).argmax(dim=-1)
