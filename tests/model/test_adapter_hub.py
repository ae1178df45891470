"""Adapters on the hub: a stand-in of its client has them in a folder, and there is no network."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_var, sample

import actvar
from actvar import ActVARConfig, apply_patch, load_adapter, patched, read_adapter_config, save_adapter
from actvar.cli import main
from actvar.distill import Stage2
from actvar.patching.hub import push_adapter
from actvar.utils.fingerprint import model_fingerprint
from actvar.zoo.pretrained import adapter_path

CONFIG = ActVARConfig(num_experts=8, token_rates=(0.5, 0.5), guidance_until=-1)


class Hub:
    """Keep repositories as folders; `refuses` is the error of an upload."""

    def __init__(self, folder: Path):
        self.folder, self.refuses = folder, None
        self.made: list[tuple[str, bool]] = []
        self.asked: list[tuple[str, str, str | None]] = []
        names = ("EntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError")
        self.errors = {name: type(name, (OSError,), {}) for name in names}

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        if self.refuses:
            raise self.refuses
        assert exist_ok
        self.made.append((repository, private))
        (self.folder / repository).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def ask(self, place: dict) -> None:
        self.asked.append((place["repo_id"], place["filename"], place["revision"]))
        if not (self.folder / place["repo_id"] / place["filename"]).exists():
            raise self.errors["EntryNotFoundError"]("404")

    def download(self, repo_id: str, filename: str, revision: str | None, local_files_only: bool) -> str:
        return str(self.folder / repo_id / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    module, utils = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.utils")
    vars(utils).update(hub.errors)
    module.get_hf_file_metadata, module.hf_hub_download = hub.ask, hub.download
    module.hf_hub_url, module.utils, module.HfApi = lambda **place: place, utils, lambda: hub
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    return hub


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "saved.safetensors"
    save_adapter(apply_patch(make_tiny_var(), CONFIG), path, {"plan": {"speedup": 1.5, "measured_ms": 12.5}})
    return path


def test_what_was_uploaded_is_loaded_by_the_name_of_the_repository(hub, saved):
    assert push_adapter(saved, "owner/repo", "# card", private=True) == "https://hub/owner/repo/commit/1"
    assert hub.made == [("owner/repo", True)]
    assert (hub.folder / "owner" / "repo" / "README.md").read_text("utf-8") == "# card"
    expected = sample(load_adapter(make_tiny_var(), saved))
    for name in ("owner/repo", "owner/repo@v1", "owner/repo:adapter.safetensors"):
        assert torch.equal(sample(load_adapter(make_tiny_var(), name)), expected)
    with patched(make_tiny_var(), adapter="owner/repo") as var:
        assert torch.equal(sample(var), expected)
    assert read_adapter_config("owner/repo") == CONFIG
    assert set(hub.asked) == {("owner/repo", "adapter.safetensors", revision) for revision in (None, "v1")}


def test_a_file_here_is_preferred_and_a_missing_one_is_not_looked_for_on_the_hub(hub, saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    shutil.copy(saved, tmp_path / "owner" / "repo")
    assert read_adapter_config("owner/repo") == CONFIG
    for name in ("owner/missing.safetensors", "missing.safetensors", "/owner/missing", "../owner/missing", "owner"):
        with pytest.raises(FileNotFoundError, match="no such adapter file"):
            read_adapter_config(name)
    assert hub.asked == []
    with pytest.raises(FileNotFoundError, match=r"owner/other:adapter\.safetensors: not found on the hub"):
        read_adapter_config("owner/other")


def test_a_refused_upload_is_one_line(hub, saved):
    hub.refuses = RuntimeError("401 Client Error\nmore lines")
    with pytest.raises(OSError, match=r"^owner/repo: not uploaded: 401 Client Error \(`hf auth login`"):
        push_adapter(saved, "owner/repo", "")
    for wrong in ("repo", "owner/repo@v1", "https://hub/owner/repo", "a/b/c"):
        with pytest.raises(ValueError, match="repository: expected owner/repo"):
            push_adapter(saved, wrong, "")


def test_without_the_hubs_package_the_errors_say_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: push_adapter(saved, "owner/repo", ""), lambda: read_adapter_config("owner/repo")):
        with pytest.raises(ImportError, match=r"pip install 'actvar\[hub\]'"):
            call()


def table(card: str, first: str) -> list[list[str]]:
    """Return the rows of the table of a card whose header begins with `first`."""
    part = card.partition(f"\n| {first}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part]


def test_the_command_uploads_a_card_of_the_base_model_the_plan_and_what_was_measured(hub, saved, tmp_path, capsys):
    var = make_tiny_var()
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), tmp_path / "vae.pth")
    source = ["--var", str(tmp_path / "var.pth"), "--vae", str(tmp_path / "vae.pth")]
    main(["push", str(saved), "owner/repo", *source, "--batch", "2"])
    assert "wrote https://hub/owner/repo/commit/1" in capsys.readouterr().out
    card = (hub.folder / "owner" / "repo" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: actvar\n")
    assert model_fingerprint(*actvar.load_var(tmp_path / "var.pth", tmp_path / "vae.pth")[::-1]) in card
    assert 'actvar.load_adapter(var, "owner/repo")' in card
    plan = table(card, "scale ")
    assert [row[:4] for row in plan] == [
        ["1x1", "100%", "8 of 8", "yes"],
        ["2x2", "100%", "8 of 8", "yes"],
        ["3x3", "56%", "6 of 8", "yes"],
        ["5x5", "52%", "6 of 8", "no"],
    ]
    assert [float(row[4]) == 0 for row in plan] == [True, True, False, False]
    assert [row[0] for row in table(card, "| dense, by PyTorch")] == [
        "ms for the images",
        "PSNR to the dense images, dB",
        "SSIM to the dense images",
    ]
    assert json.loads(card.partition("```json\n")[2].partition("```")[0])["measured_ms"] == 12.5
    assert "2 images: machine " in card
    assert re.search(r"FLOPs are \d+\.\d% fewer", card)


@pytest.mark.parametrize(
    ("lora", "changed"), [(2, "factors of rank 2 (LoRA), which loading merges"), (None, "whole tensors")]
)
def test_a_card_says_how_weights_are_changed_and_the_adapter_comes_back(hub, tmp_path, lora, changed):
    var, file = make_tiny_var(), tmp_path / "adapter.safetensors"
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), tmp_path / "vae.pth")
    Stage2(apply_patch(var, ActVARConfig(num_experts=8)), lora=lora).finish()
    save_adapter(var, file)
    main(
        [
            "push",
            str(file),
            "owner/r",
            "--var",
            str(tmp_path / "var.pth"),
            "--vae",
            str(tmp_path / "vae.pth"),
            "--batch",
            "1",
        ]
    )
    assert f"\nIt changes weights by {changed}.\n" in (hub.folder / "owner" / "r" / "README.md").read_text("utf-8")
    assert torch.equal(sample(load_adapter(make_tiny_var(), "owner/r")), sample(var))


@pytest.mark.slow
def test_an_adapter_of_a_bundled_model_comes_back_for_the_commands(hub, tmp_path, capsys):
    file = str(adapter_path("fashion-mnist", "best"))
    main(["push", file, "owner/best", "--model", "fashion-mnist", "--batch", "2"])
    card = (hub.folder / "owner" / "best" / "README.md").read_text("utf-8")
    assert "actvar.load_pretrained('fashion-mnist')" in card
    sampled = ["sample", "--model", "fashion-mnist", "--labels", "1", "--out", str(tmp_path)]
    main([*sampled, "--adapter", "owner/best", "--json", str(tmp_path / "hub.json")])
    main([*sampled, "--adapter", "best", "--json", str(tmp_path / "best.json")])
    by_hub, by_name = (json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in ("hub", "best"))
    assert by_hub["summary"] == by_name["summary"]


def test_an_adapter_of_another_model_is_not_uploaded(hub, saved, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(saved), "owner/repo", "--model", "fashion-mnist-small"])
    assert stopped.value.code == 2
    assert "made for a model with" in capsys.readouterr().err
    assert hub.made == []
