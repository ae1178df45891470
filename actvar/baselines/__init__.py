"""Rivals of ActVAR: other ways to sample a dense model faster, each a context manager.

They take `actvar.models.VAR`. `fastvar`, `skip_last_scales` and `without_guidance` take `actvar.models.Infinity` as
well, and `skipvar` takes that alone. All run on the kernels that `actvar.accelerate` uses, and leave the model as it
was, bit for bit.
"""

from actvar.baselines.collaborative import collaborative_decoding
from actvar.baselines.fastvar import fastvar
from actvar.baselines.guidance import without_guidance
from actvar.baselines.skipping import skip_last_scales
from actvar.baselines.skipvar import skipvar
from actvar.baselines.static_pruning import magnitude_units, static_pruning, trained_static_pruning, wanda_units
from actvar.baselines.token_merging import token_merging

__all__ = [
    "collaborative_decoding",
    "fastvar",
    "magnitude_units",
    "skip_last_scales",
    "skipvar",
    "static_pruning",
    "token_merging",
    "trained_static_pruning",
    "wanda_units",
    "without_guidance",
]
