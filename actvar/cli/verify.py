"""Check a checkpoint, by `actvar verify`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from actvar.cli.infinity_options import (
    add_checkpoints,
    add_size,
    describe_size,
    expect_both,
    files_of,
    first_given,
    is_bundled,
    is_infinity,
    schedule_of,
)
from actvar.cli.options import (
    DTYPES,
    adapter_of,
    add_draw,
    add_rates,
    add_source,
    at_once,
    check_source,
    config_of,
    describe,
    device_of_process,
    expect_file,
    load,
    strength_of,
    with_rates,
    write_json,
)
from actvar.config import ActVARConfig
from actvar.models.checkpoint import load_infinity, sizes_of_files
from actvar.sampling.request import Sampling
from actvar.sampling.text_request import TextSampling
from actvar.verify.infinity import verify_infinity
from actvar.verify.report import Report
from actvar.verify.run import verify
from actvar.zoo.fashion_mnist_text.architecture import DRAW
from actvar_kernels.backend import BACKENDS
from actvar_kernels.constants import FORMATS

VERIFIED_SIZE = "0.06M"
TEXT_TOKENS = 16


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `verify` to its parser."""
    source = add_source(command, dtype=False)
    source.add_argument("--dtype", nargs="+", choices=DTYPES, default=[], help="besides fp32, which is always checked")
    infinity = command.add_argument_group("Infinity, with texts of random features")
    add_checkpoints(infinity)
    add_size(infinity, VERIFIED_SIZE)
    command.add_argument(
        "--backend", nargs="+", choices=sorted(set(BACKENDS) - {"auto"}), help="default: those that run on the device"
    )
    add_rates(command)
    add_draw(command, filters=False, texts=True)
    command.add_argument("--batch", type=at_once, default=1, help="images per sample (default 1)")
    command.add_argument("--weights", choices=list(FORMATS), help="also check the products of the blocks in eight bits")
    command.add_argument("--public-var", type=Path, help="clone of the public VAR code: its class must agree as well")
    command.add_argument("--json", type=Path, help="file to write every comparison to")


def run(options: argparse.Namespace) -> None:
    """Check the model on every backend, and exit with code 1 where anything differs."""
    _check_model(options)
    expect_file("--json", options.json)
    adapter = adapter_of(options)
    config = with_rates(config_of(adapter), options.rates)
    dtypes = [DTYPES[name] for name in options.dtype]
    report = (_verify_infinity if is_infinity(options) else _verify_var)(options, config, adapter, dtypes)
    print(f"batch {options.batch} on {options.device}; {describe(config)}")
    if is_infinity(options):
        print(describe_size(options, VERIFIED_SIZE))
    print(report.table())
    print(report.summary())
    if options.json:
        facts = {"device": options.device, "batch": options.batch, "config": asdict(config)}
        write_json(options.json, facts | report.as_dict())
    if report.failures:
        raise SystemExit(1)


def _check_model(options: argparse.Namespace) -> None:
    """Raise a ValueError unless one model is named, with options that it has."""
    if not is_infinity(options):
        given = first_given(options, ("tokenizer", "pn", "aspect"))
        if given:
            raise ValueError(f"{given} needs --infinity, the checkpoint of a model of texts")
        check_source(options)
        return
    of_var = ("weights", "public_var") if is_bundled(options) else ("model", "var", "vae", "weights", "public_var")
    given = first_given(options, of_var)
    if given:
        raise ValueError(f"{given} is not for --infinity, the checkpoint of a model of texts")
    expect_both(options)


def _verify_var(
    options: argparse.Namespace, config: ActVARConfig, adapter: Path | None, dtypes: list[torch.dtype]
) -> Report:
    """Return the checks of a VAR."""
    return verify(
        lambda dtype: load(options, dtype)[1],
        config,
        adapter,
        Sampling((0,) * options.batch, strength_of(options), seed=options.seed),
        dtypes,
        options.backend,
        options.public_var,
        quantized=FORMATS.get(options.weights),
    )


def _verify_infinity(
    options: argparse.Namespace, config: ActVARConfig, adapter: Path | None, dtypes: list[torch.dtype]
) -> Report:
    """Return the checks of an Infinity."""
    files, device = files_of(options), device_of_process(options)
    sizes = sizes_of_files(*files, options.key)
    tokens = min(TEXT_TOKENS, sizes.text_maxlen)
    features = torch.randn(tokens, sizes.text_channels, generator=torch.Generator().manual_seed(0))
    labels = (0,) * options.batch
    own = DRAW["cfg"] if is_bundled(options) else TextSampling.cfg
    cfg = own if options.cfg is None else options.cfg
    schedule = schedule_of(options, VERIFIED_SIZE)
    sampling = TextSampling(("random",), labels, schedule, cfg, seed=options.seed, features=(features,))
    return verify_infinity(
        lambda dtype: load_infinity(*files, device, dtype, options.key)[1],
        config,
        adapter,
        sampling,
        dtypes,
        options.backend,
    )
