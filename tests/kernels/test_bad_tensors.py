"""Operations refuse tensors of another type, shape or device, and take every kind that fits."""

from __future__ import annotations

import pytest
import torch

import actvar_kernels as ops
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.expert_ffn import cpu_kernel


def operation_arguments() -> dict[str, tuple]:
    """Name -> arguments that fit, of every operation with tensors: 2 sequences of 6 tokens, 4 of them kept, width 8."""
    x, rows, gamma = torch.randn(2, 6, 8), torch.randn(2, 4, 8), torch.randn(2, 1, 8)
    index = torch.tensor([[0, 1, 3, 5], [1, 2, 3, 4]])
    router = torch.randn(4, 8), torch.randn(4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    ffn = torch.randn(32, 8), torch.randn(32), torch.randn(8, 32), torch.randn(8)
    heads = torch.randn(2, 2, 4, 16)
    return {
        "select_tokens": (x, torch.randn(1, 8), torch.randn(1), gamma, gamma, 4),
        "normalize_modulate": (x, gamma, gamma),
        "subset_attention": (heads, heads, heads, None, torch.ones(2), 1.0),
        "add_normalize": (x, index, rows, gamma, gamma, gamma),
        "add_normalize_route": (x, index, rows, gamma, gamma, gamma, *router, 2),
        "route_experts": (rows, *router, 2),
        "expert_ffn": (rows, mask, 2, *ffn),
        "expert_ffn_scatter": (x, index, rows, rows, mask, 2, *ffn, gamma),
        "scatter_rows": (x, index, rows, rows, gamma),
        "sample_tokens": (torch.randn(2, 3, 8), 1.0, 4, 0.9, None, 0, torch.rand(1, 3, 8)),
    }


TENSOR_POSITIONS = [
    (name, position)
    for name, arguments in operation_arguments().items()
    for position, argument in enumerate(arguments)
    if isinstance(argument, torch.Tensor)
]


@pytest.mark.parametrize(("name", "position"), TENSOR_POSITIONS)
def test_an_operation_refuses_each_argument_of_another_type_shape_or_device(name, position):
    arguments, operation = operation_arguments()[name], getattr(ops, name)
    good = arguments[position]
    operation(*arguments)
    more_dimensions = [] if (name, position) == ("route_experts", 0) else [good.unsqueeze(0).expand(3, *good.shape)]
    for bad in ([1.0], "x", good.numpy(), good[..., :-1], good.to("meta"), *more_dimensions):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match="expected"):
            operation(*arguments[:position], bad, *arguments[position + 1 :])
        assert all(a is b or torch.equal(a, b) for a, b in zip(arguments, copies, strict=True) if a is not good)


@pytest.mark.parametrize("name", ["add_normalize", "add_normalize_route", "expert_ffn_scatter", "scatter_rows"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_an_index_that_is_not_int64_is_refused(name, dtype):
    first, index, *rest = operation_arguments()[name]
    with pytest.raises(TypeError, match="index: expected int64"):
        getattr(ops, name)(first, index.to(dtype), *rest)


@pytest.mark.parametrize(("name", "position"), TENSOR_POSITIONS)
def test_an_operation_takes_strided_expanded_and_inference_tensors_and_those_that_need_grad(name, position):
    arguments, operation = operation_arguments()[name], getattr(ops, name)
    good = arguments[position]

    def result(tensor: torch.Tensor) -> list[torch.Tensor]:
        found = operation(*arguments[:position], tensor, *arguments[position + 1 :])
        found = found if isinstance(found, tuple) else (found,)
        return [part.detach().clone() for part in found if part is not None]

    def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)

    expected = result(good)
    strided = torch.stack((good, good), dim=-1)[..., 0]
    assert not strided.is_contiguous() or strided.numel() == 1
    close(result(strided), expected)
    with torch.inference_mode():
        inference = good.clone()
    with torch.no_grad():
        close(result(inference), expected)
    if good.is_floating_point():
        close(result(good.clone().requires_grad_()), expected)
        close(result(good[:1].expand_as(good)), result(good[:1].expand_as(good).clone()))


def test_sizes_that_the_cpp_kernel_cannot_count_are_refused(monkeypatch):
    if cpu.why_unavailable() is not None:
        pytest.skip(cpu.why_unavailable())
    monkeypatch.setattr(cpu, "MOST", 7)
    rows, mask, _, *weights = operation_arguments()["expert_ffn"]
    with pytest.raises(ValueError, match=r"expected at most 7 rows and columns, got \(8, 8, 4, 8\)"):
        cpu_kernel.expert_ffn(rows, mask, *weights)


@pytest.mark.parametrize("rows", [0, 2])
def test_operations_take_no_rows_at_all(rows):
    x, gamma = torch.randn(rows, 6, 8), torch.randn(rows, 1, 8)
    with torch.no_grad():
        assert ops.normalize_modulate(x, gamma, gamma).shape == (rows, 6, 8)
        ffn = operation_arguments()["expert_ffn"][3:]
        assert ops.expert_ffn(x, torch.ones(rows, 6, 4, dtype=torch.bool), 2, *ffn).shape == (rows, 6, 8)
