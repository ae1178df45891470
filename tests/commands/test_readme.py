"""Every Python snippet of README.md runs, on small models under the names that it uses."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from actvar import ActVARConfig, apply_patch, read_adapter_config, save_adapter
from actvar.families.var_model import PatchedVAR
from actvar.models import build_vae_var

README = Path(__file__).parents[2] / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
SMALL = dict(V=1024, Cvae=8, ch=32, depth=2, patch_nums=(1, 2, 3, 5))
OWN = ActVARConfig(token_rates=((0.5, 1.0), 0.75), ffn_rate=(0.5, (1.0, 0.25)), num_experts=8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_small(**sizes: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    return build_vae_var(**(sizes | SMALL))


@pytest.fixture
def sampled_with(tmp_path, monkeypatch) -> list[ActVARConfig]:
    """The configurations that are sampled with. The files of the snippets lie in the current folder, with random
    weights; the public code's `models` builds small models."""
    monkeypatch.chdir(tmp_path)
    vae, var = build_small(seed=1)
    torch.save(vae.state_dict(), "vae_ch160v4096z32.pth")
    torch.save(var.state_dict(), "var_d16.pth")
    save_adapter(apply_patch(var, OWN), "adapter.safetensors")
    models = ModuleType("models")
    models.build_vae_var = build_small
    monkeypatch.setitem(sys.modules, "models", models)
    found, sampling = [], PatchedVAR.autoregressive_infer_cfg

    def noted(self, *args, **kwargs):
        found.append(self.actvar.config)
        return sampling(self, *args, **kwargs)

    monkeypatch.setattr(PatchedVAR, "autoregressive_infer_cfg", noted)
    return found


def expect_to_run(code: str, sampled_with: list[ActVARConfig]) -> None:
    names: dict = {}
    exec(compile(code.replace('"cuda"', f'"{DEVICE}"'), str(README), "exec"), names)
    if "images" in names:
        assert len(names["images"]) == 8
        assert names["images"].isfinite().all()
    if "save_adapter" in code:
        assert read_adapter_config("adapter.safetensors") == names["var"].actvar.config != OWN
    elif "adapter.safetensors" in code:
        assert sampled_with == [OWN]


@pytest.mark.parametrize("code", SNIPPETS, ids=[f"snippet {number}" for number in range(len(SNIPPETS))])
def test_a_snippet_runs_and_samples_with_the_adapters_own_rates(code: str, sampled_with: list[ActVARConfig]) -> None:
    expect_to_run(code, sampled_with)


def test_the_snippets_are_found() -> None:
    assert sum("load_adapter(" in code or "patched(" in code for code in SNIPPETS) >= 2
    assert README.read_text("utf-8").count("```python") == len(SNIPPETS)


@pytest.mark.public_var
@pytest.mark.parametrize("code", [code for code in SNIPPETS if "from models import" in code])
def test_a_snippet_runs_with_the_public_code(code, build_public, sampled_with, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["models"], "build_vae_var", lambda **sizes: build_public(**(sizes | SMALL)))
    expect_to_run(code, sampled_with)
    assert len(sampled_with) == 1
