from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from actvar.cli import main
from actvar.flops import BY_LAST_WEIGHT, MODULES
from actvar.reports import flops as report_module
from actvar.reports.flops import MODEL_NAMES, decoder_flops, shapes_of
from actvar.reports.paper_tables import ROWS, reproduce


@pytest.fixture(scope="module")
def reproduced():
    return reproduce({name: shapes_of(name)[1] for name in {row.model for row in ROWS}})


def saving(model: str, rates: dict[int, tuple[float, float]], fixed: float) -> float:
    """Percent of FLOPs saved in a row, added up token by token; `rates`: token and FFN rate by step, counted from 1."""
    depth = int(model.removeprefix("d"))
    C, sides = 64 * depth, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

    def cost(rates) -> float:
        total, cached = fixed, 0
        for step, side in enumerate(sides, 1):
            tokens = side * side
            token_rate, ffn_rate = rates.get(step, (1, 1))
            kept = int(token_rate * tokens + 0.5)
            block = 2 * C * tokens if token_rate < 1 else 0
            for _token in range(kept):
                block += 2 * C * (4 * C) + 4 * C * (cached + kept) + 2 * C * (8 * C) * ffn_rate
                block += 2 * C * 16 if ffn_rate < 1 else 0
            total += depth * (block + 2 * C * 6 * C) + 2 * C * 2 * C + 2 * C * 4096 * tokens
            total += 2 * 32 * C * tokens / 2 if step > 1 else 0  # embedded once for both rows
            cached += kept
        return total

    return 100 * (1 - cost(rates) / cost({}))


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[f"table {row.table}, {row.name}" for row in ROWS])
def test_every_row_equals_a_count_over_tokens(reproduced, number):
    row, ours = ROWS[number], reproduced[number]
    config = row.config
    steps = [scale % 10 + 1 for scale in config.scales]
    rates = dict(zip(steps, zip(config.token_rates, config.ffn_rates, strict=True), strict=True))
    assert ours.row is row
    assert ours.transformer == pytest.approx(saving(row.model, rates, fixed=0), abs=0.01)
    assert ours.with_fixed_cost == pytest.approx(saving(row.model, rates, fixed=50e9), abs=0.01)


def test_the_tables_are_the_papers_four(reproduced):
    assert [sum(row.table == table for row in ROWS) for table in (1, 2, 3, 6)] == [4, 5, 3, 2]
    base = next(row for row in ROWS if row.name == "ActVAR-d20")
    again = [row for row in ROWS if row.table != 1 and row.saving == base.saving]
    assert [row.table for row in again] == [2, 3, 6]
    assert all([scale % 10 for scale in row.config.scales] == [8, 9] for row in again)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    files = ["--json", str(tmp_path / "flops.json"), "--plot", str(tmp_path / "flops.png")]
    main(["flops", "--model", "fashion-mnist", "--batch", "2", "--rates", "0.5", "0.25", "0.5", "--paper", *files])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "flops.json").read_text())
    assert written["config"]["token_rates"] == [0.5, 0.25]
    assert len(written["formula"]["actvar"]) == len(written["maps"]) == 6
    assert written["formula"] == written["counted"]
    last = written["formula"]["actvar"][-1]
    assert list(last) == list(MODULES)
    row = [line for line in printed.splitlines() if line.startswith("step  6, 8x8")][1]
    own = [value for module, value in last.items() if module not in BY_LAST_WEIGHT]
    assert row.split()[3:] == [f"{value / 1e9:.3f}" for value in (*own, sum(own), sum(own))]
    assert f"{written['saving']['formula']:.2%} by formula" in printed
    for entry in written["paper"]:
        line = next(text for text in printed.splitlines() if text.startswith(entry["row"]))
        assert f"{entry['transformer']:.1f} {entry['transformer_deviation']:>+6.1f}" in line
        assert entry["with_fixed_cost_deviation"] == pytest.approx(entry["with_fixed_cost"] - entry["paper"])
    assert Image.open(tmp_path / "flops.png").size[0] > 1000


def test_a_counter_that_differs_by_more_than_a_percent_is_exit_code_1(monkeypatch, capsys):
    count = report_module.counted_flops

    def wrong(*args):
        *steps, last = count(*args)
        return [*steps, replace(last, router=round(last.router * 1.02))]

    monkeypatch.setattr(report_module, "counted_flops", wrong)
    with pytest.raises(SystemExit) as stopped:
        main(["flops", "--model", "fashion-mnist"])
    assert stopped.value.code == 1
    assert "differ by at most 2.00%" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_is_made_of_shapes_of_its_own_size(name):
    vae, var = shapes_of(name)
    assert {p.device.type for module in (vae, var) for p in module.parameters()} == {"meta"}
    depth, parameters = {
        "d16": (16, 310e6),
        "d20": (20, 600e6),
        "d24": (24, 1.03e9),
        "d30": (30, 2.01e9),
        "d36": (36, 2.35e9),
        "fashion-mnist": (6, 3.1e6),
    }[name]
    assert len(var.blocks) == depth
    assert sum(p.numel() for p in var.parameters()) == pytest.approx(parameters, rel=0.05)


def test_the_decoders_first_convolutions_are_counted_by_kernel_and_pixel():
    vae = shapes_of("fashion-mnist")[0]
    whole = decoder_flops(vae)
    before = vae.decoder.forward
    vae.decoder.forward = lambda z: z.new_empty(1, 1, 32, 32)
    assert decoder_flops(vae) == sum(2 * 9 * 16 * 16 for _pixel in range(8 * 8))
    vae.decoder.forward = before
    assert decoder_flops(vae) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "d99"], "invalid choice"),
        ([], "--model"),
        (["--model", "d16", "--rates", "0.5"], "--rates: expected token rates, then the FFN's"),
        (["--model", "d16", "--rates", "0.5", "1.5"], "--rates: expected a number in (0, 1]"),
        (["--model", "fashion-mnist", "--rates", *["0.5"] * 8], "the model has 6 scales"),
        (["--model", "d16", "--json", f"{__file__}/such/file"], "--json: expected a folder at"),
        (["--model", "d16", "--plot", f"{__file__}/such/file"], "--plot: expected a folder at"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["flops", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("actvar flops: ")
