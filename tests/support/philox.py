"""Compute the random numbers that `sample_tokens` documents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def philox_uniform(seed: int, rows: int, V: int, step: int) -> Tensor:
    """Return the documented noise `[rows, V]`, V a multiple of 4."""
    counter = [np.arange(V // 4)[None, :], np.arange(rows)[:, None], np.array([[step]]), np.array([[0]])]
    counter = [c.astype(np.uint64) + np.zeros((rows, V // 4), np.uint64) for c in counter]
    keys, low, half = [seed % 2**32, seed // 2**32 % 2**32], np.uint64(2**32 - 1), np.uint64(32)
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> half) ^ counter[1] ^ np.uint64(keys[0]),
            second & low,
            (first >> half) ^ counter[3] ^ np.uint64(keys[1]),
            first & low,
        ]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    bits = np.stack(counter, axis=-1).reshape(rows, V).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.where(bits < 0, ~bits, bits).astype(np.float32) * np.float32(4.6566127342e-10))
