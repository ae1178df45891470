"""What becomes of a command's output never changes what it does: exit codes say whether the work was done."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actvar.cli import main
from actvar.cli.streams import ForgivingStream, forgiving_streams

SAMPLE = ["sample", "--model", "fashion-mnist-small", "--labels", "1", "--dense"]
ROOT = Path(__file__).parents[2]


def run(arguments: list[str], folder: Path, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.run([sys.executable, "-m", "actvar", *arguments], cwd=folder, env=environment, **options)


def pipe_without_reader() -> int:
    """Return the end of a pipe that raises BrokenPipeError when something is written to it."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_name_that_the_output_cannot_show_is_escaped_and_the_exit_code_is_0(tmp_path):
    done = run([*SAMPLE, "--out", "ö\udcff"], tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert b"wrote \\xf6\\udcff/dense.png" in done.stdout
    assert [path.name for path in tmp_path.glob("*/*")] == ["dense.png"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_without_a_reader_the_work_is_done_quietly(tmp_path, unbuffered):
    """Standard output is a pipe that is closed at its other end."""
    writer = pipe_without_reader()
    done = run([*SAMPLE, "--out", "a"], tmp_path, stdout=writer, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "a" / "dense.png").exists()


def test_without_a_reader_of_errors_the_work_is_done(tmp_path):
    writer = pipe_without_reader()
    command = ["sample", "--model", "fashion-mnist-small", "--num", "10", "--batch", "5", "--dense", "--out", "a"]
    done = run(command, tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert len(list((tmp_path / "a").glob("shard-*"))) == 2


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)], ids=str)
def test_streams_that_are_closed_are_not_needed(tmp_path, closed):
    done = run([*SAMPLE, "--out", "a"], tmp_path, preexec_fn=lambda: [os.close(number) for number in closed])
    assert done.returncode == 0
    assert (tmp_path / "a" / "dense.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_report_that_cannot_be_written_is_an_error(tmp_path):
    with open("/dev/full", "wb") as full:
        done = run(["info"], tmp_path, stdout=full)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("actvar info: [Errno 28]")


def test_help_without_a_reader_ends_quietly(tmp_path):
    writer = pipe_without_reader()
    done = run(["--help"], tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


class Failing(io.StringIO):
    """Raise an error for every text."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text: str) -> int:
        self.tries += 1
        raise self.error


def test_a_stream_without_a_reader_is_tried_once():
    stream = Failing(BrokenPipeError())
    forgiving = ForgivingStream(stream)
    for _ in range(3):
        print("text", file=forgiving)
    assert stream.tries == 1


def test_another_error_is_raised_once():
    stream = Failing(OSError(28, "No space left on device"))
    forgiving = ForgivingStream(stream)
    with pytest.raises(OSError, match="No space left"):
        print("text", file=forgiving)
    print("text", file=forgiving)
    assert stream.tries == 1


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"a\xf6\u20ac\U0001f600\udc80z"),
        ("latin-1", r"aö\u20ac\U0001f600\udc80z"),
        ("cp1252", r"aö€\U0001f600\udc80z"),
        ("utf-8", "aö€\U0001f600" + r"\udc80z"),
        ("utf-16", "aö€\U0001f600" + r"\udc80z"),
    ],
)
def test_what_an_encoding_has_is_kept_and_the_rest_escaped(encoding, shown):
    buffer = io.BytesIO()
    stream = ForgivingStream(io.TextIOWrapper(buffer, encoding))
    print("aö€\U0001f600\udc80z", end="", file=stream, flush=True)
    assert buffer.getvalue().decode(encoding) == shown


def test_the_streams_are_put_back(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    before = sys.stderr
    with forgiving_streams():
        print("text")
        assert sys.stdout is not None
        assert sys.stdout.encoding == "utf-8"
    assert (sys.stdout, sys.stderr) == (None, before)


# Messages


@pytest.mark.parametrize("digit", ["²", "٣x", "1_0_", "9" * 5000, "1e3", " ", "½", "-"])
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["sample", "--model", "fashion-mnist", "--labels"], "expected class numbers such as 0-9"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--per-class"], "expected a whole number from 1 to"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--top-k"], "expected a whole number, got"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--seed"], "expected a whole number, got"),
        (["sample", "--model", "fashion-mnist", "--num"], "expected a whole number of at least 1"),
        (["inspect", "--model", "fashion-mnist", "--label"], "expected a whole number, got"),
        (["evaluate", "--model", "fashion-mnist", "--rounds"], "expected a whole number of at least 1"),
        (["calibrate", "--model", "fashion-mnist", "--out", "a", "--samples"], "expected a whole number from 1 to"),
        (["verify", "--model", "fashion-mnist", "--batch"], "expected a whole number from 1 to"),
        (["flops", "--model", "d16", "--batch"], "expected a whole number"),
        (["distill", "--model", "fashion-mnist", "--stage"], "expected a whole number, got"),
        (["distill", "--model", "fashion-mnist", "--stage", "1", "--out", "a", "--samples"], "expected a whole number"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_text_that_is_no_number_is_refused_in_words(arguments, wanted, digit, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments[:-1], f"{arguments[-1]}={digit}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"{arguments[-1]}" in error
    assert wanted in error
    assert len(error) < 400


@pytest.mark.parametrize("text", ["nothing", "0.5.5", "½", "1,5"])
@pytest.mark.parametrize("option", ["--cfg", "--top-p", "--lr", "--epochs", "--ema", "--clip"])
def test_text_that_is_no_fraction_is_refused_in_words(option, text, capsys):
    command = ["sample", "--model", "fashion-mnist", "--labels", "0"]
    if option in ("--lr", "--epochs", "--ema", "--clip"):
        command = ["distill", "--model", "fashion-mnist", "--stage", "1", "--out", "a.safetensors"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, f"{option}={text}"])
    assert stopped.value.code == 2
    assert f"argument {option}: expected a number, got {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "pictures.png"], "--out: expected a folder, in which files get names of their own, got the file"),
        (["--out", __file__], "--out: expected a folder at"),
        (["--out", f"{__file__}/a/b"], "--out: expected a folder at"),
        (["--per-class", "1000000"], "--per-class: expected at most 1000000 images at once; draw more with --num"),
        (["--seed", str(2**64)], "--seed: expected an integer from"),
        (["--top-p", "nan"], "--top-p: expected a number from 0 to 1, got nan"),
        (["--device", "mps"], "--device: expected cpu or cuda, as this torch can use it, got 'mps'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--model", "fashion-mnist", "--labels", "0,1", *arguments])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert f"actvar sample: {message}" in error
    assert len(error) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), None], ids=repr)
def test_too_little_memory_is_one_line(error, capsys, monkeypatch):
    def too_much(_):
        if error is not None:
            raise error
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("actvar.cli.info.run", too_much)
    with pytest.raises(SystemExit) as stopped:
        main(["info"])
    message = capsys.readouterr().err
    assert (stopped.value.code, message.count("\n")) == (2, 1)
    assert "actvar info: expected less at a time than the memory has room for" in message


def test_an_error_that_nobody_expects_keeps_its_traceback(monkeypatch):
    def broken(_):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("actvar.cli.info.run", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["info"])


def test_folders_above_a_file_are_made(tmp_path, capsys):
    file = tmp_path / "a" / "b" / "flops.json"
    main(["flops", "--model", "fashion-mnist", "--json", str(file)])
    assert file.read_text("utf-8").startswith("{")
