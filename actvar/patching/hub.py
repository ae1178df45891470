"""Read adapters from the Hugging Face hub, and write them there."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from actvar.models.checkpoint.files import HUB_ID, locate

FILE_NAME = "adapter.safetensors"
"""Name of the adapter in a repository."""
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@[\w./-]+)?")


def adapter_file(path: str | Path) -> Path:
    """Return the file of an adapter on this machine, after a download if it is on the hub.

    Args:
        path: a file; or `owner/repo` or `owner/repo@revision`, whose `adapter.safetensors` is meant; or
            `owner/repo:file`. A leading `~` is the home folder.

    Raises:
        FileNotFoundError: no such file, here or on the hub.
        ImportError: a name on the hub without `huggingface_hub` installed.
    """
    file, name = Path(path).expanduser(), str(path)
    if file.is_file():
        return file
    if HUB_ID.fullmatch(name):
        return locate(name)
    if REPOSITORY.fullmatch(name) and not name.endswith(".safetensors") and not file.exists():
        return locate(f"{name}:{FILE_NAME}")
    raise FileNotFoundError(f"{path}: no such adapter file")


def push_adapter(path: Path, repository: str, card: str, private: bool = False) -> str:
    """Upload an adapter and its model card to the hub in one commit, and return the address of the commit.

    Args:
        path: the adapter file.
        repository: `owner/repo`, which is made if it does not exist. The card that it has is replaced.
        card: text of the model card.
        private: whether a new repository is private.

    Raises:
        ImportError: `huggingface_hub` is not installed.
        ValueError: a repository of another form.
        OSError: the hub cannot be reached, or refuses.
    """
    if not REPOSITORY.fullmatch(repository) or "@" in repository:
        raise ValueError(f"repository: expected owner/repo, got {repository!r:.100}")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("to upload to the hub, run `pip install 'actvar[hub]'`") from error
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder) / FILE_NAME)
        (Path(folder) / "README.md").write_text(card, "utf-8")
        try:
            HfApi().create_repo(repository, private=private, exist_ok=True)
            done = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="ActVAR adapter")
        except Exception as error:  # the network library, and so its errors, depends on the hub package's version
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OSError(f"{repository}: not uploaded: {reason} (`hf auth login` logs you in)") from error
    return str(done)
