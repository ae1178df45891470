"""Record torch's own operations on a virtual GPU: which launch kernels, what those move and compute, which wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from actvar_kernels.tools.virtual.records import TensorInfo

aten = torch.ops.aten


class HostSyncError(RuntimeError):
    """Say that an operation made the host wait for the GPU."""


class Composite(NamedTuple):
    """Describe an operation that runs several kernels: how many, and how often its operands go through memory."""

    launches: int
    passes: float


# Estimates for torch from 2.6 on.
COMPOSITES = {
    aten.multinomial: Composite(14, 8),  # checks by max, min and sum, which do not wait; exponential, divide, argmax
    aten.sort: Composite(4, 2),
    aten.topk: Composite(2, 2),
    aten.convolution: Composite(2, 1),  # the bias is added on its own
    aten.native_group_norm: Composite(3, 2),
    aten.index_put: Composite(2, 1),  # a copy comes first
}
# Their result says how much of the first operand they read.
GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather}
WRITERS = {aten.index_put_, aten._index_put_impl_, aten.index_put}
NO_LAUNCH = {aten._unsafe_view, aten.lift_fresh, aten.set_, aten.resize_}
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero}


class Recorder(TorchDispatchMode):
    """Call `record` with the fields of a `Launch` for every call that launches a kernel on tensors of a CUDA device.

    Operators of this project run their body, so that its Triton kernels are seen.

    Raises:
        HostSyncError: from the call that would wait.
    """

    def __init__(self, record: Callable[..., None]):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "actvar_kernels":
            with self:
                return _body(func)(*args, **kwargs)
        if func.namespace == "prim":  # questions about a tensor
            return func(*args, **kwargs)
        packet = func._overloadpacket
        if packet not in flop_registry:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = _tensors((args, kwargs))
        on_gpu = any(tensor.is_cuda for tensor in inputs)
        if on_gpu and _waits(packet, args):
            raise HostSyncError(f"{func} makes the host wait for the GPU")
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostSyncError(f"{func} makes the host wait for the GPU") from error
        if on_gpu and packet is aten.convolution and any(map(_is_channels_last, inputs[:2])):
            result = result.contiguous(memory_format=torch.channels_last)  # as cuDNN has it, which may be absent here
        outputs = _tensors(result)
        if on_gpu and any(not tensor.is_cuda for tensor in outputs) and packet is aten._to_copy:
            raise HostSyncError(f"{func} copies from the GPU to the host, which waits for it")
        if (on_gpu or any(tensor.is_cuda for tensor in outputs)) and _launches(func, outputs):
            self.record(**_fields(func, args, kwargs, inputs, result, outputs))
        return result


def _body(func) -> Callable:
    """Return the function behind a custom operator."""
    definition = OPDEFS.get(func.name().split(".")[0])
    if definition is None:
        raise RuntimeError(f"{func}: expected an operator made by torch.library.custom_op")
    return definition._init_fn


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Return whether an image lies in the memory format `channels_last` alone."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _tensors(tree) -> list[torch.Tensor]:
    """Return the tensors of nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _waits(packet, args) -> bool:
    """Return whether a call that fake tensors let pass makes the host wait."""
    if packet in WAITING:
        return True
    if packet is aten.copy_:
        return args[1].is_cuda and not args[0].is_cuda
    if packet in WRITERS or packet is aten.index:
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return by_mask and not (packet in WRITERS and args[2].numel() == 1)  # a number under a mask is masked_fill
    return False


def _launches(func, outputs: list[torch.Tensor]) -> bool:
    """Return whether a call launches a kernel."""
    packet = func._overloadpacket
    if packet in NO_LAUNCH or packet.__name__.startswith(("empty", "new_empty")):
        return False
    returns = func._schema.returns
    is_view = not func._schema.is_mutable and any(value.alias_info is not None for value in returns)
    return not is_view and any(tensor.numel() for tensor in outputs)


def _fields(func, args, kwargs, inputs, result, outputs) -> dict[str, object]:
    """Return the fields of the `Launch` of a call."""
    packet = func._overloadpacket
    flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
    if packet is aten._addmm_activation:
        flops = 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
    composite = COMPOSITES.get(packet, Composite(1, 1))
    if packet is aten.convolution and args[2] is None:
        composite = Composite(1, 1)
    return dict(
        name=f"{func.namespace}.{packet.__name__}",
        bytes=round(_traffic(packet, args, inputs, outputs) * composite.passes),
        flops=flops,
        dtype=inputs[-1].dtype if flops else None,
        launches=composite.launches,
        result=TensorInfo.of(outputs[0]),
    )


def _traffic(packet, args, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Return the bytes that a call reads and writes; what is changed in place counts as both."""
    if packet in GATHERS:
        return _bytes(outputs) * 2 + _bytes(inputs[1:])
    if packet in WRITERS:
        copied = 2 * _bytes(outputs) if packet is aten.index_put else 0
        return copied + _bytes(inputs[1:]) + _bytes([args[2]])
    if packet in (aten.fill_, aten.zero_, aten.copy_):
        return _bytes(outputs) + _bytes(inputs[1:])
    return _bytes(inputs) + _bytes(outputs)


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(TensorInfo.of(tensor).bytes for tensor in tensors)
