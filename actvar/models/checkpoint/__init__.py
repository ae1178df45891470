"""Load VAR and its autoencoder from checkpoints of any format, and describe what a checkpoint holds."""

from actvar.models.checkpoint.files import CheckpointError
from actvar.models.checkpoint.load import describe_checkpoint, load_var, read_tensors, usable_device

__all__ = ["CheckpointError", "describe_checkpoint", "load_var", "read_tensors", "usable_device"]
