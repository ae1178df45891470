"""Draw tokens: classifier-free guidance, top-k, top-p and the draw in one operation."""

from __future__ import annotations

import torch

from actvar_kernels.backend import Backend, choose
from actvar_kernels.checks import as_integer, as_number, expect_one_device, expect_shape
from actvar_kernels.token_draw import cpu_kernel, reference

MOST_TOKENS = 16384
"""Vocabulary that one program of the Triton kernel holds."""


def sample_tokens(
    logits: torch.Tensor,
    guidance: float | None,
    top_k: int,
    top_p: float,
    seed: int | torch.Tensor | None = None,
    step: int = 0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token per position from `softmax((1 + guidance) * cond - guidance * uncond)`, filtered.

    Both filters are those of `actvar.models.token_draw`, with a rule for equal logits, which stay or go together:

    - top-k keeps the logits that reach the k-th largest;
    - top-p then removes a token if few probability lies at its logit or below. This is at most `1 - top_p` of what
      top-k left, the token itself included. The largest logits always stay.

    The draw is `argmax(p / e)` with `e = -log(u)` and independent uniform `u`, which has the distribution `p`. A token
    with a conditional logit of -inf is never drawn; no other logit may be infinite.

    With a seed, `u` is made as `tl.rand` makes it, by Philox 4x32-10 with the key `seed`. Row `r = b * L + l` and token
    `v` take output `v % 4` of the counter `(v // 4, r, step, 0)`. So `u` depends on nothing else, and all backends draw
    the same tokens except where rounding decides. Triton takes one launch that reads the logits once.

    Args:
        logits: `[2B, L, V]` float32, float16 or bfloat16, conditional rows first; computed with in float32.
        guidance: strength t of classifier-free guidance; None: logits `[B, L, V]` that are guided already.
        top_k: 0 ... V; 0 keeps all.
        top_p: 0 ... 1; 0 keeps all.
        seed: int, taken modulo 2^64, or an int64 tensor on the logits' device with one element, or with one for each
            image. With one for each, image b has the tokens of a batch of it alone with its seed. A CUDA graph reads
            such a tensor anew at every replay. The reference has to wait for the device to read it.
        step: another one gives another stream from the same seed, such as the index of the scale.
        noise: `[B, L, V]`, floating-point, uniform in (0, 1), instead of a seed; numbers that round to 0 or 1 are
            clipped.

    Returns:
        tokens `[B, L]` int64.

    Raises:
        ValueError: shapes, `top_k` or `top_p` that do not fit, or not exactly one of `seed` and `noise`.
        BackendUnavailableError: see `actvar_kernels.set_backend`. Triton takes up to 16384 tokens, C++ needs a
            compiler.
    """
    expect_shape("logits", logits, (None, None, None))
    rows, L, V = logits.shape
    images = rows if guidance is None else rows // 2
    if rows % 2 and guidance is not None:
        raise ValueError(f"logits: expected conditional and unconditional rows, got an odd number of rows, {rows}")
    guidance = None if guidance is None else as_number("guidance", guidance)
    top_k, top_p, step = as_integer("top_k", top_k), as_number("top_p", top_p), as_integer("step", step)
    if not 0 <= top_k <= V:
        raise ValueError(f"top_k: expected between 0 and {V}, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected between 0 and 1, got {top_p}")
    if (seed is None) == (noise is None):
        raise ValueError(f"seed, noise: expected exactly one of them, got {'neither' if seed is None else 'both'}")
    if noise is not None:
        expect_shape("noise", noise, (images, L, V))
        expect_one_device(logits, noise)
    seed_tensor, seed_number = None, 0
    if isinstance(seed, torch.Tensor):
        _expect_seed(seed, images, logits.device)
        seed_tensor = seed
    elif seed is not None:
        seed_number = (as_integer("seed", seed) + 2**63) % 2**64 - 2**63
    arguments = (logits, guidance, top_k, top_p, seed_tensor, seed_number, step, noise)
    backend = _choose(logits, noise)
    if backend.recorded:  # also with the reference, which reads the seed
        return torch.ops.actvar_kernels.sample_tokens(*arguments)
    return _run(backend, *arguments)


def _expect_seed(seed: torch.Tensor, images: int, device: torch.device) -> None:
    """Raise ValueError unless `seed` is one int64 number on `device`, or one per image."""
    if seed.numel() not in (1, images) or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed: expected one int64 number on {device}, or one for each of {images} images, got {seed.numel()} of "
            f"{seed.dtype} on {seed.device}"
        )


def _choose(logits: torch.Tensor, noise: torch.Tensor | None) -> Backend:
    """Return the backend of a call with these tensors."""
    return choose(
        "sample_tokens",
        logits,
        noise,
        takes_triton=lambda: logits.shape[2] <= MOST_TOKENS,
        limits=f"a vocabulary of up to {MOST_TOKENS} tokens",
        why_not_in_cpp=lambda: None if cpu_kernel.available() else cpu_kernel.why_unavailable(),
    )


def _run(backend: Backend, logits, guidance, top_k, top_p, seed_tensor, seed_number, step, noise) -> torch.Tensor:
    """Run the operation on a backend."""
    if backend.name == "triton":
        from actvar_kernels.token_draw import triton_kernel

        seed = seed_number if seed_tensor is None else seed_tensor.contiguous()
        return triton_kernel.sample_tokens(logits, guidance, top_k, top_p, seed, step, noise)
    if seed_tensor is not None and seed_tensor.numel() > 1:
        images = seed_tensor.numel()
        alone = (logits[image::images] for image in range(images))
        drawn = zip(alone, seed_tensor.tolist(), strict=True)
        return torch.cat([_run(backend, x, guidance, top_k, top_p, None, seed, step, None) for x, seed in drawn])
    seed = seed_number if seed_tensor is None else int(seed_tensor)
    if backend.name == "cpu":
        return cpu_kernel.sample_tokens(logits, guidance, top_k, top_p, seed, step, noise)
    if noise is None:
        rows, L, V = logits.shape
        shape = (rows if guidance is None else rows // 2, L, V)
        noise = reference.uniform_noise(shape, logits.device, seed, step)
    return reference.sample_tokens(logits, guidance, top_k, top_p, noise)


@torch.library.custom_op("actvar_kernels::sample_tokens", mutates_args=())
def _sample_tokens(
    logits: torch.Tensor,
    guidance: float | None,
    top_k: int,
    top_p: float,
    seed_tensor: torch.Tensor | None,
    seed_number: int,
    step: int,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    return _run(_choose(logits, noise), logits, guidance, top_k, top_p, seed_tensor, seed_number, step, noise)


@_sample_tokens.register_fake
def _(logits, guidance, *_):
    rows, L, _ = logits.shape
    return logits.new_empty(rows if guidance is None else rows // 2, L, dtype=torch.int64)
