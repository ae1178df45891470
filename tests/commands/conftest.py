"""Fixtures for the tests of commands."""

from __future__ import annotations

import pytest

import actvar
from actvar.models import VAR


@pytest.fixture
def patches(monkeypatch) -> list[tuple[actvar.ActVARConfig, actvar.Execution] | None]:
    """Return the configuration and Execution of each sample that is drawn, or None for a model without a patch."""
    found, infer = [], VAR.autoregressive_infer_cfg

    def noted(self, *args, **kwargs):
        state = getattr(self, "actvar", None)
        found.append(state and (state.config, state.execution))
        return infer(self, *args, **kwargs)

    monkeypatch.setattr(VAR, "autoregressive_infer_cfg", noted)
    return found
