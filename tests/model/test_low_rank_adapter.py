"""Adapters whose changed weights are stored as low-rank factors: merged when loaded, written again as they were."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import CONFIG, assert_refused, rewritten
from support.faults import random_factors
from support.helpers import assert_same_fingerprint, fingerprint, sample

from actvar import ActVARConfig, Execution, apply_patch, load_adapter, patched, remove_patch, save_adapter
from actvar.cli import main
from actvar.distill import Stage2
from actvar.families.var import VARFamily
from actvar.patching.adapter import describe_adapter, read_adapter
from actvar.patching.patch import unpatched
from actvar.utils.low_rank import Factors
from actvar.utils.weight_override import own_parameters, tuned_factors, tuned_parameters
from actvar_kernels.cpu_backend import brgemm
from benchmarks import adapter_sizes

RANK = 3
QKV, FC1, FC2 = "blocks.0.attn.mat_qkv.weight", "blocks.1.ffn.fc1.weight", "blocks.1.ffn.fc2.weight"


def matrices(var):
    return {n: var.get_parameter(n) for n in VARFamily().finetuned_names(var) if var.get_parameter(n).ndim == 2}


@pytest.fixture
def low_rank(adapter, tiny_var):
    """Write the adapter with factors for every matrix, and an order of the hidden units of both blocks."""
    generator, tensors = torch.Generator().manual_seed(3), load_file(adapter)
    for index in range(2):
        tensors[f"blocks.{index}.order"] = torch.randperm(512, generator=generator).int()
    for name, matrix in matrices(tiny_var).items():
        factors = random_factors(matrix.shape, generator, RANK)
        tensors |= {f"factors.{name}.{side}": factor for side, factor in factors._asdict().items()}
    return rewritten(adapter, tensors, rank=str(RANK))


@pytest.fixture
def whole(low_rank, tiny_var, tmp_path):
    """Write the adapter with whole weights that have the sums, in the order of the experts."""
    tensors = load_file(low_rank)
    for name, matrix in matrices(copy.deepcopy(tiny_var)).items():
        block, A, B = name.split(".")[1], *(tensors.pop(f"factors.{name}.{side}") for side in "AB")
        if ".ffn." in name:
            matrix = matrix.index_select(0 if "fc1" in name else 1, tensors[f"blocks.{block}.order"].long())
        tensors[f"weights.{name}"] = torch.addmm(matrix, B, A).detach()
    path = tmp_path / "whole.safetensors"
    path.write_bytes(low_rank.read_bytes())
    rewritten(path, tensors)
    facts = dict(read_metadata(low_rank))
    del facts["rank"]
    save_file(tensors, path, facts)
    return path


def read_metadata(path):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ActVARConfig(token_rates=(1, 1), ffn_rate=0.5, static_experts=True, num_experts=8),
        ActVARConfig(num_experts=8, guidance_until=-2, weights_from=-2),
    ],
    ids=["tokens and experts", "static experts", "guidance and weights of the last scales"],
)
def test_images_are_those_of_the_whole_weights(low_rank, whole, make_var, config):
    one, other = (load_adapter(apply_patch(make_var(), config), path) for path in (low_rank, whole))
    assert torch.equal(sample(one), sample(other))
    assert not torch.equal(sample(one), sample(apply_patch(make_var(), config)))


@pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")
def test_bytes_are_those_of_the_merged_weights(low_rank, whole, make_var):
    execution = Execution(weights="int8")
    one, other, float32 = (
        load_adapter(make_var(), path, how) for path, how in [(low_rank, execution), (whole, execution), (whole, None)]
    )
    assert torch.equal(sample(one), sample(other))
    assert not torch.equal(sample(one), sample(float32))


def test_a_loaded_adapter_comes_off_bit_for_bit(low_rank, tiny_var):
    before, image = fingerprint(tiny_var), sample(tiny_var)
    state = {name: tensor.clone() for name, tensor in tiny_var.state_dict().items()}
    load_adapter(tiny_var, low_rank)
    assert tuned_parameters(tiny_var).keys() == matrices(tiny_var).keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_var.state_dict().items())
    remove_patch(tiny_var)
    assert_same_fingerprint(fingerprint(tiny_var), before)
    assert torch.equal(sample(tiny_var), image)


def saved_again(var, folder):
    save_adapter(var, folder / "again.safetensors")
    return load_file(folder / "again.safetensors")


def test_factors_are_saved_again_as_they_were(low_rank, make_var, tmp_path):
    tensors = load_file(low_rank)
    for name in [name for name in tensors if name.startswith(f"factors.{QKV}")]:
        tensors[name] = tensors[name].half()  # kept in the dtype of the file
    rewritten(low_rank, tensors)
    var = load_adapter(make_var(), low_rank)
    with patched(var), unpatched(var):
        pass
    for model in (var, copy.deepcopy(var), pickle.loads(pickle.dumps(var))):
        assert_same_tensors(saved_again(model, tmp_path), tensors)
        assert read_adapter(tmp_path / "again.safetensors").rank == RANK
    rounded = saved_again(var.to(torch.bfloat16), tmp_path)
    names = [name for name in tensors if name.startswith("factors.")]
    assert_same_tensors({name: rounded[name] for name in names}, {name: tensors[name] for name in names})


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


def test_another_adapter_takes_the_place_of_the_factors(low_rank, whole, make_var, tmp_path):
    var = load_adapter(load_adapter(make_var(), low_rank), whole)
    assert not tuned_factors(var)
    assert saved_again(var, tmp_path).keys() == load_file(whole).keys()
    image = sample(var)
    assert torch.equal(sample(load_adapter(load_adapter(var, low_rank), whole)), image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_computed_in_float32_or_more_and_rounded_once(low_rank, make_var, dtype):
    var = load_adapter(make_var().to(dtype), low_rank)
    own, tensors = own_parameters(var), load_file(low_rank)
    for name, weight in tuned_parameters(var).items():
        exact = own[name].double() + tensors[f"factors.{name}.B"].double() @ tensors[f"factors.{name}.A"].double()
        assert weight.dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2
        error = (weight.double() - exact).abs() - half_a_step * exact.abs()
        assert error.max() <= 1e-6, name  # float32's own rounding, and numbers below float16's normal ones


def test_weights_and_factors_of_a_weight_may_stand_in_one_file(low_rank, whole, make_var):
    tensors, others = load_file(low_rank), load_file(whole)
    for side in "AB":
        del tensors[f"factors.{QKV}.{side}"]
    tensors[f"weights.{QKV}"] = others[f"weights.{QKV}"]
    mixed = load_adapter(make_var(), rewritten(low_rank, tensors))
    assert torch.equal(sample(mixed), sample(load_adapter(make_var(), whole)))


def name_of(side, weight=FC1):
    return f"factors.{weight}.{side}"


def pair(weight, outputs, inputs):
    return {name_of("A", weight): torch.zeros(RANK, inputs), name_of("B", weight): torch.zeros(outputs, RANK)}


BAD_FACTORS = {
    "without B": (lambda t: t.pop(name_of("B")), rf"missing: \['{name_of('B')}'\]"),
    "without A": (lambda t: t.pop(name_of("A")), rf"missing: \['{name_of('A')}'\]"),
    "A of another rank": (
        lambda t: t.update({name_of("A"): torch.zeros(2, 128)}),
        r"fc1.weight.A: expected shape \[3, inputs\], got \[2, 128\]",
    ),
    "B of another rank": (
        lambda t: t.update({name_of("B"): torch.zeros(512, 4)}),
        r"fc1.weight.B: expected shape \[outputs, 3\], got \[512, 4\]",
    ),
    "A of other inputs": (
        lambda t: t.update({name_of("A"): torch.zeros(3, 64)}),
        r"fc1.weight.A: expected shape \[3, 128\], got \[3, 64\]",
    ),
    "B of other outputs": (
        lambda t: t.update({name_of("B"): torch.zeros(128, 3)}),
        r"fc1.weight.B: expected shape \[512, 3\], got \[128, 3\]",
    ),
    "a vector": (lambda t: t.update({name_of("A"): torch.zeros(3)}), "expected shape"),
    "integers": (lambda t: t.update({name_of("A"): torch.zeros(3, 128, dtype=torch.int32)}), "floating-point"),
    "NaN": (lambda t: t[name_of("B", FC2)].fill_(float("nan")), "fc2.weight.B: expected finite values"),
    "a sum that overflows": (
        lambda t: (t[name_of("A")].fill_(1e30), t[name_of("B")].fill_(1e30)),
        "fc1.weight: expected a finite sum with the weight in torch.float32",
    ),
    "a bias": (lambda t: t.update(pair("head.bias", 64, 1)), "head.bias.A: expected a plain matrix"),
    "an unknown weight": (lambda t: t.update(pair("new", 64, 1)), r"got also: \['factors.new.A', 'factors.new.B'\]"),
    "a frozen weight": (lambda t: t.update(pair("word_embed.weight", 128, 8)), "got also: .*word_embed"),
    "a third factor": (lambda t: t.update({name_of("C"): torch.zeros(3, 3)}), "expected a factor .A or .B"),
    "the whole weight as well": (
        lambda t: t.update({f"weights.{FC1}": torch.zeros(512, 128)}),
        rf"got also: \['weights.{FC1}'\]",
    ),
    "none at all": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("factors.")],
        "expected factors and their rank or neither, got rank 3 and none",
    ),
}


@pytest.mark.parametrize("name", BAD_FACTORS)
def test_factors_that_do_not_fit_are_refused_by_name(low_rank, make_var, name):
    change, message = BAD_FACTORS[name]
    tensors = load_file(low_rank)
    change(tensors)
    path = rewritten(low_rank, tensors)
    var = apply_patch(make_var(), CONFIG)
    before, image = fingerprint(var), sample(var)
    assert_refused(var, path, message)
    assert_same_fingerprint(fingerprint(var), before)
    assert torch.equal(sample(var), image)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("0", "rank: expected 1 or more, got 0"),
        ("-3", "rank: expected 1 or more"),
        ("4", r"expected shape \[4, inputs\]"),
        ("2.5", "rank: expected an integer"),
        ("true", "rank: expected an integer"),
        ("null", "rank: expected an integer"),
        ("{", "metadata is damaged"),
    ],
)
def test_a_wrong_rank_is_refused(low_rank, tiny_var, rank, message):
    assert_refused(apply_patch(tiny_var, CONFIG), rewritten(low_rank, rank=rank), message)


def test_factors_of_rank_0_are_refused(low_rank, tiny_var):
    tensors = load_file(low_rank)
    for name in [name for name in tensors if name.startswith("factors.")]:
        tensors[name] = tensors[name][:0] if name.endswith("A") else tensors[name][:, :0].contiguous()
    assert_refused(apply_patch(tiny_var, CONFIG), rewritten(low_rank, tensors, rank="0"), "rank: expected 1 or more")


def test_factors_without_their_rank_are_refused(low_rank, tiny_var):
    facts = read_metadata(low_rank)
    del facts["rank"]
    save_file(load_file(low_rank), low_rank, facts)
    assert_refused(apply_patch(tiny_var, CONFIG), low_rank, "expected factors and their rank or neither, got rank None")


def test_an_overflow_in_the_models_dtype_is_refused(low_rank, make_var):
    tensors = load_file(low_rank)
    tensors[name_of("A")].fill_(300.0)
    tensors[name_of("B")].fill_(300.0)
    path = rewritten(low_rank, tensors)
    load_adapter(make_var(), path)
    assert_refused(
        apply_patch(make_var().half(), CONFIG), path, "expected a finite sum with the weight in torch.float16"
    )


def test_factors_that_are_not_finite_are_not_saved(low_rank, tiny_var, tmp_path):
    load_adapter(tiny_var, low_rank)
    factors: Factors = tuned_factors(tiny_var)[FC1]
    factors.A[0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"{name_of('A')}: expected finite values"):
        saved_again(tiny_var, tmp_path)


def test_the_file_tells_its_rank_and_size(low_rank, whole, capsys):
    facts, other = describe_adapter(low_rank), describe_adapter(whole)
    count = sum(t.numel() for name, t in load_file(low_rank).items() if name.startswith("factors."))
    assert (facts["rank"], facts["changed weights"]) == (RANK, count)
    assert (other["rank"], other["changed weights"]) == (None, 128 * (2 * 1536 + 64))
    assert facts["bytes"] == sum(t.nbytes for t in load_file(low_rank).values())
    assert facts["bytes"] < 0.1 * other["bytes"]
    main(["info", str(low_rank)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rank:", str(RANK)] in lines
    assert ["bytes:", str(facts["bytes"])] in lines


def test_counted_sizes_are_those_of_files(tiny_var, tmp_path, capsys):
    counted = adapter_sizes.adapter_bytes(apply_patch(tiny_var, CONFIG), [2])
    for title, lora in (("gates", None), ("rank 2", 2), ("whole", None)):
        apply_patch(tiny_var, CONFIG)
        if title != "gates":
            Stage2(tiny_var, lora=lora).finish()
        saved_again(tiny_var, tmp_path)
        assert counted[title] == describe_adapter(tmp_path / "again.safetensors")["bytes"], title
    adapter_sizes.main(["--models", "infinity-2b", "--ranks", "16"])
    title, line = capsys.readouterr().out.splitlines()
    assert title.split() == ["adapter,", "MB", "gates", "rank", "16", "whole"]
    assert line.split() == ["infinity-2b", "4.5", "71.7", "6449.5"]
