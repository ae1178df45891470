"""Time each operation of a block by all who can compute it: the reference, PyTorch's own, and our backends.

No time is given for an operation whose numbers are wrong: every provider's first image is held to the reference in
float64, with `ERROR_FACTOR` times the reference's own error in the same type allowed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from actvar.sampling.timing import interleaved_seconds, seconds_of
from actvar_kernels import expert_ffn, linear, sample_tokens
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.operations.inputs import BlockInputs, random_inputs
from actvar_kernels.operations.shapes import GUIDANCE, SIZES, TOP_K, TOP_P, VOCABULARY, BlockShape, last_scale
from benchmarks.convolutions import LAYERS, convolution_providers
from benchmarks.operations import WrongNumbersError, allowed_error, operations
from benchmarks.results import Result, Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS_CHECKED = 2  # of one image
SECONDS, SHORTEST, REPEATS = 0.5, 0.005, (5, 20)

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Name the operations of the last scale of `model` for `batch` images with `rate` of its tokens and experts."""

    model: str
    batch: int
    rate: float
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch} rate {self.rate:.0%} {self.dtype}"

    @property
    def shape(self) -> Shape:
        return Shape(self.model, self.batch, self.dtype, self.rate, SIZES[self.model].sides[-1])


RATES, BATCHES = (0.25, 0.5, 0.75, 1.0), (1, 4, 16, 64)
SUBSETS = {
    "all": [Case(*of) for of in itertools.product(SIZES, BATCHES, RATES, DTYPES)],
    "cpu": [
        *(Case("fashion-mnist", batch, 0.75) for batch in (1, 4, 16, 64)),
        *(Case("fashion-mnist", 16, rate) for rate in (0.25, 0.5, 1.0)),
        *(Case("d16", 1, rate) for rate in RATES),
        Case("d16", 4, 0.75),
        Case("d16", 1, 0.75, "bf16"),
        Case("d16", 1, 1.0, "bf16"),
    ],
    "quick": [Case("fashion-mnist", 1, 0.75), Case("fashion-mnist", 1, 1.0)],
}


def providers(case: Case, device: str) -> dict[str, dict[str, Call]]:
    """Return by operation and provider a call that returns the values to compare.

    Raises:
        WrongNumbersError: the values of one differ from the reference in float64.
    """
    inputs = random_inputs(last_scale(case.model, case.batch, case.rate), DTYPES[case.dtype], device)
    calls = _ways(inputs)
    check(case, inputs, calls)
    return calls


def names(case: Case, device: str) -> list[tuple[str, str]]:
    """Return the operations and providers that `measure` times."""
    small = BlockShape(2, 4, 4 if case.rate == 1 else 3, 1, 64, active=16 if case.rate == 1 else 12)
    calls = _ways(random_inputs(small, DTYPES[case.dtype], device))
    if _samples(case):
        calls |= sampling_providers(replace(case, batch=1), device)
    if _convolves(case, device):
        calls |= convolution_providers(case.model, 1, DTYPES[case.dtype])
    return [(operation, provider) for operation, ways in calls.items() for provider in ways]


def _ways(inputs: BlockInputs) -> dict[str, dict[str, Call]]:
    calls: dict[str, dict[str, Call]] = {}
    for operation, run in _ours(inputs).items():
        calls[operation] = {"reference": _on("reference", run)}
        if operation in CPP_OPERATIONS or inputs.x.is_cuda:
            backend = "triton" if inputs.x.is_cuda else "cpu"
            calls[operation][backend] = _on(backend, run)
    for operation, ways in (_native_gates(inputs) | _native_ffns(inputs)).items():
        if operation in calls:
            calls[operation] |= ways
    return calls


CPP_OPERATIONS = ("expert_ffn_scatter dense", "dense_ffn", "linear qkv", "linear proj")
"""Operations that the backend "cpu" computes otherwise than the reference does."""


def _ours(inputs: BlockInputs) -> dict[str, Call]:
    """Return calls of every operation of a block, and of those that a dense one has in their place."""
    calls, shape = operations(inputs), inputs.shape
    if not inputs.x.is_cuda:
        del calls["expert_ffn_scatter tile_list"]  # the same as dense there
        calls |= _linear_layers(inputs)
    C = shape.width
    if shape.keep == shape.tokens and shape.active == shape.num_experts:
        u = F.layer_norm(inputs.x, (C,))
        every = u.new_ones(*u.shape[:-1], shape.num_experts, dtype=torch.bool)
        calls["dense_ffn"] = lambda: expert_ffn(u, every, shape.num_experts, *inputs.ffn)
    return calls


def _linear_layers(inputs: BlockInputs) -> dict[str, Call]:
    """Return layers of the size of attention's projections; on a GPU there is only cuBLAS's."""
    C = inputs.x.shape[-1]
    fc1, bias, *_ = inputs.ffn
    calls = {}
    for name, width in (("linear qkv", 3 * C), ("linear proj", C)):
        layer = fc1[:width], bias[:width]
        calls[name] = lambda layer=layer: linear(inputs.update, *layer)
    return calls


def _on(backend: str, run: Call) -> Call:
    def call() -> torch.Tensor:
        with using_backend(backend):
            return run()

    return call


def _native_gates(inputs: BlockInputs) -> dict[str, dict[str, Call]]:
    """Return PyTorch's own operations: native LayerNorm, top-k and gather; SDPA."""
    gamma1, _, scale1, scale2, shift1, shift2 = inputs.modulation
    C, shape = inputs.shape.width, inputs.shape
    q, k, v = inputs.heads

    def gathered(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, C))

    def modulated(rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(shift, F.layer_norm(rows, (C,), eps=1e-6), scale + 1)

    def select() -> torch.Tensor:
        normed = F.layer_norm(inputs.x.float(), (C,), eps=1e-6)
        scores = F.linear(normed, inputs.selector.float(), inputs.selector_bias.float()).squeeze(-1)
        index = scores.topk(shape.keep, sorted=False).indices.sort().values
        torch.addcmul(shift1, gathered(normed, index).to(inputs.x.dtype), scale1 + 1)
        return scores

    def attend() -> torch.Tensor:
        query = F.normalize(q, dim=-1) * inputs.head_scale.view(1, -1, 1, 1)
        keys = torch.cat((inputs.past[0], F.normalize(k, dim=-1)), dim=2)
        values = torch.cat((inputs.past[1], v), dim=2)
        return F.scaled_dot_product_attention(query, keys, values, scale=1.0).transpose(1, 2).flatten(2)

    def route() -> torch.Tensor:
        rows = torch.addcmul(gathered(inputs.x, inputs.index), gamma1, inputs.update)
        u = modulated(rows, scale2, shift2)
        F.linear(u.float(), inputs.router.float(), inputs.router_bias.float()).topk(shape.active, sorted=False)
        return u

    return {
        "select_tokens": {"torch": select},
        "subset_attention": {"torch": attend},
        "add_normalize_route": {"torch": route},
    }


def _native_ffns(inputs: BlockInputs) -> dict[str, dict[str, Call]]:
    """Return the experts and the dense FFN by PyTorch's own products.

    Experts are a product per expert over its tokens (`torch._grouped_mm`), or all of them with oneDNN's packed weights.
    In the second way those that are off are set to 0. The dense FFN is on packed weights. oneDNN packs bfloat16 for
    AVX-512 alone.
    """
    gamma2, N = inputs.modulation[1], inputs.shape.num_experts
    rows, u = inputs.rows, inputs.u
    fc1, bias1, fc2, bias2 = inputs.ffn
    first = fc1.unflatten(0, (N, -1)).transpose(1, 2).contiguous()  # [N, C, D/N]
    second = fc2.unflatten(1, (N, -1)).permute(1, 2, 0).contiguous()  # [N, D/N, C]

    def scattered(update: torch.Tensor) -> torch.Tensor:
        index = inputs.index.unsqueeze(-1).expand_as(rows)
        return inputs.base.scatter(1, index, torch.addcmul(rows, gamma2, update))

    def grouped() -> torch.Tensor:
        expert, token = inputs.mask.flatten(0, 1).t().nonzero(as_tuple=True)
        ends = inputs.mask.sum(dim=(0, 1)).cumsum(0).to(torch.int32)
        hidden = torch._grouped_mm(u.flatten(0, 1)[token], first, offs=ends)
        hidden = F.gelu(hidden + bias1.view(N, -1)[expert], approximate="tanh")
        update = bias2.float().repeat(rows.shape[0] * rows.shape[1], 1)
        update.index_add_(0, token, torch._grouped_mm(hidden, second, offs=ends).float())
        return scattered(update.to(rows.dtype).view_as(rows))

    if u.is_cuda:
        return {"expert_ffn_scatter dense": {"torch grouped_mm": grouped}}
    every = F.layer_norm(inputs.x, (inputs.shape.width,))
    of_experts, of_dense = {"torch grouped_mm": grouped}, {"torch": lambda: _plain_ffn(every, inputs)}
    if u.dtype == torch.float32 or cpu.multiplies_bfloat16():
        ffn = _packed_ffn(inputs)
        of_experts["torch packed"] = lambda: scattered(ffn(u, inputs.mask))
        of_dense["torch packed"] = lambda: ffn(every)
    return {"expert_ffn_scatter dense": of_experts, "dense_ffn": of_dense}


def _plain_ffn(u: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
    fc1, bias1, fc2, bias2 = inputs.ffn
    return F.linear(F.gelu(F.linear(u, fc1, bias1), approximate="tanh"), fc2, bias2)


def _packed_ffn(inputs: BlockInputs) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    fc1, bias1, fc2, bias2 = inputs.ffn
    first, second = fc1.to_mkldnn(), fc2.to_mkldnn()
    product = torch.ops.mkldnn._linear_pointwise

    def ffn(u: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = product(u.contiguous(), first, bias1, "gelu", [], "tanh")
        if mask is not None:
            hidden.unflatten(-1, (mask.shape[-1], -1)).masked_fill_(~mask.unsqueeze(-1), 0)
        return product(hidden, second, bias2, "none", [], "")

    return ffn


def sampling_providers(case: Case, device: str) -> dict[str, dict[str, Call]]:
    """Return ways to run `sample_tokens` with noise that is given, so that everyone draws the same tokens.

    Raises:
        WrongNumbersError: the first image's tokens differ.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens = SIZES[case.model].sides[-1] ** 2
    noise = torch.rand(case.batch, tokens, VOCABULARY, generator=generator, device=device).clamp_(1e-6, 1 - 1e-6)
    logits = torch.randn(2 * case.batch, tokens, VOCABULARY, generator=generator, device=device)

    def native() -> torch.Tensor:
        cond, uncond = logits.chunk(2)
        guided = (1 + GUIDANCE) * cond - GUIDANCE * uncond
        guided.masked_fill_(guided < guided.topk(TOP_K, sorted=False).values.amin(-1, keepdim=True), -torch.inf)
        ascending, order = guided.sort(dim=-1)
        remove = ascending.softmax(-1).cumsum_(-1) <= 1 - TOP_P
        guided.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)
        return (guided.softmax(-1) / -noise.log()).argmax(-1)

    def ours() -> torch.Tensor:
        return sample_tokens(logits, GUIDANCE, TOP_K, TOP_P, noise=noise)

    kernels = "triton" if logits.is_cuda else "cpu"
    ways = {"reference": _on("reference", ours), "torch": native, kernels: _on(kernels, ours)}
    truth = ways["reference"]()[:1]
    for provider, run in ways.items():
        if not torch.equal(run()[:1], truth):
            raise WrongNumbersError(
                f"{case}, sample_tokens: {provider} draws other tokens than the reference; not timed"
            )
    return {"sample_tokens": ways}


@torch.no_grad()
def check(case: Case, inputs: BlockInputs, calls: dict[str, dict[str, Call]]) -> None:
    """Hold every provider to the reference in float64 on the rows of the first image.

    Raises:
        WrongNumbersError: one errs by more than allowed.
    """
    truths = _exact(inputs)
    for operation, ways in calls.items():
        truth = truths[operation]()
        errors = {name: (run()[:ROWS_CHECKED].double() - truth).abs().max().item() for name, run in ways.items()}
        allowed = allowed_error(errors["reference"], inputs.x.dtype)
        for provider, error in errors.items():
            if not error <= allowed:
                raise WrongNumbersError(
                    f"{case}, {operation}: {provider} errs by {error:.3g} against float64, expected at most "
                    f"{allowed:.3g}; not timed"
                )


def _exact(inputs: BlockInputs) -> dict[str, Call]:
    """Return the reference in float64 on the first image."""
    first = inputs.first_rows(ROWS_CHECKED).to(torch.float64)
    return {operation: _on("reference", run) for operation, run in _ours(first).items()}


@torch.no_grad()
def measure(case: Case, device: str) -> dict[str, dict[str, list[float]]]:
    """Return seconds by operation and provider: of every repeat, the providers of an operation in turn.

    On a GPU times are taken by CUDA events, with a cold cache (`triton.testing.do_bench`).
    """
    calls = providers(case, device)
    if _samples(case):
        calls |= sampling_providers(case, device)
    if _convolves(case, device):
        calls |= convolution_providers(case.model, case.batch, DTYPES[case.dtype])
    return {operation: _seconds(ways, device) for operation, ways in calls.items()}


def _samples(case: Case) -> bool:
    """Return whether drawing tokens is timed: once, since it depends on neither rate nor type."""
    return case.model != "fashion-mnist" and case.rate == 1 and case.dtype == "fp32"


def _convolves(case: Case, device: str) -> bool:
    """Return whether the decoder's convolutions are timed: with dense blocks, since they do not depend on the rate."""
    return device == "cpu" and case.rate == 1 and case.model in LAYERS


def _seconds(ways: dict[str, Call], device: str) -> dict[str, list[float]]:
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        return {name: [1e-3 * ms for ms in do_bench(run, return_mode="all")] for name, run in ways.items()}
    return interleaved(ways)


def interleaved(ways: dict[str, Call], budget: float = SECONDS) -> dict[str, list[float]]:
    """Return the seconds of each call on the CPU, in turn.

    A repeat makes as many calls as take `SHORTEST` seconds. There are as many repeats as fit into `budget` seconds a
    way, within `REPEATS`.
    """
    cpu = torch.device("cpu")

    def timed(run: Call, calls: int) -> Callable[[], float]:
        return lambda: seconds_of(lambda: [run() for _ in range(calls)], cpu) / calls

    for run in ways.values():
        run()
    once = {name: seconds_of(run, cpu) for name, run in ways.items()}
    calls = {name: math.ceil(SHORTEST / seconds) for name, seconds in once.items()}
    fewest, most = REPEATS
    repeats = min(most, max(fewest, int(budget / max(calls[name] * once[name] for name in ways))))
    return interleaved_seconds({name: timed(run, calls[name]) for name, run in ways.items()}, repeats, "repeats")


def rows(case: Case, seconds: dict[str, dict[str, list[float]]]) -> list[Result]:
    """Return what `measure` found, in milliseconds."""
    return [
        case.shape.row(provider, operation, "ms", [1e3 * value for value in values])
        for operation, ways in seconds.items()
        for provider, values in ways.items()
    ]
