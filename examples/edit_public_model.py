"""Paint a part of an image anew, by a loop of your own over the public code's model.

    git clone https://github.com/FoundationVision/VAR
    PYTHONPATH=VAR python examples/edit_public_model.py --var var_d16.pth --vae vae_ch160v4096z32.pth \\
        --image dog.png --label 207 --out edited.png

The loop uses the public class alone. One line before it makes the model faster, and the loop does not change.
"""

import argparse

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import actvar

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIZES = dict(V=4096, Cvae=32, ch=160, share_quant_resi=4, patch_nums=SIDES, num_classes=1000, depth=16)


@torch.no_grad()
def inpaint(vae, var, image: torch.Tensor, new: torch.Tensor, label: int, cfg: float, seed: int) -> torch.Tensor:
    """Return `image` with the tokens where `new` holds drawn again.

    Args:
        vae: the public VQVAE.
        var: the public VAR, patched or not.
        image: `[1, 3, H, W]` in [-1, 1].
        new: `[side, side]` bool, at the grid of the last scale.
        label: class of what is drawn.
        cfg: guidance strength.
        seed: of the noise.

    Returns:
        `[1, 3, H, W]` in [-1, 1].
    """
    device, sides = image.device, var.patch_nums
    generator = torch.Generator(device).manual_seed(seed)
    kept = vae.img_to_idxBl(image)
    classes = torch.tensor([label, var.num_classes], device=device)  # with and without the class
    embedded = var.class_emb(classes)
    modulation = var.shared_ada_lin(embedded)
    position = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    x = embedded.unsqueeze(1) + var.pos_start + position[:, : var.first_l]
    features = torch.zeros(1, var.Cvae, sides[-1], sides[-1], device=device)
    seen = 0

    for block in var.blocks:
        block.attn.kv_caching(True)
    for scale, side in enumerate(sides):
        seen += side * side
        for block in var.blocks:
            x = block(x=x, cond_BD=modulation, attn_bias=None)
        logits, unconditional = var.get_logits(x, embedded)
        logits = logits + cfg * scale / (len(sides) - 1) * (logits - unconditional)
        drawn = logits.softmax(-1).multinomial(1, generator=generator).view(side, side)
        paint = F.interpolate(new[None, None].float(), size=(side, side), mode="area")[0, 0] > 0.5
        tokens = torch.where(paint, drawn, kept[scale].view(side, side))
        codes = vae.quantize.embedding(tokens).permute(2, 0, 1)[None]
        features, following = vae.quantize.get_next_autoregressive_input(scale, len(sides), features, codes)
        if scale + 1 < len(sides):
            following = var.word_embed(following.flatten(2).transpose(1, 2))
            x = following.expand(2, -1, -1) + position[:, seen : seen + sides[scale + 1] ** 2]
    for block in var.blocks:
        block.attn.kv_caching(False)
    return vae.fhat_to_img(features)


def main(arguments: list[str] | None = None) -> None:
    """Paint the right half of an image anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("var", "vae", "image", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--label", type=int, required=True)
    parser.add_argument("--adapter", help="file of actvar calibrate or actvar distill (default: the dense model)")
    options = parser.parse_args(arguments)

    from models import build_vae_var  # of the public repository

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae, var = build_vae_var(device=device, shared_aln=False, **SIZES)
    vae.load_state_dict(torch.load(options.vae, weights_only=True))
    var.load_state_dict(torch.load(options.var, weights_only=True))
    var.eval()

    side = 16 * var.patch_nums[-1]
    with Image.open(options.image) as picture:
        pixels = np.asarray(picture.convert("RGB").resize((side, side)))
    image = torch.from_numpy(pixels.copy()).to(device).permute(2, 0, 1)[None] / 127.5 - 1
    new = torch.zeros(var.patch_nums[-1], var.patch_nums[-1], dtype=torch.bool, device=device)
    new[:, var.patch_nums[-1] // 2 :] = True

    if options.adapter:
        actvar.load_adapter(var, options.adapter)
    else:
        actvar.accelerate(var)
    edited = inpaint(vae, var, image, new, options.label, cfg=4.0, seed=0)
    values = (edited[0].clamp(-1, 1) + 1) * 127.5
    Image.fromarray(values.permute(1, 2, 0).round().byte().cpu().numpy()).save(options.out)


if __name__ == "__main__":
    main()
