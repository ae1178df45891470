"""Sample by a CUDA graph, so that the GPU never waits for Python to launch kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actvar.families import family_of
from actvar.models.arguments import SEEDS, checked_draw, checked_integer, checked_labels
from actvar.patching.patch import release_cache
from actvar.sparse.state import patch_state
from actvar.utils.devices import device_of
from actvar.utils.modes import no_grad
from actvar.utils.wrappers import unwrapped
from actvar_kernels import backend_of

WARM_UP_RUNS = 2  # compile kernels, fill the allocator


class GraphedSampling:
    """Sample a patched model on a GPU by replaying one CUDA graph, which also decodes the images.

        apply_patch(var, config, Execution(sampler="fast"))
        sample = GraphedSampling(var, cfg=4.0, top_k=900, top_p=0.95)
        images = sample(labels, seed=0)

    Images are those of `var.autoregressive_infer_cfg(B, labels, g_seed=seed, ...)`. The first call captures the graph.
    A later call captures it again if the batch size, the patch, its Execution or the place of a weight has changed. The
    graph reads weights that are changed in place. It has memory of its own for the K/V cache and all intermediate
    values.

    Args:
        var: a patched `actvar.models.VAR`, all of it on a GPU.
        cfg, top_k, top_p: as in `VAR.autoregressive_infer_cfg`.

    Raises:
        ValueError: the model is not patched, not on a GPU, has another sampling loop, or another sampler than
            `"fast"`, the only one that a graph can hold; or Triton does not run; or a number is out of its range.
        TypeError: an argument that is no number.
    """

    def __init__(self, var: nn.Module, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0):
        self.var = unwrapped(var)
        _, cfg, top_k, top_p = checked_draw(None, cfg, top_k, top_p)
        self.arguments: dict[str, Any] = dict(cfg=cfg, top_k=top_k, top_p=top_p)
        self._captured_for: tuple | None = None
        self._graph: Any = None
        self._images: Any = None
        self._check()

    def _check(self) -> None:
        """Raise the constructor's ValueError if the model cannot be sampled by a graph."""
        sampler, weight = patch_state(self.var).execution.sampler, self.var.head.weight
        if not family_of(self.var).loop_is_ours(self.var):
            raise ValueError(f"var: expected an actvar.models.VAR, got {type(self.var).__name__}; use actvar.load_var")
        if sampler != "fast":
            raise ValueError(f"sampler: expected 'fast' in the patch's Execution, got {sampler!r}")
        if not weight.is_cuda:
            raise ValueError(f"var: expected a model on a GPU, got one on {weight.device}")
        if backend_of("sample_tokens", weight) != "triton":
            raise ValueError("backend: expected Triton, without which a graph cannot read its seed; see actvar info")

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
        checked: Any = checked_labels(len(labels), labels, self.var.num_classes, labels.device)
        seed = checked_integer("seed", seed, SEEDS[0], SEEDS[-1])
        weights = tuple(parameter.data_ptr() for parameter in self.var.parameters())
        wanted = (checked.shape, self.var.actvar, self.var.actvar.execution, weights)
        if wanted != self._captured_for:
            self._capture(checked)
            self._captured_for = wanted
        self._labels.copy_(checked)
        self._seed.fill_(seed - 2**64 if seed >= 2**63 else seed)  # the same modulo 2^64
        self._graph.replay()
        return self._images.clone()

    def _capture(self, labels: torch.Tensor) -> None:
        """Capture a sample of as many images as `labels` `[B]` int64 has classes."""
        device, shared = device_of(self.var), self.var.actvar
        self._captured_for = self._graph = self._images = None
        self._labels = labels.to(device, torch.int64, copy=True)
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)
        shared.seed = self._seed
        try:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    self._sample()
            torch.cuda.current_stream(device).wait_stream(stream)
            release_cache(self.var)  # so that the graph's cache lies in its own memory
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._images = self._sample()
        finally:
            shared.seed = None
            release_cache(self.var)

    def _sample(self) -> torch.Tensor:
        """Return images of the classes `self._labels`, launched kernel by kernel or recorded by a capture."""
        return self.var.autoregressive_infer_cfg(len(self._labels), self._labels, **self.arguments)
