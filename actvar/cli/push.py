"""Upload an adapter to the Hugging Face hub, by `actvar push`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from actvar.cli.options import add_draw, add_source, at_once, check_source, load_to_sample, request
from actvar.evaluate.divergence import divergence_by_scale
from actvar.families import family_of
from actvar.patching.adapter import read_adapter
from actvar.patching.hub import adapter_file, push_adapter
from actvar.patching.patch import patched_silently
from actvar.reports.compare import compare, first_samples
from actvar.reports.model_card import model_card
from actvar.sampling.token_maps import sampled_inputs
from actvar.sparse.state import patch_state
from actvar.utils.fingerprint import model_fingerprint
from actvar_kernels.cpu_backend.choices import processor


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `push` to its parser."""
    command.add_argument("file", help="adapter file")
    command.add_argument("repository", help="owner/repo on the hub, made if it does not exist; its card is replaced")
    add_source(command, adapter=None)
    add_draw(command)
    command.add_argument("--batch", type=at_once, default=8, help="images that are measured for the card (default 8)")
    command.add_argument("--private", action="store_true", help="make a new repository private")


def run(options: argparse.Namespace) -> None:
    """Measure the adapter on its base model, and upload it with a card that says what was measured."""
    check_source(options)
    file = adapter_file(options.file)
    adapter = read_adapter(file)
    var, sampling = load_to_sample(options, request(options, ()), "--model")
    adapter.expect_made_for(var)
    labels = tuple(image % var.num_classes for image in range(options.batch))
    sampling = replace(sampling, labels=labels)
    fingerprint = model_fingerprint(var, family_of(var).autoencoder(var))
    maps = sampled_inputs(var, options.batch, 8, options.seed, options.cfg)
    with patched_silently(var, adapter.config, file, None):
        comparison = compare(var, sampling, first_samples(var, sampling), repeats=3)
        divergence, schedules = divergence_by_scale(var, maps), patch_state(var).schedules
    base = {"name": options.model} if options.model else {"var": options.var, "vae": options.vae}
    place = {"machine": processor() if options.device == "cpu" else options.device, "dtype": options.dtype}
    place |= {"cfg": sampling.cfg, "top-k": sampling.top_k, "top-p": sampling.top_p}
    card = model_card(adapter, options.repository, base, fingerprint, schedules, divergence, comparison, place)
    print(f"wrote {push_adapter(file, options.repository, card, options.private)}")
