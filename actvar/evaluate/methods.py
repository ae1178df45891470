"""Every way to sample that is compared, by name."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from actvar import baselines
from actvar.baselines.static_pruning import SCORES
from actvar.config import DENSE
from actvar.patching.adapter import read_adapter
from actvar.patching.patch import patched_silently, unpatched
from actvar.utils.fingerprint import model_fingerprint
from actvar.zoo.pretrained import adapter_path, bundled_adapters, bundled_baselines, load_pretrained

logger = logging.getLogger(__name__)

RATES = (0.75, 0.5)
COUNTS = (1, 2)
SMALL = "{}-small"
"""Name of the bundled model that draws the last scales for a bundled model in CoDe."""


@dataclass(frozen=True)
class Method:
    """A way to sample from a VAR.

    Args:
        name: unique; before an `@` the method's family, behind it how much.
        applied: puts it on an unpatched model while its context is open.
        facts: what its results depend on besides the name and the tensors of the model it is on.
    """

    name: str
    applied: Callable[[nn.Module], AbstractContextManager[nn.Module]]
    facts: str = ""

    @property
    def family(self) -> str:
        return self.name.partition("@")[0]


def methods_of(model: str | None = None, **placement: object) -> dict[str, Method]:
    """All methods by name: of a bundled model with its adapters and trained baselines, or those that any VAR has.

    Args:
        model: a bundled model's name.
        placement: device and dtype of the small model, as `load_pretrained` takes them.

    CoDe is left out, with a logged warning, while a bundled model has no small one.
    """
    found = [Method("dense", unpatched), Method("accelerated", lambda var: patched_silently(var, DENSE, None))]
    for name in bundled_adapters(model) if model else ():
        found += adapter_methods(name, adapter_path(model, name))
    found += [_trained(*baseline) for baseline in (bundled_baselines(model) if model else {}).items()]
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
    return {method.name: method for method in found}


def chosen_methods(names: str, known: dict[str, Method]) -> list[Method]:
    """The methods of a comma-separated list: `all`; names, those of a family without its `@` for all of it; and files
    of adapters, named as they are without suffix.

    Raises:
        ValueError: an unknown name; lists those there are.
        FileNotFoundError, AdapterError: a file that is not there, or no adapter.
    """
    chosen: dict[str, Method] = {}
    for name in names.split(","):
        if name.endswith(".safetensors"):
            of_name = [adapter_method(Path(name).stem, Path(name))]
        else:
            of_name = [m for m in known.values() if name in ("all", m.name, m.family)]
        if not of_name:
            raise ValueError(f"methods: expected all, adapter files or names among {', '.join(known)}, got {name!r}")
        chosen |= {method.name: method for method in of_name}
    return list(chosen.values())


def adapter_method(name: str, path: Path, **changes: object) -> Method:
    """Return ActVAR with an adapter and the Execution that it recommends, some fields of its configuration changed."""
    adapter = read_adapter(path)
    config, execution = replace(adapter.config, **changes), adapter.execution

    @contextmanager
    def applied(var: nn.Module) -> Iterator[nn.Module]:
        with _unwarned(), patched_silently(var, config, path, execution):
            yield var

    return Method(name, applied, config.to_json() + execution.to_json())


def adapter_methods(name: str, path: Path) -> Iterator[Method]:
    """Yield an adapter as it is, with fixed tokens, without experts, and without token selection.

    With fixed tokens the first block chooses for all, as many tokens as the blocks of the adapter on average.
    """
    rates = read_adapter(path).config.token_rates
    all_tokens = (1.0,) * len(rates)
    same = tuple(statistics.fmean(rate) if isinstance(rate, tuple) else rate for rate in rates)
    yield adapter_method(name, path)
    yield adapter_method(f"{name}-fixed-tokens", path, fixed_tokens=True, token_rates=same)
    yield adapter_method(f"{name}-no-experts", path, ffn_rate=1.0)
    yield adapter_method(f"{name}-no-selection", path, token_rates=all_tokens)


def code(small: nn.Module, count: int) -> Method:
    """Return CoDe with a smaller model for the last `count` scales."""
    applied = functools.partial(baselines.collaborative_decoding, small=small, count=count)
    return Method(f"code@{count}", applied, model_fingerprint(small))


def _pruned(score: str, rate: float) -> Method:
    """Return static pruning; which units stay is found once."""
    units = functools.cache(functools.partial(SCORES[score], rate=rate))
    return Method(f"static-{score}@{rate}", lambda var: baselines.static_pruning(var, units(var)))


def _trained(name: str, path: Path) -> Method:
    """Return static pruning with the weights of an adapter."""
    config = read_adapter(path).config
    applied = functools.partial(baselines.trained_static_pruning, adapter=path)
    return Method(f"{name.partition('@')[0]}-trained@{config.ffn_rate}", applied, config.to_json())


@contextmanager
def _unwarned() -> Iterator[None]:
    """Keep back the warning that an adapter is used at other rates than it was trained for."""
    adapter_logger = logging.getLogger("actvar.patching.adapter")
    before, adapter_logger.disabled = adapter_logger.disabled, True
    try:
        yield
    finally:
        adapter_logger.disabled = before
