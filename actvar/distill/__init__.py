"""Two-stage distillation of ActVAR from the dense model."""

from actvar.distill.stage1 import Stage1
from actvar.distill.stage2 import Stage2

__all__ = ["Stage1", "Stage2"]
