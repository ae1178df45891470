"""Comparison of two commits: which worker measures, what counts as slower, and what is said of a broken worker."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actvar.reports import one_block
from actvar_kernels.operations.shapes import last_scale
from benchmarks import against, against_worker
from benchmarks.__main__ import main

ROOT = Path(__file__).parents[2]
FAKE = """
import json, os, pathlib, sys
import package
cases = {cases}
print(json.dumps(list(cases)), flush=True)
for line in sys.stdin:
    print(cases[line.rstrip("\\n")], flush=True)
"""


# --- what counts as slower


def noisy_timer(seconds: float, seed: int, spread: float = 0.05) -> against.Timer:
    noise = random.Random(seed)
    return lambda case: seconds * (1 + noise.uniform(-spread, spread))


def test_equal_commits_are_not_slower_and_a_slowdown_beyond_noise_is():
    cases = [str(number) for number in range(100)]
    equal = against.changes(cases, noisy_timer(1.0, 0), noisy_timer(1.0, 1))
    assert not any(change.slower for change in equal)
    slowed = against.changes(cases, noisy_timer(1.0, 0), noisy_timer(1.2, 1))
    assert all(change.slower for change in slowed)
    faster = against.changes(cases, noisy_timer(1.0, 0), noisy_timer(0.5, 1))
    assert not any(change.slower for change in faster)


def test_noise_is_the_larger_spread_of_the_two_and_hides_what_is_smaller():
    quiet, loud = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.9, 1.0, 1.1, 1.2, 1.3, 1.4]
    assert against.Change.of("case", quiet, loud).noise == pytest.approx((1.3 - 1.0) / 1.15)
    assert against.Change.of("case", quiet, [1.2] * 6).slower
    assert not against.Change.of("case", loud, [value * 1.2 for value in loud]).slower
    assert not against.Change.of("case", quiet, [1.02] * 6).slower  # below SMALLEST


# --- two commits with made-up workers


class Repository:
    """A git repository whose only code is a worker and a module that the worker imports."""

    def __init__(self, root: Path):
        self.root = root
        self.git("init", "-q")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True).stdout

    def write(self, worker: str, package: str = "") -> None:
        """Write the files of the working tree; the worker is Python code, or a dictionary of made-up cases."""
        (self.root / "benchmarks").mkdir(exist_ok=True)
        (self.root / "benchmarks" / "__init__.py").touch()  # otherwise a package elsewhere on the path comes first
        code = FAKE.format(cases=worker) if worker.startswith("{") else worker
        (self.root / "benchmarks" / "against_worker.py").write_text(code)
        (self.root / "package.py").write_text(package)

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", "a commit")

    def compare(self, only: str = "", subset: str = "quick") -> int:
        return against.compare("HEAD", subset, only, repeats=3, root=self.root)

    def worktrees(self) -> int:
        return len(self.git("worktree", "list").splitlines())


@pytest.fixture
def repository(tmp_path) -> Repository:
    root = tmp_path / "repository"
    root.mkdir()
    return Repository(root)


def rows(printed: str) -> dict[str, list[str]]:
    """Return the words that follow the name of each case, numbers or a remark."""
    return {line[:56].strip(): line[56:].split() for line in printed.splitlines()}


def test_each_commit_runs_its_own_worker_and_its_own_package(repository, capsys):
    repository.write("{'sample, dense': package.SECONDS}", "SECONDS = 1.0")
    repository.commit()
    repository.write("{'sample, dense': package.TIME}", "TIME = 0.25")
    assert repository.compare() == 0
    assert rows(capsys.readouterr().out)["sample, dense"] == ["1000.000", "250.000", "0.25x", "0%"]
    assert repository.worktrees() == 1


def test_cases_of_one_commit_are_listed_as_not_compared(repository, capsys):
    repository.write("{'shared': 1.0, 'old': 1.0, 'left out, old': 1.0}")
    repository.commit()
    repository.write("{'new one': 1.0, 'shared': 1, 'new two': 1.0}")
    assert repository.compare() == 0
    found = rows(capsys.readouterr().out)
    assert found["shared"] == ["1000.000", "1000.000", "1.00x", "0%"]
    assert found["old"] == found["left out, old"] == ["not", "compared,", "only", "in", "HEAD"]
    assert found["new one"] == found["new two"] == ["not", "compared,", "only", "in", "the", "present"]
    repository.compare(only="d")
    *listed, verdict = capsys.readouterr().out.splitlines()
    assert list(rows("\n".join(listed))) == ["milliseconds", "shared", "old", "left out, old"]
    assert verdict == "none of 1 cases is slower than HEAD"
    with pytest.raises(ValueError, match="expected a case of both commits that contains 'new', have shared"):
        repository.compare(only="new")


@pytest.mark.parametrize(("seconds", "code"), [(1.0, 0), (1.02, 0), (1.5, 1), (0.5, 0)])
def test_the_exit_code_says_whether_a_case_got_slower(repository, capsys, seconds, code):
    repository.write("{'one': 1.0, 'two': 1.0}")
    repository.commit()
    repository.write(f"{{'one': 1.0, 'two': {seconds}}}")
    assert repository.compare() == code
    assert ("slower than HEAD: two\n" in capsys.readouterr().out) == bool(code)


def test_a_case_is_printed_before_the_next_one_is_measured(capsys):
    seen = []

    def timer(case: str) -> float:
        seen.append((case, "one" in capsys.readouterr().out))
        return 1.0

    assert [change.case for change in against.printed(against.changes(["one", "two"], timer, timer, 1))] == [
        "one",
        "two",
    ]
    assert [shown for case, shown in seen if case == "two"] == [True, False, False, False]


def test_a_slowdown_that_new_processes_do_not_see_is_none(repository, capsys):
    repository.write("{'one': 1.0}")
    repository.commit()
    count = "runs = pathlib.Path('runs'); runs.write_text(runs.read_text() + '1' if runs.exists() else '1')\n"
    repository.write(
        FAKE.format(cases="{'one': 2.0 if runs.read_text() == '1' else 1.0}").replace("cases =", count + "cases =")
    )
    assert repository.compare() == 0
    assert "not confirmed" in capsys.readouterr().out


def test_the_subset_is_passed_on_and_only_the_earlier_commit_builds_elsewhere(
    repository, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    repository.write("{sys.argv[1]: 1.0, os.environ['TORCH_EXTENSIONS_DIR']: 1.0}")
    repository.commit()
    repository.compare(subset="all")
    only_in = {line.split()[0]: line.rsplit(" in ")[-1] for line in capsys.readouterr().out.splitlines()}
    assert "all" in only_in
    assert only_in.pop(str(tmp_path / "mine")) == "the present"
    (elsewhere,) = (name for name, commit in only_in.items() if commit == "HEAD")
    assert not Path(elsewhere).is_relative_to(repository.root)
    assert not Path(elsewhere).parent.exists()  # it went with the checkout


NO_NAMES = {
    "raise SystemExit(3)": "got its end with exit code 3",
    "print('compiling')": "got 'compiling",
    "print()": r"got '\\n'",
    "print('{\"case\": 1.0}')": "got {'case': 1.0}",
    "print('[1, 2]')": r"got \[1, 2\]",
}
NO_SECONDS = {
    "{'case': 'soon'}": "got 'soon",
    "{'case': 'null'}": "got None",
    "{'case': 'true'}": "got True",
    "{'case': '\"1.0\"'}": "got '1.0'",
    "{'case': -1.0}": "got -1.0",
    "{'case': float('inf')}": r"got 'inf\\n'",
    "{'case': 'NaN'}": "got nan",
    "print('[\"case\"]', flush=True); input(); raise SystemExit(4)": "got its end with exit code 4",
    "print('[\"case\"]', flush=True)": "got its end with exit code 0",
}


@pytest.mark.parametrize("broken", ["HEAD", "the present"])
@pytest.mark.parametrize(
    ("worker", "expected", "found"),
    [(worker, "a JSON list of case names", found) for worker, found in NO_NAMES.items()]
    + [(worker, "the seconds of 'case'", found) for worker, found in NO_SECONDS.items()],
)
def test_a_worker_that_does_not_speak_the_protocol(repository, worker, expected, found, broken):
    repository.write(worker if broken == "HEAD" else "{'case': 1.0}")
    repository.commit()
    repository.write(worker if broken == "the present" else "{'case': 1.0}")
    message = f"{broken}: expected {expected} from its benchmarks/against_worker.py, {found}.*; compare with a commit"
    with pytest.raises(against.WorkerError, match=f"(?s){message}"):
        repository.compare()
    assert repository.worktrees() == 1


def test_a_commit_without_a_worker(repository):
    (repository.root / "README").write_text("nothing\n")
    repository.commit()
    repository.write("{'case': 1.0}")
    with pytest.raises(against.WorkerError, match=r"HEAD: expected a worker from its benchmarks/.* got no such file"):
        repository.compare()


def test_an_unknown_revision_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--against", "nowhere"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "nowhere" in message
    assert len(message.splitlines()) == 1


def test_a_broken_worker_is_one_line_of_the_command(capsys, monkeypatch):
    def compare(*arguments):
        assert arguments == ("HEAD", "all", "block", 2)
        raise against.WorkerError("HEAD: it ended")

    monkeypatch.setattr(against, "compare", compare)
    with pytest.raises(SystemExit) as stopped:
        main(["--against", "HEAD", "--subset", "all", "--only", "block", "--repeats", "2"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "python -m benchmarks: HEAD: it ended (try --help)\n"


# --- the worker of this commit

OPERATIONS = (
    "select_tokens", "normalize_modulate", "subset_attention", "add_normalize_route", "expert_ffn_scatter dense",
    "expert_ffn_scatter tile_list", "scatter_rows",
)  # fmt: skip
SAMPLES = [
    f"sample, {way}, fashion-mnist batch {batch}" for batch in (1, 16) for way in ("dense", "accelerated", "ActVAR")
]
QUICK = [f"{name}, fashion-mnist batch 1" for name in OPERATIONS] + ["decoder, fashion-mnist batch 1", *SAMPLES]
CPU = [
    *(f"{name}, fashion-mnist batch 16" for name in OPERATIONS),
    *(f"{name}, d16 batch 1" for name in OPERATIONS),
    *(f"block, {way}, d16 batch 1" for way in ("dense", "accelerated", "ActVAR")),
    "decoder, fashion-mnist batch 16",
    "decoder, official batch 1",
    *SAMPLES,
]


@pytest.mark.parametrize(("subset", "names"), [("quick", QUICK), ("cpu", CPU)])
def test_names_of_cases_are_those_of_earlier_commits(subset, names, monkeypatch, capsys):
    monkeypatch.setattr(against_worker.cpu, "multiplies_bfloat16", lambda: True)
    assert list(against_worker.cases(subset, "cpu")) == names + [f"{name}, bf16" for name in names]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(against_worker.cpu, "multiplies_bfloat16", lambda: False)
    assert list(against_worker.cases(subset, "cpu")) == names
    assert capsys.readouterr().err == "left out: cases in bf16, which this processor has no instructions for\n"


def test_the_worker_answers_in_lines_and_prints_nothing_else():
    case = "normalize_modulate, fashion-mnist batch 1"
    code = f"""
from benchmarks import against_worker
cases = against_worker.cases
def printing_cases(*arguments):
    print("printed by the way")
    return {{name: run for name, run in cases(*arguments).items() if name == {case!r}}}
against_worker.cases = printing_cases
against_worker.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "quick"], cwd=ROOT, input=f"{case}\n{case}\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "printed by the way" in done.stderr
    names, *seconds = done.stdout.splitlines()
    assert names == f'["{case}"]'
    assert len(seconds) == 2
    assert all(float(line) > 0 for line in seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", one_block.WAYS)
def test_the_block_that_is_timed_has_the_cache_of_a_sample(way, dtype):
    cached = []
    block = one_block.one_block(way, "fashion-mnist", "cpu", dtype, None).blocks[0]

    def note(module, _arguments):
        cached.append(0 if module.attn.cached_k is None else module.attn.cached_k.shape[2])

    with block.register_forward_pre_hook(note):
        assert one_block.last_scale_seconds(way, "fashion-mnist", 2, "cpu", dtype) > 0
    shape = last_scale("fashion-mnist", 2)
    assert len(cached) == 6
    assert cached[:5] == [0, 1, 5, 14, 30]
    assert cached[5] == (shape.cached if way == "ActVAR" else 66)
    assert block.attn.cached_k is None


def test_the_decoder_that_is_timed_gets_features_of_a_whole_image():
    vae, features = against_worker.decoder("fashion-mnist", 3, "cpu", torch.float32)
    assert vae.fhat_to_img(features).shape == (3, 1, 32, 32)
