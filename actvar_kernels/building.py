"""C++ that is compiled when it is first needed, by torch's extension builder."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils import cpp_extension


def why_no_compiler() -> str | None:
    """What is missing for a build, or None."""
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"it needs a C++ compiler: {compiler!r} is not there; install g++ or set CXX"
    with ninja_on_path():
        if not cpp_extension.is_ninja_available():
            return "it needs ninja: pip install ninja"
    return None


@contextmanager
def ninja_on_path() -> Iterator[None]:
    """Let torch find the `ninja` of the package of that name, also where its environment is not activated."""
    try:
        import ninja
    except ImportError:
        yield
        return
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, ninja.BIN_DIR))
    try:
        yield
    finally:
        os.environ["PATH"] = before
