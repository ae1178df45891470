"""Selectors, routers and experts, fitted without data and without gradients."""

from actvar.calibrate.calibration import calibrate

__all__ = ["calibrate"]
