"""Checkpoints from the hub and from the home folder: found by name, or one line says what lacks."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import write_shards

from actvar.models.checkpoint import describe_checkpoint, load_var


@pytest.mark.parametrize("kind", ["var.pth", "vae.pth"])
def test_a_tilde_is_the_home_folder(
    kind: str, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert describe_checkpoint(f"~/{kind}") == describe_checkpoint(tmp_path / kind)
    assert describe_checkpoint(Path("~") / kind) == describe_checkpoint(tmp_path / kind)
    load_var("~/var.pth", "~/vae.pth")
    with pytest.raises(FileNotFoundError, match=r"~/absent\.pth"):
        describe_checkpoint("~/absent.pth")
    with pytest.raises(FileNotFoundError, match="home"):
        describe_checkpoint("~nobody-of-this-name/var.pth")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path]) -> Hub:
    """Install a stand-in for `huggingface_hub` that has the repository `owner/repo` with the revision `v1`."""
    return Hub(files[0].parent).install(monkeypatch)


class Hub:
    """List the downloads; `down` is a hub that cannot be reached."""

    def __init__(self, folder: Path):
        self.folder, self.down, self.cached = folder, False, set()
        self.downloads: list[tuple[str, str, str | None]] = []
        bases = {"EntryNotFoundError": Exception, "RepositoryNotFoundError": OSError, "RevisionNotFoundError": OSError}
        self.errors = {name: type(name, (base,), {}) for name, base in bases.items()}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Hub:
        module, utils = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.utils")
        vars(utils).update(self.errors)
        module.get_hf_file_metadata, module.hf_hub_download = self.ask, self.download
        module.hf_hub_url, module.utils = lambda **place: place, utils
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
        return self

    def ask(self, place: dict[str, str | None]) -> None:
        if self.down:
            raise ConnectionError("Name or service not known\nmore lines")
        for name, is_there in (
            ("RepositoryNotFoundError", place["repo_id"] == "owner/repo"),
            ("RevisionNotFoundError", place["revision"] in (None, "v1")),
            ("EntryNotFoundError", (self.folder / place["filename"]).exists()),
        ):
            if not is_there:
                raise self.errors[name]("404")

    def download(self, repo_id: str, filename: str, revision: str | None, local_files_only: bool) -> str:
        if local_files_only and filename not in self.cached:
            raise self.errors["EntryNotFoundError"]("not in the cache")
        assert local_files_only == self.down
        self.downloads.append((repo_id, filename, revision))
        return str(self.folder / filename)


def test_a_hub_id_names_a_repository_and_a_file(hub: Hub, tensors: tuple) -> None:
    vae, var = load_var("owner/repo@v1:var.pth", "owner/repo:vae.pth")
    assert torch.equal(var.head.weight, tensors[1]["head.weight"])
    assert torch.equal(vae.quant_conv.weight, tensors[0]["quant_conv.weight"])
    assert hub.downloads == [("owner/repo", "var.pth", "v1"), ("owner/repo", "vae.pth", None)]


def test_shards_on_the_hub_are_downloaded_with_their_index(hub: Hub, tensors: tuple) -> None:
    write_shards(tensors[1], hub.folder / "sharded", 3)
    description = describe_checkpoint("owner/repo@v1:sharded/model.safetensors.index.json")
    assert description["depth"] == 2
    assert hub.downloads == [("owner/repo", "sharded/model.safetensors.index.json", "v1")]
    elsewhere = hub.folder / "sharded" / "model-00002-of-00003.safetensors"  # as in a cache that lacks a shard
    elsewhere.rename(hub.folder / elsewhere.name)
    hub.downloads.clear()
    with pytest.raises(FileNotFoundError, match=r"owner/repo@v1:sharded/model-00002.*: not found"):
        describe_checkpoint("owner/repo@v1:sharded/model.safetensors.index.json")


def test_a_file_of_that_name_is_preferred_to_the_hub(
    hub: Hub, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    os.rename(files[1], tmp_path / "owner" / "repo:var.pth")
    assert describe_checkpoint("owner/repo:var.pth")["kind"] == "var"
    assert hub.downloads == []


@pytest.mark.parametrize("hub_id", ["owner/repo:absent.pth", "owner/absent:var.pth", "owner/repo@v2:var.pth"])
def test_what_the_hub_does_not_have_is_a_missing_file(hub: Hub, hub_id: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{hub_id}.*not found on the hub"):
        describe_checkpoint(hub_id)
    assert hub.downloads == []


def test_without_a_network_the_cache_is_used_and_otherwise_one_line_says_why(hub: Hub) -> None:
    hub.down, hub.cached = True, {"var.pth"}
    assert describe_checkpoint("owner/repo:var.pth")["kind"] == "var"
    with pytest.raises(FileNotFoundError, match=r"vae\.pth: not in .*cache.*Name or service not known\)$") as caught:
        describe_checkpoint("owner/repo:vae.pth")
    assert "\n" not in str(caught.value)


def test_the_hubs_own_package_gives_up_at_once_and_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    nothing_listens = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "actvar", "info", "owner/repo@v1:var.pth"],
        capture_output=True,
        text=True,
        env=os.environ | nothing_listens,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("actvar info: owner/repo@v1:var.pth: not in the hub's cache on this machine")
    assert done.stderr.count("\n") == 1, "each of the package's own tries would be logged"


def test_a_hub_id_without_the_hub_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'actvar\[hub\]'"):
        describe_checkpoint("owner/repo:var.pth")


def test_the_hub_package_is_imported_for_hub_ids_only(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    load_var(files[1], files[0])
