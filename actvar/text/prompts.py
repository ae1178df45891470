"""Prompts of many kinds, which a model of texts is fitted to where no others are given."""

from __future__ import annotations

from importlib.resources import files


def default_prompts() -> tuple[str, ...]:
    """Return the 64 prompts of `prompts.txt`: things, scenes, people, animals, drawings and written words."""
    return tuple(files("actvar.text").joinpath("prompts.txt").read_text("utf-8").splitlines())
