"""The command line: `actvar sample`, `inspect`, `evaluate`, `distill`, `calibrate`, `verify`, `flops`, `info`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import actvar
from actvar.adapter import describe_adapter, read_adapter_config
from actvar.bulk import Bulk, sample_many, write_npz
from actvar.calibrate import calibrate
from actvar.checkpoint import describe_checkpoint, usable_device
from actvar.compare import Sampling, compare, save_pictures
from actvar.distill.data import source_of
from actvar.distill.recipes import RECIPES
from actvar.distill.run import Distillation, distill
from actvar.files import replacing
from actvar.flops_report import AGREEMENT, MODEL_NAMES, flops_report, save_plot
from actvar.inspection import inspect_sample, save_page
from actvar.models import VAR
from actvar.patch import patched_silently, warn_untrained
from actvar.pictures import save_grid
from actvar.training import launched_processes, rank
from actvar.verify import verify
from actvar.zoo.fashion_mnist.data import CLASSES, DEBIAN_FOLDER
from actvar.zoo.pretrained import WEIGHTS, adapter_path, bundled_adapters
from actvar_kernels import BackendUnavailableError, cpu, get_backend
from actvar_kernels.backend import BACKENDS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MOST_LABELS = 1_000_000
DTYPES |= {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Parser(argparse.ArgumentParser):
    """Errors are one line that says what to do, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (try {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `actvar` command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, BackendUnavailableError) as error:
        parser.exit(2, f"actvar {options.command}: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="actvar", description="Sample pretrained VAR image generators faster with ActVAR.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    sample = commands.add_parser("sample", help="sample images; --compare also times dense against ActVAR")
    _add_source(sample, "best")
    sample.add_argument("--dtype", choices=DTYPES, default="fp32", help="transformer weights (default fp32)")
    what = sample.add_argument_group("images")
    what.add_argument("--labels", "--classes", type=_labels, help="e.g. 0-9 or 207,980 (default for --num: all)")
    what.add_argument("--per-class", type=_positive, help="images per class (default 1)")
    _add_draw(what)
    sample.add_argument("--dense", action="store_true", help="sample without ActVAR")
    sample.add_argument("--compare", action="store_true", help="dense and ActVAR with the same seed, side by side")
    sample.add_argument("--repeats", type=_positive, default=5, help="timed runs of each (default 5)")
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder to write to (default samples)")
    many = sample.add_argument_group("many images; by 2 processes: torchrun --nproc-per-node 2 -m -- actvar sample ...")
    many.add_argument("--num", type=_positive, help="so many images of all classes together, as shards; resumes")
    many.add_argument("--batch", type=_positive, help="images per batch and shard (default 50)")
    many.add_argument("--npz", type=Path, help="file to write all of them to, shuffled, for OpenAI's evaluator")
    sample.set_defaults(run=_sample)

    look = commands.add_parser("inspect", help="one image from inside, as an HTML page: scales, tokens, experts, cost")
    _add_source(look, "best")
    look.add_argument("--dtype", choices=DTYPES, default="fp32", help="transformer weights (default fp32)")
    look.add_argument("--label", "--class", type=int, required=True, help="the image's class, e.g. 7")
    _add_draw(look)
    look.add_argument("--repeats", type=_positive, default=5, help="timed runs of each way (default 5)")
    look.add_argument("--out", type=Path, default=Path("inspect.html"), help="the page (default inspect.html)")
    look.set_defaults(run=_inspect)

    judge = commands.add_parser("evaluate", help="quality, time and FLOPs of ActVAR beside other methods; resumes")
    _add_source(judge, adapter=False)
    judge.add_argument("--dtype", choices=DTYPES, default="fp32", help="transformer weights (default fp32)")
    judge.add_argument(
        "--methods",
        default="all",
        help="comma-separated names, or files of adapters (default all); unknown: lists them",
    )
    judge.add_argument("--num", type=_positive, default=5000, help="images per method and seed (default 5000)")
    judge.add_argument("--repeats", type=_positive, default=1, help="seeds, from --seed on (default 1)")
    judge.add_argument("--batch", type=_positive, default=50, help="images per batch (default 50)")
    judge.add_argument("--rounds", type=_positive, default=5, help="timed batches per method (default 5)")
    _add_draw(judge)
    judge.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST's files, for --model")
    judge.add_argument(
        "--json", type=Path, default=Path("evaluation.json"), help="file to write; finished parts go beside it"
    )
    judge.add_argument("--plot", type=Path, help="PNG file to draw quality over time to")
    judge.add_argument("--npz", type=Path, help="folder for the images of each method, for OpenAI's evaluator")
    judge.set_defaults(run=_evaluate)

    train = commands.add_parser("distill", help="train an adapter; run the same command again to go on with it")
    _add_source(train)
    train.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast (default fp32)")
    train.add_argument("--stage", type=int, choices=[1, 2], required=True, help="1: selectors, routers; 2: weights")
    train.add_argument(
        "--recipe", choices=RECIPES, default="paper", help="the paper's choices (default), or the best found here"
    )
    train.add_argument("--out", type=Path, required=True, help="adapter file; checkpoints and losses go beside it")
    train.add_argument("--data", help="folder of images in a subfolder per class, of Fashion-MNIST's files, or none")
    train.add_argument("--samples", type=_positive, default=10_000, help="token maps for --data none (default 10000)")
    what = train.add_argument_group("what is sparse (default: as in --adapter, else the paper's)")
    what.add_argument("--scales", nargs="+", type=int, help="e.g. -2 -1 for the last two")
    what.add_argument("--rates", nargs="+", type=float, help="token rate of each scale, then the FFN's")
    what.add_argument("--experts", type=_positive, help="experts the FFN is cut into")
    how = train.add_argument_group("training")
    how.add_argument("--epochs", type=float, help="passes over the data (default 2 for stage 1, 10 for stage 2)")
    how.add_argument("--batch", type=_positive, default=256, help="over all processes (default 256)")
    how.add_argument("--lr", type=float, help="peak (default 1e-4 per 256 of the batch; stage 2 of best 2e-3)")
    how.add_argument("--accumulate", type=_positive, default=1, help="parts a batch is computed in (default 1)")
    how.add_argument("--ema", type=float, default=0.0, help="decay of the average of the weights, e.g. 0.999")
    how.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1)")
    how.add_argument("--seed", type=int, default=0)
    train.set_defaults(run=_distill)
    fit = commands.add_parser("calibrate", help="make an adapter without data or training, in minutes")
    _add_source(fit, adapter=None)
    fit.add_argument("--dtype", choices=DTYPES, default="fp32", help="transformer weights (default fp32)")
    fit.add_argument(
        "--out", type=Path, required=True, help="adapter file to write; the report goes beside it as .json"
    )
    fit.add_argument(
        "--rates", nargs="+", type=float, help="token rates of the last scales, then the FFN's (default 0.75 0.75 0.75)"
    )
    fit.add_argument("--uniform", action="store_true", help="these rates in every block, not the best at their FLOPs")
    fit.add_argument("--experts", type=_positive, default=16, help="groups of hidden units (default 16)")
    fit.add_argument("--images", type=_positive, default=16, help="samples to fit to (default 16)")
    fit.add_argument("--cfg", type=float, default=1.5, help="guidance strength of the samples (default 1.5)")
    fit.add_argument("--seed", type=int, default=0)
    fit.set_defaults(run=_calibrate)

    check = commands.add_parser("verify", help="check a checkpoint with ActVAR; exit code 1 if anything differs")
    _add_source(check)
    check.add_argument("--dtype", nargs="+", choices=DTYPES, default=[], help="besides fp32, which is always checked")
    check.add_argument(
        "--backend", nargs="+", choices=set(BACKENDS) - {"auto"}, help="default: those that run on the device"
    )
    _add_rates(check)
    check.add_argument("--batch", type=_positive, default=1, help="images per sample (default 1)")
    check.add_argument("--public-var", type=Path, help="clone of the public VAR code: its class must agree as well")
    check.add_argument("--json", type=Path, help="file to write every comparison to")
    check.set_defaults(run=_verify)

    count = commands.add_parser("flops", help="FLOPs by module and step; exit code 1 if torch counts other ones")
    count.add_argument("--model", choices=MODEL_NAMES, required=True, help="an official size, or the bundled model")
    _add_rates(count)
    count.add_argument("--batch", type=_positive, default=1, help="images (default 1)")
    count.add_argument("--paper", action="store_true", help="also the savings of the paper's tables, row by row")
    count.add_argument("--json", type=Path, help="file to write every figure to")
    count.add_argument("--plot", type=Path, help="PNG file to draw FLOPs by module and step to")
    count.set_defaults(run=_flops)

    info = commands.add_parser("info", help="describe a checkpoint or adapter, or, without a file, this installation")
    info.add_argument("file", nargs="?", help="a file, or owner/repo:file on the hub")
    info.set_defaults(run=_info)
    return parser


def _add_source(command: argparse.ArgumentParser, adapter: str | None = "paper") -> None:
    """`adapter`: the bundled one that --model takes by default; None for a command that reads none."""
    source = command.add_argument_group("model")
    source.add_argument("--model", choices=sorted(WEIGHTS), help="a model that comes with the package")
    source.add_argument("--var", help="transformer checkpoint: .pth, .safetensors, or owner/repo:file on the hub")
    source.add_argument("--vae", help="autoencoder checkpoint, likewise")
    if adapter:
        source.add_argument(
            "--adapter", help=f"adapter file, or the name of a bundled one (default for --model: {adapter})"
        )
    source.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")


def _add_draw(command: argparse._ActionsContainer) -> None:
    command.add_argument("--cfg", type=float, default=1.5, help="guidance strength (default 1.5)")
    command.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens (default 0: all)")
    command.add_argument("--top-p", type=float, default=0.0, help="from the likeliest that reach p (default 0: all)")
    command.add_argument("--seed", type=int, default=0, help="of the sampling noise (default 0)")


def _add_rates(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rates", nargs="+", type=float, help="token rates of the last scales, then the FFN's, e.g. 0.75 0.75 0.75"
    )


def _check_source(options: argparse.Namespace) -> None:
    if (options.model is None) == (options.var is None):
        raise ValueError("give either --model, or --var with --vae")
    if (options.var is None) != (options.vae is None):
        raise ValueError("--var needs --vae, the checkpoint of its autoencoder, and the other way round")


def _sample(options: argparse.Namespace) -> None:
    _check_source(options)
    _check_images(options)
    sampling = Sampling(options.labels or (), options.cfg, options.top_k, options.top_p, options.seed)
    var, config, adapter = _load_to_sample(options, sampling.labels, "--labels")
    if adapter is None and not options.dense:
        warn_untrained(config)
    if options.num:
        with contextlib.nullcontext() if options.dense else patched_silently(var, config, adapter):
            _sample_many(var, sampling, options)
        return
    per_class = options.per_class or 1
    labels = tuple(label for label in sampling.labels for _ in range(per_class))
    sampling = replace(sampling, labels=labels)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compare:
        result = compare(var, config, adapter, sampling, options.repeats)
        titles = [_class_name(options, label) for label in labels]
        written = save_pictures(var, config, adapter, sampling, options.out, per_class, titles)
        print(f"{len(labels)} images, cfg {options.cfg}, {options.dtype}, {torch.get_num_threads()} threads,", end=" ")
        print(f"median of {options.repeats}; {_describe(config)}")
        print(result.table())
    elif options.dense:
        written = [save_grid(sampling.run(var), options.out / "dense.png", per_class)]
    else:
        with patched_silently(var, config, adapter):
            written = [save_grid(sampling.run(var), options.out / "actvar.png", per_class)]
    print("wrote " + ", ".join(str(path) for path in written))


def _load_to_sample(
    options: argparse.Namespace, labels: tuple[int, ...], option: str
) -> tuple[VAR, actvar.ActVARConfig, Path | None]:
    """The model, and the adapter with its configuration, or without one the paper's."""
    _, var = _load(options, DTYPES[options.dtype])
    if options.top_k > var.V:
        raise ValueError(f"--top-k: the model has {var.V} tokens to choose from, got {options.top_k}")
    bad = [label for label in labels if not 0 <= label < var.num_classes]
    if bad:
        raise ValueError(f"{option}: the model has classes 0-{var.num_classes - 1}, got {bad[0]}")
    adapter = _adapter(options, "best")
    return var, actvar.ActVARConfig() if adapter is None else read_adapter_config(adapter), adapter


def _class_name(options: argparse.Namespace, label: int) -> str:
    return CLASSES[label] if options.model else f"class {label}"


def _inspect(options: argparse.Namespace) -> None:
    _check_source(options)
    _expect_folder("--out", options.out)
    sampling = Sampling((options.label,), options.cfg, options.top_k, options.top_p, options.seed)
    var, config, adapter = _load_to_sample(options, sampling.labels, "--label")
    if adapter is None:
        warn_untrained(config)
    inspection = inspect_sample(var, config, adapter, sampling, options.repeats)
    facts = (
        f"{options.model or Path(options.var).name}, {options.dtype}",
        adapter.name if adapter else "untrained gates: time and FLOPs are those of ActVAR, the image is not",
        _describe(config),
        f"seed {options.seed}, guidance {options.cfg}, top-k {options.top_k}, top-p {options.top_p}",
        f"{options.device}, {torch.get_num_threads()} threads, actvar {actvar.__version__}, torch {torch.__version__}",
    )
    print(f"wrote {save_page(inspection, options.out, _class_name(options, options.label), facts)}")


def _check_images(options: argparse.Namespace) -> None:
    """Options of a few images and of many do not mix."""
    if options.dense and options.compare:
        raise ValueError("--dense samples without ActVAR; leave it out for --compare")
    if options.num:
        if options.compare or options.per_class:
            raise ValueError("--num draws shards; leave out --compare and --per-class")
        _expect_folder("--npz", options.npz)
    elif options.batch or options.npz:
        raise ValueError("--batch and --npz belong to --num, which draws many images")
    elif options.labels is None:
        raise ValueError("--labels: say which classes to draw, e.g. 0-9, or how many images of all of them with --num")


def _sample_many(var: torch.nn.Module, sampling: Sampling, options: argparse.Namespace) -> None:
    rank, processes = _of_process("RANK", 0), _of_process("WORLD_SIZE", 1)
    sampling = replace(sampling, labels=sampling.labels or tuple(range(var.num_classes)))
    bulk = Bulk(sampling, options.num, options.batch or 50)
    sample_many(var, bulk, options.out, rank, processes)
    if rank == 0:
        print(f"{options.num} images in {options.out}")
        if options.npz:
            write_npz(options.out, bulk, options.npz)
            print(f"wrote {options.npz}")


def _of_process(variable: str, default: int) -> int:
    """What torchrun tells its processes."""
    return int(os.environ.get(variable, default))


def _load(options: argparse.Namespace, dtype: torch.dtype):
    if torch.cuda.is_available():
        torch.cuda.set_device(_of_process("LOCAL_RANK", 0) % torch.cuda.device_count())
    placement = dict(device=_device(options.device), dtype=dtype)
    if options.model:
        return actvar.load_pretrained(options.model, **placement)
    return actvar.load_var(options.var, options.vae, **placement)


def _device(name: str) -> torch.device:
    try:
        return usable_device(name)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def _adapter(options: argparse.Namespace, bundled: str = "paper") -> Path | None:
    """The adapter's file, with --model by default the `bundled` one; a name without a suffix is a bundled one."""
    comes_with = bundled_adapters(options.model) if options.model else []
    name = options.adapter or (bundled if bundled in comes_with else None)
    if name is None:
        return None
    if options.model and "." not in name:
        return adapter_path(options.model, name)
    return Path(name)


def _describe(config: actvar.ActVARConfig) -> str:
    def text(rate: float | tuple[float, ...]) -> str:
        return f"{min(rate):.0%}-{max(rate):.0%}" if isinstance(rate, tuple) else f"{rate:.0%}"

    tokens = "/".join(text(rate) for rate in config.token_rates)
    ffn = "/".join(text(rate) for rate in config.ffn_rates)
    return f"tokens {tokens}, FFN {ffn} of {config.num_experts} experts at scales {config.scales}"


def _evaluate(options: argparse.Namespace) -> None:
    _check_source(options)
    _expect_folder("--json", options.json)
    _expect_folder("--plot", options.plot)
    if options.plot and not options.model:
        raise ValueError("--plot: quality is measured of the bundled model; of others --npz writes the images")
    try:
        from actvar.evaluate.bundled import dense_predictions, training_image_quality
        from actvar.evaluate.methods import chosen_methods, methods_of
        from actvar.evaluate.report import Report, save_quality_plot
        from actvar.evaluate.run import Evaluation, evaluate, write_samples
    except ImportError as error:
        raise ImportError(f"{error}; install the packages of evaluation: pip install actvar[eval]") from error
    names = ("num", "seed", "repeats", "batch", "cfg", "top_k", "top_p", "rounds")
    how = Evaluation(**{name: getattr(options, name) for name in names})
    vae, var = _load(options, DTYPES[options.dtype])
    placement = dict(device=_device(options.device), dtype=DTYPES[options.dtype])
    methods = chosen_methods(options.methods, methods_of(options.model, **placement))
    quality = dense = None
    how.bulk(var, options.seed)  # says what is wrong with the numbers before anything is read
    if options.model:
        quality = training_image_quality(options.data, var.head.weight.device)
        dense = dense_predictions(vae, var, options.data, options.cfg)
    results = evaluate(var, methods, how, options.json.with_suffix(".parts"), quality, dense)
    report = Report(results, how, var.patch_nums)
    facts = {"actvar": actvar.__version__, "torch": torch.__version__, "model": options.model or Path(options.var).name}
    facts |= {"device": options.device, "dtype": options.dtype, "threads": torch.get_num_threads()}
    with replacing(options.json) as temporary:
        temporary.write_text(json.dumps(facts | report.as_dict(), indent=1) + "\n", "utf-8")
    print(report.table())
    written = [options.json]
    if options.plot:
        written.append(save_quality_plot(report, options.plot))
    if options.npz:
        written += write_samples(var, methods, how, options.npz)
    print("wrote " + ", ".join(map(str, written)))


def _distill(options: argparse.Namespace) -> None:
    _check_source(options)
    data = options.data or (str(DEBIAN_FOLDER) if options.model else None)
    if data is None:
        raise ValueError("--data: expected a folder, or none to sample token maps from the model itself")
    if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
        raise ValueError(f"--out: expected a .safetensors file in a folder that exists, got {options.out}")
    adapter = _adapter(options) if options.stage == 2 or options.adapter else None
    config = actvar.ActVARConfig() if adapter is None else read_adapter_config(adapter)
    if options.scales and not options.rates:
        raise ValueError("--scales: give --rates as well, a token rate for each scale, then the FFN's")
    config = _with_rates(config, options.rates, options.scales)
    if options.experts:
        config = replace(config, num_experts=options.experts)
    names = ("stage", "epochs", "batch", "lr", "accumulate", "ema", "clip", "seed")
    given = {name: getattr(options, name) for name in names}
    how = Distillation(**given, recipe=RECIPES[options.recipe], bf16=options.dtype == "bf16")
    with launched_processes(_device(options.device)) as device:
        options.device = str(device)
        vae, var = _load(options, torch.float32)
        source = source_of(data, vae, var, options.samples, options.seed)
        written = distill(vae, var, config, adapter, source, how, options.out)
        if rank() == 0:
            print(f"wrote {written}; {_describe(config)}")


def _calibrate(options: argparse.Namespace) -> None:
    _check_source(options)
    if not options.out.parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {options.out}")
    if options.out.suffix == ".json":
        raise ValueError(f"--out: expected the adapter's name, such as adapter.safetensors, got {options.out}")
    config = _with_rates(actvar.ActVARConfig(num_experts=options.experts), options.rates)
    _, var = _load(options, DTYPES[options.dtype])
    begin = time.perf_counter()
    report = calibrate(var, config, images=options.images, seed=options.seed, cfg=options.cfg, uniform=options.uniform)
    seconds = time.perf_counter() - begin
    actvar.save_adapter(var, options.out)
    facts = {"actvar": actvar.__version__, "torch": torch.__version__, "device": options.device}
    facts |= {"images": options.images, "cfg": options.cfg, "seed": options.seed, "seconds": round(seconds, 1)}
    written = options.out.with_suffix(".json")
    with replacing(written) as temporary:
        temporary.write_text(json.dumps(facts | report.as_dict(), indent=1) + "\n")
    print(report.table())
    print(f"wrote {options.out}, {written}; {options.images} samples, {seconds:.0f} s")


def _verify(options: argparse.Namespace) -> None:
    _check_source(options)
    _expect_folder("--json", options.json)
    adapter = _adapter(options)
    config = _with_rates(actvar.ActVARConfig() if adapter is None else read_adapter_config(adapter), options.rates)
    sampling = Sampling((0,) * options.batch)
    dtypes = [DTYPES[name] for name in options.dtype]
    report = verify(
        lambda dtype: _load(options, dtype)[1], config, adapter, sampling, dtypes, options.backend, options.public_var
    )
    print(f"batch {options.batch} on {options.device}; {_describe(config)}")
    print(report.table())
    print(report.summary())
    if options.json:
        facts = {"actvar": actvar.__version__, "torch": torch.__version__, "device": options.device}
        facts |= {"batch": options.batch, "config": asdict(config)}
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(facts | report.as_dict(), indent=1) + "\n")
    if report.failures:
        raise SystemExit(1)


def _expect_folder(option: str, file: Path | None) -> None:
    if file is not None and (not file.parent.is_dir() or file.is_dir()):
        raise ValueError(f"{option}: expected a file in a folder that exists, got {file}")
    if file is not None and not os.access(file.parent, os.W_OK):
        raise ValueError(f"{option}: expected a file in a folder that can be written to, got {file}")


def _with_rates(
    config: actvar.ActVARConfig, rates: list[float] | None, scales: list[int] | None = None
) -> actvar.ActVARConfig:
    """`config` at the rates of `--rates`, if there are any: of the last scales unless `scales` are given."""
    if not rates:
        return config
    if len(rates) < 2:
        raise ValueError(f"--rates: expected token rates, then the FFN's, e.g. 0.75 0.75 0.75, got {rates}")
    *token_rates, ffn_rate = rates
    scales = tuple(range(-len(token_rates), 0)) if scales is None else tuple(scales)
    return replace(config, scales=scales, token_rates=tuple(token_rates), ffn_rate=ffn_rate)


def _flops(options: argparse.Namespace) -> None:
    _expect_folder("--json", options.json)
    _expect_folder("--plot", options.plot)
    config = _with_rates(actvar.ActVARConfig(), options.rates)
    report = flops_report(options.model, config, options.batch, options.paper)
    print(f"{options.model}, batch {options.batch}; {_describe(config)}")
    print(report.text())
    if options.json:
        facts = {"actvar": actvar.__version__, "torch": torch.__version__}
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(facts | report.as_dict(), indent=1) + "\n")
    if options.plot:
        save_plot(report, options.plot)
    if report.worst_difference > AGREEMENT:
        raise SystemExit(1)


def _info(options: argparse.Namespace) -> None:
    if options.file is None:
        facts = {
            "actvar": actvar.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "backend": get_backend(),
            "C++ experts": cpu.why_unavailable() or cpu.level_name(cpu.best_level()),
        }
    else:
        facts = _describe_file(options.file)
    for name, value in facts.items():
        print(f"{name:<16}{value}")


def _describe_file(path: str) -> dict[str, object]:
    """An adapter or a checkpoint; when it is neither, the checkpoint reader's error."""
    if Path(path).is_file():
        with contextlib.suppress(actvar.AdapterError):
            return describe_adapter(path)
    return describe_checkpoint(path)


def _labels(text: str) -> tuple[int, ...]:
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise argparse.ArgumentTypeError(f"expected class numbers such as 0-9 or 207,980, got {text!r}")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not 1 <= len(numbers) <= MOST_LABELS:
            raise argparse.ArgumentTypeError(f"expected a range of 1 to {MOST_LABELS} classes, got {part!r}")
        labels.extend(numbers)
    return tuple(labels)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
