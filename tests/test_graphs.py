"""What CUDA graphs of whole samples refuse; what they give is checked on a GPU, in `test_gpu.py`."""

from __future__ import annotations

import pytest

from actvar import ActVARConfig, GraphedSampling, apply_patch
from actvar.models import VAR


def test_a_model_that_is_not_patched_is_refused(tiny_var):
    with pytest.raises(ValueError, match=r"patched by actvar\.apply_patch"):
        GraphedSampling(tiny_var)


def test_another_sampler_than_the_fast_one_is_refused(tiny_var):
    with pytest.raises(ValueError, match=r"sampler: expected 'fast'.*'torch'"):
        GraphedSampling(apply_patch(tiny_var, ActVARConfig(num_experts=8)))


def test_a_model_on_the_cpu_is_refused(tiny_var):
    with pytest.raises(ValueError, match="expected a model on a GPU, got one on cpu"):
        GraphedSampling(apply_patch(tiny_var, ActVARConfig(num_experts=8, sampler="fast")))


def test_a_sampling_loop_of_another_make_is_refused(tiny_var):
    class Other(VAR):
        def autoregressive_infer_cfg(self, *args, **kwargs):
            return super().autoregressive_infer_cfg(*args, **kwargs)

    tiny_var.__class__ = Other
    with pytest.raises(ValueError, match=r"expected an actvar\.models\.VAR"):
        GraphedSampling(apply_patch(tiny_var, ActVARConfig(num_experts=8, sampler="fast")))
