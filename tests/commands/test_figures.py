"""The paper's figures: the numbers in their tables."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from actvar import load_pretrained, record
from actvar.flops import model_flops, total_flops
from actvar.reports.figures import figure3, figure4, figure5, figure6, figures7and8
from actvar.reports.figures.__main__ import main
from actvar.sampling.request import Sampling


def rows_of(written: list[Path]) -> list[dict[str, str]]:
    """The table, after a look at the picture's size."""
    picture, table = written
    assert min(Image.open(picture).size) > 300
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_sequence_lengths_add_up_to_those_that_the_paper_names(tmp_path):
    totals = {row["model"]: int(row["tokens_so_far"]) for row in rows_of(figure3(tmp_path))}
    assert list(totals.values()) == [130, 680, 2240]


def test_cost_split_has_all_flops_of_the_model(tmp_path):
    rows = rows_of(figure4(tmp_path))
    _, var = load_pretrained("fashion-mnist")
    dense = [row for row in rows if row["model"] == "dense"]
    assert sum(int(row["flops"]) for row in dense) == total_flops(model_flops(var, 1))
    assert sum(float(row["share"]) for row in dense) == pytest.approx(1, abs=1e-3)


def test_every_token_wants_twelve_experts(tmp_path):
    sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for row in rows_of(figure5(tmp_path, per_class=1)):
        sums[row["chosen_by"], row["step"], row["block"], row["class"]] += float(row["share"])
    assert len(sums) == 6 * 6 + 2 * 6 * 10
    assert list(sums.values()) == pytest.approx([12.0] * len(sums), abs=2e-3)


def test_coverage_is_the_union_of_what_the_blocks_updated(tmp_path):
    rows = rows_of(figure6(tmp_path, per_class=1))
    _, var = load_pretrained("fashion-mnist", "paper")
    with record(var) as records:
        Sampling(tuple(range(10))).run(var)
    of_bag = [set(r.index[8].tolist()) for r in records if r.scale.tokens == 64]
    shown = [row for row in rows if row["class"] == "bag" and row["step"] == "6"]
    for count, row in enumerate(shown, 1):
        assert float(row["updated"]) == 0.75
        assert float(row["covered"]) == pytest.approx(len(set.union(*of_bag[:count])) / 64, abs=1e-4)
        assert float(row["covered_at_random"]) == pytest.approx(1 - 0.25**count, abs=1e-4)
    assert len(shown) == 6


def test_samples_of_models_that_do_not_come_with_the_package_are_left_out(tmp_path):
    rows = rows_of(figures7and8(tmp_path, ("fashion-mnist", "fashion-mnist-of-tomorrow"), per_class=1))
    _, var = load_pretrained("fashion-mnist")
    dense = Sampling(tuple(range(10))).run(var)
    with_paper = Sampling(tuple(range(10))).run(load_pretrained("fashion-mnist", "paper")[1])
    differences = (with_paper - dense).abs().mean(dim=(1, 2, 3))
    by_adapter = {name: [float(r["difference"]) for r in rows if r["adapter"] == name] for name in ("dense", "paper")}
    assert by_adapter["dense"] == [0] * 10
    assert torch.allclose(torch.tensor(by_adapter["paper"]), differences, atol=1e-4)


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    main(["--figures", "3", "--out", str(tmp_path / "new")])
    assert capsys.readouterr().out.split() == [
        word for name in ("figure3.png", "figure3.csv") for word in ("wrote", str(tmp_path / "new" / name))
    ]
