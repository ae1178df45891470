"""Rebuild the bundled Fashion-MNIST models from the images: `python -m scripts.fashion_mnist`.

Every stage is skipped when it is finished and resumed when it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from actvar.training.processes import run_in_processes
from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER
from actvar.zoo.pretrained import WEIGHTS
from scripts.fashion_mnist.adapters import STAGE2, STATIC, ship, train_adapter, train_static
from scripts.fashion_mnist.export import export
from scripts.fashion_mnist.measure import measure, save
from scripts.fashion_mnist.presets import CONFIGS, train_preset
from scripts.fashion_mnist.small import export_small, small_plan, train_small
from scripts.fashion_mnist.train import Build, train


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m scripts.fashion_mnist", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the four idx files")
    parser.add_argument("--work", type=Path, default=Path("fashion-mnist-build"), help="checkpoints and loss logs")
    parser.add_argument("--processes", type=int, default=2, help="training processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-measure", action="store_true", help="measure the shipped files, train nothing")
    options = parser.parse_args()
    folder, small = WEIGHTS["fashion-mnist"], WEIGHTS["fashion-mnist-small"]
    if not options.only_measure:
        build = Build(options.data, options.work, options.seed)
        train(build, options.processes)
        export(build, folder)
        plan = small_plan(build.work, build.seed)
        run_in_processes(train_small, options.processes, build.data, plan)
        export_small(plan, small)
        for name in STAGE2:
            ship(train_adapter(name, folder, build.data, build.work, build.seed), name, folder)
        for name in STATIC:
            trained = train_static(name, folder, build.data, build.work, build.seed)
            ship(trained, name, folder, "baseline")
        for name in CONFIGS:
            ship(train_preset(name, folder, build.work, build.seed), name, folder, "preset")
    figures = measure(options.data)
    save(figures, folder / "quality.json")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
