"""Pictures of what was sampled."""

from __future__ import annotations

import pytest
from matplotlib.axes import Axes

from actvar import ActVARConfig, apply_patch, record
from actvar.reports.token_overlay import save_token_overlay


@pytest.mark.parametrize("ffn_rate", [1.0, 0.5], ids=["dense blocks", "blocks with experts alone"])
def test_blocks_that_update_all_tokens_are_shown_beside_those_that_select(tiny_var, tmp_path, monkeypatch, ffn_rate):
    blocks = len(tiny_var.blocks)
    rates = (1.0,) * (blocks - 1) + (0.5,)
    apply_patch(tiny_var, ActVARConfig(num_experts=8, token_rates=(rates, rates), ffn_rate=ffn_rate))
    with record(tiny_var) as records:
        images = tiny_var.autoregressive_infer_cfg(1, 1, g_seed=0)
    shown, imshow = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axis, pixels, **how: shown.append(pixels) or imshow(axis, pixels, **how))
    assert save_token_overlay(images, records, tmp_path / "tokens.png", ["1"]).stat().st_size > 1000
    recorded = len({r.block for r in records})
    assert len(shown) == 2 * (1 + recorded + 1)
    picture, *of_blocks, times = shown[: 1 + recorded + 1]
    untouched = [bool((panel == picture).all(axis=-1).any()) for panel in of_blocks]
    assert untouched == [False] * (recorded - 1) + [True], "only the block that selects leaves tokens as they were"
    kept = [r.index[0].tolist() if r.index is not None else range(9) for r in records if r.scale.tokens == 9]
    assert times.flatten().tolist() == [sum(token in of_block for of_block in kept) for token in range(9)]
