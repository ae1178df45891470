"""Compile every kernel for every GPU architecture, without a GPU: `python -m actvar_kernels.compile_check`."""

import sys

from actvar_kernels.tools.compile_check import main

if __name__ == "__main__":
    sys.exit(main())
