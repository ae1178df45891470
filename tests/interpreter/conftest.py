"""Triton kernels on CPU tensors in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/interpreter`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import actvar_kernels
from actvar_kernels.backend import interpreted, triton_installed

collect_ignore_glob = [] if triton_installed() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder in a process that was not started for the interpreter."""
    if interpreted():
        return
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 before Python starts"))


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation runs its Triton kernels, or raises."""
    monkeypatch.delenv("ACTVAR_BACKEND", raising=False)
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", "triton")


@pytest.fixture(autouse=True)
def filled_memory() -> Iterator[None]:
    """`torch.empty` and its relatives return NaN, or the largest integer, so that reads of unwritten memory show."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def same_product_at_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's product does not depend on its place in a tile, as on a GPU. In NumPy's float32 it does, on processors
    without AVX-512; here sums are in float64 and rounded once. The interpreter takes bfloat16 and float8e4nv for
    integers; here their numbers are multiplied."""
    if not interpreted():
        return
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    dot = interpreter_builder.create_dot

    def numbers(factor: TensorHandle) -> np.ndarray:
        if factor.dtype.scalar.name == "fp8e4nv":
            return decoded(factor.data)
        if factor.dtype.scalar.name != "bf16":
            return factor.data
        return (factor.data.astype(np.uint32) << 16).view(np.float32)

    def rounded_once(a, b, d, *options):
        first, second = numbers(a), numbers(b)
        if d.data.dtype != np.float32 or first.dtype.kind != "f":
            return dot(a, b, d, *options)
        product = np.matmul(first, second, dtype=np.float64).astype(np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter_builder, "create_dot", rounded_once)


def decoded(values: np.ndarray) -> np.ndarray:
    """Return float8e4nv numbers, which the interpreter holds as uint8, in float32."""
    return torch.from_numpy(np.ascontiguousarray(values)).view(torch.float8_e4m3fn).float().numpy()


@pytest.fixture(autouse=True)
def e4m3_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers become float8e4nv as PyTorch rounds them, half to even. The interpreter rounds a half up, and forgets to
    carry."""
    if not interpreted():
        return
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    convert = interpreter_builder.create_fp_to_fp

    def converted(source: TensorHandle, target, rounding):
        names = source.dtype.scalar.name, target.scalar.name
        if names == ("fp32", "fp8e4nv"):
            values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return TensorHandle(values.view(torch.uint8).numpy(), target.scalar)
        assert "fp8e4nv" not in names
        return convert(source, target, rounding)

    monkeypatch.setattr(interpreter_builder, "create_fp_to_fp", converted)


@pytest.fixture(params=["in order", "shuffled"])
def grid_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreter visits the programs of a grid in order, or in a random order that is the same in every run."""
    if request.param == "shuffled":
        from triton.runtime.interpreter import interpreter_builder

        visit = interpreter_builder.set_grid_idx
        random = np.random.default_rng(0)
        order = None

        def visit_another(*program: int) -> None:
            nonlocal order
            grid = interpreter_builder.grid_dim
            position = np.ravel_multi_index(program, grid)
            if position == 0:
                order = random.permutation(np.prod(grid))
            visit(*(int(index) for index in np.unravel_index(order[position], grid)))

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", visit_another)
    return request.param
