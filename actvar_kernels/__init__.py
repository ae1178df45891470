"""Offer the operations of the ActVAR block.

Each folder has the public function (`op.py`) and the PyTorch code that defines its result (`reference.py`).
"""

from actvar_kernels.backend import (
    BackendUnavailableError,
    backend_of,
    choose_fused,
    cpp_runs,
    get_backend,
    set_backend,
    triton_runs,
)
from actvar_kernels.conv3x3.codes import add_codes
from actvar_kernels.conv3x3.op import conv3x3
from actvar_kernels.expert_ffn.op import expert_ffn, expert_ffn_scatter
from actvar_kernels.expert_ffn.static import static_ffn
from actvar_kernels.group_norm.op import add_residual, add_residual_moments, group_norm_silu
from actvar_kernels.linear.few_rows import linear_residual, norm_linear
from actvar_kernels.linear.linears import linears
from actvar_kernels.linear.op import linear, linear_once
from actvar_kernels.linear.products import gelu_linear
from actvar_kernels.residual_norm.op import Residual, Routed, add_normalize, add_normalize_route
from actvar_kernels.residual_norm.reference import Gated
from actvar_kernels.rotary.op import rotate_heads
from actvar_kernels.routing.op import route_experts
from actvar_kernels.scatter.op import scatter_rows
from actvar_kernels.subset_attention.op import subset_attention
from actvar_kernels.token_draw.op import sample_tokens
from actvar_kernels.token_select.op import Selection, normalize_modulate, select_tokens

__all__ = [
    "BackendUnavailableError",
    "Gated",
    "Residual",
    "Routed",
    "Selection",
    "add_codes",
    "add_normalize",
    "add_normalize_route",
    "add_residual",
    "add_residual_moments",
    "backend_of",
    "choose_fused",
    "conv3x3",
    "cpp_runs",
    "expert_ffn",
    "expert_ffn_scatter",
    "gelu_linear",
    "get_backend",
    "group_norm_silu",
    "linear",
    "linear_once",
    "linear_residual",
    "linears",
    "norm_linear",
    "normalize_modulate",
    "rotate_heads",
    "route_experts",
    "sample_tokens",
    "scatter_rows",
    "select_tokens",
    "set_backend",
    "static_ffn",
    "subset_attention",
    "triton_runs",
]
