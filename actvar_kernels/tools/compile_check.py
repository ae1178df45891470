"""Compile every kernel for every architecture at the shapes of the official models, and check the machine code.

    python -m actvar_kernels.compile_check --arch 90 --models d16

needs no GPU: the operations are called on a virtual one. A kernel passes if nothing is spilled, its shared memory fits,
and its matrix products run on tensor cores with asynchronous copies in their loop. AMD's cores have no such copies, and
`--arch gfx942` asks for none. A kernel that is launched early waits before it reads or writes memory.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from actvar_kernels.operations.shapes import DTYPES, INFINITY, MODELS
from actvar_kernels.tools.compile_cases import cases
from actvar_kernels.tools.virtual import CompiledKernel, virtual_gpu, why_unavailable
from actvar_kernels.tools.virtual.driver import SHARED_MEMORY_KIB, Architecture
from actvar_kernels.tools.virtual.resources import Resources, resources
from actvar_kernels.triton_backend.tiles import ARCHITECTURES

CHECKED = (*MODELS, *INFINITY)
# Others: HMMA, IMMA, QMMA. On sm_100 Triton has the new instruction for floating-point products alone.
TENSOR_CORES: dict[Architecture, str] = {90: "[HIQ]GMMA", 100: "UTC.*MMA|IMMA"}
# A product with fewer rows than a warp group's 64 runs on the older instruction, which these architectures have too.
WARP_GROUP_ROWS = 64
AMD_ARCHITECTURES = ("gfx942", "gfx1100")
AMD_PRODUCTS = ("v_mfma", "v_wmma")
ASYNCHRONOUS_COPIES = ("LDGSTS", "UTMALDG")
# What a kernel that is launched early may not do before its wait: touch global memory, end, or jump to who knows where.
# It may ask for lines in L2 (CCTL.E.PF2), which reads and writes nothing.
_TOO_EARLY = re.compile(r"(LD|ST)G?|ATOMG?|RED|REDG|LDGSTS|UTMA.*|UBLK.*|CCTL(?!\.E\.PF2).*|BRX|JM.*|EXIT|PREEXIT")
# A product, or products side by side in a loop. Outside of one those are a router's, whose weights are read once.
_PRODUCT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x([a-z]\w*)> \*")
_PRODUCTS = re.compile(r"^ {6,}%.* = tt\.dot .*: tensor<\d+x(\d+)x\d+x([a-z]\w*)> \*", re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """Name what one process compiles: all cases of a model, batch and type for one architecture."""

    arch: Architecture
    model: str
    batch: int
    dtype: str


@dataclass(frozen=True)
class Row:
    """Describe one compiled kernel, or one operation that could not be compiled.

    Attributes:
        kernel: name of the kernel, or of the case.
        arch: compute capability, or AMD's name of an architecture.
        case: operation, model, batch and type.
        configuration: constants, warps and stages.
        registers: registers of a thread.
        spilled: bytes that a thread spilled.
        shared: bytes of shared memory.
        loop: counts of tensor-core and copy instructions in the main loop.
        faults: what is wrong, empty when nothing is.
    """

    kernel: str
    arch: Architecture
    case: str
    configuration: str
    registers: int
    spilled: int
    shared: int
    loop: dict[str, int]
    faults: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if why_unavailable() is not None:
        parser.error(f"virtual GPU: {why_unavailable()}")
    todo = jobs(options.arch, options.models, options.quick)
    if not todo:
        parser.error(
            "--quick: covers sm_80 and sm_90 with d16, d30 and infinity-2b, of which --arch or --models leave out all"
        )
    rows = check(todo, options.processes)
    print(table(rows))
    failures = sum(bool(row.faults) for row in rows)
    architectures = ", ".join(dict.fromkeys(named(row.arch) for row in rows))
    print(f"{len(rows)} kernels on {architectures}: {failures} failures")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if failures else 0


class LineParser(argparse.ArgumentParser):
    """Parse arguments; an error is one line, with exit code 2."""

    def error(self, message: str):
        """Print the message and leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (try --help)\n")


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = LineParser("python -m actvar_kernels.compile_check", description=(__doc__ or "").split("\n\n")[0])
    known = (*ARCHITECTURES, *AMD_ARCHITECTURES)
    parser.add_argument("--arch", nargs="+", type=_architecture, choices=known, default=known, metavar="ARCH")
    parser.add_argument("--models", nargs="+", choices=CHECKED, default=CHECKED, metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="sm_80 and sm_90, d16, d30 and infinity-2b, one case each")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: one per core)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser


def _architecture(value: str) -> Architecture:
    return int(value) if value.isdecimal() else value


def named(arch: Architecture) -> str:
    """Return the name of an architecture, such as sm_90 or gfx942."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def jobs(architectures: Iterable[Architecture], models: Iterable[str], quick: bool) -> list[Job]:
    """Return jobs for batches 1 and 64 in bfloat16, where tiles may differ, and for one case in float32."""
    if quick:
        return [
            Job(arch, model, batch, "bf16")
            for arch in (80, 90)
            for model, batch in (("d16", 1), ("d30", 64), ("infinity-2b", 1))
            if arch in architectures and model in models
        ]
    kinds = (("bf16", 64), ("bf16", 1), ("fp32", 1))  # Infinity's residual stream is float32 in all
    return [Job(arch, model, batch, dtype) for arch in architectures for model in models for dtype, batch in kinds]


def check(todo: list[Job], processes: int) -> list[Row]:
    """Return a row for every distinct kernel of the jobs, in the order of architecture and name."""
    rows: dict[object, Row] = {}
    with (
        ProcessPoolExecutor(min(processes, len(todo)), get_context("spawn")) if processes > 1 else nullcontext() as pool
    ):
        results = map(compiled, todo) if pool is None else pool.map(compiled, todo)
        for found in tqdm(results, total=len(todo), desc="compile", leave=False):
            rows = found | rows
    order = list(SHARED_MEMORY_KIB)
    return sorted(rows.values(), key=lambda row: (order.index(row.arch), row.kernel, row.configuration, row.case))


def compiled(job: Job) -> dict[object, Row]:
    """Return rows of a job's kernels by machine code, so that equal ones are found.

    Rows of cases that failed stand by job and case.
    """
    rows: dict[object, Row] = {}
    with torch.no_grad(), virtual_gpu(job.arch, limit_shared_memory=False) as gpu:
        for name, run in cases(job.model, job.batch, DTYPES[job.dtype]):
            case = f"{name}, {job.model} batch {job.batch} {job.dtype}"
            gpu.launches.clear()
            try:
                run()
            except Exception as error:  # whatever the compiler raises is the result
                text = str(error).strip().splitlines() or [""]
                failed = (f"{type(error).__name__}: {text[-1][:200]}",)
                rows[job, name] = Row(name, job.arch, case, "", 0, 0, 0, {}, failed)
                continue
            kernels = [launch.kernel for launch in gpu.launches if launch.kernel is not None]
            if not kernels:
                rows[job, name] = Row(name, job.arch, case, "", 0, 0, 0, {}, ("launched no Triton kernel",))
            for kernel in kernels:
                rows.setdefault((job.arch, kernel.binary), row_of(kernel, case))
    return rows


def row_of(kernel: CompiledKernel, case: str) -> Row:
    """Measure and judge a kernel."""
    found = resources(kernel)
    configuration = " ".join(f"{name}={value}" for name, value in kernel.constants.items())
    loop = main_loop(found)
    kinds = ("MMA", *AMD_PRODUCTS)
    shown = {
        name: count
        for name, count in loop.items()
        if any(kind in name for kind in kinds) or name in (*ASYNCHRONOUS_COPIES, "LDG")
    }
    return Row(
        kernel=kernel.name,
        arch=kernel.arch,
        case=case,
        configuration=f"{configuration} warps={kernel.num_warps} stages={kernel.num_stages}".strip(),
        registers=found.registers,
        spilled=found.stack + found.local,
        shared=kernel.shared,
        loop=shown,
        faults=tuple(faults(kernel)),
    )


def main_loop(found: Resources) -> collections.Counter:
    """Return the counts of instructions in the main loop; nothing without matrix products on tensor cores.

    This is the shortest of the innermost loops with a matrix product that copy asynchronously, otherwise the shortest
    of all. Where the loop was unrolled, and on GPUs of AMD, all of the kernel counts.
    """
    if not any(kind in name for name in found.instructions for kind in ("MMA", *AMD_PRODUCTS)):
        return collections.Counter()
    loops = found.loops or (found.instructions,)
    copying = [loop for loop in loops if any(loop[name] for name in ASYNCHRONOUS_COPIES)]
    return min(copying or loops, key=collections.Counter.total)


def faults(kernel: CompiledKernel) -> Iterator[str]:
    """Yield what is wrong with a kernel."""
    found, limit = resources(kernel), SHARED_MEMORY_KIB[kernel.arch] * 1024
    if found.stack or found.local:
        yield f"spills {found.stack + found.local} bytes per thread"
    if kernel.shared > limit:
        yield f"{kernel.shared} bytes of shared memory, of {limit}"
    yield from _early_faults(kernel.early, found)
    products = [*_PRODUCT.findall(kernel.ttir), *_PRODUCTS.findall(kernel.ttir)]
    rows = [int(rows) for rows, dtype in products if dtype in ("f16", "bf16", "i8", "f8E4M3FN")]
    if rows and kernel.assembly is not None:
        if not any(name.startswith(AMD_PRODUCTS) for name in found.instructions):
            yield f"none of {', '.join(AMD_PRODUCTS)}"
    elif rows:
        loop = main_loop(found)
        wanted = TENSOR_CORES.get(kernel.arch, "[HIQ]MMA") if min(rows) >= WARP_GROUP_ROWS else ".*MMA"
        if not any(re.fullmatch(wanted, name) for name in loop):
            yield f"no {wanted} in the main loop"
        if not any(loop[name] for name in ASYNCHRONOUS_COPIES):
            yield "no asynchronous copy in the main loop"


def _early_faults(early: bool, found: Resources) -> Iterator[str]:
    """Yield what is wrong with the wait of a kernel that is launched early, or that one of another waits at all."""
    if not early:
        if found.instructions["ACQBULK"]:
            yield "waits for the kernels ahead, and is not launched early"
        return
    if found.before_wait is None:
        yield "is launched early, and never waits"
        return
    wrong = sorted(name for name in found.before_wait if _TOO_EARLY.fullmatch(name))
    if wrong:
        yield f"{', '.join(wrong)} can run before the wait"


def table(rows: list[Row]) -> str:
    """Return the rows as text, one line each."""
    lines = []
    for row in rows:
        loop = " ".join(f"{name} {count}" for name, count in sorted(row.loop.items()))
        numbers = f"{row.registers:3d} regs {row.spilled:4d} spilled {row.shared / 1024:6.1f} K  {loop:34s}"
        verdict = "; ".join(row.faults) or "ok"
        lines.append(f"{row.kernel:24s} {named(row.arch):7s} {numbers} {verdict:4s} {row.configuration}  ({row.case})")
    return "\n".join(lines)
