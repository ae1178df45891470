"""Hidden units of an FFN in groups of equal size, so that units that matter for the same tokens are together."""

from __future__ import annotations

import torch
from torch.nn import functional as F

ROUNDS = 20


def expert_order(energy: torch.Tensor, num_experts: int, active: int) -> torch.Tensor:
    """Order `[D]` int64 of hidden units, a permutation in which expert e has the e-th D / N of them.

    Balanced k-means on the units' profiles (columns of `energy`), then steps that each raise the energy which the
    `active` best experts of every token hold.

    Args:
        energy: share of each unit in its token's FFN output, `[T, D]`; rows sum to 1.
        num_experts: N, a divisor of D.
        active: experts on per token.
    """
    expert = raise_kept_energy(energy, balanced_kmeans(energy.T, num_experts), num_experts, active)
    return expert.argsort(stable=True)


def balanced_kmeans(profiles: torch.Tensor, count: int) -> torch.Tensor:
    """Cluster `[D]` int64 of each row of `profiles` `[D, T]`; `count` clusters of `D / count` rows each.

    The first centres are rows far from each other (farthest first, from the longest one).
    """
    chosen = [int(profiles.square().sum(dim=1).argmax())]
    distance = profiles.new_full((len(profiles),), torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (profiles - profiles[chosen[-1]]).square().sum(dim=1))
        chosen.append(int(distance.argmax()))
    centres = profiles[chosen]
    cluster = torch.arange(len(profiles), device=profiles.device) * count // len(profiles)
    for _ in range(ROUNDS):
        cost = centres.square().sum(dim=1) - 2 * profiles @ centres.T  # less |profile|^2, the same for every cluster
        moved = exchanged(cost, cluster)
        if torch.equal(moved, cluster):
            break
        cluster = moved
        members = F.one_hot(cluster, count).to(profiles.dtype)
        centres = members.T @ profiles * (count / len(profiles))
    return cluster


def raise_kept_energy(energy: torch.Tensor, cluster: torch.Tensor, count: int, active: int) -> torch.Tensor:
    """Better clusters `[D]`: by turns choose the best experts of every token, and move units to the experts that are on
    for the tokens where they matter. Neither step lowers the energy in the chosen experts; stops when it stays.
    """
    kept = -torch.inf
    for _ in range(ROUNDS):
        of_expert = energy @ F.one_hot(cluster, count).to(energy.dtype)
        best = of_expert.topk(active, dim=1)
        total = best.values.sum().item()
        if total <= kept * (1 + 1e-5):
            break
        kept = total
        on = torch.zeros_like(of_expert).scatter_(1, best.indices, 1.0)
        cluster = exchanged(-(energy.T @ on), cluster)
    return cluster


def exchanged(cost: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
    """`cluster` `[D]` after exchanges of two units between two clusters, as long as one lowers the sum of
    `cost[i, cluster[i]]`, for `ROUNDS` rounds at most; sizes stay as they are.

    On the CPU wherever the tensors are: many small steps, each of which looks at the one before.

    Args:
        cost: of each unit in each cluster, `[D, N]`.
    """
    device, count = cluster.device, cost.shape[1]
    cost, cluster = cost.cpu(), cluster.to("cpu", copy=True)
    least = 1e-6 * cost.abs().mean()
    for _ in range(ROUNDS):
        moves = 0
        for a in range(count):
            for b in range(a + 1, count):
                in_a, in_b = (cluster == a).nonzero().flatten(), (cluster == b).nonzero().flatten()
                gain_a, order_a = (cost[in_a, a] - cost[in_a, b]).sort(descending=True)
                gain_b, order_b = (cost[in_b, b] - cost[in_b, a]).sort(descending=True)
                pairs = int((gain_a + gain_b > least).sum())
                cluster[in_a[order_a[:pairs]]] = b
                cluster[in_b[order_b[:pairs]]] = a
                moves += pairs
        if not moves:
            break
    return cluster.to(device)
