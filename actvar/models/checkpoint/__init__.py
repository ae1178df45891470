"""Load models and what decodes their tokens from checkpoints of any format, and describe what a checkpoint holds."""

from actvar.models.checkpoint.files import CheckpointError
from actvar.models.checkpoint.load import describe_checkpoint, load_var, read_tensors, usable_device
from actvar.models.checkpoint.load_infinity import load_infinity, sizes_of_files

__all__ = [
    "CheckpointError",
    "describe_checkpoint",
    "load_infinity",
    "load_var",
    "read_tensors",
    "sizes_of_files",
    "usable_device",
]
