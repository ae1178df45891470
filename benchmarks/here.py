"""Time the C++ kernels against plain PyTorch on this machine: `python -m benchmarks.here`, which is `actvar bench`."""

import sys

from actvar.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
