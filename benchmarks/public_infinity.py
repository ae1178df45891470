"""Import the public Infinity code on a CPU, with stand-ins for packages that it imports and does not need here.

PyTorch's attention stands for flash-attn's. The public norm is `torch.compile`d; its formula runs without the compiler.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actvar.models import Infinity


def import_infinity(folder: Path) -> ModuleType:
    """Return the module `infinity.models.infinity` of the clone in `folder`."""
    sys.modules.update({name: module for name, module in _stand_ins().items() if name not in sys.modules})
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("infinity.models.infinity")
    finally:
        sys.path.remove(str(folder))
    module.fused_ada_layer_norm = _fused_ada_layer_norm  # pyright: ignore[reportAttributeAccessIssue]
    return module


def public_twin(module: ModuleType, own: Infinity, size: str, **changes: Any) -> nn.Module:
    """Return a public model with the sizes of ours, with weights of its own.

    Args:
        module: the result of `import_infinity`.
        own: our model.
        size: number of pixels that the model is for, such as "1M".
        changes: arguments of the public class.
    """
    options = dict(
        vae_local=_Sizes(own.vae_proxy[0].bits),
        text_channels=own.text_channels,
        text_maxlen=own.text_maxlen,
        shared_aln=True,
        customized_flash_attn=False,
        fused_norm=True,
        pad_to_multiplier=1,
        add_lvl_embeding_only_first_block=1,
        use_bit_label=1,
        rope2d_each_sa_layer=1,
        rope2d_normalized_by_hw=2,
        pn=size,
        inference_mode=True,
        train_h_div_w_list=[1.0],
        apply_spatial_patchify=int(own.spatial_patchify),
        depth=own.depth,
        embed_dim=own.C,
        num_heads=own.num_heads,
        block_chunks=1 if hasattr(own, "blocks") else len(own.block_chunks),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        public = module.Infinity(**options | changes)
    return public.eval().requires_grad_(False)


class _Sizes(nn.Module):
    """Stand for the tokenizer that the public class reads sizes of."""

    def __init__(self, bits: int):
        super().__init__()
        self.embed_dim, self.vocab_size = bits, 2**bits
        self.quantizer: Any = ModuleType("quantizer")
        self.quantizer.lfq = ModuleType("lfq")
        self.quantizer.lfq.mask = 2 ** torch.arange(bits)


def _fused_ada_layer_norm(C: int, eps: float, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (C,), None, None, eps).mul(scale.add(1)).add_(shift)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, **_: Any) -> Tensor:
    out = F.scaled_dot_product_attention(*(rows.transpose(1, 2) for rows in (q, k, v)), scale=softmax_scale)
    return out.transpose(1, 2)


def _flash_attention_of_lengths(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float | None = None, **_: Any
) -> Tensor:
    outs = []
    for row in range(len(cu_seqlens_q) - 1):
        of_row = q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]]
        k, v = kv[cu_seqlens_k[row] : cu_seqlens_k[row + 1]].unbind(1)
        outs.append(_flash_attention(of_row[None], k[None], v[None], softmax_scale)[0])
    return torch.cat(outs)


def _stand_ins() -> dict[str, ModuleType]:
    """Return modules by name: flash-attn by PyTorch's attention, the others without content."""
    names = ("flash_attn", "timm", "timm.models", "timm.models.layers", "timm.loss", "imageio", "torchvision", "pytz")
    modules = {name: ModuleType(name) for name in (*names, "torchvision.transforms")}
    for name in ("flash_attn", "timm", "timm.models", "imageio", "torchvision"):
        modules[name].__path__ = []
    parts: dict[str, dict[str, Any]] = {
        "flash_attn": {
            "flash_attn_func": _flash_attention,
            "flash_attn_varlen_kvpacked_func": _flash_attention_of_lengths,
        },
        "timm.models.layers": {"DropPath": nn.Identity, "drop_path": lambda x, *_: x},
        "timm.models": {"register_model": lambda f: f},
        "timm.loss": {"SoftTargetCrossEntropy": nn.Module},
        "torchvision": {"transforms": modules["torchvision.transforms"]},
    }
    for name, content in parts.items():
        for part, value in content.items():
            setattr(modules[name], part, value)
    return modules
