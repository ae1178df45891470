"""An inspection as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import torch
from einops import rearrange
from PIL import Image

from actvar.flops import total_flops
from actvar.reports.inspection.sample import Inspection
from actvar.sparse.record import BlockRecord
from actvar.utils.files import replacing
from actvar.utils.pictures import pixel_values

FOLDER = Path(__file__).parent
NAMES = {"dense": "dense", "accelerated": "dense, accelerated", "actvar": "ActVAR"}


def save_page(inspection: Inspection, path: Path, title: str, facts: Sequence[str]) -> Path:
    """Write the page; the same inspection gives the same file.

    Args:
        inspection: of one sample.
        path: the file.
        title: of the page.
        facts: on which the numbers depend, such as model, adapter and versions.

    Returns:
        The path.
    """
    with replacing(path) as temporary:
        temporary.write_text(page(inspection, title, facts), "utf-8")
    return path


def page(inspection: Inspection, title: str, facts: Sequence[str]) -> str:
    """Return the page's HTML, with the arguments of `save_page`."""
    files = {suffix: (FOLDER / f"page.{suffix}").read_text("utf-8") for suffix in ("html", "css", "js")}
    data = json.dumps(explorer_data(inspection), separators=(",", ":")).replace("<", "\\u003c")
    return Template(files["html"]).substitute(
        title=escape(title),
        facts=" · ".join(escape(fact) for fact in facts),
        style=files["css"],
        script=files["js"],
        data=data,
        summary=_summary(inspection),
        film=_film(inspection),
        last=len(inspection.maps),
        depth=inspection.blocks,
        flops=_bars(_step_names(inspection), _flops_by_step(inspection), 3),
        seconds=_bars([*_step_names(inspection), "decoder"], _milliseconds(inspection), 1),
    )


def explorer_data(inspection: Inspection) -> dict[str, object]:
    """Return the choices of the blocks, JSON-compatible.

    `experts` is their number N. `scales` has `step` (from 1), `height`, `width` and `blocks` of each active scale. Each
    block has:

    - `kept`: the tokens that it updated, in order;
    - `experts`: for each kept token a text of N characters, "1" for an expert that is on; null where the FFN is dense;
    - `load`: for each expert the share of the kept tokens that chose it; null where the FFN is dense.
    """
    records = {(record.scale.index, record.block): record for record in inspection.records}
    return {
        "experts": inspection.config.num_experts,
        "scales": [
            {
                "step": scale + 1,
                "height": inspection.maps[scale][0],
                "width": inspection.maps[scale][1],
                "blocks": [
                    _block_data(records.get((scale, block)), math.prod(inspection.maps[scale]))
                    for block in range(inspection.blocks)
                ],
            }
            for scale in sorted({scale for scale, _ in records})
        ],
    }


def _block_data(record: BlockRecord | None, tokens: int) -> dict[str, object]:
    index = None if record is None else record.index
    kept = torch.arange(tokens, device="cpu") if index is None else index[0].cpu()
    data: dict[str, object] = {"kept": kept.sort().values.tolist(), "experts": None, "load": None}
    if record is not None and record.mask is not None:
        mask = record.mask[0].cpu()[kept.argsort()]
        data["experts"] = ["".join("01"[on] for on in token) for token in mask.tolist()]
        data["load"] = [round(share, 4) for share in mask.float().mean(dim=0).tolist()]
    return data


def _summary(inspection: Inspection) -> str:
    flops = {name: total_flops(steps) for name, steps in inspection.flops.items()}
    seconds = {name: sum(steps) for name, steps in inspection.seconds.items()}
    gain = {name: f"{seconds[name] / seconds['actvar']:.2f}×" for name in ("dense", "accelerated")}
    active = sorted({record.scale.index for record in inspection.records})
    return "".join(
        f"<div><dt>{label}</dt><dd>{value}</dd><dd>{note}</dd></div>"
        for label, value, note in (
            (
                "FLOPs saved",
                f"{1 - flops['actvar'] / flops['dense']:.1%}",
                f"{flops['actvar'] / 1e9:.2f} of {flops['dense'] / 1e9:.2f} GFLOP",
            ),
            ("Speed-up", gain["dense"], f"over dense; {gain['accelerated']} over dense on the same kernels"),
            ("Sparse steps", f"{len(active)} of {len(inspection.maps)}", _share_of_dense(inspection, active)),
        )
    )


def _share_of_dense(inspection: Inspection, scales: Sequence[int]) -> str:
    share = sum(inspection.flops["dense"][scale].total for scale in scales) / total_flops(inspection.flops["dense"])
    return f"with {share:.0%} of the dense FLOPs"


def _film(inspection: Inspection) -> str:
    """Return a figure per scale with the image so far, dense and with ActVAR."""
    active = {record.scale.index for record in inspection.records}
    figures = []
    for scale, (height, width) in enumerate(inspection.maps):
        images = "".join(
            f'<div><img id="{name}-{scale + 1}" src="{_data_uri(inspection.images[name][scale])}" '
            f'alt="{NAMES[name]}, after step {scale + 1}"><span>{NAMES[name]}</span></div>'
            for name in ("dense", "actvar")
        )
        sparse = " <em>sparse</em>" if scale in active else ""
        figures.append(
            f"<figure><figcaption><b>{height}×{width}</b> step {scale + 1}{sparse}</figcaption>"
            f"<div>{images}</div></figure>"
        )
    return "".join(figures)


def _data_uri(image: torch.Tensor) -> str:
    """Return an image `[C, H, W]` in [0, 1] as a PNG in a data URI."""
    pixels = rearrange(pixel_values(image), "c h w -> h w c").cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _step_names(inspection: Inspection) -> list[str]:
    return [f"{height}×{width}" for height, width in inspection.maps]


def _flops_by_step(inspection: Inspection) -> dict[str, list[float]]:
    return {name: [step.total / 1e9 for step in steps] for name, steps in inspection.flops.items()}


def _milliseconds(inspection: Inspection) -> dict[str, list[float]]:
    return {name: [1e3 * step for step in steps] for name, steps in inspection.seconds.items()}


def _bars(steps: Sequence[str], values: Mapping[str, Sequence[float]], digits: int) -> str:
    """Return a group of bars per step, one for each name, and their sums."""
    longest = max(map(max, values.values()))
    rows = [
        '<div class="legend">' + "".join(f'<span class="{name}">{NAMES[name]}</span>' for name in values) + "</div>"
    ]
    for place, step in enumerate(steps):
        bars = "".join(
            f'<span class="bar {name}"><i style="width:{heights[place] / longest:.2%}"></i>'
            f"<b>{heights[place]:.{digits}f}</b></span>"
            for name, heights in values.items()
        )
        rows.append(f'<div class="step"><span>{step}</span><div>{bars}</div></div>')
    sums = "".join(f'<b class="{name}">{math.fsum(heights):.{digits}f}</b>' for name, heights in values.items())
    rows.append(f'<div class="sum"><span>sum</span>{sums}</div>')
    return "".join(rows)
