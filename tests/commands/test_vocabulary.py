"""An option that several commands have means the same in each."""

from __future__ import annotations

import argparse
from collections import defaultdict
from importlib import import_module
from typing import NamedTuple

import pytest

from actvar.cli import COMMANDS
from actvar.cli.options import at_once, filters_of, integer, positive
from actvar.sampling.request import Sampling

OWN_CHOICES = {"--model", "--dtype"}
"""Options whose choices a command narrows."""
OWN_DEFAULTS = {
    "--batch",
    "--cfg",
    "--repeats",
    "--out",
    "--num",
    "--samples",
    "--experts",
    "--json",
    "--data",
    "--weights",
}
"""Options whose default fits a command's work; that of --cfg is also the model's, 4 for Infinity."""
PRINTED = {("info", "--json"), ("models", "--json")}
"""Flags to print JSON; elsewhere --json names a file."""
OTHERWISE = {("verify", "--dtype"), ("info", "--key"), ("distill", "--data")}
"""Options that take several values, one alone, or also the word none."""


class Option(NamedTuple):
    """Hold what an option takes."""

    read: object
    count: object
    choices: object
    default: object


def options_of(command: str) -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    import_module(f"actvar.cli.{command}").add_options(parser)
    return {name: action for action in parser._actions for name in action.option_strings}


def test_an_option_takes_the_same_in_every_command():
    meanings: dict[str, dict[Option, list[str]]] = defaultdict(lambda: defaultdict(list))
    for command in COMMANDS:
        for name, action in options_of(command).items():
            if (command, name) in PRINTED | OTHERWISE:
                continue
            choices = None if name in OWN_CHOICES or action.choices is None else tuple(action.choices)
            read = "whole number" if action.type in (positive, at_once, integer) else action.type
            default = None if name in OWN_DEFAULTS or action.required else action.default
            meanings[name][Option(read, action.nargs, choices, default)].append(command)
    assert {name: dict(found) for name, found in meanings.items() if len(found) > 1} == {}


def test_every_command_calls_its_seeds_samples_and_files_alike():
    evaluate, calibrate, distill = (options_of(name).keys() for name in ("evaluate", "calibrate", "distill"))
    assert {"--seeds", "--npz-dir"} <= evaluate
    assert not {"--repeats", "--npz"} & evaluate, "runs that are timed, and a file, in `actvar sample`"
    assert "--samples" in calibrate & distill
    assert "--classes" not in distill, "classes to draw, in `actvar sample`"


@pytest.mark.parametrize(
    ("var", "top_k", "top_p", "expected"),
    [
        ("var.pth", None, None, {"top_k": 64, "top_p": 0.95}),
        ("var.pth", 0, 0.5, {"top_k": 0, "top_p": 0.5}),
        (None, None, None, {"top_k": 0, "top_p": 0.0}),
        (None, 7, None, {"top_k": 7, "top_p": 0.0}),
    ],
)
def test_filters_are_those_of_the_public_demo_for_a_checkpoint(tiny_var, var, top_k, top_p, expected):
    assert filters_of(argparse.Namespace(var=var, top_k=top_k, top_p=top_p), tiny_var) == expected


def test_verify_draws_with_the_guidance_and_the_seed_of_its_options(monkeypatch):
    verify, found = import_module("actvar.cli.verify"), []

    def recorded(load, config, adapter, sampling, *rest, **named):
        found.append(sampling)
        raise ValueError("seen")

    monkeypatch.setattr(verify, "verify", recorded)
    parser = argparse.ArgumentParser()
    verify.add_options(parser)
    with pytest.raises(ValueError, match="seen"):
        verify.run(parser.parse_args(["--model", "fashion-mnist", "--cfg", "3", "--seed", "5", "--batch", "2"]))
    assert found == [Sampling((0, 0), 3.0, seed=5)]
