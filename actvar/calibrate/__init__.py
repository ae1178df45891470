"""Selectors, routers and experts without data and without gradients."""

from actvar.calibrate.calibrate import calibrate

__all__ = ["calibrate"]
