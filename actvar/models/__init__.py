"""Define VAR with its autoencoder and Infinity with its tokenizer, compatible with the official checkpoints."""

from actvar.models.build import OFFICIAL_PATCH_NUMS, build_vae_var
from actvar.models.infinity import Infinity, InfinityTokenizer, build_infinity, scale_schedule
from actvar.models.transformer_block import TransformerBlock
from actvar.models.var import VAR
from actvar.models.vqvae import VQVAE

__all__ = [
    "OFFICIAL_PATCH_NUMS",
    "VAR",
    "VQVAE",
    "Infinity",
    "InfinityTokenizer",
    "TransformerBlock",
    "build_infinity",
    "build_vae_var",
    "scale_schedule",
]
