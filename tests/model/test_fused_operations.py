"""Which operations run fused in C++ for a plain model: the set is written out here and may only grow on purpose."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from actvar import ActVARConfig, Execution, accelerate, load_pretrained
from actvar.patching.patch import patched_silently
from actvar.zoo.pretrained import adapter_path
from actvar_kernels import group_norm_silu, scatter_rows
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu
from benchmarks.fused import QUERIES, fused_operations, text

AUTOENCODER = {"conv3x3", "group_norm_silu"}
BLOCKS = {"add_normalize", "expert_ffn", "linear", "scatter_rows", "subset_attention"}
PUBLIC_SAMPLER = {"draw", "guide_and_filter"}
MODELS = {
    "own class": AUTOENCODER,
    "accelerated": AUTOENCODER | BLOCKS | PUBLIC_SAMPLER,
    "best": AUTOENCODER | BLOCKS | PUBLIC_SAMPLER | {"select_rows"},
    "fast sampler": AUTOENCODER | BLOCKS | {"select_rows", "sample_tokens"},
}
"""Names of the C++ functions that a sample of the bundled model calls."""

needs_cpp = pytest.mark.skipif(
    cpu.why_unavailable() is not None, reason=f"the C++ kernels do not run here: {cpu.why_unavailable()}"
)


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    with using_backend("auto"):
        yield


def names(run) -> set[str]:
    counts = fused_operations(run)
    assert all(count > 0 for count in counts.values())
    return set(counts)


def sample(var: nn.Module, batch: int = 2) -> torch.Tensor:
    labels = torch.arange(batch) % 10
    return var.autoregressive_infer_cfg(batch, labels, g_seed=0, cfg=4.0, top_k=100, top_p=0.95)


def bundled(way: str) -> nn.Module:
    _, var = load_pretrained("fashion-mnist", adapter="best" if way == "best" else None)
    return accelerate(var) if way == "accelerated" else var


@needs_cpp
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("way", ["own class", "accelerated", "best"])
def test_a_plain_model_calls_every_function_that_it_called_before(way, batch):
    var = bundled(way)
    assert names(lambda: sample(var, batch)) == MODELS[way]


@needs_cpp
def test_the_fast_sampler_is_one_function():
    var = bundled("own class")
    with patched_silently(var, ActVARConfig(), adapter_path("fashion-mnist", "paper"), Execution(sampler="fast")):
        assert names(lambda: sample(var)) == MODELS["fast sampler"]


@needs_cpp
@pytest.mark.parametrize("method", ["fhat_to_img", "img_to_idxBl"])
def test_the_autoencoder_alone(method):
    vae, _ = load_pretrained("fashion-mnist")
    inputs = torch.rand(2, vae.Cvae, 8, 8) if method == "fhat_to_img" else torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert names(lambda: getattr(vae, method)(inputs)) == AUTOENCODER


def test_the_reference_calls_none():
    var = bundled("accelerated")
    with using_backend("reference"):
        assert fused_operations(lambda: sample(var)) == {}


# --- the counting itself


def normalised() -> torch.Tensor:
    with torch.no_grad():
        return group_norm_silu(torch.ones(1, 32, 2, 2), torch.ones(32), torch.zeros(32), 32, 1e-6)


def cpp_function():
    normalised()
    return cpu.library().group_norm_silu


@needs_cpp
@pytest.mark.parametrize("times", [0, 1, 3])
def test_every_call_of_the_second_run_is_counted(times):
    runs = []

    def run() -> None:
        runs.append([normalised() for _ in range(times)])

    assert fused_operations(run) == ({"group_norm_silu": times} if times else {})
    assert len(runs) == 2


@needs_cpp
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind_and_argument_types_stay(fails):
    function, calls = cpp_function(), []
    argtypes, restype, expected = function.argtypes, function.restype, normalised()

    def run() -> None:
        calls.append(normalised())
        if fails and len(calls) == 2:
            raise RuntimeError("in the middle")

    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            fused_operations(run)
    else:
        fused_operations(run)
    assert all(torch.equal(call, expected) for call in calls)
    assert cpu.library().group_norm_silu is function
    assert (function.argtypes, function.restype, function.errcheck) == (argtypes, restype, None)


@needs_cpp
def test_a_check_that_a_function_has_already_goes_on():
    function, checked = cpp_function(), []

    def check(result, _function, _arguments):
        checked.append(result)
        return result

    function.errcheck = check
    try:
        assert fused_operations(normalised) == {"group_norm_silu": 1}
        assert checked == [0, 0]
        assert function.errcheck is check
    finally:
        del function.errcheck


@needs_cpp
def test_questions_to_the_library_are_no_operations():
    library, numbers = cpu.library(), (ctypes.c_int * 3)()

    def run() -> None:
        isa = library.best_isa()
        library.isa_name(isa)
        library.isa_layout(isa, numbers)

    assert fused_operations(run) == {}
    assert set(QUERIES) <= set(vars(library))


def test_launches_of_our_triton_kernels_are_counted():
    pytest.importorskip("triton")
    from support.recorded_launches import cuda, launch_scale

    from actvar_kernels.tools import virtual

    if virtual.why_unavailable() is not None:
        pytest.skip(virtual.why_unavailable())

    def run() -> None:
        index = torch.empty(1, 2, dtype=torch.int64, device="cuda")
        rows, gamma = cuda(1, 2, 64), cuda(1, 1, 64)
        for _ in range(3):
            scatter_rows(cuda(1, 4, 64), index, rows, rows, gamma)
        launch_scale(gamma)  # a kernel that is not of the package

    with using_backend("triton"), virtual.virtual_gpu(90), torch.no_grad():
        assert fused_operations(run) == {"_scatter_rows": 3}


def test_the_table_has_a_line_for_each_way():
    table = text({"dense": {}, "accelerated": {"conv3x3": 2, "draw": 1}})
    assert table.splitlines()[1:] == ["dense            none", "accelerated      conv3x3 2, draw 1"]
