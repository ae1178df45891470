"""Compiling C++: compilers that fail, names of folders, several processes, and what users see."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import sys
import threading
from pathlib import Path

import pytest
from support.small_libraries import (
    compiled_lines,
    expect_no_process_of,
    leftovers,
    libraries,
    needs_compiler,
    probe,
    script,
)

from actvar_kernels.cpu_backend import brgemm, building, cpu
from actvar_kernels.cpu_backend.building import BuildError, load
from actvar_kernels.token_draw import cpu_kernel

pytestmark = pytest.mark.skipif(os.name != "posix", reason="libraries are compiled on Linux and macOS")
ODD_NAMES = ("10:30", "a$b", "$HOME", "a b", 'quote"', "it's", "é✓", "-o", "@file", "a;b&c", "new\nline", "%s{}", "a,b")


# Compilers

FAILING = {
    "missing": ("no-such-compiler-here", "'no-such-compiler-here' is not there"),
    "missing and relative": ("./nothing", "'./nothing' is not there"),
    "a folder": ("{folder}", "is not there"),
    "not executable": ("{folder}/text", "is not there"),
    "a quote without its end": ('"g++ -O2', "CXX: expected a command"),
    "an empty word": ("''", "'' is not there"),
    "no program": ("{folder}/noise", "does not start: Exec format error"),
    "without its interpreter": ("{folder}/orphan", "does not start: No such file or directory"),
    "exits with 1": ("exit 1", "failed with exit code 1"),
    "says why": ("echo 'x.cpp:1: error: no such luck'; exit 3", "exit code 3: x.cpp:1: error: no such luck"),
    "says it at length": ("yes error: | head -c 100000 >&2; exit 1", "exit code 1: error:"),
    "says it in no encoding": (r"printf '\377 error: \376\n'; exit 1", "exit code 1: \ufffd error: \ufffd"),
    "is killed": ("kill -9 $$", "failed with exit code -9"),
    "makes nothing": ("exit 0", "made no file"),
    "makes nonsense": ('for last; do :; done; echo nonsense > "$last"', "the compiled library cannot be loaded"),
    "makes empty files": ('for last; do :; done; : > "$last"', "the compiled library cannot be loaded"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_compiler_that_fails_is_one_line_that_says_why_and_names_cxx(name, compiled_cache, tmp_path, monkeypatch):
    command, expected = FAILING[name]
    (tmp_path / "text").write_text("no program")
    (tmp_path / "noise").write_bytes(b"\x00\x01\x02")
    (tmp_path / "noise").chmod(0o755)
    (tmp_path / "orphan").write_text("#!/no/such/interpreter\n")
    (tmp_path / "orphan").chmod(0o755)
    is_script = " " in command and not command.startswith('"')
    command = script(tmp_path / "compiler", command) if is_script else command.format(folder=tmp_path)
    monkeypatch.setenv("CXX", command)
    with pytest.raises(BuildError) as error:
        load(probe(tmp_path / "source"))
    message = str(error.value)
    assert expected in message
    assert "CXX" in message
    assert "\n" not in message
    assert len(message) < 1000
    assert not leftovers(compiled_cache)


@needs_compiler
def test_a_library_without_its_functions_is_refused(compiled_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "c++ -fvisibility=hidden")
    with pytest.raises(BuildError, match=r"cannot be loaded: .*answer"):
        load(probe(tmp_path / "source"))


@needs_compiler
@pytest.mark.parametrize("named", ["", "  ", "c++", "./compiler", "'{folder}/compiler' -DX", "'{folder}/reads'"])
def test_compilers_that_work_are_taken_as_they_are_named(named, compiled_cache, tmp_path, monkeypatch):
    script(tmp_path / "compiler", 'exec c++ "$@"')
    script(tmp_path / "reads", 'cat; exec c++ "$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", named.format(folder=tmp_path))
    assert load(probe(tmp_path / "source")).answer() == 42


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="it looks for processes in /proc")
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_compiler_that_hangs_is_ended_with_its_own_processes(interrupted, compiled_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", 'sh -c "sleep 1000; :" "$0" & wait'))
    if interrupted:

        def interrupt(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(building.time, "sleep", interrupt)
        expected = pytest.raises(KeyboardInterrupt)
    else:
        monkeypatch.setattr(building, "SECONDS", 0)
        expected = pytest.raises(BuildError, match="compiler did not end in 0 s; install g")
    with expected:
        load(probe(tmp_path / "source"))
    expect_no_process_of(tmp_path / "compiler")
    assert not leftovers(compiled_cache)


@needs_compiler
def test_what_fails_once_can_be_built_the_next_time(compiled_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", "exit 1"))
    with pytest.raises(BuildError):
        load(probe(tmp_path / "source"))
    monkeypatch.delenv("CXX")
    assert load(probe(tmp_path / "source")).answer() == 42


def test_several_files_are_compiled_at_once_and_an_error_ends_the_others(compiled_cache, tmp_path, monkeypatch):
    """Each call waits until the other has begun: one after the other they would never end."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    text = 'for last; do :; done; : > "$0.$(basename "$last")"\n'
    text += 'while [ ! -e "$0.0.o" ] || [ ! -e "$0.1.o" ]; do sleep 0.01; done\n'
    text += 'case "$last" in *0.o) exit 5;; esac; sleep 1000'
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", text))
    library = probe(tmp_path / "source")
    with pytest.raises(BuildError, match="exit code 5"):
        load(library._replace(sources=library.sources * 2))
    expect_no_process_of(tmp_path / "compiler")


# Names


@needs_compiler
@pytest.mark.parametrize("name", [*ODD_NAMES, os.fsdecode(b"\xff")], ids=ascii)
def test_any_name_of_the_folders_of_package_cache_and_compiler_works(name, compiled_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / name / "cache"))
    library = probe(tmp_path / name / "source")
    assert load(library).answer() == 42
    assert len(libraries(tmp_path / name / "cache" / "actvar")) == 1


@needs_compiler
def test_the_same_sources_elsewhere_are_not_compiled_again_and_any_change_is(compiled_cache, tmp_path, caplog):
    first = probe(tmp_path / "first")
    load(first)
    (tmp_path / "second").mkdir()
    assert load(probe(tmp_path / "second" / "deep"))._name == load(first)._name
    assert len(compiled_lines(caplog)) == 1
    assert load(probe(tmp_path / "third", answer=7)).answer() == 7
    load(probe(tmp_path / "third", flags=("-DX",)))
    source = probe(tmp_path / "third").sources[0]
    source.write_text(source.read_text() + "\n")
    load(first._replace(sources=[source]))
    assert len(compiled_lines(caplog)) == len(libraries(compiled_cache)) == 4


@pytest.mark.parametrize("module", [cpu, cpu_kernel], ids=lambda module: module.__name__)
def test_all_that_the_sources_include_counts_for_whether_they_are_compiled_again(module):
    files, included = [*module.SOURCES, *module.HEADERS], set()
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            if line.startswith('#include "'):
                included.add((file.parent / line.split('"')[1]).resolve())
    assert included <= {file.resolve() for file in files}


@pytest.mark.parametrize("module", [cpu, cpu_kernel], ids=lambda module: module.__name__)
def test_both_libraries_have_the_function_by_which_they_are_known(module):
    if module.why_unavailable() is not None:
        pytest.skip(module.why_unavailable())
    assert load(module.LIBRARY)._name == module.library()._name


# Several processes


@needs_compiler
def test_of_many_that_need_it_at_once_one_builds(compiled_cache, tmp_path, monkeypatch, caplog):
    """Threads, which hold their locks apart as processes do."""
    log = tmp_path / "calls"
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", f'echo call >> "{log}"; exec c++ "$@"'))
    library, together, answers = probe(tmp_path / "source"), threading.Barrier(5), []

    def work() -> None:
        together.wait()
        answers.append(load(library).answer())

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 5
    assert log.read_text().split() == ["call"] * 2  # to compile and to link
    assert len(compiled_lines(caplog)) == 1


def test_a_process_that_holds_the_lock_for_ever_is_not_waited_for_for_ever(
    compiled_cache, tmp_path, monkeypatch, caplog
):
    library = probe(tmp_path / "source")
    compiled_cache.mkdir(parents=True)
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", "exit 9"))
    monkeypatch.setattr(building, "SECONDS", 0)
    with (compiled_cache / f"probe_{building._digest(library)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match="another process has not finished compiling a probe in 0 s; end that pro"):
            load(library)
    monkeypatch.setattr(building, "SECONDS", 600)
    with pytest.raises(BuildError, match="exit code 9"):  # the lock went with its owner
        load(library)


@needs_compiler
def test_what_a_killed_build_left_is_removed_and_does_not_stop_the_next_one(compiled_cache, tmp_path):
    library = probe(tmp_path / "source")
    stem = f"probe_{building._digest(library)}"
    (compiled_cache / f".{stem}.abc").mkdir(parents=True)
    (compiled_cache / f".{stem}.abc" / "0.o").write_text("half")
    (compiled_cache / f"{stem}.lock").touch()
    assert load(library).answer() == 42
    assert not leftovers(compiled_cache)


@needs_compiler
def test_where_a_file_system_has_no_locks_it_is_built_without(compiled_cache, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert load(probe(tmp_path / "source")).answer() == 42


# What users see


@pytest.fixture
def forgotten(monkeypatch):
    """Let the kernels' libraries be looked for again, in the test and after it."""
    caches = (cpu.why_unavailable, cpu.available, cpu.library, cpu_kernel._why_not_loaded, cpu_kernel._loads)
    caches += (cpu_kernel.library, brgemm.library, brgemm.runs)
    kernels = [module for name, module in sys.modules.items() if name.startswith("actvar_kernels.")]
    caches += tuple(module._library for module in kernels if hasattr(getattr(module, "_library", None), "cache_clear"))
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("lost", ["actvar_cpu", "actvar_sampling", "both"])
def test_a_library_that_is_lost_ends_in_the_reference_and_one_line(lost, forgotten, monkeypatch, caplog):
    import torch
    from support.helpers import make_tiny_var

    import actvar
    from actvar_kernels import sample_tokens
    from actvar_kernels.token_draw import reference

    def failing(library):
        if lost in (library.name, "both"):
            raise BuildError(f"{library.name} is lost")
        return load(library)

    var = make_tiny_var()
    actvar.accelerate(var)
    logits, noise = torch.randn(4, 3, 20), torch.rand(2, 3, 20).clamp(0.01, 0.99)
    monkeypatch.setattr(building, "load", failing)
    with caplog.at_level(logging.WARNING):
        images = [var.autoregressive_infer_cfg(2, 1, g_seed=0, top_k=10, top_p=0.9) for _ in range(2)]
        tokens = sample_tokens(logits, 1.0, 5, 0.9, noise=noise)
    assert torch.equal(*images)
    assert torch.equal(tokens, reference.sample_tokens(logits, 1.0, 5, 0.9, noise))
    lines = [record.getMessage() for record in caplog.records if "is lost" in record.getMessage()]
    assert len(lines) == 1
    title = "the C++ samplers" if lost == "actvar_sampling" else "the C++ kernels"
    assert lines[0].startswith(f"{title} are off")


@needs_compiler
def test_where_no_logging_is_set_up_the_line_is_seen(compiled_cache, tmp_path, monkeypatch):
    """Python writes warnings of a logger without a handler to stderr."""
    monkeypatch.setattr(logging.root, "handlers", [])
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    load(probe(tmp_path / "source"))
    assert shown.getvalue() == f"compiling a probe once (a moment) into {compiled_cache}\n"


def test_info_says_where_the_libraries_are_or_why_they_are_not(forgotten, monkeypatch, capsys):
    from actvar.cli import main

    reason = cpu_kernel.why_unavailable()
    if reason is None:
        main(["info"])
        out = capsys.readouterr().out
        assert cpu.library()._name in out
        assert cpu_kernel.library()._name in out
        assert cpu.isa_name(cpu.best_isa()) in out
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "no compiler here")
    main(["info"])
    assert capsys.readouterr().out.count("no compiler here") == 2
