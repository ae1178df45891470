"""Train low-rank changes of a model's matrices (LoRA) in place of the matrices themselves."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from actvar.families import family_of
from actvar.models.arguments import checked_integer
from actvar.patching.adapter_tensors import rank_of
from actvar.utils.low_rank import Factors, merged
from actvar.utils.weight_override import (
    own_parameters,
    replace_parameters,
    restore_parameters,
    tuned_factors,
    tuned_parameters,
)
from actvar_kernels.situation import are_plain


class LowRank(nn.Module):
    """Hold trainable factors for each matrix of attention, FFN and head: those of an adapter, otherwise new ones.

    New ones leave the model as it is: `B` is 0, and `A` is uniform between `-1/sqrt(inputs)` and `1/sqrt(inputs)`.

    Args:
        var: a patched model.
        rank: of the changes.

    Raises:
        TypeError: the rank is no integer, or a matrix is quantised or wrapped.
        ValueError: a rank below 1 or above that of a matrix, an adapter that changes weights in another way, or parts
            under activation checkpointing.
    """

    def __init__(self, var: nn.Module, rank: int):
        super().__init__()
        if any(isinstance(module, CheckpointWrapper) for module in var.modules()):
            raise ValueError(
                "lora: expected blocks without activation checkpointing, which would run them again with other "
                "weights; take the CheckpointWrapper off, or compute a batch in more parts (accumulate)"
            )
        parameters = {name: var.get_parameter(name) for name in family_of(var).finetuned_names(var)}
        matrices = {name: parameter for name, parameter in parameters.items() if parameter.ndim == 2}
        for name, matrix in matrices.items():
            if not are_plain(matrix) or not matrix.is_floating_point():
                kind = f"{type(matrix).__name__} in {matrix.dtype}"
                raise TypeError(f"lora: {name}: expected a plain weight in floating point, got a {kind}")
        rank = checked_integer("lora", rank, 1, min(min(matrix.shape) for matrix in matrices.values()))
        factors = tuned_factors(var)
        whole = sorted(tuned_parameters(var).keys() - factors.keys())
        if whole:
            raise ValueError(f"lora: expected an adapter that changes no whole weights, got one with {whole[:4]}")
        if factors and (rank_of(factors) != rank or factors.keys() != matrices.keys()):
            raise ValueError(
                f"lora: expected the rank of the adapter and its {len(matrices)} matrices, got rank {rank} for an "
                f"adapter with {len(factors)} matrices of rank {rank_of(factors)}"
            )
        self.names = tuple(matrices)
        pairs = [factors.get(name) or _new(index, matrices[name], rank) for index, name in enumerate(self.names)]
        self.A, self.B = (
            nn.ParameterList([nn.Parameter(side.clone().to(matrices[self.names[0]])) for side in sides])
            for sides in zip(*pairs, strict=True)
        )
        if not factors:
            # A scale with the model's own weights has to find these beside the trained ones.
            replace_parameters(var, matrices)

    def factors(self) -> dict[str, Factors]:
        """Return the factors by the name of their weight."""
        return {name: Factors(A, B) for name, A, B in zip(self.names, self.A, self.B, strict=True)}

    def weights(self, var: nn.Module) -> dict[str, torch.Tensor]:
        """Return the changed matrices of `var` by name, with gradients of the factors where these are wanted."""
        own = own_parameters(var)
        return {name: merged(own[name], pair) for name, pair in self.factors().items()}

    @torch.no_grad()
    def put_into(self, var: nn.Module) -> None:
        """Put the changed matrices and copies of their factors into `var`, as `actvar.load_adapter` does."""
        weights = {name: nn.Parameter(weight, requires_grad=False) for name, weight in self.weights(var).items()}
        factors = {
            name: Factors(*(side.detach().cpu().clone() for side in pair)) for name, pair in self.factors().items()
        }
        restore_parameters(var)
        replace_parameters(var, weights, factors)


def _new(index: int, matrix: torch.Tensor, rank: int) -> Factors:
    """Return factors of no change for a matrix `[outputs, inputs]`, drawn by its number."""
    outputs, inputs = matrix.shape
    generator = torch.Generator("cpu").manual_seed(index)
    uniform = torch.rand(rank, inputs, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1
    return Factors(uniform * inputs**-0.5, torch.zeros(outputs, rank, device="cpu", dtype=torch.float32))
