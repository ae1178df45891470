"""All ways to sample that are compared, by name."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actvar import baselines
from actvar.baselines.static_pruning import SCORES
from actvar.config import DENSE
from actvar.execution import Execution
from actvar.patching.adapter import read_adapter
from actvar.patching.patch import patched_silently, unpatched
from actvar.utils.fingerprint import model_fingerprint
from actvar.zoo.pretrained import (
    adapter_path,
    bundled_adapters,
    bundled_baselines,
    bundled_presets,
    load_pretrained,
    preset_path,
)
from actvar_kernels.backend import why_not_in_eight_bits
from actvar_kernels.constants import FORMATS

logger = logging.getLogger(__name__)

RATES = (0.75, 0.5)
COUNTS = (1, 2)
SMALL = "{}-small"
"""Name of the bundled model that draws the last scales for a bundled model in CoDe."""


@dataclass(frozen=True)
class Method:
    """A way to sample from a model.

    Args:
        name: unique; the method's group, and behind an `@` how much is saved.
        applied: puts the method on an unpatched model while its context is open.
        facts: text on which results depend, besides the name and the tensors of the sampled model.
    """

    name: str
    applied: Callable[[nn.Module], AbstractContextManager[nn.Module]]
    facts: str = ""

    @property
    def group(self) -> str:
        """Return the part of the name that all settings of a method share."""
        return self.name.partition("@")[0]


def methods_of(model: str | None = None, **placement: Any) -> dict[str, Method]:
    """Return all methods by name.

    CoDe is left out, with a logged warning, while a bundled model has no small one, and so are methods in a
    format of eight bits that the device of the models does not multiply.

    Args:
        model: name of a bundled model, whose adapters, presets with files, and trained baselines are methods too; None
            for the methods that any VAR has.
        placement: device and dtype of the models, for `load_pretrained`; the CPU without a device.
    """
    found = [Method("dense", unpatched), Method("accelerated", lambda var: patched_silently(var, DENSE, None))]
    if model:
        for name in bundled_adapters(model):
            found += adapter_methods(name, adapter_path(model, name))
        found += preset_methods(model)
        found += [_trained(*baseline) for baseline in bundled_baselines(model).items()]
    for rate in RATES:
        found += [_pruned("magnitude", rate), _pruned("wanda", rate)]
        found.append(Method(f"fastvar@{rate}", functools.partial(baselines.fastvar, rate=rate)))
        found.append(Method(f"tome@{rate}", functools.partial(baselines.token_merging, rate=rate)))
    for count in COUNTS:
        found.append(Method(f"skip@{count}", functools.partial(baselines.skip_last_scales, count=count)))
        found.append(Method(f"unguided@{count}", functools.partial(baselines.without_guidance, count=count)))
    if model:
        try:
            small = load_pretrained(SMALL.format(model), **placement)[1]
        except ValueError as error:
            logger.warning("code is left out: it needs a smaller model of the same autoencoder: %s", error)
        else:
            found += [code(small, count) for count in COUNTS]
    return by_name([*found, *EIGHT_BITS], placement.get("device", "cpu"))


def _dense_in(weights: str) -> Method:
    """Return the dense model with products in eight bits, by a name of `FORMATS`."""
    return Method(weights, lambda model: patched_silently(model, DENSE, None, Execution(weights=weights)))


EIGHT_BITS = [_dense_in(weights) for weights in FORMATS]


def by_name(methods: Sequence[Method], device: torch.device | str) -> dict[str, Method]:
    """Return methods by name, without those in a format that `device` does not multiply, which is logged."""
    found = {method.name: method for method in methods}
    for name, quantized in FORMATS.items():
        missing = why_not_in_eight_bits(quantized, torch.device(device))
        if missing is not None:
            logger.warning("methods in %s are left out: %s", name, missing)
            found = {other: method for other, method in found.items() if not other.endswith(name)}
    return found


def preset_methods(model: str) -> list[Method]:
    """Return the presets with files that a bundled model comes with, each also in eight bits."""
    found = []
    for name in bundled_presets(model):
        path = preset_path(model, name)
        if path:  # lossless has none, and is the method accelerated
            found.append(adapter_method(f"preset-{name}", path))
            found += [adapter_method(f"preset-{name}-{weights}", path, weights) for weights in FORMATS]
    return found


def chosen_methods(names: str, known: dict[str, Method]) -> list[Method]:
    """Return the methods of a comma-separated list.

    Args:
        names: `all`; names of methods, or of a group for all its methods; and files of adapters, which may follow
            `adapter:`, whose methods are named by the file without its suffix.
        known: methods by name, see `methods_of`.

    Raises:
        ValueError: an unknown name; lists those there are.
        FileNotFoundError, AdapterError: a file that is not there, or no adapter.
    """
    chosen: dict[str, Method] = {}
    for name in names.split(","):
        file = name.removeprefix("adapter:")
        if file != name or name.endswith(".safetensors"):
            meant = [adapter_method(Path(file).stem, Path(file))]
        else:
            meant = [m for m in known.values() if name in ("all", m.name, m.group)]
        if not meant:
            raise ValueError(f"methods: expected all, adapter files or names among {', '.join(known)}, got {name!r}")
        chosen |= {method.name: method for method in meant}
    return list(chosen.values())


def adapter_method(name: str, path: Path, weights: str | None = None, **changes: Any) -> Method:
    """Return ActVAR with an adapter and the Execution that it recommends.

    Args:
        name: of the method.
        path: file of the adapter.
        weights: `Execution.weights` in place of what the adapter recommends; None for that.
        changes: other values for fields of the adapter's configuration.
    """
    adapter = read_adapter(path)
    config, execution = replace(adapter.config, **changes), adapter.execution
    if weights is not None:
        execution = replace(execution, weights=weights)

    @contextmanager
    def applied(var: nn.Module) -> Iterator[nn.Module]:
        with _unwarned(), patched_silently(var, config, path, execution):
            yield var

    return Method(name, applied, config.to_json() + execution.to_json())


def adapter_methods(name: str, path: Path) -> Iterator[Method]:
    """Yield an adapter as it is, with fixed tokens, without experts, and without token selection.

    With fixed tokens the first block chooses for all. It keeps as many tokens as the adapter's blocks do on average.

    Args:
        name: of the first method, with which the others' names begin.
        path: file of the adapter.
    """
    rates = read_adapter(path).config.token_rates
    all_tokens = (1.0,) * len(rates)
    same = tuple(statistics.fmean(rate) if isinstance(rate, tuple) else rate for rate in rates)
    yield adapter_method(name, path)
    yield from (adapter_method(f"{name}-{weights}", path, weights) for weights in FORMATS)
    yield adapter_method(f"{name}-fixed-tokens", path, fixed_tokens=True, token_rates=same)
    yield adapter_method(f"{name}-no-experts", path, ffn_rate=1.0)
    yield adapter_method(f"{name}-no-selection", path, token_rates=all_tokens)


def code(small: nn.Module, count: int) -> Method:
    """Return CoDe with a smaller model for the last `count` scales."""
    applied = functools.partial(baselines.collaborative_decoding, small=small, count=count)
    return Method(f"code@{count}", applied, model_fingerprint(small))


def _pruned(score: str, rate: float) -> Method:
    """Return static pruning, which looks once for the units that stay."""
    units = functools.cache(functools.partial(SCORES[score], rate=rate))
    return Method(f"static-{score}@{rate}", lambda var: baselines.static_pruning(var, units(var)))


def _trained(name: str, path: Path) -> Method:
    """Return static pruning with the weights of an adapter."""
    config = read_adapter(path).config
    applied = functools.partial(baselines.trained_static_pruning, adapter=path)
    return Method(f"{name.partition('@')[0]}-trained@{config.ffn_rate}", applied, config.to_json())


@contextmanager
def _unwarned() -> Iterator[None]:
    """Hold back the warning that an adapter is used at other rates than it was trained for."""
    adapter_logger = logging.getLogger("actvar.patching.adapter")
    before, adapter_logger.disabled = adapter_logger.disabled, True
    try:
        yield
    finally:
        adapter_logger.disabled = before
