"""What CUDA graphs of whole samples refuse; what they give is checked on a GPU, in `test_gpu.py`."""

from __future__ import annotations

import pytest
import torch

from actvar import ActVARConfig, Execution, GraphedSampling, apply_patch
from actvar.models import VAR


def test_a_model_that_is_not_patched_is_refused(tiny_var):
    with pytest.raises(ValueError, match=r"patched by actvar\.apply_patch"):
        GraphedSampling(tiny_var)


def test_another_sampler_than_the_fast_one_is_refused(tiny_var):
    with pytest.raises(ValueError, match=r"sampler: expected 'fast'.*'torch'"):
        GraphedSampling(apply_patch(tiny_var, ActVARConfig(num_experts=8)))


def test_a_model_on_the_cpu_is_refused(tiny_var):
    with pytest.raises(ValueError, match="expected one on a GPU, got one on cpu"):
        GraphedSampling(apply_patch(tiny_var, ActVARConfig(num_experts=8), Execution(sampler="fast")))


def test_a_sampling_loop_of_another_make_is_refused(tiny_var):
    class Other(VAR):
        def autoregressive_infer_cfg(self, *args, **kwargs):
            return super().autoregressive_infer_cfg(*args, **kwargs)

    tiny_var.__class__ = Other
    with pytest.raises(ValueError, match=r"expected an actvar\.models\.VAR"):
        GraphedSampling(apply_patch(tiny_var, ActVARConfig(num_experts=8), Execution(sampler="fast")))


@pytest.mark.parametrize(
    ("labels", "seed", "error", "message"),
    [
        (torch.tensor([0, 10]), 0, ValueError, "labels from 0 to 9, or negative for unconditional images, got 10"),
        (torch.tensor([0.0, 1.0]), 0, TypeError, "expected an integer tensor, got torch.float32"),
        (torch.tensor([[0, 1]]), 0, TypeError, r"labels: expected an integer tensor \[B\]"),
        ([0, 1], 0, TypeError, r"labels: expected an integer tensor \[B\], got \[0, 1\]"),
        (torch.empty(0, dtype=torch.int64), 0, ValueError, "B: expected"),
        (torch.tensor([0, 1]), 2**64, ValueError, "seed: expected an integer from"),
        (torch.tensor([0, 1]), 1.0, TypeError, "seed: expected"),
    ],
)
def test_bad_labels_and_seeds_are_refused_before_anything_is_captured(
    tiny_var, monkeypatch, labels, seed, error, message
):
    monkeypatch.setattr(GraphedSampling, "_check", lambda self: None)  # which asks for a GPU
    sampled = GraphedSampling(apply_patch(tiny_var, ActVARConfig(num_experts=8), Execution(sampler="fast")))
    with pytest.raises(error, match=message):
        sampled(labels, seed)
