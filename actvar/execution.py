"""Say how a patched model is run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from actvar.utils.fields import check_choice, check_names, json_object
from actvar_kernels.constants import FORMATS

SAMPLERS = ("torch", "fast")
DECODER_DTYPES = (None, "bfloat16", "float16")
EXPERT_EXECUTIONS = ("auto", "dense", "tile_list")
WEIGHTS = (None, *FORMATS)
CUDA_GRAPHS = ("auto", True, False)

FIELDS_ONCE_IN_CONFIG = {
    "sampler": "sampler",
    "decoder_dtype": "decoder_dtype",
    "expert_schedule": "expert_execution",
}
"""Fields that `ActVARConfig` and the adapters written with it once had, and their names in `Execution`."""


@dataclass(frozen=True)
class Execution:
    """Say how a patched model is run. The default changes no token and no image.

    `ActVARConfig` says what is computed.

    Args:
        sampler: `"torch"` draws tokens as the public code does. `"fast"` draws them in one kernel and from another
            random stream (`actvar_kernels.sample_tokens`). For our `VAR` and `Infinity` only.
        decoder_dtype: `"bfloat16"` or `"float16"` decodes images under autocast to that dtype, which changes them
            slightly. None leaves the autoencoder as it is. For our `VAR` and `Infinity` only.
        expert_execution: how the Triton backend runs the experts; results are equal to rounding. `"dense"` computes all
            experts and reads zeros for those that are off. `"tile_list"` sorts tokens by their experts, and a tile of
            tokens skips the experts that none of them wants. `"auto"` takes the one that was measured to be faster on
            the GPU.
        weights: `"int8"` or `"fp8"` multiplies in eight bits in the blocks: queries, keys and values, the projection
            after attention, both layers of the FFN and its experts. `actvar_kernels.linear.quantized` defines the
            result. AdaLN, head and attention itself stay as they are. `"int8"` runs on CPUs that multiply bytes, and on
            CUDA. `"fp8"` (`torch.float8_e4m3fn`) runs on GPUs of NVIDIA from compute capability 8.9 on. None leaves all
            as it is. A sequence has one of the three for every block.
        cuda_graph: whether a sample on a GPU is replayed as one CUDA graph, which the first sample of each shape
            captures. It takes `sampler="fast"` and `actvar.models.VAR` or `Infinity`. `"auto"` does so where it can,
            and elsewhere samples eagerly, which `actvar.summary` says. It gives up a graph whose first images differ
            from those of eager sampling, with a logged warning. True raises where a graph is not possible. Hooks,
            replaced methods and recorded choices always run eagerly. `actvar.release_cache` frees the graphs.
        cudnn_benchmark: whether cuDNN times its algorithms for the shapes of the decoder and takes the fastest, instead
            of choosing by its heuristics. It takes seconds at the first sample of a shape, and two runs may choose
            otherwise and round otherwise. For `actvar.models.VAR` only.

    Raises:
        TypeError: a field is neither a string nor None, `weights` is no sequence of them either, `cuda_graph` is
            neither a string nor a bool, or `cudnn_benchmark` is no bool.
        ValueError: a field is none of its choices.
    """

    sampler: str = "torch"
    decoder_dtype: str | None = None
    expert_execution: str = "auto"
    weights: str | Sequence[str | None] | None = None
    cuda_graph: str | bool = "auto"
    cudnn_benchmark: bool = False

    def __post_init__(self):
        if self.expert_execution == "snap":
            raise ValueError("expert_execution: 'snap' was removed: it changed images; use 'dense' or 'tile_list'")
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("decoder_dtype", self.decoder_dtype, DECODER_DTYPES)
        check_choice("expert_execution", self.expert_execution, EXPERT_EXECUTIONS)
        if not isinstance(self.cuda_graph, bool):
            check_choice("cuda_graph", self.cuda_graph, CUDA_GRAPHS)
        if not isinstance(self.cudnn_benchmark, bool):
            raise TypeError(f"cudnn_benchmark: expected a bool, got {self.cudnn_benchmark!r}")
        if isinstance(self.weights, (list, tuple)):
            for index, weights in enumerate(self.weights):
                check_choice(f"weights[{index}]", weights, WEIGHTS)
            object.__setattr__(self, "weights", tuple(self.weights))
        else:
            check_choice("weights", self.weights, WEIGHTS)

    def formats(self, blocks: int) -> tuple[torch.dtype | None, ...]:
        """Return for each of a model's `blocks` the dtype in which it multiplies in eight bits, or None.

        Raises:
            ValueError: `weights` has another number of blocks.
        """
        by_block = self.weights if isinstance(self.weights, tuple) else blocks * (self.weights,)
        if len(by_block) != blocks:
            raise ValueError(f"weights: the model has {blocks} blocks, got {len(by_block)} of them")
        return tuple(FORMATS[weights] if isinstance(weights, str) else None for weights in by_block)

    def to_json(self) -> str:
        """Return all fields as the text of a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Execution:
        """Return the Execution that `to_json` wrote as `text`.

        Raises:
            TypeError, ValueError: `text` is no JSON object, or one with a field that is unknown or wrong.
        """
        values = json_object(text)
        check_names(values, {field.name for field in fields(cls)})
        return cls(**values)


def checked_execution(execution: object) -> Execution:
    """Return `execution`.

    Raises:
        TypeError: `execution` is no Execution.
    """
    if not isinstance(execution, Execution):
        raise TypeError(f"execution: expected an actvar.Execution, got {type(execution).__name__}")
    return execution


def expect_no_execution(names: Iterable[str]) -> None:
    """Raise a TypeError if `names`, arguments of `ActVARConfig`, have a field that belongs to `Execution`."""
    for name in names:
        if name in FIELDS_ONCE_IN_CONFIG:
            field = FIELDS_ONCE_IN_CONFIG[name]
            raise TypeError(
                f"{name}: expected in actvar.Execution, got it for ActVARConfig; pass "
                f"execution=actvar.Execution({field}=...) beside the configuration, as in "
                "actvar.apply_patch(var, config, execution)"
            )
