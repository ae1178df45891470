"""Write the model card of an adapter: what it is for, its plan, and what was measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence

from actvar.patching.adapter import Adapter
from actvar.patching.adapter_tensors import WEIGHTS
from actvar.reports.compare import Comparison
from actvar.sparse.schedule import Scale


def model_card(
    adapter: Adapter,
    repository: str,
    base: Mapping[str, str],
    fingerprint: str,
    schedules: Sequence[Sequence[Scale]],
    divergence: Sequence[float],
    comparison: Comparison,
    place: Mapping[str, object],
) -> str:
    """Return the text of a model card, with the metadata that the hub reads.

    Args:
        adapter: the adapter.
        repository: `owner/repo`, where it will be.
        base: the arguments of `actvar.load_var`, or of `actvar.load_pretrained`, that load the base model.
        fingerprint: of the base model and its autoencoder, see `actvar.utils.fingerprint`.
        schedules: the scales of each block of the patched model.
        divergence: KL to the dense model's predictions at each scale, in nats.
        comparison: times and images beside the dense model's.
        place: machine, dtype and settings of the measurement, by name.
    """
    hub_id = base.get("var", "").partition(":")[0].partition("@")[0]
    metadata = ["library_name: actvar", "tags: [actvar, var, adapter]"]
    if ":" in base.get("var", ""):
        metadata.append(f"base_model: {hub_id}")
    load = "load_pretrained" if "name" in base else "load_var"
    call = f"actvar.{load}({', '.join(repr(value) for value in base.values())})"
    changed = "whole tensors" if any(name.startswith(WEIGHTS) for name in adapter.tensors) else ""
    if adapter.rank is not None:
        changed = f"factors of rank {adapter.rank} (LoRA), which loading merges"
    plan = (adapter.training if isinstance(adapter.training, dict) else {}).get("plan")
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# {repository}",
            "",
            "An adapter of ActVAR for a VAR image generator: its last scales update a part of the tokens, use a part",
            "of the FFN, or do without guidance.",
            "",
            "```python",
            "import actvar",
            "",
            f"vae, var = {call}",
            f'actvar.load_adapter(var, "{repository}")',
            "images = var.autoregressive_infer_cfg(8, 0, g_seed=0)",
            "```",
            "",
            "## Base model",
            "",
            f"Sizes: {', '.join(f'{name} {value}' for name, value in adapter.sizes.items())}.",
            f"`actvar.utils.fingerprint.model_fingerprint(var, vae)` in {place['dtype']}:",
            "",
            f"`{fingerprint}`",
            "",
            *([f"It changes weights by {changed}.", ""] if changed else []),
            "## Plan",
            "",
            "Means over the blocks. KL is that of the predictions to the dense model's, in nats.",
            "",
            "| scale | tokens updated | experts used | guidance | KL |",
            "|---|---|---|---|---|",
            *_by_scale(schedules, adapter.config.num_experts, divergence),
            "",
            *(["Planned with:", "", "```json", json.dumps(plan, indent=1), "```", ""] if plan else []),
            "## Time and images",
            "",
            f"{comparison.images} images: {', '.join(f'{name} {value}' for name, value in place.items())}.",
            "",
            "| | dense, by PyTorch | dense, accelerated | this adapter |",
            "|---|---|---|---|",
            *_measured(comparison),
            "",
            f"The transformer's FLOPs are {_saved(comparison):.1%} fewer than the dense model's.",
            "",
        ]
    )


def _by_scale(schedules: Sequence[Sequence[Scale]], experts: int, divergence: Sequence[float]) -> Iterator[str]:
    """Yield a row of the table of the plan for each scale."""
    for scales, kl in zip(zip(*schedules, strict=True), divergence, strict=True):
        size = f"{scales[0].height}x{scales[0].width}"
        if scales[0].left_out:
            yield f"| {size} | left out | | | |"
            continue
        tokens = statistics.fmean(scale.keep / scale.tokens for scale in scales)
        active = statistics.fmean(scale.experts for scale in scales)
        guided = "yes" if scales[0].guided else "no"
        yield f"| {size} | {tokens:.0%} | {active:.3g} of {experts} | {guided} | {kl:.4f} |"


def _measured(comparison: Comparison) -> Iterator[str]:
    """Yield the rows of the table of times and images."""
    names = ("dense", "accelerated", "actvar")
    yield f"| ms for the images | {' | '.join(f'{1e3 * comparison.seconds[name]:.1f}' for name in names)} |"
    yield f"| PSNR to the dense images, dB | | {' | '.join(f'{comparison.psnr[name]:.1f}' for name in names[1:])} |"
    yield f"| SSIM to the dense images | | {' | '.join(f'{comparison.ssim[name]:.4f}' for name in names[1:])} |"


def _saved(comparison: Comparison) -> float:
    """Return the share of the transformer's FLOPs that is saved."""
    return 1 - comparison.formula_flops["actvar"] / comparison.formula_flops["dense"]
