"""A report of how much the fitted selectors and routers keep, beside the best and a random choice."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from actvar.calibrate.curves import Curves
from actvar.calibrate.rates import blocks_flops
from actvar.config import DENSE, ActVARConfig
from actvar.families import family_of
from actvar.families.conditions import Conditions
from actvar.sparse.schedule import Scale
from actvar.sparse.state import patch_state


@dataclass(frozen=True)
class KeptShare:
    """Shares kept in one block at one scale, of token maps that nothing was fitted to.

    A random choice keeps `token_rate` and `ffn_rate`.

    Args:
        block: number of the block.
        scale: height and width of the scale's map, as text.
        token_rate: share of the tokens that are kept.
        ffn_rate: share of the experts that are on.
        update: share of the energy `|block(x) - x|^2` in the tokens that are kept.
        update_by_oracle: the same for the best choice of tokens.
        norm: share of the experts' output norms in those that are on.
        norm_by_oracle: the same for the best choice of experts.
    """

    block: int
    scale: str
    token_rate: float
    ffn_rate: float
    update: float
    update_by_oracle: float
    norm: float
    norm_by_oracle: float


@dataclass(frozen=True)
class Report:
    """The result of a calibration.

    Args:
        config: the one that the model is patched with.
        flops: of all blocks for one row, by name: `dense`, `budget` and `chosen`.
        kept: shares per block and active scale.
    """

    config: ActVARConfig
    flops: dict[str, int]
    kept: tuple[KeptShare, ...]

    def table(self) -> str:
        """Return aligned text with a line per block and scale."""
        titles = ("block", "map", "tokens", "update", "oracle", "random", "experts", "norm", "oracle", "random")
        lines = ["".join(f"{title:>9}" for title in titles)]
        for k in self.kept:
            shares = (k.token_rate, k.update, k.update_by_oracle, k.token_rate)
            shares += (k.ffn_rate, k.norm, k.norm_by_oracle, k.ffn_rate)
            lines.append(f"{k.block:>9}{k.scale:>9}" + "".join(f"{share:>9.1%}" for share in shares))
        saved = 1 - self.flops["chosen"] / self.flops["dense"]
        lines.append(
            "update, norm: shares of the tokens' update energy and of the experts' norm that are kept, beside what"
        )
        lines.append("an oracle and chance keep of as many, on samples that nothing was fitted to")
        lines.append(f"FLOPs of the blocks: {saved:.1%} saved")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Return the fields, JSON-compatible."""
        return asdict(self)


def report_of(
    var: nn.Module,
    budget: ActVARConfig,
    chosen: ActVARConfig,
    conditions: Conditions,
    curves: list[dict[int, Curves]],
) -> Report:
    """Return the report of a patched model.

    Args:
        var: the model.
        budget: the configuration that was asked for.
        chosen: the one that the model is patched with.
        conditions: of the images whose FLOPs count.
        curves: per block, by scale index.
    """
    configs = {"dense": DENSE, "budget": budget, "chosen": chosen}
    flops = {name: blocks_flops(var, config, conditions) for name, config in configs.items()}
    patch_state(var).fit_maps(var, family_of(var).maps_of(var, conditions))
    schedules = patch_state(var).schedules
    kept = [
        _kept(block, schedules[block][index], scale_curves)
        for block, block_curves in enumerate(curves)
        for index, scale_curves in sorted(block_curves.items())
    ]
    return Report(chosen, flops, tuple(kept))


def _kept(block: int, scale: Scale, curves: Curves) -> KeptShare:
    return KeptShare(
        block=block,
        scale=f"{scale.height}x{scale.width}",
        token_rate=scale.keep / scale.tokens,
        ffn_rate=scale.experts / curves.num_experts,
        update=1 - (curves.update_lost[scale.keep] / curves.update_lost[0]).item(),
        update_by_oracle=1 - (curves.update_lost_by_oracle[scale.keep] / curves.update_lost[0]).item(),
        norm=(curves.norm_kept[scale.experts] / curves.norm_kept[-1]).item(),
        norm_by_oracle=(curves.norm_kept_by_oracle[scale.experts] / curves.norm_kept[-1]).item(),
    )
