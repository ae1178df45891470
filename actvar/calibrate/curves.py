"""The losses of one block at one scale, for every number of tokens and of experts that could be kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

CHUNK = 256


@dataclass
class Curves:
    """Sums over tokens that were not fitted to, by the number of tokens or experts that are kept, each float64.

    Args:
        tokens: of the scale, L.
        num_experts: N.

    Attributes:
        update_lost: energy `|block(x) - x|^2` of the tokens that are not kept, `[L + 1]`.
        update_lost_by_oracle: the same for the best choice of tokens.
        output_lost: energy `|gamma * sum of E_e|^2` of the experts that are off, `[N + 1]`.
        static_lost: the same if the experts were those of static pruning, of which the last are off for every token.
        norm_kept: sum of `|gamma * E_e|` over the experts that are on, `[N + 1]`.
        norm_kept_by_oracle: the same for the best choice of experts.
    """

    tokens: int
    num_experts: int
    update_lost: torch.Tensor = field(init=False)
    update_lost_by_oracle: torch.Tensor = field(init=False)
    output_lost: torch.Tensor = field(init=False)
    static_lost: torch.Tensor = field(init=False)
    norm_kept: torch.Tensor = field(init=False)
    norm_kept_by_oracle: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.update_lost, self.update_lost_by_oracle = torch.zeros(
            2, self.tokens + 1, dtype=torch.float64, device="cpu"
        )
        self.output_lost, self.static_lost, self.norm_kept, self.norm_kept_by_oracle = torch.zeros(
            4, self.num_experts + 1, dtype=torch.float64, device="cpu"
        )

    def add_rows(self, scores: torch.Tensor, change: torch.Tensor) -> None:
        """Count the selector's `scores` and `|block(x) - x|` of whole rows, each `[R, L]`."""
        energy = change.square()
        self.update_lost += _lost(energy.gather(1, scores.argsort(dim=1, descending=True, stable=True)))
        self.update_lost_by_oracle += _lost(energy.sort(dim=1, descending=True).values)

    def add_routed(
        self, logits: torch.Tensor, hidden: torch.Tensor, fc2_weight: torch.Tensor, gamma: torch.Tensor
    ) -> None:
        """Count the router's choices for some tokens.

        Args:
            logits: of the router, `[T, N]`.
            hidden: activations of the FFN's hidden units, `[T, D]`.
            fc2_weight: second weight of the FFN, `[C, D]`.
            gamma: AdaLN gates of the FFN's output, `[T, C]`.
        """
        for scores, h, gate in zip(*(t.split(CHUNK) for t in (logits, hidden, gamma)), strict=True):
            outputs = torch.stack(list(expert_outputs(h, fc2_weight, gate, self.num_experts)), dim=1)  # [t, N, C]
            order = scores.argsort(dim=1, descending=True, stable=True)
            ranked = outputs.gather(1, order.unsqueeze(-1).expand_as(outputs))
            self.output_lost[:-1] += _lost_outputs(ranked)
            norms = outputs.norm(dim=-1)
            self.norm_kept[1:] += norms.gather(1, order).sum(dim=0).double().cumsum(0).cpu()
            best = norms.sort(dim=1, descending=True).values
            self.norm_kept_by_oracle[1:] += best.sum(dim=0).double().cumsum(0).cpu()

    def add_static(self, hidden: torch.Tensor, fc2_weight: torch.Tensor, gamma: torch.Tensor) -> None:
        """Count the experts of static pruning for some tokens; arguments are those of `add_routed`."""
        for h, gate in zip(hidden.split(CHUNK), gamma.split(CHUNK), strict=True):
            outputs = torch.stack(list(expert_outputs(h, fc2_weight, gate, self.num_experts)), dim=1)
            self.static_lost[:-1] += _lost_outputs(outputs)


def expert_outputs(
    hidden: torch.Tensor, fc2_weight: torch.Tensor, gamma: torch.Tensor, num_experts: int
) -> Iterator[torch.Tensor]:
    """Yield `gamma * hidden_e W2_e^T` `[T, C]` of one expert after the other, without the bias of the second layer.

    Args:
        hidden: activations of the FFN's hidden units, `[T, D]`.
        fc2_weight: second weight of the FFN, `[C, D]`.
        gamma: AdaLN gates of the FFN's output, `[T, C]`.
        num_experts: N, a divisor of D.
    """
    for h, weight in zip(hidden.chunk(num_experts, dim=1), fc2_weight.chunk(num_experts, dim=1), strict=True):
        yield h @ weight.T * gamma


def _lost_outputs(outputs: torch.Tensor) -> torch.Tensor:
    """Return the energy `[N]` float64 of the sums of all experts from the k-th on, for k in 0 ... N - 1.

    Args:
        outputs: of the experts in order of preference, `[T, N, C]`.
    """
    return outputs.flip(1).cumsum(dim=1).flip(1).square().sum(dim=(0, 2)).double().cpu()


def _lost(energy: torch.Tensor) -> torch.Tensor:
    """Return the sums `[L + 1]` float64 of all energy that comes after the first k tokens, for k in 0 ... L.

    Args:
        energy: of tokens in order of preference, `[R, L]`.
    """
    total = energy.sum(dim=0).double().cpu()
    return torch.cat((total.flip(0).cumsum(0).flip(0), total.new_zeros(1)))
