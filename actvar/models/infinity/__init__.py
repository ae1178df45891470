"""Define Infinity, which draws images from texts, and its bitwise tokenizer."""

from actvar.models.infinity.build import build_infinity
from actvar.models.infinity.schedules import ASPECTS, SIZES, scale_schedule
from actvar.models.infinity.tokenizer import InfinityTokenizer
from actvar.models.infinity.transformer import Infinity

__all__ = ["ASPECTS", "SIZES", "Infinity", "InfinityTokenizer", "build_infinity", "scale_schedule"]
