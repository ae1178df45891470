"""Compiled libraries in folders as they are: files that are damaged, folders that cannot be used or trusted."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.faults import full_disk
from support.small_libraries import (
    CURE,
    compiled_lines,
    libraries,
    needs_compiler,
    private_folder,
    probe,
    script,
)

from actvar_kernels.cpu_backend import build_folders, building
from actvar_kernels.cpu_backend.building import BuildError, load

pytestmark = pytest.mark.skipif(os.name != "posix", reason="libraries are compiled on Linux and macOS")


# A library that is there already


@needs_compiler
@pytest.mark.parametrize(
    "hindrance", ["no compiler", "empty CXX", "no PATH", "no streams", "locked", "no process", "no writes", "no home"]
)
def test_a_library_that_is_there_is_loaded_without_anything_else(
    hindrance, compiled_cache, tmp_path, monkeypatch, caplog
):
    library = probe(tmp_path / "source")
    load(library)
    caplog.clear()
    context = nullcontext()
    if hindrance == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler-here")
    elif hindrance == "empty CXX":
        monkeypatch.setenv("CXX", "")
    elif hindrance == "no PATH":
        monkeypatch.setenv("PATH", "")
    elif hindrance == "no streams":
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(sys, name, None)
    elif hindrance == "locked":
        context = next(compiled_cache.glob("*.lock")).open("w")
        fcntl.flock(context, fcntl.LOCK_EX)
    elif hindrance == "no process":
        monkeypatch.setattr(subprocess, "Popen", None)
    elif hindrance == "no writes":
        context = full_disk(0)
        monkeypatch.setattr(Path, "mkdir", None)
        monkeypatch.setattr(os, "open", None)

        def no_temporary_folder():
            raise FileNotFoundError(2, "No usable temporary directory found")

        monkeypatch.setattr(tempfile, "gettempdir", no_temporary_folder)
    else:
        monkeypatch.setenv("HOME", "/proc/nobody")
    with context:
        assert load(library).answer() == 42
    assert not caplog.records


@needs_compiler
def test_without_any_stream_a_process_builds_it(compiled_cache, tmp_path):
    """With descriptors 0 to 2 closed, as a service may start it."""
    library = probe(tmp_path / "source")
    code = "import pathlib, sys; from actvar_kernels.cpu_backend.building import Library, load; "
    code += "assert sys.stdout is None; "
    code += "source = pathlib.Path(sys.argv[1]); library = Library('probe', 'a probe', 'a moment', [source], "
    code += "[source.with_name('probe.h')], (), 'answer'); "
    code += "pathlib.Path(sys.argv[2]).write_text(str(load(library).answer()))"
    command = 'exec "$0" -c "$1" "$2" "$3" <&- >&- 2>&-'
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    arguments = ["sh", "-c", command, sys.executable, code, str(library.sources[0]), str(tmp_path / "result")]
    assert subprocess.run(arguments, env=environment, timeout=200).returncode == 0
    assert (tmp_path / "result").read_text() == "42"
    assert len(libraries(compiled_cache)) == 1


# Damaged files

DAMAGES = {
    "empty": lambda whole: b"",
    "one byte": lambda whole: whole[:1],
    "half": lambda whole: whole[: len(whole) // 2],
    "without its end": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"\0",
    "a bit": lambda whole: whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
    "text": lambda whole: b"#!/bin/sh\n",
}


@needs_compiler
@pytest.mark.parametrize("damage", [*DAMAGES, "a folder", "a link to nothing", "a pipe", "writable by all", "removed"])
def test_a_damaged_file_in_the_cache_is_never_loaded_and_built_anew(damage, compiled_cache, tmp_path):
    library = probe(tmp_path / "source")
    load(library)
    (file,) = libraries(compiled_cache)
    whole = file.read_bytes()
    file.unlink()  # the loaded one stays as it is
    if damage in DAMAGES:
        file.write_bytes(DAMAGES[damage](whole))
    elif damage == "a folder":
        file.mkdir()
    elif damage == "a link to nothing":
        file.symlink_to(tmp_path / "nothing")
    elif damage == "a pipe":
        os.mkfifo(file)
    elif damage == "writable by all":
        file.write_bytes(whole)
        file.chmod(0o777)
    again = load(library)
    assert again.answer() == 42
    if damage == "a folder":  # which nothing can take the place of
        assert Path(again._name).parent == private_folder()
        return
    assert libraries(compiled_cache) == [file]
    assert file.read_bytes() == whole
    assert stat.S_IMODE(file.stat().st_mode) & 0o022 == 0


@needs_compiler
def test_a_library_for_another_system_stays_and_another_is_built_beside_it(compiled_cache, tmp_path):
    """As in a home folder that several machines share."""
    library = probe(tmp_path / "source")
    load(library)
    (file,) = libraries(compiled_cache)
    stem = file.stem.rsplit("_", 1)[0]
    file.unlink()
    (compiled_cache / "text").write_text("of another system")
    other = (compiled_cache / "text").rename(compiled_cache / building._file_name(stem, compiled_cache / "text"))
    assert load(library).answer() == 42
    assert libraries(compiled_cache) == sorted([file, other])


# Folders


def unusable(kind: str, tmp_path: Path, monkeypatch) -> None:
    """Make the cache unusable."""
    root = tmp_path / "cache"
    if kind == "a file in its place":
        root.write_text("")
    elif kind == "a file inside":
        root.mkdir()
        (root / "actvar").write_text("")
    elif kind == "a link to nothing":
        root.symlink_to(tmp_path / "nothing" / "nowhere")
    elif kind == "not to be made":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nobody/cache")
    elif kind == "a home that is not there":
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/proc/nobody")
    elif kind == "no home":
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification ignores
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    elif kind == "a working folder that was removed":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "relative")
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
    else:
        refused = {"read-only": (os, "mkdir"), "full": (tempfile, "TemporaryFile"), "noexec": (os, "statvfs")}[kind]
        original = getattr(*refused)

        def refuse(*arguments, **options):
            folder = str(arguments[0] if arguments else options["dir"])
            if not folder.startswith(str(root)):
                return original(*arguments, **options)
            if kind == "noexec":
                return os.statvfs_result((*original(*arguments)[:8], os.ST_NOEXEC, 255))
            raise OSError(30 if kind == "read-only" else 28, "Read-only file system" if kind == "read-only" else "Full")

        monkeypatch.setattr(*refused, refuse)


UNUSABLE = (
    *("a file in its place", "a file inside", "a link to nothing", "not to be made", "a home that is not there"),
    *("no home", "a working folder that was removed", "read-only", "full", "noexec"),
)


@needs_compiler
@pytest.mark.parametrize("kind", UNUSABLE)
def test_where_the_cache_cannot_be_used_a_private_folder_is(kind, compiled_cache, tmp_path, monkeypatch, caplog):
    library = probe(tmp_path / "source")
    unusable(kind, tmp_path, monkeypatch)
    assert load(library).answer() == 42
    folder = private_folder()
    assert len(libraries(folder)) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (line,) = compiled_lines(caplog)
    assert line.startswith(f"compiling a probe once (a moment) into {folder}")
    if kind not in ("no home", "a working folder that was removed"):
        assert "cannot be used (" in line
        assert line.endswith(CURE)
    load(library)  # from there
    assert len(compiled_lines(caplog)) == 1


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("temporary", ["none", "a file", "full"])
def test_where_no_folder_can_be_used_the_message_names_what_to_set(
    kind, temporary, compiled_cache, tmp_path, monkeypatch
):
    library, context = probe(tmp_path / "source"), nullcontext()
    unusable(kind, tmp_path, monkeypatch)
    if temporary == "none":

        def none():
            raise FileNotFoundError(2, "No usable temporary directory found")

        monkeypatch.setattr(tempfile, "gettempdir", none)
    elif temporary == "a file":
        private_folder().write_text("")
    else:
        context = full_disk(1000)
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", "exit 9"))  # which is not asked
    with context, pytest.raises(BuildError) as error:
        load(library)
    message = str(error.value)
    assert message.startswith("there is no folder for the compiled library: ")
    assert message.endswith(CURE)
    assert ("File too large" in message) == (temporary == "full")
    assert "\n" not in message


@needs_compiler
@pytest.mark.parametrize("squatter", ["a link", "open to a group", "open to all", "of another user"])
def test_a_private_folder_that_another_user_may_have_made_is_neither_read_nor_written(
    squatter, compiled_cache, tmp_path, monkeypatch
):
    library, folder = probe(tmp_path / "source"), private_folder()
    load(library)
    (file,) = libraries(compiled_cache)
    folder.mkdir(mode=0o700)
    shutil.copy(file, folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nobody")
    assert load(library)._name == str(folder / file.name)
    if squatter == "a link":
        folder.rename(tmp_path / "theirs")
        folder.symlink_to(tmp_path / "theirs")
    elif squatter == "of another user":
        owner = os.stat
        monkeypatch.setattr(Path, "lstat", lambda path: os.stat_result((*owner(path)[:4], 4242, *owner(path)[5:10])))
    else:
        folder.chmod(0o750 if squatter == "open to a group" else 0o707)
    with pytest.raises(BuildError, match=f"actvar-{os.getuid()} cannot be used .another user made it or can write"):
        load(library)
    assert [path.name for path in folder.iterdir()] == [file.name]


@needs_compiler
@pytest.mark.parametrize("what", ["folder", "file"])
def test_in_a_cache_that_everybody_writes_to_only_what_is_ours_is_loaded(what, compiled_cache, tmp_path, monkeypatch):
    library = probe(tmp_path / "source")
    load(library)
    (file,) = libraries(compiled_cache)
    theirs = compiled_cache if what == "folder" else file
    original = Path.stat

    def stat_of(path, **options):
        found = original(path, **options)
        return os.stat_result((*found[:4], 4242, *found[5:10])) if path == theirs else found

    monkeypatch.setattr(Path, "stat", stat_of)
    assert load(library)._name == str(file)  # its folder is not open to all: an administrator made it
    theirs.parent.chmod(0o1777)
    if what == "folder":
        assert load(library)._name == str(private_folder() / file.name)
    else:
        assert build_folders.is_trusted_file(file) is False
