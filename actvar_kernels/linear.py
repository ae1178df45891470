"""A linear layer whose weight is packed for the CPU once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.backend import needs_operator
from actvar_kernels.expert_ffn.op import computed_dtype, cpp_runs
from actvar_kernels.packing import packed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias`.

    Where the C++ kernel of `expert_ffn` runs, oneDNN multiplies with a packed copy of the weight, which saves packing
    it in every call.

    Args:
        x: `[..., C]`.
        weight: `[D, C]`, a tensor that stays, since its copy is kept with it; with `bias` `[D]` in x's dtype, or in any
            under autocast.
    """
    if not cpp_runs(x) or needs_operator(x, weight, bias) or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    dtype = computed_dtype(x)
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return F.linear(x, weight, bias)
    x = x.to(dtype)
    copy = packed((weight,), x.dtype, lambda: weight.detach().to(x.dtype).to_mkldnn())
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), copy, bias.to(x.dtype), "none", [], "")
