"""Hidden units of an FFN in groups of equal size, in which units that matter for the same tokens are together."""

from __future__ import annotations

import torch
from torch.nn import functional as F

ROUNDS = 20


def expert_order(energy: torch.Tensor, num_experts: int, active: int) -> torch.Tensor:
    """Return an order `[D]` int64 of hidden units, a permutation in which expert e has the e-th D / N of them.

    Balanced k-means clusters the units' profiles, the columns of `energy`. Further steps each raise the energy that the
    `active` best experts of every token hold.

    Args:
        energy: share of each unit in its token's FFN output, `[T, D]` float32; rows sum to 1.
        num_experts: N, a divisor of D.
        active: experts on per token.
    """
    expert = raise_kept_energy(energy, balanced_kmeans(energy.T, num_experts), num_experts, active)
    return expert.argsort(stable=True)


def balanced_kmeans(profiles: torch.Tensor, count: int) -> torch.Tensor:
    """Return the cluster `[D]` int64 of each row of `profiles` `[D, T]`, with `D / count` rows in every cluster.

    The first centres are rows far from each other: first the longest row, then always the farthest from those so far.

    Args:
        profiles: `[D, T]`, of a floating-point dtype.
        count: number of clusters, a divisor of D.
    """
    chosen = [int(profiles.square().sum(dim=1).argmax())]
    distance = profiles.new_full((len(profiles),), torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (profiles - profiles[chosen[-1]]).square().sum(dim=1))
        chosen.append(int(distance.argmax()))
    centres = profiles[chosen]
    cluster = torch.arange(len(profiles), device=profiles.device) * count // len(profiles)
    for _ in range(ROUNDS):
        cost = (
            centres.square().sum(dim=1) - 2 * profiles @ centres.T
        )  # |profile|^2 is left out, the same for every cluster
        moved = exchanged(cost, cluster)
        if torch.equal(moved, cluster):
            break
        cluster = moved
        members = F.one_hot(cluster, count).to(profiles.dtype)
        centres = members.T @ profiles * (count / len(profiles))
    return cluster


def raise_kept_energy(energy: torch.Tensor, cluster: torch.Tensor, count: int, active: int) -> torch.Tensor:
    """Return better clusters `[D]` int64, whose chosen experts hold more of the tokens' energy.

    Two steps take turns: choose the best experts of every token, and move units to the experts that are on for the
    tokens where these units matter. Neither step lowers the energy in the chosen experts. The turns end when this
    energy stays the same.

    Args:
        energy: share of each unit in its token's FFN output, `[T, D]` float32.
        cluster: of each unit, `[D]` int64.
        count: number of clusters, which are the experts.
        active: experts on per token.
    """
    kept = -torch.inf
    for _ in range(ROUNDS):
        expert_energy = energy @ F.one_hot(cluster, count).to(energy.dtype)
        best = expert_energy.topk(active, dim=1)
        total = best.values.sum().item()
        if total <= kept * (1 + 1e-5):
            break
        kept = total
        on = torch.zeros_like(expert_energy).scatter_(1, best.indices, 1.0)
        cluster = exchanged(-(energy.T @ on), cluster)
    return cluster


def exchanged(cost: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
    """Return the clusters `[D]` int64 after exchanges of two units each, which leave the clusters' sizes as they are.

    Exchanges go on while one lowers the sum of `cost[i, cluster[i]]`, for `ROUNDS` rounds at most. They run on the CPU
    wherever the tensors are, since they are many small steps that depend on each other.

    Args:
        cost: of each unit in each cluster, `[D, N]`, of a floating-point dtype.
        cluster: of each unit, `[D]` int64.
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
