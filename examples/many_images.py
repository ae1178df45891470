"""Draw many images by several processes, each with the seed of its own number.

    torchrun --nproc-per-node 2 -- examples/many_images.py --num 1000 --out images

Run again after an interruption, it draws what is missing. Without torchrun one process draws all.
"""

import argparse
import os
from pathlib import Path

import torch

import actvar
from actvar.sampling.request import Sampling
from actvar.sampling.shards import Bulk, read_images, sample_many


def main(arguments: list[str] | None = None) -> None:
    """Draw the share of this process, and say in the first one what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-mnist", help="a bundled model")
    parser.add_argument("--num", type=int, default=1000, help="a multiple of the number of classes")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("images"))
    options = parser.parse_args(arguments)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    device = f"cuda:{rank % gpus}" if gpus else "cpu"

    _, var = actvar.load_pretrained(options.model, device=device, preset="lossless")
    bulk = Bulk(Sampling(tuple(range(var.num_classes)), cfg=1.5, seed=0), options.num, options.batch, format="png")
    sample_many(var, bulk, options.out, rank, processes)
    if rank == 0:  # which returns when all images are there
        images, labels = read_images(options.out, bulk)
        print(f"{len(images)} images {images.shape[1:]} of {len(set(labels.tolist()))} classes in {options.out}")


if __name__ == "__main__":
    main()
