"""Pretrained models that come with the package, and the scripts that rebuild them."""

from actvar.zoo.pretrained import load_feature_network, load_pretrained, load_text_encoder

__all__ = ["load_feature_network", "load_pretrained", "load_text_encoder"]
