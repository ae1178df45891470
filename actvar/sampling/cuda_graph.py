"""Sample by a CUDA graph whatever the Execution of the patch says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actvar.models import Infinity
from actvar.models.arguments import SEEDS, checked_draw, checked_integer, checked_labels, one_thread
from actvar.sparse.sample_graphs import why_no_graph
from actvar.sparse.state import patch_state
from actvar.utils.devices import device_of
from actvar.utils.modes import no_grad
from actvar.utils.wrappers import unwrapped


class GraphedSampling:
    """Sample a patched model on a GPU by replaying one CUDA graph, which also decodes the images.

        apply_patch(var, config, Execution(sampler="fast"))
        sample = GraphedSampling(var, cfg=4.0, top_k=900, top_p=0.95)
        images = sample(labels, seed=0)

    Images are those of `var.autoregressive_infer_cfg(B, labels, g_seed=seed, ...)`, which by itself replays graphs too
    unless `Execution(cuda_graph=False)` says otherwise. Here an error says why there can be no graph. The first call of
    a batch size captures its graph. Later calls capture it again if the patch, its Execution, or the place or the
    version of a weight has changed. All graphs of a model share one pool of memory, which `release_cache` frees.

    Args:
        var: a patched `actvar.models.VAR`, all of it on a GPU.
        cfg, top_k, top_p: as in `VAR.autoregressive_infer_cfg`.

    Raises:
        ValueError: the model is not patched, not on a GPU, has another sampling loop, or another sampler than
            `"fast"`, the only one that a graph can hold; or Triton does not run; or a hook or another reason of
            `Execution.cuda_graph`; or a number is out of its range.
        TypeError: an argument that is no number.
    """

    def __init__(self, var: nn.Module, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0):
        self.var: Any = unwrapped(var)
        _, cfg, top_k, top_p = checked_draw(None, cfg, top_k, top_p)
        self.arguments: dict[str, Any] = dict(cfg=cfg, top_k=top_k, top_p=top_p)
        self._check()

    def _check(self) -> None:
        """Raise the constructor's ValueError if the model cannot be sampled by a graph."""
        patch_state(self.var)
        if isinstance(self.var, Infinity):
            raise ValueError(
                "var: expected an actvar.models.VAR, got an Infinity, whose sample replays graphs by itself"
            )
        reason = why_no_graph(self.var)
        if reason is not None:
            raise ValueError(reason)

    @no_grad
    def __call__(self, labels: torch.Tensor, seed: int) -> torch.Tensor:
        """Return images `[B, channels, H, W]` in [0, 1] on the GPU, in the dtype of the autoencoder's output.

        Args:
            labels: classes `[B]`, an integer tensor on the GPU or the CPU.
            seed: seed of the sampling noise, -2^63 ... 2^64 - 1.

        Raises:
            TypeError: labels that are no integer tensor `[B]`, or a seed that is no integer.
            ValueError: a label on the CPU or a seed that is out of range, or a model as in the constructor.
        """
        self._check()
        if not isinstance(labels, torch.Tensor) or labels.ndim != 1:
            raise TypeError(f"labels: expected an integer tensor [B], got {labels!r:.100}")
        checked_labels(len(labels), labels, self.var.num_classes, labels.device)
        seed = checked_integer("seed", seed, SEEDS[0], SEEDS[-1])
        request = self.var.request(len(labels), labels.to(device_of(self.var)), seed, **self.arguments)
        with one_thread(self.var):
            return self.var.actvar.graphs.results(self.var, request, self.var.drawn, wanted=True)[0]
