"""Measure the peak memory of one way of sampling in a process of its own, beside what it cannot do without.

python -m benchmarks.memory --model d16 --batch 1 --dtype fp32 --way ActVAR
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from actvar.config import DENSE, ActVARConfig
from actvar.families import family_of
from actvar.flops import without_weights
from actvar.models.basic_vae import Conv3x3, Upsample
from actvar.sparse.schedule import build_schedule
from actvar.utils.live_memory import peak_live_bytes
from actvar_kernels import cpp_runs
from actvar_kernels.conv3x3.cpu_kernel import packed_bytes

MIB = 2**20


@dataclass(frozen=True)
class Bound:
    """Count the bytes that sampling has to hold at once.

    The weights are those of transformer and autoencoder, packed ones twice. The K/V cache is as before the last scale.
    Activations are those of one dense block at the last scale, or the decoder's if they are more.
    """

    weights: int
    packed: int
    cache: int
    block: int
    decoder: int

    @property
    def total(self) -> int:
        return self.weights + self.packed + self.cache + max(self.block, self.decoder)


def bound(vae: nn.Module, var: nn.Module, batch: int, config: ActVARConfig, kernels: bool, int8: bool = False) -> Bound:
    """Return the bound of a dense `var` on any device, of which only shapes and dtypes are read.

    Args:
        kernels: sampling runs on the C++ kernels, which pack the layers of every block, the head and the decoder.
        int8: the blocks multiply in eight bits, whose packed numbers are bytes.
    """
    blocks, dtype = len(var.blocks), var.head.weight.dtype
    side = var.patch_nums[-1]
    f_hat = torch.empty(batch, var.Cvae, side, side, device="meta", dtype=next(vae.parameters()).dtype)
    of_vae = copy.deepcopy(vae).to("meta")
    packed = 0
    if kernels:
        parts = ((b.attn.mat_qkv, b.attn.proj, b.ffn.fc1, b.ffn.fc2) for b in var.blocks)
        weights = [layer.weight for layers in parts for layer in layers]
        in_blocks = sum(weight.numel() for weight in weights) if int8 else _bytes(weights)
        packed = in_blocks + _bytes([var.head.weight]) + _transformed_bytes(of_vae, f_hat)
    last = build_schedule(config, family_of(var).maps(var))[-1]
    return Bound(
        weights=_bytes(var.parameters()) + _bytes(vae.parameters()),
        packed=packed,
        cache=blocks * 2 * 2 * batch * last.cached_before * var.C * dtype.itemsize,
        block=_block_bytes(var, 2 * batch, last.tokens),
        decoder=peak_live_bytes(lambda: of_vae.fhat_to_img(f_hat)),
    )


def _transformed_bytes(vae: nn.Module, f_hat: torch.Tensor) -> int:
    """Return the bytes of the packed weights with which convolutions decode `f_hat`."""
    sizes = []
    enlarging = {module.conv for module in vae.modules() if isinstance(module, Upsample)}

    def note(module: Conv3x3, _: tuple, out: torch.Tensor) -> None:
        D, C = module.weight.shape[:2]
        if C % 16 == 0:
            sizes.append(packed_bytes(out.dtype, C, D, out.shape[2] * out.shape[3], module in enlarging))

    hooks = [m.register_forward_hook(note) for m in vae.modules() if isinstance(m, Conv3x3)]
    vae.fhat_to_img(f_hat)
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def _block_bytes(var: nn.Module, rows: int, tokens: int) -> int:
    """Return the bytes of the last block's activations for `rows` sequences.

    The tensors are fake ones, whose attention is the CPU's fused one.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    block = without_weights(var, mode, var.vae_proxy[0]).blocks[-1]
    with mode:
        x = torch.empty(rows, tokens, var.C, dtype=var.head.weight.dtype)
        cond = x.new_empty(rows, 1, 6, var.C) if block.shared_aln else x.new_empty(rows, var.C)
        return peak_live_bytes(lambda: block(x, cond, None))


@torch.no_grad()
def kernels_run(dtype: torch.dtype) -> bool:
    """Return whether sampling in `dtype` on this CPU runs the C++ kernels."""
    return cpp_runs(torch.empty(1, dtype=dtype))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_of_process(run: Callable[[], object]) -> int:
    """Return the peak resident bytes of this process during `run` (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM again
    run()
    return _status("VmHWM")


def resident() -> int:
    """Return the resident bytes of this process now (Linux)."""
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(model: str, batch: int, dtype: str, way: str, public: Path | None = None) -> dict[str, float]:
    """Return MiB of `way`, measured in a process of its own: `peak`, `bound`, and the parts of the bound.

    The peak while sampling is over what the process had after a first small sample, without a model.

    Raises:
        RuntimeError: the process failed; has its last line.
    """
    arguments = ["--model", model, "--batch", str(batch), "--dtype", dtype, "--way", way]
    if public is not None:
        arguments += ["--public-var", str(public)]
    run = subprocess.run([sys.executable, "-m", "benchmarks.memory", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"memory of {way}: expected exit code 0, got {run.returncode}: {run.stderr[-300:]}")
    return json.loads(run.stdout)


def table(of_ways: dict[str, dict[str, float]]) -> str:
    """Return a table to read: MiB of every way."""
    columns = list(next(iter(of_ways.values())))
    lines = [f"{'memory, MiB':24s}" + "".join(f"{column:>10s}" for column in columns)]
    for way, figures in of_ways.items():
        lines.append(f"{way:24s}" + "".join(f"{figures[column]:10.0f}" for column in columns))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    from benchmarks import sampling

    parser = sampling.shape_parser("python -m benchmarks.memory", __doc__.split("\n\n")[0])
    parser.add_argument("--way", required=True, choices=(*sampling.WAYS, *sampling.INT8_WAYS))
    options = parser.parse_args(arguments)
    if options.way == "public code" and options.public_var is None:
        parser.error("--way 'public code' needs --public-var")

    def sample(name: str, batch: int) -> tuple[nn.Module, int]:
        var, adapter = sampling.model(name)
        weights = "int8" if options.way in sampling.INT8_WAYS else None
        ways = sampling.ways(var, adapter, sampling.DTYPES[options.dtype], options.public_var, weights)
        drawn = sampling.sampling_of(var, batch)
        with ways[options.way]() as used:
            drawn.run(used)
            return var, peak_of_process(lambda: drawn.run(used))

    sample("fashion-mnist", 1)  # loads the libraries' code
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc
    before = resident()
    var, peak = sample(options.model, options.batch)
    peak -= before
    kernels = options.way not in ("public code", "dense") and kernels_run(var.head.weight.dtype)
    dense = ("public code", "dense", "accelerated", "accelerated int8")
    config = DENSE if options.way in dense else ActVARConfig()
    parts = bound(var.vae_proxy[0], var, options.batch, config, kernels, options.way in sampling.INT8_WAYS)
    figures = {"peak": peak, "bound": parts.total} | asdict(parts)
    print(json.dumps({name: value / MIB for name, value in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
