"""Import the public Infinity code on a CPU, with stand-ins for packages that it imports and does not need here.

Its fused norm is `torch.compile`d; the same formula runs without the compiler here. Cross-attention does not round to
bfloat16, where sums in another order may fall to the other side.
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
from support.infinity import TINY, tiny_infinity

SIZE = "0.06M"


def import_infinity(folder: Path) -> ModuleType:
    """Return the module `infinity.models.infinity` of the clone in `folder`."""
    sys.modules.update({name: module for name, module in _stand_ins().items() if name not in sys.modules})
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("infinity.models.infinity")
    finally:
        sys.path.remove(str(folder))
    module.fused_ada_layer_norm = _fused_ada_layer_norm  # pyright: ignore[reportAttributeAccessIssue]
    unrounded = ModuleType("torch")
    vars(unrounded).update(vars(torch) | {"bfloat16": torch.float32})
    sys.modules["infinity.models.basic"].torch = unrounded  # pyright: ignore[reportAttributeAccessIssue]
    return module


def public_twin(
    module: ModuleType, patchify: bool = False, strict: bool = True, **changes: Any
) -> tuple[nn.Module, Infinity]:
    """Return a tiny public model and ours with the same weights.

    Args:
        module: the result of `import_infinity`.
        patchify: whether a token stands for 2x2 places.
        strict: whether both must have the same weights.
        changes: arguments of the public class.
    """
    tokenizer, own = tiny_infinity(patchify)
    tokenizer.embed_dim = tokenizer.bits
    tokenizer.quantizer.lfq.indices_to_codes = lambda bits, label_type: _codes(tokenizer, bits)
    tokenizer.quantizer.z_interplote_up = "trilinear"
    options = dict(
        vae_local=_Sizes(TINY["bits"]),
        text_channels=TINY["text_channels"],
        text_maxlen=TINY["text_maxlen"],
        shared_aln=True,
        customized_flash_attn=False,
        fused_norm=True,
        pad_to_multiplier=1,
        add_lvl_embeding_only_first_block=1,
        use_bit_label=1,
        rope2d_each_sa_layer=1,
        rope2d_normalized_by_hw=2,
        pn=SIZE,
        inference_mode=True,
        train_h_div_w_list=[1.0],
        apply_spatial_patchify=int(patchify),
        depth=TINY["depth"],
        embed_dim=TINY["embed_dim"],
        num_heads=TINY["num_heads"],
        block_chunks=TINY["block_chunks"],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        public = module.Infinity(**options | changes).eval().requires_grad_(False)
    if strict:
        public.load_state_dict(own.state_dict())
    public.rng = torch.Generator()
    return public, own


def sample_public(
    public: Any, own: Infinity, text: Tensor, lengths: list[int], schedule: list[tuple[int, int, int]], **changes: Any
) -> list[Tensor]:
    """Return the bits of every scale `[B, h, w, bits]` that the public class draws with our tokenizer."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    arguments = dict(
        vae=own.vae_proxy[0],
        scale_schedule=schedule,
        label_B_or_BLT=(text.clone(), lengths, ends, max(lengths)),
        B=len(lengths),
        cfg_list=[4.0] * len(schedule),
        tau_list=[1.0] * len(schedule),
        g_seed=1,
        top_k=900,
        top_p=0.97,
        returns_vemb=1,
        cfg_insertion_layer=[0],
        vae_type=1,
        inference_mode=True,
    )
    drawn: list[Tensor] = []
    lfq = own.vae_proxy[0].quantizer.lfq
    codes = lfq.indices_to_codes
    lfq.indices_to_codes = lambda bits, label_type: (drawn.append(bits.squeeze(1)), codes(bits, label_type))[1]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            public.autoregressive_infer_cfg(**arguments | changes)
    finally:
        lfq.indices_to_codes = codes
    return drawn


class _Sizes(nn.Module):
    """Stand for the tokenizer that the public class reads sizes of."""

    def __init__(self, bits: int):
        super().__init__()
        self.embed_dim, self.vocab_size = bits, 2**bits
        self.quantizer = ModuleType("quantizer")
        self.quantizer.lfq = ModuleType("lfq")
        self.quantizer.lfq.mask = 2 ** torch.arange(bits)


def _codes(tokenizer: Any, bits: Tensor) -> Tensor:
    """Return codes `[B, bits, 1, h, w]` of bits `[B, 1, h, w, bits]`."""
    return tokenizer.quantizer.lfq.to_codes(bits.squeeze(1)).unsqueeze(2)


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
