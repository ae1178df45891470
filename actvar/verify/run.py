"""Check a model with ActVAR: rates of 1 against dense, backends against the reference, removal, the public class.

The tolerances are derived in `actvar.verify.rounding`. Choices, copies and tokens have a tolerance of 0, and their
error is the number of elements that differ.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.families import family_of
from actvar.models.public_code import public_classes, public_twin
from actvar.patching.adapter import read_adapter
from actvar.patching.patch import patched_silently
from actvar.sampling.request import Sampling
from actvar.utils.devices import device_of
from actvar.utils.fingerprint import fingerprint
from actvar.utils.progress import progress
from actvar.verify.comparisons import compared_blocks, compared_operations, dtype_of
from actvar.verify.eight_bits import eight_bit_checks
from actvar.verify.report import Check, Report
from actvar.verify.rounding import difference
from actvar_kernels.backend import BackendUnavailableError, choose_fused, get_backend, using_backend
from actvar_kernels.cpu_backend import cpu


def verify(
    load: Callable[[torch.dtype], nn.Module],
    config: ActVARConfig,
    adapter: str | Path | None,
    sampling: Sampling,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    backends: Sequence[str] | None = None,
    public_folder: Path | None = None,
    execution: Execution | None = None,
    quantized: torch.dtype | None = None,
) -> Report:
    """Sample with every dtype and backend, and compare block by block and operation by operation.

    A backend whose operations differ is not tried with rates of 1.

    Args:
        load: returns the unpatched `actvar.models.VAR` with weights of a dtype, in eval mode.
        config: rates with which operations, removal and the public class are checked.
        adapter: file of the gates for these checks; None for gates without training.
        sampling: the images to draw.
        dtypes: float32 is always added, since tokens and removal are compared in it alone.
        backends: None for those that run on the model's device.
        public_folder: a clone of the public VAR code, whose class must give the same tokens.
        execution: how patched models are run, except that tokens are drawn by `sampler="torch"`, and products are those
            of the weights' own dtype; None for the one that the adapter recommends, otherwise the default.
        quantized: `torch.int8` or `torch.float8_e4m3fn`, in which the products of the blocks are checked as well,
            kernels against their reference; None for neither.

    Raises:
        BackendUnavailableError: a backend asked for cannot run here.
        ImportError: the public code needs a package that is not installed.
        ValueError: a configuration, adapter or folder that does not fit; bfloat16 in Triton's interpreter.
    """
    classes = None if public_folder is None else public_classes(public_folder)
    if execution is None:
        execution = Execution() if adapter is None else read_adapter(adapter).execution
    execution = replace(execution, sampler="torch", weights=None)
    patched = functools.partial(patched_silently, execution=execution)
    checks: list[Check] = []
    for dtype in dict.fromkeys((torch.float32, *dtypes)):
        var = load(dtype)
        backends = backends or available_backends(device_of(var), dtypes)
        for backend in backends:
            expect_backend(backend, device_of(var), dtypes)
        if dtype == torch.float32:
            checks += _all_checks(var, patched, config, adapter, sampling, backends, classes)
        else:
            with patched(var, config, adapter):
                checks += _checks_of_backends(var, patched, config, sampling, backends)
        if quantized is not None:
            checks += eight_bit_checks(var, quantized)
        del var
    return Report(tuple(checks))


def available_backends(device: torch.device, dtypes: Sequence[torch.dtype] = ()) -> tuple[str, ...]:
    """Return the backends that run on `device`, the reference first.

    Args:
        device: of the model.
        dtypes: that the backends must take.
    """
    found = ["reference"]
    for name in ("cpu", "triton"):
        with contextlib.suppress(BackendUnavailableError):
            expect_backend(name, device, dtypes)
            found.append(name)
    return tuple(found)


def expect_backend(name: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Raise an error if a backend does not run on a device with dtypes.

    Raises:
        BackendUnavailableError, ValueError: as in `verify`.
    """
    if name == "triton":
        with using_backend(name):
            choose_fused(torch.empty(0, device=device))
    if name == "cpu":
        reason = cpu.why_unavailable() if device.type == "cpu" else f"it needs CPU tensors, got {device}"
        if reason is not None:
            raise BackendUnavailableError(f"the 'cpu' backend: {reason}")
    if name == "triton" and device.type == "cpu" and torch.bfloat16 in dtypes:
        raise ValueError("bfloat16: Triton's interpreter computes it wrongly; leave it out, or use a GPU")


def _all_checks(var, patched, config, adapter, sampling, backends, classes) -> Iterator[Check]:
    """Yield the checks of the backends, of removal, and of the public class.

    Args:
        var: the unpatched model in float32.
        patched: patches a model, with the arguments of `patched_silently`.
        config, adapter, sampling: see `verify`.
        backends: to check.
        classes: of the public code, or None.
    """
    before = facts_of(var)
    with using_backend("reference"):
        dense = _sampled(var, sampling, "dense")
    with patched(var, config, adapter):
        yield from _checks_of_backends(var, patched, config, sampling, backends, dense)
    with using_backend("reference"):
        after, again = facts_of(var), _sampled(var, sampling, "patch removed")
        for what, count in differing_facts(before, after).items():
            yield Check("removal", "float32", "reference", what, float(count))
        yield Check("removal", "float32", "reference", "images", difference(again.images, dense.images))
        yield from _same_tokens("removal", var, again, dense)
        if classes is not None:
            public = public_twin(var, classes)
            yield from _same_tokens("public class", var, _sampled(public, sampling, "public class"), dense)
            with patched(var, config, adapter):
                sparse = _sampled(var, sampling, "patched")
            with patched(public, config, adapter):
                sparse_public = _sampled(public, sampling, "public class, patched")
            yield from _same_tokens("public class, patched", var, sparse_public, sparse)


def _checks_of_backends(var, patched, config, sampling, backends, dense=None) -> Iterator[Check]:
    """Yield the checks of a patched model's operations, then those of rates of 1 against the dense model.

    Args:
        var: the patched model.
        patched: patches a model, with the arguments of `patched_silently`.
        config, sampling: see `verify`.
        backends: to check.
        dense: the dense model's sample, whose tokens are compared; None: tokens are not compared.
    """
    rates_1 = replace(config.without_savings(), weights_from=None)
    for backend in backends:
        with using_backend(backend):
            with compared_operations(var) as checks:
                _sampled(var, sampling, f"operations, {backend}")
            yield from checks
            if not all(check.passed for check in checks):
                continue  # a wrong backend could raise anywhere in a sample
            for name, forced in (("rates 1", False), ("rates 1, forced", True)):
                with patched(var, replace(rates_1, always_sparse=forced), None), compared_blocks(var, name) as checks:
                    sampled = _sampled(var, sampling, f"{name}, {backend}")
                yield from checks
                if dense is not None:
                    yield from _same_tokens(f"{name}, tokens", var, sampled, dense)


@dataclass(frozen=True)
class _Sampled:
    """Token maps `[B, L]` of every scale, and the images."""

    tokens: list[torch.Tensor]
    images: torch.Tensor


def _sampled(var: nn.Module, sampling: Sampling, title: str) -> _Sampled:
    """Draw a sample under a progress bar with a title."""
    tokens: list[torch.Tensor] = []
    title = f"{title}, {dtype_of(var)}"
    family = family_of(var)
    with progress(total=len(family.maps(var)), desc=title, leave=False) as bar:

        def count(_scale: int, drawn: torch.Tensor, _features: torch.Tensor) -> None:
            tokens.append(drawn.clone())
            bar.update()

        with family.watch_scales(var, count):
            return _Sampled(tokens, sampling.run(var))


def _same_tokens(name: str, var: nn.Module, sampled: _Sampled, due: _Sampled) -> Iterator[Check]:
    """Yield a check per scale of the tokens of two samples."""
    for scale, (got, wanted) in enumerate(zip(sampled.tokens, due.tokens, strict=True)):
        yield Check(name, dtype_of(var), get_backend(), "tokens", difference(got, wanted), scale=scale)


def facts_of(var: nn.Module) -> dict[str, dict]:
    """Return everything that removal must leave unchanged, each by name."""
    state = var.state_dict()
    return {
        "classes and attributes": {n: (type(m), sorted(vars(m)), list(m._modules)) for n, m in var.named_modules()},
        "state_dict keys": dict(enumerate(state)),
        "state_dict tensors": {name: (t.device, fingerprint([(name, t)])) for name, t in state.items()},
    }


def differing_facts(before: dict[str, dict], after: dict[str, dict]) -> dict[str, int]:
    """Return how many of the results of `facts_of` differ, by kind."""
    return {
        what: sum(due.get(name) != after[what].get(name) for name in due.keys() | after[what].keys())
        for what, due in before.items()
    }
