"""Fit an adapter without data or training, and measure how near its images are to the dense ones.

    python examples/calibrate_and_evaluate.py --out adapter.safetensors

The bundled model is taken; for one of your own load it by `actvar.load_var`.
"""

import argparse

import torch

import actvar
from actvar.calibrate import calibrate
from actvar.evaluate.divergence import divergence_by_scale
from actvar.evaluate.similarity import psnr, ssim
from actvar.sampling.token_maps import sampled_inputs


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Write the adapter, print its figures, and return PSNR and SSIM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-mnist", help="a bundled model")
    parser.add_argument("--images", type=int, default=16, help="samples to fit to, and to measure on")
    parser.add_argument("--out", default="adapter.safetensors")
    options = parser.parse_args(arguments)
    _, var = actvar.load_pretrained(options.model)

    labels = torch.arange(options.images) % var.num_classes
    dense = var.autoregressive_infer_cfg(len(labels), labels, g_seed=7, cfg=1.5)
    print(calibrate(var, images=options.images, cfg=1.5).table())  # leaves the model patched
    actvar.save_adapter(var, options.out)

    sparse = var.autoregressive_infer_cfg(len(labels), labels, g_seed=7, cfg=1.5)
    figures = {"PSNR": psnr(sparse, dense), "SSIM": ssim(sparse, dense)}
    print(actvar.summary(var))
    print(f"to the dense images of the same seed: PSNR {figures['PSNR']:.1f} dB, SSIM {figures['SSIM']:.3f}")

    maps = sampled_inputs(var, options.images, batch=8, seed=7, cfg=1.5)
    print("KL to the dense predictions by scale:", *(f"{kl:.4f}" for kl in divergence_by_scale(var, maps)))
    return figures


if __name__ == "__main__":
    main()
