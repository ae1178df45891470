"""The report of `actvar flops --model infinity-2b`: FLOPs by module and scale, where they lie, and memory by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actvar.config import DENSE, ActVARConfig
from actvar.flops import StepFlops
from actvar.models import build_infinity
from actvar.models.infinity.build import OFFICIAL_SIZES
from actvar.models.infinity.schedules import Schedule
from actvar.patching.patch import patch_silently
from actvar.reports.flops import FlopsReport
from actvar.reports.infinity.flops import counted_infinity_flops, decoder_flops, infinity_flops
from actvar.reports.infinity.memory import memory_by_part
from actvar.utils.progress import progress
from actvar.zoo.fashion_mnist_text import architecture
from actvar.zoo.pretrained import TEXT_MODEL

INFINITY_NAMES = (*OFFICIAL_SIZES, TEXT_MODEL)
AROUND_BLOCKS = ("adaln", "head", "text")
"""Modules that are in no block."""
SHARES = {"qkv+proj": ("qkv", "proj"), "attention": ("attention",), "cross": ("cross",), "FFN": ("ffn",)}
MOST_LAST = 4


@dataclass(frozen=True)
class Share:
    """Hold what part of all blocks' work lies in some scales.

    Args:
        name: of the scales.
        tokens: share of the tokens.
        flops: share of the FLOPs.
        parts: share of each of `SHARES` in the FLOPs of these scales.
    """

    name: str
    tokens: float
    flops: float
    parts: dict[str, float]


@dataclass(frozen=True)
class InfinityReport(FlopsReport):
    """FLOPs and memory of some images of Infinity under guidance.

    Args:
        text_tokens: number of tokens of each text.
        memory: bytes by part, of `dense` and `actvar`, with blocks in bfloat16, see `memory_by_part`.
    """

    text_tokens: int
    memory: dict[str, dict[str, int]]

    @property
    def fewer(self) -> float:
        """Return the FLOPs of the dense model's blocks divided by those with ActVAR, by formula."""
        dense, own = (sum(map(block_total, self.formula[name])) for name in ("dense", "actvar"))
        return dense / own

    def shares(self) -> list[Share]:
        """Return the shares of all scales, of each of the last two, and of the last two to four together."""
        steps, count = self.formula["dense"], len(self.maps)
        chosen = {"all": range(count)}
        chosen |= {f"{h}x{w}": range(i, i + 1) for i, (h, w) in list(enumerate(self.maps))[-2:]}
        chosen |= {f"last {n}": range(count - n, count) for n in range(2, min(MOST_LAST, count) + 1)}
        tokens = [height * width for height, width in self.maps]
        return [_share(name, steps, tokens, scales) for name, scales in chosen.items()]

    def text(self) -> str:
        """Return the tables, in TFLOP, percent and GiB, or in GFLOP and MiB for the bundled model."""
        lines = self.tables("G" if self.model == TEXT_MODEL else "T")
        lines.insert(-1, f"blocks with ActVAR: {self.fewer:.2f}x fewer FLOPs by formula")
        return "\n".join([*lines, "", *self._shares_table(), "", *self._memory_table()])

    def as_dict(self) -> dict[str, object]:
        """Return the report JSON-compatible; FLOPs are integers, memory is in bytes."""
        facts = super().as_dict()
        del facts["paper"], facts["fixed_cost_per_row"]
        shares = [vars(share) for share in self.shares()]
        return facts | {"text_tokens": self.text_tokens, "shares": shares, "fewer": self.fewer, "memory": self.memory}

    def _shares_table(self) -> list[str]:
        """Return the lines of the table of shares."""
        lines = [f"{'blocks, dense':<20}" + "".join(f"{name:>10}" for name in ("tokens", "FLOPs", *SHARES))]
        for share in self.shares():
            values = (share.tokens, share.flops, *share.parts.values())
            lines.append(f"{share.name:<20}" + "".join(f"{value:>10.1%}" for value in values))
        return lines

    def _memory_table(self) -> list[str]:
        """Return the lines of the table of memory."""
        dense, own = self.memory["dense"], self.memory["actvar"]
        unit, size = ("MiB", 2**20) if self.model == TEXT_MODEL else ("GiB", 2**30)
        lines = [f"{f'memory, {unit}':<40}{'dense':>10}{'ActVAR':>10}"]
        for part in dense:
            lines.append(f"{part:<40}" + "".join(f"{way[part] / size:>10.2f}" for way in (dense, own)))
        return lines


def infinity_report(
    model: str, config: ActVARConfig, batch: int, schedule: Schedule, text_tokens: int
) -> InfinityReport:
    """Return FLOPs and memory of a published or the bundled Infinity, built without memory for its weights.

    Args:
        model: one of `INFINITY_NAMES`.
        config: of ActVAR.
        batch: number of images.
        schedule: `(1, h, w)` of every scale.
        text_tokens: number of tokens of each text.

    Raises:
        ValueError: a configuration that does not fit the schedule.
    """
    if model == TEXT_MODEL:
        _, infinity = architecture.build(device="meta")
    else:
        _, infinity = build_infinity(**OFFICIAL_SIZES[model], device="meta")  # pyright: ignore[reportArgumentType]
    ways = {"dense": DENSE, "actvar": config}
    formula = {name: infinity_flops(infinity, schedule, batch, text_tokens, of) for name, of in ways.items()}
    memory = {name: memory_by_part(infinity, schedule, batch, text_tokens, of) for name, of in ways.items()}
    decoder = decoder_flops(infinity, schedule)
    counted = {}
    for name, of in progress(ways.items(), desc="counting", leave=False):
        if name == "actvar":
            patch_silently(infinity, of)
        counted[name] = counted_infinity_flops(infinity, schedule, batch, text_tokens)
    maps = tuple((h, w) for _, h, w in schedule)
    return InfinityReport(model, batch, config, maps, formula, counted, decoder, [], text_tokens, memory)


def block_total(step: StepFlops) -> int:
    """Return the FLOPs of a scale in the blocks."""
    return step.total - sum(getattr(step, module) for module in AROUND_BLOCKS)


def _share(name: str, steps: Sequence[StepFlops], tokens: Sequence[int], scales: range) -> Share:
    """Return the share of some scales in the blocks' FLOPs and in the tokens."""
    own = sum(block_total(steps[scale]) for scale in scales)
    parts = {
        title: sum(getattr(steps[scale], module) for scale in scales for module in modules) / own
        for title, modules in SHARES.items()
    }
    all_flops = sum(map(block_total, steps))
    return Share(name, sum(tokens[scale] for scale in scales) / sum(tokens), own / all_flops, parts)
