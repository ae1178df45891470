from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from actvar.training.loop import batch_indices, fit
from actvar.training.plan import Plan
from actvar.training.processes import run_in_processes

DATA = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def plan(folder, **changes) -> Plan:
    return Plan("line", folder, **({"steps": 12, "batch": 8, "lr": 0.1, "warmup": 2, "bf16": False} | changes))


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 1, bias=False))
    nn.init.ones_(net[0].weight)
    return net


def loss(net: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
    noise = torch.rand(len(index), 1)
    return {"loss": (net(DATA[index]) - DATA[index].sum(1, keepdim=True) * 2 + 0.1 * noise).square().mean()}


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    whole, part = model(), model()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fit(whole, loss, plan(tmp_path / "a"), len(DATA))

    class Killed(Exception):
        pass

    def kill(step):
        if step == 7:
            raise Killed

    interrupted = plan(tmp_path / "b", checkpoint_seconds=0)
    with pytest.raises(Killed):
        fit(part, loss, interrupted, len(DATA), after_step=kill)
    resumed = model()
    fit(resumed, loss, interrupted, len(DATA))
    assert torch.equal(resumed[0].weight, whole[0].weight)
    assert interrupted.log.read_text() == plan(tmp_path / "a").log.read_text()


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    net = model()
    before = loss(net, torch.arange(40))["loss"].item()
    fit(net, loss, plan(tmp_path, steps=60), len(DATA))
    assert loss(net, torch.arange(40))["loss"].item() < before / 4
    rows = plan(tmp_path).log.read_text().splitlines()
    assert rows[0] == "step,loss"
    assert [int(row.split(",")[0]) for row in rows[1:]] == [20, 40, 60]


def test_every_example_is_used_once_per_pass():
    steps = [batch_indices(40, step, 8, seed=3) for step in range(5)]
    assert torch.equal(torch.cat(steps).sort().values, torch.arange(40))
    assert not torch.equal(steps[0], batch_indices(40, 5, 8, seed=3))


def _train(folder) -> None:
    fit(model(), deterministic_loss, plan(folder, steps=10), len(DATA))


def deterministic_loss(net: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": (net(DATA[index]) - DATA[index].sum(1, keepdim=True) * 2).square().mean()}


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(tmp_path):
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run_in_processes(_train, processes, folder)
        weights.append(torch.load(plan(folder, steps=10).checkpoint, weights_only=True)["model"]["0.weight"])
    torch.testing.assert_close(*weights)


def test_the_model_ends_with_the_average_of_its_weights(tmp_path):
    seen, net = [], model()
    fit(
        net,
        loss,
        plan(tmp_path, steps=15, ema=0.6),
        len(DATA),
        after_step=lambda _: seen.append(net[0].weight.detach().clone()),
    )
    expected = torch.ones(1, 3)
    for step, weights in enumerate(seen):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(net[0].weight.detach(), expected)
    assert not torch.allclose(net[0].weight, seen[-1])


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path):
    weights = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        folder.mkdir()
        net = model()
        fit(net, deterministic_loss, plan(folder, accumulate=parts), len(DATA))
        weights.append(net[0].weight.detach())
    torch.testing.assert_close(*weights)
    logs = [plan(tmp_path / part).log.read_text().splitlines()[-1].split(",")[1] for part in ("1", "4")]
    assert float(logs[0]) == pytest.approx(float(logs[1]), rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_lets_the_step_end_and_saves(tmp_path, number):
    before = signal.getsignal(number)
    steps = []

    def ask(step):
        steps.append(step)
        if step == 4:
            os.kill(os.getpid(), number)

    net = model()
    with pytest.raises(KeyboardInterrupt):
        fit(net, loss, plan(tmp_path), len(DATA), after_step=ask)
    assert steps == [0, 1, 2, 3, 4]
    state = torch.load(plan(tmp_path).checkpoint, weights_only=True)
    assert state["step"] == 5
    assert torch.equal(state["model"]["0.weight"], net[0].weight)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("changes", [{"batch": 41}, {"batch": 9, "accumulate": 2}])
def test_a_batch_that_cannot_be_cut_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"batch: expected a multiple of 1 processes x \d parts, from 1 to the 40"):
        fit(model(), loss, plan(tmp_path, **changes), len(DATA))


DIES = """
import sys
import torch
from pathlib import Path
from actvar.training.loop import fit
from actvar.training.plan import Plan
from actvar.training.processes import launched_processes, rank

def after(step):
    if step == 2 and rank() == 1:
        raise RuntimeError("no room left on this machine")

net = torch.nn.Linear(3, 1)
plan = Plan("net", Path(sys.argv[1]), 100, batch=4, lr=0.1, bf16=False, checkpoint_seconds=0)
with launched_processes(torch.device("cpu")):
    fit(net, lambda model, index: {"loss": model(torch.ones(len(index), 3)).sum()}, plan, 8, after_step=after)
"""


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_training_with_its_reason_and_the_checkpoint_stays(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DIES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "RuntimeError: no room left on this machine" in done.stderr
    assert torch.load(tmp_path / "net.checkpoint.pt", weights_only=True)["step"] == 2
