"""The summary of a model says what each scale leaves out, how the model is run, and what is not fused."""

from __future__ import annotations

import pytest
import torch
from support.helpers import make_tiny_var

import actvar
from actvar import ActVARConfig, Execution
from actvar.cli import main

ALL = dict(token_rates=(1, 1), ffn_rate=1, num_experts=8)


def test_a_model_without_a_patch_is_dense():
    assert actvar.summary(make_tiny_var().half()) == "dense, by PyTorch; weights float16"


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (ActVARConfig(**ALL), ["all tokens, experts and rows at every scale"]),
        (ActVARConfig(**ALL, guidance_until=-1), ["5x5: no guidance"]),
        (
            ActVARConfig(token_rates=(1, (0.4, 0.8)), ffn_rate=(0.5, 1), num_experts=8, guidance_until=-1),
            ["3x3: 4 of 8 experts", "5x5: 60% of the tokens, no guidance"],
        ),
    ],
    ids=["dense", "guidance", "all"],
)
def test_each_scale_says_what_it_leaves_out(config, lines):
    var = actvar.apply_patch(make_tiny_var(), config, Execution(sampler="fast", decoder_dtype="bfloat16"))
    *scales, how, flops = actvar.summary(torch.compile(var)).splitlines()
    assert scales == lines
    assert how.startswith("weights float32, decoder bfloat16, sampler fast, backend ")
    assert ("0.0% saved" in flops) == ("all tokens" in lines[0])


def test_parts_that_are_called_are_named():
    var = make_tiny_var()
    var.blocks[1].ffn.register_forward_hook(lambda *_: None)
    actvar.accelerate(var)
    last = actvar.summary(var).splitlines()[-1]
    assert last.startswith("not fused: ffn (")
    assert last.endswith("in blocks 1")


def test_sample_takes_the_preset_near_of_a_bundled_model_and_prints_the_summary(tmp_path, capsys):
    command = ["sample", "--model", "fashion-mnist", "--labels", "0,1", "--out", str(tmp_path)]
    main(command)
    out = capsys.readouterr().out
    assert "2 images in " in out
    assert "6x6: no guidance\n8x8: no guidance\n" in out
    main([*command, "--quiet"])
    assert capsys.readouterr().out.count("\n") == 1
