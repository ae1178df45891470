"""Read off machine code: registers, spills, and what the innermost loop with a matrix product consists of."""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from typing import NamedTuple

from actvar_kernels.tools.virtual.records import CompiledKernel

_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_WAIT = " ACQBULK "
_TARGET = re.compile(r"`\(([^)]+)\)")
_ENDS = re.compile(r"/\s+(BRA `|EXIT|RET)")  # without a condition, so that the next line does not follow
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)\b", re.MULTILINE)
# Of the names of a family that also changes caches, the one that asks for a line in L2 is kept whole.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?(CCTL\.E\.PF2|[A-Z][A-Z0-9_]*)")


class Resources(NamedTuple):
    """Describe what a kernel takes.

    Attributes:
        registers: registers of a thread.
        stack, local: bytes of memory of a thread, which hold what was spilled.
        instructions: counts of all instructions by name.
        loops: such counts for each innermost loop that has a matrix product, `MMA`; none for GPUs of AMD.
        before_wait: such counts of what can run before the wait for earlier kernels; None where there is no wait.
    """

    registers: int
    stack: int
    local: int
    instructions: collections.Counter
    loops: tuple[collections.Counter, ...]
    before_wait: collections.Counter | None


def resources(kernel: CompiledKernel) -> Resources:
    """Return what a kernel takes.

    For GPUs of NVIDIA `cuobjdump` and `nvdisasm`, which come with Triton, say so, and for those of AMD the assembly.
    """
    return _of_nvidia(kernel.binary) if kernel.assembly is None else _of_amd(kernel.assembly)


@functools.cache
def _of_nvidia(cubin: bytes) -> Resources:
    """Return what a kernel takes by its machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        lines = _output(knobs.nvidia.nvdisasm.path, "-c", file.name).splitlines()
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL"))
    loops = tuple(_count(lines[start:end]) for start, end in _product_loops(lines))
    return Resources(registers, stack, local, _count(lines), loops, _before_wait(lines))


@functools.cache
def _of_amd(assembly: str) -> Resources:
    """Return what a kernel takes by its assembly; scratch memory of a thread holds what was spilled."""
    registers, scratch = (
        int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return Resources(registers, scratch, 0, collections.Counter(_AMD_INSTRUCTION.findall(assembly)), (), None)


def _output(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _product_loops(lines: list[str]) -> list[tuple[int, int]]:
    """Return first and last line of every innermost loop that has a matrix product in it.

    Code that was moved behind the kernel, such as waits, jumps back too. So the loop is the shortest of overlapping
    spans.
    """
    labels = {match[1]: number for number, line in enumerate(lines) if (match := _LABEL.match(line.strip()))}
    spans = []
    for number, line in enumerate(lines):
        branch = _BRANCH.search(line)
        start = labels.get(branch[1], number) if branch else number
        if start < number and any("MMA" in name for name in _count(lines[start:number])):
            spans.append((start, number + 1))
    loops: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        if all(end <= other[0] or other[1] <= start for other in loops):
            loops.append((start, end))
    return loops


def _before_wait(lines: list[str]) -> collections.Counter | None:
    """Return the counts of instructions that can run before `griddepcontrol.wait`, along all jumps.

    Where a jump may go around every wait, the end of the program is among them. On sm_100 a program first waits for
    tensor memory, in a loop.
    """
    waits = {number for number, line in enumerate(lines) if _WAIT in line and "@" not in line}
    if not waits:
        return None
    labels = {line.strip()[:-1]: number for number, line in enumerate(lines) if line.rstrip().endswith(":")}
    todo, reached = [next(number for label, number in labels.items() if label.startswith(".text."))], set()
    while todo:
        number = todo.pop()
        if number in reached or number in waits or number >= len(lines):
            continue
        reached.add(number)
        line = lines[number]
        todo += [labels[target] for target in _TARGET.findall(line) if target in labels]
        if not _ENDS.search(line):
            todo.append(number + 1)
    return _count([lines[number] for number in reached])


def _count(lines: list[str]) -> collections.Counter:
    """Return the counts of instructions in lines of code."""
    return collections.Counter(match[1] for line in lines if (match := _INSTRUCTION.search(line)))
