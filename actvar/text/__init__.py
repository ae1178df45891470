"""Turn prompts into the features that Infinity draws images from, by a T5 of `transformers` or by vectors of words."""

from actvar.text.cache import FeatureCache, default_folder
from actvar.text.encoder import DEFAULT_ENCODER, MOST_TOKENS, TextEncoder
from actvar.text.prompts import default_prompts

__all__ = ["DEFAULT_ENCODER", "MOST_TOKENS", "FeatureCache", "TextEncoder", "default_folder", "default_prompts"]
