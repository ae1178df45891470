"""An editable install is found from every folder, also from the one above a clone named like the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]
PACKAGES = ("actvar", "actvar_kernels")


@pytest.fixture
def clone(tmp_path) -> Path:
    """Copy what an editable install reads into a folder named as the package."""
    clone = tmp_path / "work" / "actvar"
    for name in ("setup.py", "pyproject.toml", "README.md", *(f"{package}/__init__.py" for package in PACKAGES)):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    for package in PACKAGES:
        (clone / package / "__init__.py").write_text(f'__version__ = "1.0"\nNAME = "{package}"\n')
    return clone


def test_the_package_is_found_from_the_folder_above_a_clone_of_its_name(clone, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, site], cwd=clone, check=True, capture_output=True)
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import site, sys; site.addsitedir(sys.argv[1]); "
    code += "import actvar, actvar_kernels; print(actvar.NAME, actvar_kernels.NAME, actvar.__version__)"
    for folder in (clone.parent, clone, tmp_path):
        command = [sys.executable, "-E", "-S", "-c", code, site]  # without what is installed in this environment
        found = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
        assert found.stdout.split() == ["actvar", "actvar_kernels", "1.0"], (folder, found.stderr)
