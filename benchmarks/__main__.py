"""Run all benchmarks of a subset, into the CSV of this device: `python -m benchmarks --subset cpu`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from actvar_kernels.cpu_backend import cpu
from actvar_kernels.tools.compile_check import LineParser
from benchmarks import against, results, sampling, scaling
from benchmarks.providers import SUBSETS

# Model, batch, type and repeats of what is sampled; memory is measured at the largest batch of a model and type.
SAMPLES = {
    "quick": [("fashion-mnist", 1, "fp32", 3)],
    "cpu": [
        *(("fashion-mnist", batch, "fp32", 5) for batch in (1, 4, 16, 64)),
        ("d16", 1, "fp32", 3),
        ("d16", 1, "bf16", 3),
    ],
    "all": [
        *(("fashion-mnist", batch, dtype, 7) for batch in (1, 2, 4, 8, 16, 32, 64) for dtype in sampling.DTYPES),
        *(("d16", batch, dtype, 5) for batch in (1, 2, 4, 8) for dtype in sampling.DTYPES),
        *((model, 1, dtype, 3) for model in ("d20", "d24", "d30") for dtype in sampling.DTYPES),
    ],
}
AXES = {"quick": ["batch"], "cpu": list(scaling.AXES), "all": list(scaling.AXES)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = LineParser("python -m benchmarks", description=__doc__.split(":")[0])
    parser.add_argument("--subset", choices=SUBSETS, default="cpu", help="(default: two cores, 20 minutes)")
    parser.add_argument("--csv", type=Path, help="(default: benchmarks/results/<device>.csv)")
    parser.add_argument("--public-var", type=Path, help="clone of the public VAR code, to be sampled as well")
    parser.add_argument("--against", metavar="REV", help="compare with an earlier commit instead; writes no CSV")
    parser.add_argument("--only", default="", help="of --against: cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=against.REPEATS, help="of --against (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.against is not None:
        try:
            return against.compare(options.against, options.subset, options.only, options.repeats)
        except (ValueError, against.WorkerError) as error:
            parser.error(str(error))
    csv = options.csv or results.csv_of(results.device_name())
    public = [] if options.public_var is None else ["--public-var", str(options.public_var)]
    steps = [["pytest", "-q", str(Path(__file__).parent), "--subset", options.subset, "--timeout", "0"]]
    samples = SAMPLES[options.subset]
    largest = {(model, dtype): batch for model, batch, dtype, _ in samples}  # they ascend
    for model, batch, dtype, repeats in samples:
        if dtype == "bf16" and not cpu.multiplies_bfloat16():
            print(f"left out: operations and samples of {model} in bf16, which this processor has no instructions for")
            continue
        shape = ["--model", model, "--batch", str(batch), "--dtype", dtype, "--repeats", str(repeats)]
        memory = ["--memory"] if batch == largest[model, dtype] else []
        steps.append(["benchmarks.sampling", *shape, "--components", *memory, *public])
    steps.append(["benchmarks.scaling", "--axes", *AXES[options.subset]])
    failed = [step for step in steps if subprocess.run([sys.executable, "-m", *step, "--csv", str(csv)]).returncode]
    print(f"the numbers are in {csv}")
    for step in failed:
        print(f"failed: {' '.join(step)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
