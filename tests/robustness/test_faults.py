"""What is promised when something goes wrong on the way: the short part of what a soak repeats."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from support import faults, interruptions
from support.faults import draw, expect_free, expect_same_state, small_model, state_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import actvar
import actvar_kernels
from actvar import ActVARConfig, apply_patch, remove_patch
from actvar.training.checkpoint import load_trained
from actvar.training.loop import fit
from actvar.training.plan import Plan
from actvar.utils.files import replacing
from actvar_kernels import BackendUnavailableError, get_backend, set_backend
from actvar_kernels.backend import using_backend

BLOCKS, SCALES = 2, 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("patch", [None, ActVARConfig(num_experts=8), ActVARConfig(num_experts=8, kv="all")])
def test_an_error_at_any_block_and_scale_frees_the_caches_and_leaves_the_next_sample_as_it_was(patch, error):
    var = small_model()
    before, dense = state_of(var), draw(var)
    if patch is not None:
        apply_patch(var, patch)
    expected = draw(var)
    for position in range(BLOCKS * SCALES):
        calls = []

        def fail(*_, calls=calls, position=position):
            calls.append(None)
            if len(calls) > position:
                raise error("stop")

        handles = [block.register_forward_hook(fail) for block in var.blocks]
        with pytest.raises(error, match="stop"):
            draw(var)
        for handle in handles:
            handle.remove()
        expect_free(var)
        assert torch.equal(draw(var), expected), position
    if patch is not None:
        assert not var.actvar.rows_are_guided
        assert not var.actvar.writes_in_place
    expect_same_state(remove_patch(var), before)
    assert torch.equal(draw(var), dense)


def test_an_interruption_at_any_line_of_sampling_is_survived():
    assert interruptions.run_sampling_faults(9) == {"faults in sampling": 9}


def test_an_interruption_at_any_moment_of_patching_and_loading_can_be_unpatched_and_a_load_is_taken_back():
    assert interruptions.run_patching_faults(3)["faults in patching"] > 11 * 3


def test_an_interrupted_load_that_is_not_taken_back_would_be_found(monkeypatch):
    put = actvar.patching.adapter._put

    def only_forward(*arguments):
        if sys.exc_info()[0] is None:
            put(*arguments)

    monkeypatch.setattr("actvar.patching.adapter._put", only_forward)
    with pytest.raises(AssertionError, match="load another: fault"):
        interruptions.run_patching_faults(0, names=("load another",))


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", ["patch", "load another", "remove with an adapter", "sample"])
def test_ctrl_c_in_torchs_own_python_does_not_leave_its_modes_behind(name, mode, tmp_path):
    changes = interruptions.Adapters(tmp_path).changes()
    changes["sample"] = interruptions.Change(interruptions.patched_model, draw)
    prepare, action, sources = changes[name].prepare, changes[name].action, interruptions.TORCHS_MODES
    with mode():
        var = prepare()
        lines = interruptions.lines_of(lambda: action(var), sources)
        for number in range(1, lines + 1):
            var = prepare()
            failed = interruptions.fails(
                lambda var=var: action(var), interruptions.raising_at_line(number, KeyboardInterrupt, sources)
            )
            assert failed
        assert interruptions.modes() == (mode is nullcontext, mode is torch.inference_mode)


class Mutations(TorchDispatchMode):
    """Names of the operators that write to one of `tensors`."""

    def __init__(self, tensors):
        super().__init__()
        self.addresses, self.names = {tensor.data_ptr() for tensor in tensors}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        written = args[0] if isinstance(args[0], list | tuple) else args[:1]
        addresses = {tensor.data_ptr() for tensor in written if isinstance(tensor, torch.Tensor)}
        if func._schema.is_mutable and self.addresses & addresses:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_weights_gates_and_their_order_change_in_one_call_per_block(tmp_path):
    adapters, var = interruptions.Adapters(tmp_path), interruptions.patched_model()
    places = [block.actvar.hidden_order for block in var.blocks]
    with Mutations([*var.parameters(), *places]) as mutations:
        actvar.load_adapter(var, adapters.paths[0])
        remove_patch(var)
    assert mutations.names == ["aten::_foreach_copy_"] * 2 * BLOCKS


def test_removal_finishes_what_an_interrupted_removal_began():
    var = small_model()
    before = state_of(var)
    apply_patch(var, faults.CONFIG)
    var.__class__ = type(var).original_class  # the first step
    expect_same_state(remove_patch(var), before)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, 3, "var"], ids=repr)
def test_removal_from_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="cannot be patched"):
        remove_patch(model)


# Training


def test_killed_training_resumes_to_the_same_weights_and_log():
    assert faults.run_kills(3)["kills survived"] == 3


def test_a_row_of_the_log_that_was_cut_off_is_written_anew(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        faults._train(tmp_path / name, 0)
    whole, cut = tmp_path / "whole" / "net.csv", tmp_path / "cut" / "net.csv"
    torch.save(torch.load(cut.with_name("net.checkpoint.pt")) | {"step": 30}, cut.with_name("net.checkpoint.pt"))
    cut.write_bytes(cut.read_bytes()[:-10])
    cut.write_bytes(cut.read_bytes() + b"4")  # of step 40
    stale = cut.with_name(".net.checkpoint.pt.99999999")
    stale.write_bytes(b"half")
    faults._train(tmp_path / "cut", 0)
    steps = [row.split(",")[0] for row in whole.read_text().splitlines()]
    assert [row.split(",")[0] for row in cut.read_text().splitlines()] == steps == ["step", "20", "40"]
    assert not stale.exists()


def trained(folder) -> tuple[nn.Module, Plan]:
    net, plan = nn.Linear(3, 1), Plan("line", folder, 2, batch=2, lr=0.1, bf16=False)
    fit(net, lambda model, index: {"loss": model(torch.ones(len(index), 3)).sum()}, plan, 4)
    return net, plan


@pytest.mark.parametrize("damage", ["cut", "other keys", "another model", "no tensors"])
def test_a_damaged_training_checkpoint_is_an_error_and_changes_nothing(tmp_path, damage):
    _, plan = trained(tmp_path)
    state = torch.load(plan.checkpoint, weights_only=True)
    if damage == "cut":
        plan.checkpoint.write_bytes(plan.checkpoint.read_bytes()[:-200])
    elif damage == "other keys":
        torch.save({"step": 1}, plan.checkpoint)
    elif damage == "another model":
        state["model"]["bias"] = torch.zeros(1, 1)
        torch.save(state, plan.checkpoint)
    else:
        state["model"]["bias"] = 3
        torch.save(state, plan.checkpoint)
    net = nn.Linear(3, 1)
    before = state_of(net)
    with pytest.raises(ValueError, match=r"line.checkpoint.pt: .*expected"):
        load_trained(net, plan)
    expect_same_state(net, before)


@pytest.mark.parametrize("batch", [0, 5, -2])
def test_a_batch_that_the_data_cannot_fill_is_refused(tmp_path, batch):
    with pytest.raises(ValueError, match=f"batch: expected a multiple of .*, from 1 to the 4 examples, got {batch}"):
        fit(nn.Linear(3, 1), lambda *_: {}, Plan("line", tmp_path, 2, batch=batch, lr=0.1), 4)


# Files


def test_a_full_disk_leaves_the_old_file_and_no_other():
    assert faults.run_full_disk() == {"failed writes": 16}


def test_a_folder_that_cannot_be_written_to_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")
    if os.getuid():
        tmp_path.chmod(0o500)
    else:  # nothing is read-only to root

        def refuse(*_args, **_kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.write_text", refuse)
    try:
        with pytest.raises(PermissionError), replacing(path) as temporary:
            temporary.write_text("new")
    finally:
        tmp_path.chmod(0o700)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


# Threads


def test_two_threads_sample_from_two_models_as_one_after_the_other():
    assert faults.run_threads(4) == {"samples in two threads": 8}


@pytest.mark.parametrize("action", [draw, apply_patch, remove_patch], ids=lambda action: action.__name__)
@pytest.mark.parametrize("is_patched", [False, True], ids=["dense", "patched"])
def test_a_second_thread_that_uses_a_model_while_it_samples_is_refused_and_disturbs_nothing(action, is_patched):
    var = small_model()
    if is_patched:
        apply_patch(var, faults.CONFIG)
    expected, errors = draw(var), []

    def intrude() -> None:
        try:
            action(var)
        except RuntimeError as error:
            errors.append(str(error))

    def in_another_thread(*_) -> None:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    handle = var.blocks[1].register_forward_hook(in_another_thread)
    assert torch.equal(draw(var), expected)
    handle.remove()
    assert len(errors) == SCALES
    assert all("in use by another thread" in error for error in errors)
    thread_image = []
    thread = threading.Thread(target=lambda: thread_image.append(draw(var)))
    thread.start()
    thread.join()
    assert torch.equal(thread_image[0], expected)


def test_the_backend_is_the_same_for_all_threads(monkeypatch):
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", None)
    monkeypatch.delenv("ACTVAR_BACKEND", raising=False)
    seen = []

    def look() -> None:
        thread = threading.Thread(target=lambda: seen.append(get_backend()))
        thread.start()
        thread.join()

    look()
    set_backend("reference")
    look()
    with using_backend("cpu"):
        look()
    look()
    assert seen == ["auto", "reference", "cpu", "reference"]
    with pytest.raises(ValueError, match="expected one of"):
        set_backend("cuda")
    with pytest.raises(BackendUnavailableError, match="triton"), using_backend("triton"):
        actvar_kernels.normalize_modulate(torch.zeros(1, 1, 4).double(), *torch.zeros(2, 1, 1, 4).double())
    assert get_backend() == "reference"


# Leaks


def test_patching_many_times_leaks_nothing_and_changes_nothing():
    assert faults.run_patching(30) == {"patches": 30, "leaks": 0}


def test_the_soak_would_notice_a_leak(monkeypatch):
    kept = []
    monkeypatch.setattr(
        faults,
        "patch_silently",
        lambda var, config: kept.append(actvar.patching.patch.patch_silently(var, config) or var.blocks[0].actvar),
    )
    with pytest.raises(AssertionError, match="more objects"):
        faults.run_patching(5)
