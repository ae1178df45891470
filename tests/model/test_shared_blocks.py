"""A patched model whose blocks are no longer those that were patched is refused, and `remove_patch` still works."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.helpers import make_tiny_var, sample
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from actvar import (
    ActVARConfig,
    accelerate,
    apply_patch,
    load_adapter,
    patched,
    record,
    release_cache,
    remove_patch,
    save_adapter,
)
from actvar.models import VAR
from actvar.models.transformer_block import TransformerBlock
from actvar.patching.patch import unpatched

CONFIG = ActVARConfig(token_rates=(0.5, 0.75), ffn_rate=0.5, num_experts=8)
MESSAGE = r"(?s)patch.*call actvar\.remove_patch\(var\), .*then actvar\.apply_patch\(var, config\)"

Models = list[VAR]
"""Models that are to be refused; `remove_patch` of each makes each as it was."""


def unpatched_copy(var: VAR) -> Models:
    other = copy.copy(var)
    remove_patch(apply_patch(other, CONFIG))
    return [var]


def copy_of_the_patched_one_unpatched(var: VAR) -> Models:
    remove_patch(copy.copy(var))
    return [var]


def copy_patched_again(var: VAR) -> Models:
    accelerate(copy.copy(var))
    return [var]


def copy_before_patching(var: VAR) -> Models:
    remove_patch(var)
    other = copy.copy(var)
    apply_patch(var, CONFIG)
    return [other]


def another_models_block(var: VAR) -> Models:
    other = apply_patch(make_tiny_var(), CONFIG)
    var.blocks[1] = other.blocks[1]
    return [var]


def a_block_of_each(var: VAR) -> Models:
    other = apply_patch(make_tiny_var(), CONFIG)
    var.blocks[0], other.blocks[0] = other.blocks[0], var.blocks[0]
    return [var, other]


def in_an_unpatched_model(var: VAR) -> Models:
    other = make_tiny_var()
    other.blocks[1] = var.blocks[1]
    return [other]


def wrapped_in_an_unpatched_model(var: VAR) -> Models:
    other = make_tiny_var()
    other.blocks[1] = CheckpointWrapper(var.blocks[1])
    return [other]


def appended(var: VAR) -> Models:
    var.blocks.append(make_tiny_var().blocks[0])
    return [var]


def appended_of_another_kind(var: VAR) -> Models:
    var.blocks.append(nn.Identity())
    return [var]


def appended_again(var: VAR) -> Models:
    var.blocks.append(var.blocks[0])
    return [var]


def exchanged(var: VAR) -> Models:
    var.blocks[0] = make_tiny_var().blocks[0]
    return [var]


def copied(var: VAR) -> Models:
    var.blocks[1] = copy.deepcopy(var.blocks[1])
    return [var]


def reversed_order(var: VAR) -> Models:
    var.blocks = nn.ModuleList(reversed(var.blocks))
    return [var]


def inserted(var: VAR) -> Models:
    var.blocks.insert(1, make_tiny_var().blocks[0])
    return [var]


def removed(var: VAR) -> Models:
    del var.blocks[1]
    return [var]


def emptied(var: VAR) -> Models:
    var.blocks = nn.ModuleList()
    return [var]


def wrapped_then_exchanged(var: VAR) -> Models:
    var.blocks[0] = CheckpointWrapper(var.blocks[0])
    var.blocks[1] = make_tiny_var().blocks[1]
    return [var]


CHANGES = [
    unpatched_copy,
    copy_of_the_patched_one_unpatched,
    copy_patched_again,
    copy_before_patching,
    another_models_block,
    a_block_of_each,
    in_an_unpatched_model,
    wrapped_in_an_unpatched_model,
    appended,
    appended_of_another_kind,
    appended_again,
    exchanged,
    copied,
    reversed_order,
    inserted,
    removed,
    emptied,
    wrapped_then_exchanged,
]


def teacher_forced(var: VAR) -> torch.Tensor:
    return var(torch.tensor([1, 2]), torch.zeros(2, var.L - 1, var.Cvae))


@pytest.fixture
def patched_var(tiny_var) -> VAR:
    return apply_patch(tiny_var, CONFIG)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_with_other_blocks_is_refused_and_can_be_unpatched(patched_var, change):
    models = change(patched_var)
    for var in models:
        for run in (sample, teacher_forced):
            with pytest.raises(ValueError, match=MESSAGE):
                run(var)
            assert not any(getattr(block, "attn", block).__dict__.get("caching") for block in var.blocks)
    for var in models:
        assert remove_patch(var) is var
        assert type(var) is VAR
        parts = list(var.modules())
        assert not any(hasattr(part, "actvar") for part in parts)
        assert {type(part) for part in parts if isinstance(part, TransformerBlock)} <= {TransformerBlock}


@pytest.mark.parametrize(
    "change",
    [c for c in CHANGES if c not in (appended_of_another_kind, emptied, appended_again)],
    ids=lambda c: c.__name__,
)
def test_the_way_out_of_the_message_leads_to_a_model_that_samples(patched_var, change):
    var = change(patched_var)[0]
    remove_patch(var)
    if change not in (appended, inserted, removed):
        assert torch.equal(sample(var), sample(make_tiny_var())) == (change is not reversed_order)
    apply_patch(var, CONFIG)
    assert sample(var).isfinite().all()
    assert teacher_forced(var).isfinite().all()


def saved(var: VAR, folder) -> None:
    save_adapter(var, folder / "saved.safetensors")


def loaded(var: VAR, folder) -> None:
    load_adapter(var, folder / "adapter.safetensors")


def recorded(var: VAR, _folder) -> None:
    with record(var):
        pass


def unpatched_for_a_while(var: VAR, _folder) -> None:
    with unpatched(var):
        pass


def patched_for_a_while(var: VAR, _folder) -> None:
    with patched(var, CONFIG):
        pass


@pytest.mark.parametrize("change", [exchanged, copied, reversed_order, removed], ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "use",
    [saved, loaded, recorded, unpatched_for_a_while, patched_for_a_while, lambda var, _: release_cache(var)],
    ids=["save", "load", "record", "unpatched", "patched", "release_cache"],
)
def test_whatever_reads_the_patch_refuses_such_a_model(
    patched_var, tmp_path, change: Callable[[VAR], Models], use: Callable
):
    save_adapter(patched_var, tmp_path / "adapter.safetensors")
    (var,) = change(patched_var)
    with pytest.raises(ValueError, match=MESSAGE):
        use(var, tmp_path)
    assert not (tmp_path / "saved.safetensors").exists()


def test_blocks_that_are_wrapped_after_patching_stay_patched_until_the_patch_is_removed(patched_var):
    expected = sample(patched_var)
    for index, block in enumerate(patched_var.blocks):
        patched_var.blocks[index] = CheckpointWrapper(block)
    assert torch.equal(sample(patched_var), expected)
    remove_patch(patched_var)
    assert not any(hasattr(part, "actvar") for part in patched_var.modules())
    assert torch.equal(sample(patched_var), sample(make_tiny_var()))


def test_a_shallow_copy_of_a_patched_model_samples_as_it_does(patched_var):
    assert torch.equal(sample(copy.copy(patched_var)), sample(patched_var))
