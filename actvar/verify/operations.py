"""The operations of a block that `actvar.verify.run` compares."""

from __future__ import annotations

from actvar_kernels.operations.table import BLOCK

TEACHER_FORCING = ("route_experts",)
"""Operations that blocks call under teacher forcing alone, and no sample does."""
OPERATIONS = {
    operation.name: operation.exact
    for operation in BLOCK
    if operation.exact is not None and operation.name not in TEACHER_FORCING
}
"""Functions by the operation's name in the modules that call it.

Each gets `unmoved` or `moved` and the arguments of a call, and returns the function that takes the result apart.
"""
WRITABLE = ("rest", "room")
"""Arguments that an operation may write to."""
