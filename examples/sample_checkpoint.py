"""Sample a checkpoint of your own: the same images as before, sooner.

    python examples/sample_checkpoint.py --var var_d16.pth --vae vae_ch160v4096z32.pth --labels 207 980 --out pictures

The files may be the official ones, or one file of the public trainer given twice.
"""

import argparse
from pathlib import Path

import torch

import actvar


def main(arguments: list[str] | None = None) -> None:
    """Draw one picture of each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--var", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--adapter", help="file of actvar calibrate or actvar distill (default: the dense model)")
    parser.add_argument("--labels", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    vae, var = actvar.load_var(options.var, options.vae, device=device, dtype=dtype)
    if options.adapter:
        actvar.load_adapter(var, options.adapter)
    else:
        actvar.accelerate(var)

    sampler = actvar.Sampler(vae, var)
    pictures = sampler(options.labels, seeds=0, cfg=4.0, top_k=min(900, var.V), top_p=0.95)
    options.out.mkdir(parents=True, exist_ok=True)
    for label, picture in zip(options.labels, pictures, strict=True):
        picture.save(options.out / f"class-{label}.png")
    print(sampler.summary())


if __name__ == "__main__":
    main()
