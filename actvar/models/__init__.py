"""Define VAR and its autoencoder, compatible with the official checkpoints."""

from actvar.models.build import OFFICIAL_PATCH_NUMS, build_vae_var
from actvar.models.transformer_block import TransformerBlock
from actvar.models.var import VAR
from actvar.models.vqvae import VQVAE

__all__ = ["OFFICIAL_PATCH_NUMS", "VAR", "VQVAE", "TransformerBlock", "build_vae_var"]
