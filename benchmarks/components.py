"""Say where a sample's time goes: seconds by component and step, of the ways that `benchmarks.sampling` compares.

Functions and modules are wrapped for the duration of one sample. A component's time is its own: what a wrapped call
spends inside another one belongs to the inner one, so that the components of a step add up.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import actvar.sparse.block
import actvar.sparse.selection
from actvar.families.var import VARFamily
from actvar.utils.files import replacing

COMPONENTS = (
    "qkv", "attention", "proj", "ffn", "adaln", "select", "route", "norms", "head", "sampling", "decoder", "other",
)  # fmt: skip
"""`attention` with QK norm and cache; `norms`: the rest of a block, LayerNorm, modulation and residuals; `ffn` with its
residual where that is fused; `sampling`: the draw, and the next step's input; `other`: the rest of the loop."""

Steps = list[dict[str, float]]


class Stopwatch:
    """Measure the own seconds of nested components, by step and component."""

    def __init__(self):
        self.steps: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.step, self.running, self.since = 0, ["other"], time.perf_counter()

    def enter(self, component: str) -> None:
        self.charge()
        self.running.append(component)

    def leave(self) -> None:
        self.charge()
        self.running.pop()

    def charge(self) -> None:
        """Give the time since the last call to the component that runs."""
        now = time.perf_counter()
        self.steps[self.step][self.running[-1]] += now - self.since
        self.since = now

    def wrapped(self, function: Callable, component: str) -> Callable:
        def call(*args, **kwargs):
            self.enter(component)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call


def components(var: nn.Module, sample: Callable[[], object]) -> Steps:
    """Run `sample` once on the CPU; return own seconds of every component by step, 0 where it does not run."""
    watch = Stopwatch()
    with _watching(var, watch):
        watch.since = time.perf_counter()
        sample()
        watch.charge()
    return [{name: watch.steps[step][name] for name in COMPONENTS} for step in range(len(var.patch_nums))]


@contextmanager
def _watching(var: nn.Module, watch: Stopwatch) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, component in _functions(var):
            if hasattr(owner, name):
                function = watch.wrapped(getattr(owner, name), component)
                stack.enter_context(mock.patch.object(owner, name, function))
        stack.enter_context(mock.patch.object(F, "linear", _with_qkv(var, watch)))
        by_id = {id(module): component for module, component in _modules(var)}
        forwards = {kind: kind.forward for kind in {type(module) for module, _ in _modules(var)}}
        for kind, forward in forwards.items():  # of classes, since a layer with hooks does not run fused
            stack.enter_context(mock.patch.object(kind, "forward", _timed_forward(forward, by_id, watch)))
        begun = [0]
        first = var.blocks[0].register_forward_pre_hook(partial(_next_step, watch, begun), prepend=True)
        stack.callback(first.remove)
        yield


def _with_qkv(var: nn.Module, watch: Stopwatch) -> Callable:
    """Return a stand-in for `F.linear`, with which dense blocks multiply by the weight of queries, keys and values."""
    weights, plain = {id(block.attn.mat_qkv.weight) for block in var.blocks}, F.linear
    timed = watch.wrapped(plain, "qkv")

    def linear(input, weight, bias=None):
        return (timed if id(weight) in weights else plain)(input, weight, bias)

    return linear


def _timed_forward(forward: Callable, by_id: Mapping[int, str], watch: Stopwatch) -> Callable:
    """Return `forward` of a class, timed for those of its modules whose id has a component."""

    def timed(module, *args, **kwargs):
        component = by_id.get(id(module))
        call = forward if component is None else watch.wrapped(forward, component)
        return call(module, *args, **kwargs)

    return timed


def _next_step(watch: Stopwatch, begun: list[int], _module, _args) -> None:
    watch.charge()
    watch.step = begun[0]
    begun[0] += 1


def _functions(var: nn.Module) -> Iterator[tuple[object, str, str]]:
    """Return owner, attribute and component of functions: of the kernels' block, of the loop, of the public code."""
    family = VARFamily
    yield family, "project", "qkv"
    yield from ((family, name, "adaln") for name in ("modulation", "qkv_bias"))
    yield family, "attention_output", "proj"
    yield family, "dense_ffn", "ffn"
    yield actvar.sparse.block, "subset_attention", "attention"
    yield from ((actvar.sparse.block, name, "ffn") for name in ("expert_ffn_scatter", "scatter_rows", "quantized_ffn"))
    yield actvar.sparse.selection, "select_tokens", "select"
    yield actvar.sparse.block, "add_normalize_route", "route"
    of_model = sys.modules[getattr(type(var), "original_class", type(var)).__module__]
    yield of_model, "sample_with_top_k_top_p_", "sampling"
    vae = var.vae_proxy[0]
    yield var, "get_logits", "head"
    yield var, "draw", "sampling"
    yield from ((vae.quantize, name, "sampling") for name in ("add_scale", "get_next_autoregressive_input"))
    yield vae, "fhat_to_img", "decoder"


def _modules(var: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    yield var.shared_ada_lin, "adaln"
    yield var.word_embed, "sampling"
    for block in var.blocks:
        yield block, "norms"
        yield block.attn, "attention"
        yield block.attn.proj, "proj"
        yield block.ffn, "ffn"
        if not block.shared_aln:
            yield block.ada_lin, "adaln"


def table(ways: Mapping[str, Steps]) -> str:
    """Return a table to read: milliseconds by step and component of every way."""
    lines = []
    for way, steps in ways.items():
        lines.append(f"{way + ', ms':24s}" + "".join(f"{name:>10s}" for name in (*COMPONENTS, "total")))
        rows = [(f"step {number}", step) for number, step in enumerate(steps, 1)]
        rows.append(("all steps", {name: sum(step[name] for step in steps) for name in COMPONENTS}))
        for label, step in rows:
            values = (*(step[name] for name in COMPONENTS), sum(step.values()))
            lines.append(f"{label:24s}" + "".join(f"{1e3 * value:10.2f}" for value in values))
        lines.append("")
    return "\n".join(lines)


def save_plot(ways: Mapping[str, Steps], title: str, path: Path) -> Path:
    """Write a PNG: time per step of every way, stacked by component."""
    figure = Figure(figsize=(4 * len(ways), 4), layout="constrained")
    for place, (axes, (way, steps)) in enumerate(
        zip(figure.subplots(1, len(ways), sharey=True, squeeze=False)[0], ways.items(), strict=True)
    ):
        stacked(axes, steps)
        axes.set_title(f"{way}, {1e3 * sum(sum(step.values()) for step in steps):.0f} ms", fontsize=9)
        if place == 0:
            axes.set_ylabel("milliseconds")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def stacked(axes: Axes, steps: Sequence[Mapping[str, float]]) -> None:
    """Draw bars of milliseconds per step by component."""
    numbers, bottom = range(1, len(steps) + 1), [0.0] * len(steps)
    for place, name in enumerate(COMPONENTS):
        heights = [1e3 * step.get(name, 0.0) for step in steps]
        axes.bar(numbers, heights, bottom=bottom, label=name, color=colormaps["tab20"](place))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(numbers)
    axes.set_xlabel("step")
