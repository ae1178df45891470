"""What comes from elsewhere is pinned, and nothing is fetched behind the user's back."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\d.]+", str(requirement.specifier)) for requirement in requirements)
    return {canonicalize_name(requirement.name) for requirement in requirements}


def needed(package: str, extras: frozenset[str], found: dict[tuple[str, frozenset[str]], None]) -> set[str]:
    """Names of all installed packages that `package` with `extras` needs, directly or not, but for those whose exact
    version another package names."""
    names = set()
    for text in requires(package) or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in (*extras, ""))
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        exact = package != "actvar" and str(requirement.specifier).startswith("==")
        if not applies or exact or key in found:
            continue
        found[key] = None
        try:
            names |= {key[0], *needed(*key, found)}
        except PackageNotFoundError:  # not for this platform
            continue
    return names


@pytest.mark.skipif(sys.version_info < (3, 11), reason="on Python 3.10 the constraints leave some to pip")
def test_every_package_that_make_installs_is_pinned():
    names = needed("actvar", frozenset({"dev", "hub"}), {})
    assert {"torch", "numpy", "pytest", "huggingface-hub", "jinja2"} <= names
    assert names - pinned() == set()


OFFLINE = """
import importlib, pkgutil, sys
events = []
sys.addaudithook(lambda event, arguments: events.append((event, arguments)) if event.startswith("socket.") else None)
import actvar, actvar_kernels
for package in (actvar, actvar_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
assert not {"huggingface_hub", "requests", "httpx"} & set(sys.modules)
_, var = actvar.load_pretrained("fashion-mnist", "paper")
assert var.autoregressive_infer_cfg(1, 3, g_seed=0).shape == (1, 1, 32, 32)
calls = [event for event in events if event[0] not in ("socket.__new__", "socket.gethostname")]
assert not calls, calls
assert "torch.utils.cpp_extension" not in sys.modules  # which warns where a build of torch for CUDA finds no GPU
print("offline")
"""


def test_importing_every_module_and_sampling_the_bundled_model_asks_nothing_of_a_network():
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "offline\n", done.stderr


def test_a_test_that_reaches_for_a_network_fails():
    with pytest.raises(RuntimeError, match=r"reaches for example\.org"):
        socket.create_connection(("example.org", 80), timeout=1)
    with pytest.raises(RuntimeError, match=r"reaches for 192\.0\.2\.1"):
        socket.socket().connect(("192.0.2.1", 80))
