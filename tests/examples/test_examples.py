"""The scripts and the notebook of `examples/` run as they stand, on small models."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import fill
from support.helpers import ROOT, make_tiny_var

import actvar
from actvar import ActVARConfig, apply_patch, save_adapter
from actvar.models import build_vae_var

EXAMPLES = ROOT / "examples"
SIZES = dict(V=64, Cvae=8, ch=32, patch_nums=(1, 2, 3, 4), depth=2, share_quant_resi=4)


def example(name: str) -> dict:
    """Return the names of a script, which is imported and not run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture
def checkpoint(tmp_path) -> list[str]:
    var = make_tiny_var(image_channels=3)
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), tmp_path / "vae.pth")
    save_adapter(apply_patch(var, ActVARConfig(num_experts=8)), tmp_path / "adapter.safetensors")
    return ["--var", str(tmp_path / "var.pth"), "--vae", str(tmp_path / "vae.pth")]


@pytest.mark.parametrize("adapter", [False, True], ids=["accelerated", "with an adapter"])
def test_a_checkpoint_is_sampled(adapter, checkpoint, tmp_path, capsys):
    given = ["--adapter", str(tmp_path / "adapter.safetensors")] if adapter else []
    example("sample_checkpoint")["main"]([*checkpoint, *given, "--labels", "1", "3", "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"class-1.png", "class-3.png"}
    assert ("of the tokens" in capsys.readouterr().out) == adapter


@pytest.fixture
def public(monkeypatch):
    """Give our own class, with the method of the quantizer that only the public one has, as the public `models`."""

    def build(device: str, **sizes: object):
        vae, var = build_vae_var(**(sizes | SIZES), ch_mult=(1,) * 5, num_res_blocks=1)
        fill(vae, 0)
        fill(var, 1)
        quantize = vae.quantize
        quantize.get_next_autoregressive_input = lambda scale, _scales, f_hat, h: quantize.add_scale(scale, f_hat, h)
        return vae, var

    models = ModuleType("models")
    models.build_vae_var = build
    monkeypatch.setitem(sys.modules, "models", models)
    return build


def edit(build, tmp_path, *given: str) -> tuple[np.ndarray, dict]:
    """Run the example of editing, and return its picture and its names."""
    vae, var = build(device="cpu", shared_aln=False, num_classes=1000)
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    torch.save(var.state_dict(), tmp_path / "var.pth")
    save_adapter(apply_patch(var, ActVARConfig(num_experts=8)), tmp_path / "adapter.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    files = [part for name in ("var", "vae") for part in (f"--{name}", str(tmp_path / f"{name}.pth"))]
    files += ["--image", str(tmp_path / "image.png"), "--out", str(tmp_path / "out.png")]
    names = example("edit_public_model")
    names["main"]([*files, "--label", "207", *given])
    with Image.open(tmp_path / "out.png") as picture:
        return np.asarray(picture).astype(int), names


def test_the_loop_for_editing_runs_accelerated_and_with_an_adapter(public, tmp_path):
    accelerated, _ = edit(public, tmp_path)
    assert accelerated.shape == (64, 64, 3)
    sparse, _ = edit(public, tmp_path, "--adapter", str(tmp_path / "adapter.safetensors"))
    assert not np.array_equal(accelerated, sparse)


def test_the_loop_keeps_what_is_not_new_and_draws_what_is(public, tmp_path):
    """Without anything new the image is its own reconstruction."""
    inpaint = example("edit_public_model")["inpaint"]
    vae, var = public(device="cpu", shared_aln=False, num_classes=10)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    nothing, everything = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    same = vae.idxBl_to_img(vae.img_to_idxBl(image))
    torch.testing.assert_close(inpaint(vae, var, image, nothing, 3, 4.0, 0), same, rtol=0, atol=1e-4)
    dense = inpaint(vae, var, image, everything, 3, 4.0, 0)
    assert not torch.allclose(dense, same, atol=1e-2)
    with actvar.patched(var, ActVARConfig(token_rates=(1, 1), ffn_rate=1)):
        torch.testing.assert_close(inpaint(vae, var, image, everything, 3, 4.0, 0), dense, rtol=0, atol=1e-3)


@pytest.mark.public_var
def test_the_loop_for_editing_runs_on_the_public_class(build_public, monkeypatch, tmp_path):
    def build(**sizes):
        vae, var = build_public(**(sizes | SIZES))
        fill(vae, 0)
        fill(var, 1)
        return vae, var

    monkeypatch.setattr(sys.modules["models"], "build_vae_var", build)
    accelerated, _ = edit(build, tmp_path)
    sparse, _ = edit(build, tmp_path, "--adapter", str(tmp_path / "adapter.safetensors"))
    assert accelerated.shape == sparse.shape == (64, 64, 3)
    assert not np.array_equal(accelerated, sparse)


def test_the_block_with_all_experts_is_the_dense_one():
    errors = example("sparse_ffn_block")["main"](["--width", "64", "--tokens", "32"])
    assert errors[16] < 1e-5 < errors[12] < errors[8] < 1


@pytest.mark.slow
def test_an_adapter_is_fitted_and_measured(tmp_path, capsys):
    file = tmp_path / "new" / "adapter.safetensors"
    figures = example("calibrate_and_evaluate")["main"](
        ["--model", "fashion-mnist-small", "--images", "8", "--out", str(file)]
    )
    assert actvar.read_adapter_config(file).is_sparse
    assert figures["PSNR"] > 10
    assert 0 < figures["SSIM"] < 1
    assert "KL to the dense predictions by scale:" in capsys.readouterr().out


def test_two_processes_draw_many_images(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--", "examples/many_images.py"]
    command += ["--model", "fashion-mnist-small", "--num", "20", "--batch", "5", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"20 images (32, 32, 1) of 10 classes in {tmp_path}" in done.stdout
    assert len(list(tmp_path.glob("*.png"))) == 20


def test_the_notebook_is_without_outputs():
    cells = json.loads((EXAMPLES / "first_five_minutes.ipynb").read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    for cell in code:
        compile("".join(cell["source"]), "first_five_minutes.ipynb", "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook")
    pytest.importorskip("ipykernel", reason="needs the extra notebook")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "first_five_minutes.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("to the dense images: PSNR" in text for text in texts)
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2


def test_every_example_is_on_the_page_and_has_a_test():
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    tests = (ROOT / "tests" / "examples" / "test_examples.py").read_text("utf-8")
    files = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(files) == 6
    for path in files:
        assert f"examples/{path.name}" in page
        assert path.stem in tests
