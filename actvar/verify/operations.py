"""Name what the operations of a block must give, for `actvar.verify.run`."""

from __future__ import annotations

from actvar_kernels.operations.table import BLOCK

OPERATIONS = {operation.name: operation.exact for operation in BLOCK if operation.exact is not None}
"""By the name in `actvar.sparse.block`. Each is called with `unmoved` or `moved` and the arguments of a call, and gives
the function that takes the result of the call apart."""
WRITABLE = ("rest", "room")
"""Arguments that an operation may write to."""
