"""Raise exceptions and Ctrl-C in the middle of sampling, patching and loading: at lines, in torch, at moments.

Every `run_...` returns counts and raises AssertionError where a promise is broken.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import actvar
from actvar import ActVARConfig
from actvar.config import KV_MODES
from actvar.patching.patch import patch_silently
from actvar_kernels.cpu_backend import packing
from support.faults import CONFIG, draw, expect_free, expect_same_state, save_whole_adapter, small_model, state_of

PACKAGES = (Path(actvar.__file__).parent, Path(packing.__file__).parents[1])
TORCHS_MODES = (Path(torch.autograd.grad_mode.__file__), Path(torch.utils._contextlib.__file__))
WITHOUT_SIGNALS = actvar.utils.modes.__file__
"""The file between whose lines Python handles no signal, so none is raised there."""
Action = Callable[[nn.Module], object]


class InjectedError(Exception):
    """Stand for an error where nothing else would raise one."""


# Where it is raised


@contextmanager
def raising_at_line(
    number: int, error: type[BaseException], sources: tuple[Path, ...] = PACKAGES
) -> Iterator[list[int]]:
    """Raise `error` before the `number`-th line of `sources` that runs; yield the count of lines so far."""
    count = [0]

    def trace(frame, event, _argument):
        file = frame.f_code.co_filename
        if not file.startswith(tuple(map(str, sources))) or file == WITHOUT_SIGNALS:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@contextmanager
def raising_at_copy(number: int, error: type[BaseException], copied: bool) -> Iterator[list[int]]:
    """Raise `error` at the `number`-th call of torch that changes weights in place; yield the count of calls so far.

    The error comes before the call, or after it if the weights are to be `copied`.
    """
    count, copy = [0], torch._foreach_copy_

    def copy_or_raise(*arguments):
        count[0] += 1
        if count[0] != number:
            return copy(*arguments)
        if copied:
            copy(*arguments)
        raise error

    torch._foreach_copy_ = copy_or_raise
    try:
        yield count
    finally:
        torch._foreach_copy_ = copy


@contextmanager
def raising_after(seconds: float) -> Iterator[None]:
    """Send Ctrl-C by a signal when `seconds` are over, wherever the process is, if it is in the context."""

    def interrupt(*_) -> None:
        if armed:
            raise KeyboardInterrupt

    armed, before = True, signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def lines_of(action: Callable[[], object], sources: tuple[Path, ...] = PACKAGES) -> int:
    """Count the lines of `sources` that `action` runs."""
    with raising_at_line(-1, InjectedError, sources) as count:
        action()
    return count[0]


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def fails(action: Callable[[], object], raising) -> bool:
    """Return whether the error that the context `raising` raises came out of `action`, which may have ended before.

    The modes of autograd are the same before and after.
    """
    before, failed = modes(), False
    try:
        with raising:
            action()
    except (InjectedError, KeyboardInterrupt):
        failed = True
    except actvar.AdapterError as error:  # while a file is read, any error counts as a damaged file
        if "expected a safetensors file" not in str(error):
            raise
        failed = True
    found = modes()
    torch.set_grad_enabled(before[0])  # what is found here shall not be found again elsewhere
    assert found == before, f"gradients and inference mode were {before}, are {found}"
    return failed


def modes() -> tuple[bool, bool]:
    """Return whether there are gradients, and whether inference mode is on."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


# Sampling


def run_sampling_faults(count: int, seed: int = 0) -> dict[str, int]:
    """Raise an exception or Ctrl-C `count` times at a random line of a sample, dense or patched.

    The caches are empty afterwards, the next sample is that of an undisturbed model, and the patch comes off.
    """
    rng = random.Random(seed)
    for round in range(count):
        var = small_model()
        dense, before = draw(var), state_of(var)
        if round % 3:
            patch_silently(var, ActVARConfig(num_experts=8, kv=KV_MODES[round % 2]))
        expected = draw(var)
        line = rng.randrange(1, lines_of(lambda var=var: draw(var)) + 1)
        fails(lambda var=var: draw(var), raising_at_line(line, rng.choice((InjectedError, KeyboardInterrupt))))
        assert torch.equal(draw(var), expected), f"line {line} of round {round}"
        expect_free(var)
        actvar.remove_patch(var)
        expect_same_state(var, before)
        assert torch.equal(draw(var), dense)
    return {"faults in sampling": count}


# Patching and loading


@dataclass(frozen=True)
class Change:
    """Describe a change: `action` on the model that `prepare` made.

    A failure leaves the model as `prepare` made it if `keeps`. Otherwise `remove_patch` must make the dense model of
    it.
    """

    prepare: Callable[[], nn.Module]
    action: Action
    keeps: bool = False


class Adapters:
    """Write two adapters of the small model, each with gates, an order of the hidden units and changed weights."""

    def __init__(self, folder: Path):
        self.paths = [save_whole_adapter(folder / f"{seed}.safetensors", seed) for seed in range(2)]

    def loaded(self, number: int) -> nn.Module:
        return actvar.load_adapter(patched_model(), self.paths[number])

    def plain_file(self) -> Path:
        """Return an adapter without an order and changed weights."""
        path = self.paths[0].with_name("plain.safetensors")
        actvar.save_adapter(patched_model(), path)
        return path

    def changes(self) -> dict[str, Change]:
        first, second = self.paths
        plain = self.plain_file()

        def use_another(var: nn.Module) -> None:
            with actvar.patched(var, adapter=second):
                pass

        def use_the_dense_one(var: nn.Module) -> None:
            with actvar.patching.patch.unpatched(var):
                pass

        return {
            "patch": Change(small_model, lambda var: patch_silently(var, CONFIG)),
            "patch again": Change(patched_model, lambda var: patch_silently(var, ActVARConfig(num_experts=4))),
            "patch instead of an adapter": Change(lambda: self.loaded(0), lambda var: patch_silently(var, CONFIG)),
            "remove": Change(patched_model, actvar.remove_patch),
            "remove with an adapter": Change(lambda: self.loaded(0), actvar.remove_patch),
            "load": Change(patched_model, lambda var: actvar.load_adapter(var, first), keeps=True),
            "load another": Change(lambda: self.loaded(0), lambda var: actvar.load_adapter(var, second), keeps=True),
            "load a plain one": Change(lambda: self.loaded(0), lambda var: actvar.load_adapter(var, plain), keeps=True),
            "load and patch": Change(small_model, lambda var: actvar.load_adapter(var, first), keeps=True),
            "patched": Change(small_model, use_another),
            "patched instead of an adapter": Change(lambda: self.loaded(0), use_another),
            "unpatched": Change(lambda: self.loaded(0), use_the_dense_one),
        }


def patched_model() -> nn.Module:
    var = small_model()
    patch_silently(var, CONFIG)
    return var


class Interrupted:
    """Check that a change leaves behind what it must when it fails."""

    def __init__(self, change: Change):
        self.change = change
        self.dense, self.dense_image = state_of(small_model()), draw(small_model())
        var = change.prepare()
        self.before, self.image = contents(var), draw(var)
        change.action(var)
        self.after = contents(var)

    def expect_whole(self, var: nn.Module, failed: bool) -> None:
        if not failed:
            assert same(contents(var), self.after)
        elif self.change.keeps:
            # Ctrl-C may come when all is done
            assert same(contents(var), self.before) or same(contents(var), self.after)
        if self.change.keeps and failed and same(contents(var), self.before):
            assert torch.equal(draw(var), self.image)
        actvar.remove_patch(var)
        expect_same_state(var, self.dense)
        assert torch.equal(draw(var), self.dense_image)


def contents(var: nn.Module) -> dict[str, torch.Tensor]:
    """Return all that a sample depends on, by name: weights, gates, orders, and which weights are changed."""
    tensors = dict(var.named_parameters()) | {f"state {name}": tensor for name, tensor in var.state_dict().items()}
    for name, module in var.named_modules():
        if isinstance(getattr(module, "places", None), torch.Tensor):
            tensors[f"{name}.hidden_order"] = module.hidden_order
        tensors |= {f"{name}.originals.{leaf}": p for leaf, p in module.__dict__.get("originals", {}).items()}
        factors = module.__dict__.get("factors", {}).items()
        tensors |= {f"{name}.factors.{leaf}.{side}": f for leaf, pair in factors for side, f in pair._asdict().items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def run_patching_faults(count: int, seed: int = 0, names: tuple[str, ...] | None = None) -> dict[str, int]:
    """Interrupt every change of a model, or those of `names`, at lines, at calls of torch and at moments.

    There are `count` random lines and `count` random moments of a signal. Each call of torch that changes weights in
    place fails once before and once after it. Afterwards the model samples as before, or `remove_patch` gives it as it
    was, bit for bit.
    """
    rng, done = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        changes = Adapters(Path(folder)).changes()
        for name in names or changes:
            change = changes[name]
            expected = Interrupted(change)
            var = change.prepare()
            lines = lines_of(lambda var=var, change=change: change.action(var))
            var = change.prepare()
            with raising_at_copy(-1, InjectedError, False) as copies:
                seconds = seconds_of(lambda var=var, change=change: change.action(var))
            errors = (InjectedError, KeyboardInterrupt)
            raising = [
                *(raising_at_line(n, rng.choice(errors)) for n in rng.sample(range(1, lines + 1), min(count, lines))),
                *(raising_at_copy(n + 1, InjectedError, c) for n in range(copies[0]) for c in (False, True)),
                *(raising_after(rng.uniform(0, seconds)) for _ in range(count)),
            ]
            for number, context in enumerate(raising):
                var = change.prepare()
                try:
                    failed = fails(lambda var=var, change=change: change.action(var), context)
                    expected.expect_whole(var, failed)
                except Exception as error:
                    raise AssertionError(f"{name}: fault {number} of {len(raising)}, seed {seed}: {error}") from error
                done += failed
    return {"faults in patching": done}
