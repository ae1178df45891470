"""Two-stage distillation of ActVAR from the dense model."""

from actvar.distill.stage1 import Stage1

__all__ = ["Stage1"]
