"""Give gradients to operators whose forward runs in kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def register_reference_gradient(
    operator: torch.library.CustomOpDef,  # pyright: ignore[reportPrivateImportUsage] the docs of PyTorch name it so
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    chosen: Sequence[int] = (),
) -> None:
    """Give `operator` the gradient of `reference`, which is computed again in the backward pass.

    Args:
        operator: whose forward runs in kernels.
        reference: takes the arguments of the operator and returns its outputs.
        chosen: positions of outputs that `reference` takes as further arguments, for choices that it might not repeat.
    """

    def setup_context(ctx, inputs, output) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        arguments = (*inputs, *(outputs[position] for position in chosen))
        ctx.others = [None if isinstance(a, torch.Tensor) else a for a in arguments]
        ctx.is_tensor = [isinstance(a, torch.Tensor) for a in arguments]
        ctx.save_for_backward(*(a for a in arguments if isinstance(a, torch.Tensor)))

    def backward(ctx, *gradients):
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if tensor else a for a, tensor in zip(ctx.others, ctx.is_tensor, strict=True)]
        wanted = ctx.needs_input_grad[: len(arguments) - len(chosen)]
        for position, needed in enumerate(wanted):
            if needed:
                arguments[position] = arguments[position].detach().requires_grad_()
        with torch.enable_grad():
            outputs = reference(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(output, g) for output, g in zip(outputs, gradients, strict=True) if output.requires_grad]
        outputs, gradients = zip(*pairs, strict=True)
        leaves = [argument for argument, needed in zip(arguments, wanted, strict=False) if needed]
        found = iter(torch.autograd.grad(outputs, leaves, gradients, allow_unused=True))
        return tuple(next(found) if needed else None for needed in wanted)

    operator.register_autograd(backward, setup_context=setup_context)
