"""Count the size of adapters of the official models by what they hold: `python -m benchmarks.adapter_sizes`.

Models are built without weights. Tensors are counted in float32, as `actvar distill` writes them.
"""

from __future__ import annotations

import argparse
from typing import Any

from actvar.config import ActVARConfig
from actvar.families import family_of
from actvar.models import build_infinity, build_vae_var
from actvar.models.infinity.build import OFFICIAL_SIZES
from actvar.patching.adapter import gate_parameters
from actvar.patching.patch import patch_silently

VAR_DEPTHS = {f"d{depth}": depth for depth in (16, 20, 24, 30)}
MODELS = (*VAR_DEPTHS, *OFFICIAL_SIZES)
BYTES = 4


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m benchmarks.adapter_sizes", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="(default all)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64], help="(default 4 16 64)")
    options = parser.parse_args(arguments)
    titles = ["gates", *(f"rank {rank}" for rank in options.ranks), "whole"]
    print(f"{'adapter, MB':<12}" + "".join(f"{title:>10}" for title in titles))
    for name in options.models:
        sizes = adapter_bytes(patched_model(name), options.ranks)
        print(f"{name:<12}" + "".join(f"{sizes[title] / 1e6:>10.1f}" for title in titles))


def patched_model(name: str) -> Any:
    """Return an official model without weights, patched with the default configuration."""
    if name in OFFICIAL_SIZES:
        _, model = build_infinity(**OFFICIAL_SIZES[name], device="meta")
    else:
        _, model = build_vae_var(depth=VAR_DEPTHS[name], device="meta")
    patch_silently(model, ActVARConfig())
    return model


def adapter_bytes(model: Any, ranks: list[int]) -> dict[str, int]:
    """Return the bytes of an adapter's tensors without orders of hidden units, by what it holds.

    Args:
        model: a patched model.
        ranks: of low-rank factors.

    Returns:
        `gates` of stage 1 alone, `rank R` with factors of each rank, and `whole` with all that stage 2 trains.
    """
    gates = sum(gate.numel() for gate in gate_parameters(model).values())
    trained = [model.get_parameter(name) for name in family_of(model).finetuned_names(model)]
    sides = sum(sum(parameter.shape) for parameter in trained if parameter.ndim == 2)
    counts = {"gates": gates, "whole": gates + sum(parameter.numel() for parameter in trained)}
    counts |= {f"rank {rank}": gates + rank * sides for rank in ranks}
    return {title: BYTES * count for title, count in counts.items()}


if __name__ == "__main__":
    main()
