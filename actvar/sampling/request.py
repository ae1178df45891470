"""Hold a request for images: the classes, the guidance, the filters and the seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from actvar.families import family_of
from actvar.models.arguments import checked_draw
from actvar.utils.devices import device_of
from actvar.utils.wrappers import unwrapped
from actvar_kernels.checks import as_integer, as_items


@dataclass(frozen=True)
class Sampling:
    """Hold the arguments of a call of `VAR.autoregressive_infer_cfg`.

    Numbers of any kind, also in arrays, become Python's own.

    Args:
        labels: the class of each image.
        cfg: guidance strength.
        top_k, top_p: filters of the tokens, as in `VAR.autoregressive_infer_cfg`.
        seed: one seed for the batch, or a tuple with one per image.

    Raises:
        TypeError: labels that are no integers, or a field as in `actvar.models.arguments.checked_draw`.
        ValueError: a field as in `actvar.models.arguments.checked_draw`.
    """

    labels: tuple[int, ...]
    cfg: float = 1.5
    top_k: int = 0
    top_p: float = 0.0
    seed: int | tuple[int, ...] = 0

    def __post_init__(self):
        draw = checked_draw(self.seed, self.cfg, self.top_k, self.top_p)
        labels = as_items(self.labels)
        if labels is None:
            raise TypeError(f"labels: expected a sequence of class numbers, got {self.labels!r:.100}")
        numbers = {"labels": tuple(as_integer("labels", label) for label in labels)}
        numbers |= dict(cfg=draw.cfg, top_k=draw.top_k, top_p=draw.top_p, seed=draw.g_seed)
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    def maps(self, model: Any) -> tuple[tuple[int, int], ...]:
        """Return height and width of the token map of every scale, which are those of the model."""
        return family_of(unwrapped(model)).maps(unwrapped(model))

    def settings(self) -> dict[str, object]:
        """Return everything that the images depend on beside the model, as JSON values."""
        return asdict(self)

    def run(self, var: Any) -> torch.Tensor:
        """Sample `var`, dense or patched, and return images `[B, C, H, W]` in [0, 1]."""
        labels = torch.tensor(self.labels, device=device_of(var))
        return var.autoregressive_infer_cfg(
            len(labels), labels, g_seed=self.seed, cfg=self.cfg, top_k=self.top_k, top_p=self.top_p
        )


def number_of_classes(model: Any) -> int:
    """Return the number of classes that a model, which may be inside a wrapper, draws images of.

    Raises:
        TypeError: a model that draws images of texts.
    """
    model = unwrapped(model)
    if family_of(model).draws_from_texts:
        kind = type(model).__name__
        raise TypeError(f"expected a model that draws from classes, such as VAR, got {kind}; it draws from texts")
    return model.num_classes
