"""The answers that most families share; a family inherits them and adds its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from actvar.families.base import BlockCall, OnScale, Rows, Sizes
from actvar.families.conditions import Conditions
from actvar.models.vqvae import without_decoder
from actvar.utils.class_swap import own_class
from actvar_kernels.residual_norm.reference import AdaLN, Gated
from actvar_kernels.situation import are_plain
from actvar_kernels.triton_backend.row_form import NormedRows


class BaseFamily:
    """Answer what is the same for most families; `actvar.families.base.Family` describes the methods."""

    leaves_out_guidance = False
    hands_on = False
    takes_eight_bits = False
    takes_few_rows = False
    draws_from_texts = False
    default_cfg = 1.5
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

    def autoencoder(self, model: Any) -> Any:
        """Return the module that turns tokens into images; every family has its own."""
        raise NotImplementedError

    def watch_scales(self, model: Any, on_scale: OnScale) -> AbstractContextManager[None]:
        """Call `on_scale` after every scale; every family has its own way."""
        raise NotImplementedError

    def recorded_sizes(self, model: Any) -> dict[str, int | list[int]]:
        """Return width, hidden units, and heights and widths of the token maps."""
        sizes = self.sizes(model)
        sides = [side for token_map in self.maps(model) for side in token_map]
        return {"width": sizes.width, "hidden": sizes.hidden, "maps": sides}

    def drawing_twin(self, model: Any, tokenizer: Any = None) -> Any:
        """Return None: the model draws samples itself."""
        return None

    def maps_of(self, model: Any, conditions: Conditions) -> tuple[tuple[int, int], ...]:
        """Return the maps of the model, which do not depend on classes."""
        return self.maps(model)

    def strength(self, cfg: float, scale: int, count: int) -> float:
        """Return a strength that grows from 0 at the first scale to `cfg` at the last one."""
        return cfg * scale / (count - 1)

    def images(self, model: Any, conditions: Any, seed: int, cfg: float) -> Tensor:
        """Return images of classes `[B]` int64, drawn by `autoregressive_infer_cfg`."""
        return model.autoregressive_infer_cfg(len(conditions), conditions, g_seed=seed, cfg=cfg)

    def token_maps(self, model: Any, conditions: Any, seed: int, cfg: float) -> Tensor:
        """Return the tokens `[B, L]` int64 of images that `images` would draw; no image is decoded."""
        maps: list[Any] = []
        with (
            without_decoder(self.autoencoder(model), "fhat_to_img"),
            self.watch_scales(model, lambda _scale, tokens, _features: maps.append(tokens)),
        ):
            self.images(model, conditions, seed, cfg)
        return torch.cat(maps, dim=1)

    def predicted(self, model: Any, conditions: Any, inputs: Tensor) -> Tensor:
        """Return the logits of a model that is called with classes and inputs."""
        return model(conditions, inputs)

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

    def modulations(self, blocks: Sequence[Any], cond: Any) -> Sequence[tuple[Tensor, ...]] | None:
        """Return None: each block is asked by itself."""
        return None

    def head_scale(self, block: Any) -> Tensor | None:
        """Return None: queries and keys are not normalised."""
        return None

    def layer_dtype(self, block: Any) -> torch.dtype | None:
        """Return None: layers compute in the dtype of the residual stream."""
        return None

    def called_attention(self, block: Any, u: Tensor, mask: Tensor | None, at: Rows, call: BlockCall) -> Tensor:
        """Refuse: the family's `parts_called` never names the attention."""
        raise NotImplementedError

    def four_layers(self, block: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        """Refuse: `takes_few_rows` is False."""
        raise NotImplementedError

    def attention_added(self, block: Any, out: Tensor, onto: Gated) -> Tensor:
        """Refuse: `takes_few_rows` is False."""
        raise NotImplementedError

    def ffn_added(self, block: Any, u: NormedRows, onto: Gated) -> Tensor:
        """Refuse: `takes_few_rows` is False."""
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
