"""The losses of ActVAR's two training stages, each a small function. Source: the paper's 3.2, 3.3 and supplement 6.

Where the paper leaves a choice open, distances and changes are divided by their mean so that a temperature of 1 fits
every model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch.nn import functional as F

from actvar.models.token_draw import guided


def expert_distances(
    u: torch.Tensor, fc1_weight: torch.Tensor, fc1_bias: torch.Tensor, fc2_weight: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Return the mean squared distances of the experts' outputs to the FFN's, `d_e = mean_c (E_e(u) - FFN(u))_c^2`.

    `E_e(u) = gelu(u W1_e^T + b1_e) W2_e^T + b2`. The square is expanded, so that no `[T, N, C]` tensor is made.

    Args:
        u: FFN input, `[T, C]`.
        fc1_weight: `[D, C]`.
        fc1_bias: `[D]`.
        fc2_weight: `[C, D]`.
        num_experts: N, a divisor of D.

    Returns:
        `[T, N]` in u's dtype.
    """
    hidden = F.gelu(F.linear(u, fc1_weight, fc1_bias), approximate="tanh")
    output = F.linear(hidden, fc2_weight)
    by_expert = rearrange(hidden, "t (n d) -> n t d", n=num_experts)
    down = rearrange(fc2_weight, "c (n d) -> n c d", n=num_experts)
    gram = down.transpose(1, 2) @ down
    own = ((by_expert @ gram) * by_expert).sum(-1)  # |E_e|^2
    projected = rearrange(output @ fc2_weight, "t (n d) -> n t d", n=num_experts)
    cross = (projected * by_expert).sum(-1)  # E_e . FFN
    squares = rearrange(own - 2 * cross, "n t -> t n") + output.square().sum(-1, keepdim=True)
    return squares.clamp_min(0) / u.shape[1]


def router_target(distances: torch.Tensor, active: int, temperature: float = 1.0) -> torch.Tensor:
    """Return pseudo-labels over experts (Eq. 5): softmax of `-d / mean(d) / temperature` over the nearest.

    Other experts have 0.

    Args:
        distances: `[T, N]`.
        active: experts on per token, M.
        temperature: of the softmax.
    """
    relative = distances / distances.mean(dim=-1, keepdim=True).clamp_min(1e-12)
    return _softmax_over_largest(-relative / temperature, active)


def selector_target(change: torch.Tensor, keep: int, temperature: float = 1.0) -> torch.Tensor:
    """Return pseudo-labels over tokens (Eq. 16): softmax of `c / mean(c) / temperature` over the most changed.

    Other tokens have 0.

    Args:
        change: `||block(x)_i - x_i||_2` of the dense block, `[R, L]`.
        keep: tokens kept per row, K.
        temperature: of the softmax.
    """
    relative = change / change.mean(dim=-1, keepdim=True).clamp_min(1e-12)
    return _softmax_over_largest(relative / temperature, keep)


def _softmax_over_largest(values: torch.Tensor, count: int) -> torch.Tensor:
    ordered = values.sort(dim=-1, descending=True, stable=True)
    kept, indices = ordered.values[..., :count], ordered.indices[..., :count]
    return torch.zeros_like(values).scatter_(-1, indices, kept.softmax(dim=-1))


def distillation_loss(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return `KL(target || softmax(logits))` over the last axis, averaged over the others (Eq. 6, 14, 17).

    Args:
        target: probabilities, `[..., N]`.
        logits: `[..., N]`.
    """
    log_prediction = logits.log_softmax(dim=-1)
    return (torch.xlogy(target, target) - target * log_prediction).sum(dim=-1).mean()


def balance_loss(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return `N * sum_e f_e P_e` (Eq. 15, 18): f_e is the share of rows that chose e, P_e its mean probability.

    Args:
        logits: `[rows, N]` of experts, or `[R, L]` of token positions.
        chosen: `[rows, N]` or `[R, L]` bool.
    """
    share = chosen.to(logits.dtype).mean(dim=0)
    probability = logits.softmax(dim=-1).mean(dim=0)
    return logits.shape[-1] * (share * probability).sum()


def block_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over blocks of the mean squared difference of block outputs (Eq. 20), in float32.

    Args:
        student: the outputs of its blocks, each `[B, L, C]`.
        teacher: the outputs of its blocks, each `[B, L, C]`.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(ours.float(), theirs.float()) for ours, theirs in pairs]).mean()


def output_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return `KL(softmax(teacher) || softmax(student))`, averaged over tokens (Eq. 21), or over their bits.

    Args:
        logits: of the student, `[B, L, V]`, or `[B, L, bits, 2]`.
        teacher_logits: in the same shape.
    """
    return distillation_loss(teacher_logits.softmax(dim=-1), logits)


def guided_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, strength: torch.Tensor, own_strength: torch.Tensor
) -> torch.Tensor:
    """Return `KL(teacher || student)` of the guided logits that sampling draws from, averaged over tokens or bits.

    Args:
        logits: of the student, `[2B, L, V]`, conditional half first; or `[B, L, V]`, of conditional rows alone. Those
            of bits are `[2B, L, bits, 2]`.
        teacher_logits: `[2B, L, V]`, conditional half first.
        strength: of the teacher's guidance, `[L, 1]`, for bits `[L, 1, 1]`.
        own_strength: of the student's guidance, in the same shape; 0 at scales without it.
    """
    drawn = guided(logits, own_strength) if len(logits) == len(teacher_logits) else logits
    return output_loss(drawn, guided(teacher_logits, strength))
