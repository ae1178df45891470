"""The last residual of a block is added by the next block's norm, in its launch, where nobody else sees the sum."""

from __future__ import annotations

import pytest
import torch
from support.helpers import make_tiny_var

from actvar import ActVARConfig, apply_patch
from actvar.models import VAR, VQVAE
from actvar.sparse import block
from actvar_kernels import Residual

SMALL = dict(depth=3, width=64, patch_nums=(1, 2, 3))


@pytest.fixture
def residuals(monkeypatch: pytest.MonkeyPatch) -> list:
    """Collect the residuals that blocks add by a launch of their own; images are not decoded."""
    monkeypatch.setattr(VQVAE, "fhat_to_img", lambda vae, f_hat: f_hat)
    found, add = [], block.scatter_rows

    def noted(*arguments):
        found.append(arguments[2].shape[1])
        return add(*arguments)

    monkeypatch.setattr(block, "scatter_rows", noted)
    return found


def drawn(var: VAR) -> torch.Tensor:
    return var.autoregressive_infer_cfg(2, torch.tensor([1, 2]), g_seed=0, cfg=1.5)


def test_only_the_last_block_adds_its_own_and_the_features_stay(residuals: list) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ActVARConfig(token_rates=(1, 1), ffn_rate=1))
    found = drawn(var)
    assert residuals == [1, 4, 9], "one of three blocks at each scale"
    residuals.clear()
    handle = var.blocks[1].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(drawn(var), found)
    assert residuals == 3 * [1] + 3 * [4] + 3 * [9], "a hook sees what a block returns"
    handle.remove()
    assert torch.equal(drawn(var), found)
    assert var.actvar.deferred is None


def test_a_block_that_selects_gets_whole_rows(residuals: list) -> None:
    config = ActVARConfig(scales=(-1,), token_rates=((1.0, 0.5, 1.0),), ffn_rate=1)
    var = apply_patch(make_tiny_var(**SMALL), config)
    found = drawn(var)
    assert residuals == [1, 4, 9, 5, 9], "before a block that selects, in it, and in the last block"
    var.blocks[0].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(drawn(var), found)


def test_rows_without_guidance_are_whole_as_well(residuals: list) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ActVARConfig(token_rates=(1, 1), ffn_rate=1, guidance_until=-1))
    found = drawn(var)
    assert residuals == [1, 4, 9, 9, 9]
    var.blocks[0].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(drawn(var), found)


def test_a_block_whose_forward_is_replaced_returns_whole_rows(residuals: list) -> None:
    var = apply_patch(make_tiny_var(**SMALL), ActVARConfig(token_rates=(1, 1), ffn_rate=1))
    forward = var.blocks[0].forward
    var.blocks[0].forward = lambda **arguments: forward(**arguments)
    drawn(var)
    assert residuals == 3 * [1] + 3 * [4] + 3 * [9]


def test_an_input_that_is_another_is_an_error() -> None:
    state = apply_patch(make_tiny_var(**SMALL), ActVARConfig()).actvar
    x = torch.zeros(2, 1, 64)
    assert state.take_deferred(x) is None
    state.deferred = Residual(x, x, x)
    assert state.take_deferred(x) is not None
    state.deferred = Residual(x, x, x)
    with pytest.raises(RuntimeError, match="expected the input of a block to be what the block before returned"):
        state.take_deferred(x.clone())
    assert state.deferred is None
