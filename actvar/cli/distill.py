"""Train an adapter, by `actvar distill`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import actvar
from actvar.cli.options import (
    DTYPES,
    adapter_of,
    add_rates,
    add_source,
    check_source,
    describe,
    expect_file,
    integer,
    load,
    number,
    positive,
    say_device,
    strength_of,
    with_rates,
)
from actvar.cli.sample_infinity import add_infinity, is_of_texts, load_to_sample_texts, request_of_texts
from actvar.config import DENSE
from actvar.distill.data import GUIDANCE, Source, sampled_source, source_of
from actvar.distill.recipes import CONDITIONAL, RECIPES
from actvar.distill.run import Distillation, distill
from actvar.models import VAR, Infinity
from actvar.models.checkpoint import usable_device
from actvar.patching.adapter import describe_adapter, read_adapter_config
from actvar.sampling.text_request import TextSampling
from actvar.training.processes import launched_processes, rank
from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER, WHERE_FROM


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `distill` to its parser."""
    source = add_source(command, "paper-stage1, for --stage 2", dtype=False)
    add_infinity(command)
    dtypes = [name for name, dtype in DTYPES.items() if dtype != torch.float16]
    source.add_argument("--dtype", choices=dtypes, default="fp32", help="bf16 is autocast (default fp32)")
    command.add_argument(
        "--stage", type=integer, choices=[1, 2], required=True, help="1: selectors, routers; 2: weights"
    )
    command.add_argument(
        "--recipe",
        choices=RECIPES,
        default="paper",
        help="the paper's choices (default), the best found here, or that for guidance",
    )
    command.add_argument("--out", type=Path, required=True, help="adapter file; checkpoints and losses go beside it")
    command.add_argument(
        "--data",
        help="folder of images in a subfolder per class, of Fashion-MNIST's files, or none; for texts none",
    )
    command.add_argument(
        "--class-numbers",
        type=Path,
        help="JSON file with the class number of each folder of --data by its name, for folders that are not as many "
        "as the model's classes and have no class numbers for names",
    )
    command.add_argument("--skip-bad", action="store_true", help="leave out images of --data that cannot be read")
    command.add_argument(
        "--samples", type=positive, default=10_000, help="of the model, for --data none (default 10000)"
    )
    what = command.add_argument_group("what is sparse (default: as in --adapter, else the paper's)")
    what.add_argument(
        "--scales", nargs="+", type=integer, help="of the token rates, e.g. -3 -1 (default: the last ones)"
    )
    add_rates(what, "the adapter's, else 0.75 0.75 0.75")
    what.add_argument("--experts", type=positive, help="experts the FFN is cut into")
    what.add_argument(
        "--guidance-until",
        type=integer,
        help="first scale without guidance, e.g. -2, for stage 2 of the recipe guided: from there on conditional rows "
        "alone imitate the guided logits, and trained weights begin there too",
    )
    how = command.add_argument_group("training")
    how.add_argument("--epochs", type=number, help="passes over the data (default 2 for stage 1, 10 for stage 2)")
    how.add_argument("--batch", type=positive, default=256, help="over all processes (default 256)")
    how.add_argument(
        "--lr", type=number, help="peak (default 1e-4 per 256 of the batch; stage 2 of best 2e-3; --lora 1e-2)"
    )
    how.add_argument("--accumulate", type=positive, default=1, help="parts a batch is computed in (default 1)")
    how.add_argument("--ema", type=number, default=0.0, help="decay of the average of the weights, e.g. 0.999")
    how.add_argument("--clip", type=number, default=1.0, help="largest norm of the gradient (default 1)")
    how.add_argument(
        "--cfg",
        type=number,
        help=f"guidance that --recipe guided is for (default {GUIDANCE}; with --infinity {TextSampling.cfg})",
    )
    how.add_argument(
        "--lora",
        type=positive,
        metavar="RANK",
        help="stage 2 trains changes of this rank, e.g. 16, in place of whole weights, for a smaller adapter",
    )
    how.add_argument("--seed", type=integer, default=0, help="of order and noise (default 0)")


def run(options: argparse.Namespace) -> None:
    """Train an adapter, or go on with a training, and write it."""
    sampling = request_of_texts(options, at_once=False) if is_of_texts(options) else None
    data = _data_of(options, of_texts=sampling is not None)
    if options.out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a .safetensors file, got {options.out}")
    expect_file("--out", options.out)
    until = options.guidance_until
    if until is not None and (options.stage, options.recipe) != (2, "guided"):
        raise ValueError("--guidance-until: expected it with --stage 2 --recipe guided")
    needs_adapter = options.stage == 2 and until is None
    adapter = adapter_of(options, "paper-stage1") if needs_adapter or options.adapter else None
    if adapter is not None:
        config = read_adapter_config(adapter)
    else:
        config = actvar.ActVARConfig() if until is None else DENSE
    if options.scales and not options.rates:
        raise ValueError("--scales: give --rates as well, a token rate for each scale, then the FFN's")
    config = with_rates(config, options.rates, options.scales)
    if until is not None:
        changed = adapter is not None and describe_adapter(adapter)["changed weights"]
        config = replace(config, guidance_until=until, weights_from=config.weights_from if changed else until)
    if options.experts:
        config = replace(config, num_experts=options.experts)
    names = ("stage", "epochs", "batch", "lr", "accumulate", "ema", "clip", "seed", "lora")
    given = {name: getattr(options, name) for name in names}
    given["cfg"] = strength_of(options) if sampling is None else sampling.cfg
    recipe = RECIPES[options.recipe] if until is None else CONDITIONAL
    how = Distillation(**given, recipe=recipe, bf16=DTYPES[options.dtype] == torch.bfloat16)
    with launched_processes(usable_device(options.device)) as device:
        options.device = str(device)
        var, source = _loaded(options, data) if sampling is None else _loaded_for_texts(options, sampling)
        if rank() == 0 and source.description:
            print(source.description, flush=True)
        written = distill(var, config, adapter, source, how, options.out)
        if rank() == 0:
            print(f"wrote {written}; {describe(config)}")


def _data_of(options: argparse.Namespace, of_texts: bool) -> str:
    """Return the folder of images, or `none` for token maps of the model itself.

    Raises:
        ValueError: no model, or no data; a folder for a model of texts.
        FileNotFoundError: the bundled model's images are not there.
    """
    if of_texts:
        if options.data not in (None, "none"):
            raise ValueError(
                "--data: expected none for a model of texts, whose images are drawn for the prompts, got "
                f"{options.data}"
            )
        if options.class_numbers or options.skip_bad:
            raise ValueError(
                "--class-numbers, --skip-bad: expected a folder of images, got a model of texts, which takes none"
            )
        return "none"
    check_source(options)
    data = options.data or (str(DEBIAN_FOLDER) if options.model else None)
    if data is None:
        raise ValueError("--data: expected a folder, or none to sample token maps from the model itself")
    if options.data is None and not DEBIAN_FOLDER.is_dir():
        raise FileNotFoundError(
            f"{DEBIAN_FOLDER}: expected the images of Fashion-MNIST, got no such folder; {WHERE_FROM} (or --data none "
            "to sample token maps from the model itself)"
        )
    return data


def _loaded(options: argparse.Namespace, data: str) -> tuple[VAR, Source]:
    """Return a VAR in float32, and the source of its token maps."""
    say_device(options)
    vae, var = load(options, torch.float32)
    choices = {"mapping": options.class_numbers, "skip_bad": options.skip_bad, "cache": options.out.parent}
    return var, source_of(data, vae, var, options.samples, options.seed, **choices)


def _loaded_for_texts(options: argparse.Namespace, sampling: TextSampling) -> tuple[Infinity, Source]:
    """Return an Infinity in float32, and the source of its token maps."""
    infinity, sampling = load_to_sample_texts(options, sampling, torch.float32)
    return infinity, sampled_source(infinity, options.samples, options.seed, sampling.texts, sampling.cfg)
