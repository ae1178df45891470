"""Rebuild the bundled model of texts from the images: `python -m scripts.fashion_mnist_text`.

Every stage is skipped when it is finished and resumed when it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER
from actvar.zoo.pretrained import TEXT_MODEL, WEIGHTS
from scripts.fashion_mnist_text.export import export
from scripts.fashion_mnist_text.measure import measure, save
from scripts.fashion_mnist_text.presets import CONFIGS, ship, train_preset
from scripts.fashion_mnist_text.train import Build, train


def main() -> None:
    """Train every stage that is not finished, and write the files that ship with the package."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m scripts.fashion_mnist_text", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of the four idx files")
    parser.add_argument("--work", type=Path, default=Path("fashion-mnist-text-build"), help="checkpoints and loss logs")
    parser.add_argument("--processes", type=int, default=2, help="training processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-measure", action="store_true", help="measure the shipped files, train nothing")
    parser.add_argument("--samples", type=int, default=5000, help="images to measure on (default 5000)")
    options = parser.parse_args()
    folder = WEIGHTS[TEXT_MODEL]
    if not options.only_measure:
        build = Build(options.data, options.work, options.seed)
        train(build, options.processes)
        export(build, folder)
        for name in CONFIGS:
            ship(train_preset(name, folder, build.work, build.seed), folder)
    figures = measure(options.data, options.samples)
    save(figures, folder / "quality.json")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
