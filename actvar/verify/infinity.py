"""Check an Infinity with ActVAR: operations on every backend, rates of 1 against dense, removal.

Tolerances of operations are derived in `actvar.verify.rounding`. Bits and images have a tolerance of 0, and are
compared on the reference backend: attention to the text rounds to bfloat16, so a few bits may differ on another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.patching.adapter import read_adapter
from actvar.patching.patch import patched_silently
from actvar.sampling.text_request import TextSampling
from actvar.utils.devices import device_of
from actvar.utils.progress import progress
from actvar.verify.comparisons import compared_operations, dtype_of
from actvar.verify.report import Check, Report
from actvar.verify.rounding import difference
from actvar.verify.run import available_backends, differing_facts, expect_backend, facts_of
from actvar_kernels.backend import using_backend


def verify_infinity(
    load: Callable[[torch.dtype], nn.Module],
    config: ActVARConfig,
    adapter: str | Path | None,
    sampling: TextSampling,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    backends: Sequence[str] | None = None,
) -> Report:
    """Sample with every dtype and backend, and compare operation by operation; in float32 also bits and images.

    Args:
        load: returns the unpatched `actvar.models.Infinity` with blocks of a dtype, in eval mode.
        config: rates with which operations and removal are checked.
        adapter: file of the gates for these checks; None for gates without training.
        sampling: the images to draw, with features.
        dtypes: float32 is always added.
        backends: None for those that run on the model's device.

    Raises:
        BackendUnavailableError: a backend asked for cannot run here.
        ValueError: a configuration or adapter that does not fit; bfloat16 in Triton's interpreter.
    """
    execution = Execution() if adapter is None else read_adapter(adapter).execution
    patched = functools.partial(patched_silently, execution=replace(execution, weights=None))
    checks: list[Check] = []
    for dtype in dict.fromkeys((torch.float32, *dtypes)):
        infinity = load(dtype)
        backends = backends or available_backends(device_of(infinity), dtypes)
        for backend in backends:
            expect_backend(backend, device_of(infinity), dtypes)
        with patched(infinity, config, adapter):
            for backend in progress(backends, desc=f"operations, {dtype_of(infinity)}", leave=False):
                with using_backend(backend), compared_operations(infinity) as of_operations:
                    sampling.run(infinity)
                checks += of_operations
        if dtype == torch.float32:
            checks += _checks_of_bits(infinity, patched, config, adapter, sampling)
        del infinity
    return Report(tuple(checks))


def _checks_of_bits(infinity: Any, patched: Callable, config, adapter, sampling: TextSampling) -> Iterator[Check]:
    """Yield the checks of rates of 1 and of removal, on the reference backend.

    Args:
        infinity: the unpatched model in float32.
        patched: patches a model, with the arguments of `patched_silently`.
        config, adapter, sampling: as in `verify_infinity`.
    """
    rates_1 = replace(config.without_savings(), weights_from=None)
    with using_backend("reference"):
        before, dense = facts_of(infinity), sampling.run_with_bits(infinity)
        for name, forced in (("rates 1", False), ("rates 1, forced", True)):
            with patched(infinity, replace(rates_1, always_sparse=forced), None):
                yield from _same(name, sampling.run_with_bits(infinity), dense)
        with patched(infinity, config, adapter):
            sampling.run(infinity)
        for what, count in differing_facts(before, facts_of(infinity)).items():
            yield Check("removal", "float32", "reference", what, float(count))
        yield from _same("removal", sampling.run_with_bits(infinity), dense)


Drawn = tuple[torch.Tensor, list[torch.Tensor]]
"""Images, and the bits of every scale."""


def _same(name: str, drawn: Drawn, due: Drawn) -> Iterator[Check]:
    """Yield a check of the images of two samples, and one of the bits of each scale."""
    yield Check(name, "float32", "reference", "images", difference(drawn[0], due[0]))
    for scale, (got, wanted) in enumerate(zip(drawn[1], due[1], strict=True)):
        yield Check(name, "float32", "reference", "bits", difference(got, wanted), scale=scale)
