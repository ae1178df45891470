"""The operations of a block that `actvar.verify.run` compares."""

from __future__ import annotations

from actvar_kernels.operations.table import BLOCK

OPERATIONS = {operation.name: operation.exact for operation in BLOCK if operation.exact is not None}
"""Functions by the operation's name in `actvar.sparse.block`.

Each gets `unmoved` or `moved` and the arguments of a call, and returns the function that takes the result apart.
"""
WRITABLE = ("rest", "room")
"""Arguments that an operation may write to."""
