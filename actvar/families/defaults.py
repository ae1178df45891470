"""The answers that most families share; a family inherits them and adds its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from actvar.families.base import BlockCall, Embedded, OnScale, Rows, Sizes
from actvar.utils.class_swap import own_class
from actvar_kernels.residual_norm.reference import AdaLN
from actvar_kernels.situation import are_plain


class BaseFamily:
    """Answer what is the same for most families; `actvar.families.base.Family` describes the methods."""

    leaves_out_guidance = False
    hands_on = False
    takes_int8 = False
    has_between = False
    hidden_axes: Mapping[str, int]
    name: str

    def loop_fields(self, model: Any) -> Collection[str]:
        """Return none: a patch leaves the drawing and the decoding to the model."""
        return ()

    def loop_is_ours(self, model: Any) -> bool:
        """Return False: the sampling loop may read a block's input again."""
        return False

    def ends_early(self, model: Any) -> bool:
        """Return False: the sampling loop runs all scales."""
        return False

    def sizes(self, model: Any) -> Sizes:
        """Return the sizes of the model; every family has its own."""
        raise NotImplementedError

    def maps(self, model: Any) -> tuple[tuple[int, int], ...]:
        """Return height and width of the token map of every scale; every family has its own."""
        raise NotImplementedError

    def recorded_sizes(self, model: Any) -> dict[str, int | list[int]]:
        """Return width, hidden units, and heights and widths of the token maps."""
        sizes = self.sizes(model)
        sides = [side for token_map in self.maps(model) for side in token_map]
        return {"width": sizes.width, "hidden": sizes.hidden, "maps": sides}

    def embedded(self, model: Any, labels: Tensor, inputs: Tensor) -> Embedded:
        """Refuse: the family draws from no classes."""
        raise self._draws_from_no_classes()

    def without_class(self, model: Any, labels: Tensor) -> Tensor:
        """Refuse: the family draws from no classes."""
        raise self._draws_from_no_classes()

    def logits(self, model: Any, x: Tensor, head_cond: Any) -> Tensor:
        """Refuse: the family draws from no classes."""
        raise self._draws_from_no_classes()

    def scale_logits(self, model: Any, labels: Tensor, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Refuse: the family draws from no classes."""
        raise self._draws_from_no_classes()

    def watch_scales(self, model: Any, on_scale: OnScale) -> AbstractContextManager[None]:
        """Refuse: the family draws from no classes."""
        raise self._draws_from_no_classes()

    def teacher_input(self, model: Any, token_maps: Tensor) -> Tensor:
        """Refuse: the family draws from no classes."""
        raise self._draws_from_no_classes()

    def _draws_from_no_classes(self) -> TypeError:
        """Return the error for what needs classes and token maps, such as the distillation."""
        return TypeError(f"expected a model that draws from classes, such as VAR; {self.name} can be patched and run")

    def head_called(self, model: Any) -> str | None:
        """Return None: no kernel reads the head."""
        return None

    def packed_head(self, model: Any) -> list[Tensor | None]:
        """Return nothing: no kernel reads the head."""
        return []

    def conditional(self, call: BlockCall) -> BlockCall:
        """Return the first half of the rows of condition and context, tensors, and as many rows of `x`."""
        rows = len(call.cond) // 2
        context = None if call.context is None else call.context[:rows]
        return call._replace(x=call.x[:rows], cond=call.cond[:rows], context=context)

    def packed_weights(self, block: Any) -> list[Tensor | None]:
        """Return all matrices of the block; those without a packed copy cost nothing."""
        return [parameter for parameter in block.parameters() if parameter.ndim == 2]

    def head_scale(self, block: Any) -> Tensor | None:
        """Return None: queries and keys are not normalised."""
        return None

    def layer_dtype(self, block: Any) -> torch.dtype | None:
        """Return None: layers compute in the dtype of the residual stream."""
        return None

    def called_attention(self, block: Any, u: Tensor, mask: Tensor | None, at: Rows, call: BlockCall) -> Tensor:
        """Refuse: the family's `parts_called` never names the attention."""
        raise NotImplementedError

    def between_norm(self, block: Any, rows: int) -> AdaLN:
        """Refuse: there is no such layer."""
        raise NotImplementedError

    def between(self, block: Any, u: Tensor, at: Rows, call: BlockCall) -> Tensor:
        """Refuse: there is no such layer."""
        raise NotImplementedError

    def ffn_module(self, block: Any) -> Any:
        """Return the FFN's module; every family has its own."""
        raise NotImplementedError

    def called_ffn(self, block: Any, u: Tensor) -> Tensor:
        """Return the output of `ffn_module` for `u` `[R, K, C]`."""
        return self.ffn_module(block)(u)

    def dense_ffn(self, block: Any, u: Tensor, num_experts: int) -> Tensor:
        """Return the output of `ffn_module` for `u` `[R, K, C]`."""
        return self.called_ffn(block, u)

    def set_ffn_module(self, block: Any, ffn: nn.Module) -> None:
        """Refuse: no baseline exchanges FFNs of this family."""
        raise NotImplementedError

    def pruned_ffn(self, block: Any, units: Tensor) -> Any:
        """Refuse: no baseline prunes FFNs of this family."""
        raise NotImplementedError

    def reordered_hidden(self, block: Any, order: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the tensors of `hidden_axes` with their values in the new order.

        Raises:
            TypeError: a layer of the FFN is more than its weight.
        """
        axes: dict[nn.Parameter, int] = {}
        for name, axis in self.hidden_axes.items():
            path, _, leaf = name.rpartition(".")
            layer = block.get_submodule(path)
            weight = layer._parameters.get(leaf)
            if own_class(layer) is not nn.Linear or weight is None or not are_plain(weight):
                raise TypeError(f"{name}: expected a plain layer, whose hidden units can be reordered, got {layer}")
            axes[weight] = axis
        return {weight: weight.index_select(axis, order.to(weight.device)) for weight, axis in axes.items()}
