"""Build tiny public Infinity models beside ours, and draw bits from them with our tokenizer."""

from __future__ import annotations

import contextlib
import io
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from actvar.models import Infinity
from benchmarks import public_infinity
from support.infinity import tiny_infinity

SIZE = "0.06M"


def round_nowhere() -> None:
    """Let the public cross-attention keep float32, where sums in another order may round to the other side."""
    unrounded = ModuleType("torch")
    vars(unrounded).update(vars(torch) | {"bfloat16": torch.float32})
    sys.modules["infinity.models.basic"].torch = unrounded  # pyright: ignore[reportAttributeAccessIssue]


def public_and_own(module: ModuleType, patchify: bool = False, **changes: Any) -> tuple[nn.Module, Infinity]:
    """Return a tiny public model and ours, with the same weights unless there are `changes` of the public class."""
    tokenizer, own = tiny_infinity(patchify)
    lfq = tokenizer.quantizer.lfq
    lfq.indices_to_codes = lambda bits, label_type: lfq.to_codes(bits.squeeze(1)).unsqueeze(2)
    tokenizer.quantizer.z_interplote_up = "trilinear"
    public: Any = public_infinity.public_twin(module, own, SIZE, **changes)
    if not changes:
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
    lfq: Any = own.vae_proxy[0].quantizer.lfq
    codes = lfq.indices_to_codes
    lfq.indices_to_codes = lambda bits, label_type: (drawn.append(bits.squeeze(1)), codes(bits, label_type))[1]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            public.autoregressive_infer_cfg(**arguments | changes)
    finally:
        lfq.indices_to_codes = codes
    return drawn
