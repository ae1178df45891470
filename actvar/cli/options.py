"""Add the options that several commands share, and read their values."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

import actvar
from actvar.models import VAR, VQVAE
from actvar.models.checkpoint import usable_device
from actvar.patching.adapter import read_adapter_config
from actvar.sampling.request import Sampling
from actvar.sampling.text_request import TextSampling
from actvar.utils.files import replacing
from actvar.zoo.fashion_mnist.data import CLASSES
from actvar.zoo.pretrained import TEXT_MODEL, WEIGHTS, adapter_path, bundled_adapters

Number = TypeVar("Number", int, float)

MOST_AT_ONCE = 1_000_000
"""The most images of one sample or one batch; more would fit into no memory."""
DEMO_TOP_K, DEMO_TOP_P = 900, 0.95
"""The filters of the public code's demo."""
GUIDANCE = 1.5
FILE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".html", ".json", ".csv", ".npz", ".npy", ".safetensors"}
_NAMED = {name.lower(): number for number, name in enumerate(CLASSES)}
_SHORT = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES = _SHORT | {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_source(
    command: argparse.ArgumentParser, adapter: str | None = "best", dtype: bool = True
) -> argparse._ArgumentGroup:
    """Add the options that choose a model, an adapter, a device and a dtype, and return their group.

    Args:
        command: the command's parser.
        adapter: the bundled adapter that --model takes by default; None for a command that reads no adapter.
        dtype: whether --dtype is the dtype of the transformer's weights; otherwise the command adds an option of its
            own.
    """
    source = command.add_argument_group("model")
    source.add_argument("--model", choices=sorted(WEIGHTS), help="a model that comes with the package")
    source.add_argument(
        "--var",
        help="transformer checkpoint: .pth, .ckpt, .safetensors, a folder of shards, or owner/repo[@revision]:file on "
        "the hub",
    )
    source.add_argument("--vae", help="autoencoder checkpoint, in the same formats; may be the same file")
    source.add_argument(
        "--key",
        action="append",
        help="which state dict of a checkpoint that has several, e.g. ema; give it twice for two files",
    )
    if adapter:
        source.add_argument(
            "--adapter",
            help=f"adapter file, owner/repo on the hub, or a bundled one's name (default for --model: {adapter})",
        )
    source.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default cuda where there is one, otherwise cpu)",
    )
    if dtype:
        source.add_argument("--dtype", choices=DTYPES, default="fp32", help="transformer weights (default fp32)")
    return source


def add_draw(command: argparse._ActionsContainer, filters: bool = True, texts: bool = False) -> None:
    """Add the options that say how tokens are drawn.

    Args:
        command: the command's parser, or a group of it.
        filters: whether there are --top-k and --top-p, which `filters_of` reads.
        texts: whether the command also draws images of texts. --cfg is then None unless it is given.
    """
    of_texts = "; with --infinity {}" if texts else ""
    cfg, top_k, top_p = (of_texts.format(getattr(TextSampling, name)) for name in ("cfg", "top_k", "top_p"))
    top_k = f"(default 0: all; with --var {DEMO_TOP_K}{top_k})"
    top_p = f"(default 0: all; with --var {DEMO_TOP_P}{top_p})"
    default = None if texts else GUIDANCE
    command.add_argument("--cfg", type=number, default=default, help=f"guidance strength (default {GUIDANCE}{cfg})")
    if filters:
        command.add_argument("--top-k", type=integer, help=f"draw from the k likeliest tokens {top_k}")
        command.add_argument("--top-p", type=number, help=f"from the likeliest that reach p {top_p}")
    command.add_argument("--seed", type=integer, default=0, help="of the sampling noise (default 0)")


def sampler_of(options: argparse.Namespace) -> str | None:
    """Return the sampler of --sampler, by default the fast one on a GPU, whose samples are CUDA graphs; or None."""
    return options.sampler or ("fast" if options.device.startswith("cuda") else None)


def add_rates(command: argparse._ActionsContainer, default: str = "the adapter's") -> None:
    """Add the option for the rates of tokens and experts, whose default the help names."""
    command.add_argument(
        "--rates",
        nargs="+",
        type=number,
        help=f"token rates of the last scales, then the FFN's, e.g. 0.75 0.75 0.75 (default {default})",
    )


def check_source(options: argparse.Namespace) -> None:
    """Raise a ValueError unless one model is named: a bundled one, or both checkpoints."""
    if (options.model is None) == (options.var is None):
        more = ", or --infinity with --tokenizer" if hasattr(options, "infinity") else ""
        raise ValueError(f"give either --model, or --var with --vae{more}")
    if (options.var is None) != (options.vae is None):
        raise ValueError("--var needs --vae, the checkpoint of its autoencoder, and the other way round")
    if options.model == TEXT_MODEL:
        raise ValueError(f"--model: expected a model of classes, since this command draws no texts, got {TEXT_MODEL}")
    if options.model and options.key:
        raise ValueError("--key chooses within the files of --var and --vae; leave it out with --model")


def say_device(options: argparse.Namespace) -> None:
    """Print the device, once for all processes of torchrun, unless --quiet is given."""
    if not options.quiet and of_process("RANK", 0) == 0:
        print(f"device {options.device}", flush=True)


def device_of_process(options: argparse.Namespace) -> torch.device:
    """Return the device of --device, where `cuda` is the one that torchrun gives this process."""
    if torch.cuda.is_available():
        torch.cuda.set_device(of_process("LOCAL_RANK", 0) % torch.cuda.device_count())
    return usable_device(options.device)


def load(options: argparse.Namespace, dtype: torch.dtype) -> tuple[VQVAE, VAR]:
    """Load autoencoder and transformer in `dtype`, on the device of --device or the one that torchrun gives."""
    device = device_of_process(options)
    if options.model:
        return actvar.load_pretrained(options.model, device=device, dtype=dtype)
    return actvar.load_var(options.var, options.vae, device, dtype, options.key)


def request(options: argparse.Namespace, labels: tuple[int, ...]) -> Sampling:
    """Return the request of the options, in which a filter that is not given is off."""
    return Sampling(labels, strength_of(options), options.top_k or 0, options.top_p or 0.0, options.seed)


def strength_of(options: argparse.Namespace) -> float:
    """Return the guidance strength of --cfg, or its default for classes."""
    return GUIDANCE if options.cfg is None else options.cfg


def filters_of(options: argparse.Namespace, var: VAR) -> dict[str, int | float]:
    """Return `top_k` and `top_p` of the options, whose defaults are those of the public demo for --var, otherwise 0."""
    demo = (min(DEMO_TOP_K, var.V), DEMO_TOP_P) if options.var else (0, 0.0)
    return {
        "top_k": demo[0] if options.top_k is None else options.top_k,
        "top_p": demo[1] if options.top_p is None else options.top_p,
    }


def load_to_sample(options: argparse.Namespace, sampling: Sampling, option: str) -> tuple[VAR, Sampling]:
    """Load the model, and check that it has what is to be sampled.

    Args:
        options: the command's options.
        sampling: their request.
        option: the option that gave the classes, for the message.

    Returns:
        the model, and the request with the filters of `filters_of`.

    Raises:
        ValueError: the model does not have such a class, or so many tokens.
    """
    say_device(options)
    _, var = load(options, DTYPES[options.dtype])
    if sampling.top_k > var.V:
        raise ValueError(f"--top-k: the model has {var.V} tokens to choose from, got {sampling.top_k}")
    bad = [label for label in sampling.labels if not 0 <= label < var.num_classes]
    if bad:
        raise ValueError(f"{option}: the model has classes 0-{var.num_classes - 1}, got {bad[0]}")
    return var, replace(sampling, **filters_of(options, var))


def class_name(options: argparse.Namespace, label: int) -> str:
    """Return the name of a class for the title of a picture."""
    return CLASSES[label] if options.model else f"class {label}"


def of_process(variable: str, default: int) -> int:
    """Return a number that torchrun gives its processes by an environment variable, or `default` without torchrun."""
    return int(os.environ.get(variable, default))


def adapter_of(options: argparse.Namespace, bundled: str | None = "best") -> Path | None:
    """Return the adapter's file, or None without an adapter.

    With --model, a name without a suffix is that of a bundled adapter, and `bundled` is the default.
    """
    comes_with = bundled_adapters(options.model) if options.model else []
    name = options.adapter or (bundled if bundled in comes_with else None)
    if name is None:
        return None
    if options.model and "." not in name and "/" not in name:
        return adapter_path(options.model, name)
    return Path(name)


def config_of(adapter: Path | None) -> actvar.ActVARConfig:
    """Return the configuration of an adapter, or the paper's without an adapter."""
    return actvar.ActVARConfig() if adapter is None else read_adapter_config(adapter)


def describe(config: actvar.ActVARConfig) -> str:
    """Return one line about the rates and scales of a configuration."""

    def text(rate: float | tuple[float, ...]) -> str:
        return f"{min(rate):.0%}-{max(rate):.0%}" if isinstance(rate, tuple) else f"{rate:.0%}"

    tokens = "/".join(text(rate) for rate in config.token_rates)
    ffn = "/".join(text(rate) for rate in config.ffn_rates)
    experts = f"{config.num_experts} {'static ' if config.static_experts else ''}experts"
    strength = config.guidance_strength
    imitated = "" if strength is None else f", then imitated up to strength {strength:g}"
    guidance = "" if config.guidance_until is None else f", guidance until scale {config.guidance_until}{imitated}"
    sampled = "" if config.scales_until is None else f", sampled until scale {config.scales_until}"
    return f"tokens {tokens}, FFN {ffn} of {experts} at scales {config.scales}{guidance}{sampled}"


def expect_file(option: str, file: Path | None) -> None:
    """Raise a ValueError unless `file`, if given, can be written, in a folder that exists or can be made."""
    if file is None:
        return
    if file.is_dir():
        raise ValueError(f"{option}: expected the name of a file, got the folder {file}")
    _expect_folder(option, file, file.parent)


def expect_folder(option: str, folder: Path | None) -> None:
    """Raise a ValueError unless `folder`, if given, exists or can be made, and can be written to."""
    if folder is None:
        return
    if folder.suffix.lower() in FILE_SUFFIXES and not folder.is_dir():
        raise ValueError(
            f"{option}: expected a folder, in which files get names of their own, got the file {folder}; give "
            f"{folder.with_suffix('')} instead"
        )
    _expect_folder(option, folder, folder)


def _expect_folder(option: str, given: Path, folder: Path) -> None:
    """Raise a ValueError unless `folder`, or the nearest folder above it that exists, can be written to."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{option}: expected a folder at {folder}, where there is a file, to write {given}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: expected a folder that can be written to at {folder}, to write {given}")


def with_rates(
    config: actvar.ActVARConfig, rates: list[float] | None, scales: list[int] | None = None
) -> actvar.ActVARConfig:
    """Return `config` at the rates of --rates, or unchanged without any.

    Args:
        config: the configuration.
        rates: token rates of the scales, then the FFN's.
        scales: numbers of the scales; None for the last ones.
    """
    if not rates:
        return config
    if len(rates) < 2:
        raise ValueError(f"--rates: expected token rates, then the FFN's, e.g. 0.75 0.75 0.75, got {rates}")
    *token_rates, ffn_rate = rates
    active = tuple(range(-len(token_rates), 0)) if scales is None else tuple(scales)
    return replace(config, scales=active, token_rates=tuple(token_rates), ffn_rate=ffn_rate)


def positive(text: str) -> int:
    """Return the whole number of at least 1 in an option's text."""
    return _whole(text, 1)


def at_once(text: str) -> int:
    """Return the whole number in an option's text that counts things which are in memory together."""
    return _whole(text, 1, MOST_AT_ONCE)


def _whole(text: str, least: int, most: int | None = None) -> int:
    """Return the whole number in an option's text, which must be from `least` to `most`."""
    number = _parsed(int, text)
    if number is None or number < least or (most is not None and number > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, got {text!r:.100}")
    return number


def integer(text: str) -> int:
    """Return the whole number in an option's text."""
    number = _parsed(int, text)
    if number is None:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r:.100}")
    return number


def number(text: str) -> float:
    """Return the number in an option's text."""
    found = _parsed(float, text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r:.100}")
    return found


def labels_of(text: str) -> tuple[int | str, ...]:
    """Return the classes in an option's text, such as `0-9`, `207,980` or `sandal,bag`; see `numbered`."""
    labels: list[int | str] = []
    for part in text.split(","):
        if part.lower() in _NAMED:
            labels.append(part)
            continue
        ends = [_parsed(int, end) if end.isdecimal() else None for end in part.split("-")]
        numbers = [end for end in ends if end is not None]
        if len(numbers) < len(ends) or len(ends) > 2:
            raise argparse.ArgumentTypeError(
                f"expected class numbers such as 0-9 or 207,980, or names of actvar models, got {text!r:.100}"
            )
        if not 0 <= numbers[-1] - numbers[0] < MOST_AT_ONCE:
            raise argparse.ArgumentTypeError(f"expected a range of 1 to {MOST_AT_ONCE} classes, got {part!r:.100}")
        labels.extend(range(numbers[0], numbers[-1] + 1))
    return tuple(labels)


def label_of(text: str) -> int | str:
    """Return the class in an option's text, a number or a name; see `numbered`."""
    return text if text.lower() in _NAMED else integer(text)


def numbered(options: argparse.Namespace, labels: Sequence[int | str], option: str) -> tuple[int, ...]:
    """Return the numbers of classes, some of which may be named.

    Raises:
        ValueError: a name for another model than a bundled one; the message begins with `option`.
    """
    named = next((label for label in labels if isinstance(label, str)), None)
    if named is not None and not options.model:
        raise ValueError(f"{option}: expected class numbers with --var, whose classes have no names, got {named!r}")
    return tuple(_NAMED[label.lower()] if isinstance(label, str) else label for label in labels)


def _parsed(kind: Callable[[str], Number], text: str) -> Number | None:
    """Return the number in `text`, or None where there is no number, or one of thousands of digits."""
    try:
        return kind(text)
    except ValueError:
        return None


def write_json(path: Path, values: dict[str, object]) -> None:
    """Write `values` as JSON, after the versions of actvar and torch."""
    versions = {"actvar": actvar.__version__, "torch": torch.__version__}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(versions | values, indent=1) + "\n", "utf-8")
