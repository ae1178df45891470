from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import make_tiny_var, sample
from torch.nn import functional as F

from actvar import ActVARConfig, apply_patch, load_adapter, read_adapter_config, remove_patch, save_adapter
from actvar.calibrate import calibrate
from actvar.calibrate.clusters import balanced_kmeans, exchanged, expert_order, raise_kept_energy
from actvar.calibrate.curves import Curves, expert_outputs
from actvar.calibrate.rates import blocks_flops, rates_under_budget
from actvar.calibrate.ridge import NormalEquations, fitted
from actvar.calibrate.sensitivity import divergence_per_block
from actvar.cli import main
from actvar.evaluate.divergence import divergence_by_scale, token_divergence
from actvar.families.var import VARFamily
from actvar.flops import model_flops
from actvar.sampling.token_maps import sampled_inputs

CONFIG = ActVARConfig(num_experts=8)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept_energy(energy, cluster, count, active):
    """The energy that the best experts of every token hold, by loops."""
    total = 0.0
    for token in energy:
        of_expert = [sum(token[i].item() for i in range(len(token)) if cluster[i] == e) for e in range(count)]
        total += sum(sorted(of_expert, reverse=True)[:active])
    return total


def test_ridge_is_least_squares_with_a_penalised_weight():
    x, y = normal(40, 5), normal(40, 3, seed=1)
    equations = NormalEquations(5, 3, torch.device("cpu"))
    for part in range(0, 40, 8):
        equations.add(x[part : part + 8], y[part : part + 8])
    strength = 0.3
    penalty = strength * x.square().sum(dim=0).mean()
    rows = torch.cat(
        (torch.cat((x, torch.ones(40, 1, dtype=x.dtype)), 1), torch.eye(5, 6, dtype=x.dtype) * penalty**0.5)
    )
    expected = torch.linalg.lstsq(rows, torch.cat((y, torch.zeros(5, 3, dtype=y.dtype)))).solution
    solution = equations.solution(strength)
    torch.testing.assert_close(solution, expected)
    residual = x @ expected[:-1] + expected[-1] - y
    assert equations.squared_error(solution) == pytest.approx(residual.square().sum().item())


def test_the_ridge_strength_is_that_of_the_held_out_samples():
    x, truth = normal(30, 20), normal(20, 1, seed=1)
    noisy = x @ truth + 3 * normal(30, 1, seed=2)
    train, exact, same = (NormalEquations(20, 1, torch.device("cpu")) for _ in range(3))
    train.add(x, noisy)
    same.add(x, noisy)
    more = normal(500, 20, seed=3)
    exact.add(more, more @ truth)
    chosen = torch.cat([t.flatten() for t in fitted(train, exact)]).double()
    overfitted = torch.cat([t.flatten() for t in fitted(train, same)]).double()
    assert exact.squared_error(chosen.unsqueeze(1)) < exact.squared_error(overfitted.unsqueeze(1))


@pytest.mark.parametrize(("units", "count"), [(24, 4), (32, 8), (6, 6), (5, 1)])
def test_clusters_are_balanced_and_the_order_is_a_permutation(units, count):
    energy = normal(50, units).square()
    energy = energy / energy.sum(dim=1, keepdim=True)
    cluster = balanced_kmeans(energy.T, count)
    assert cluster.bincount(minlength=count).tolist() == [units // count] * count
    order = expert_order(energy, count, max(1, count // 2))
    assert sorted(order.tolist()) == list(range(units))


def test_units_that_fire_together_become_one_expert():
    """Three groups of units, shuffled, each on for its own tokens."""
    groups = torch.arange(12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))] // 4
    tokens = torch.arange(60) % 3
    energy = (tokens.unsqueeze(1) == groups).double() + 0.01 * normal(60, 12).abs()
    order = expert_order(energy / energy.sum(dim=1, keepdim=True), 3, 1)
    assert [len(set(groups[part].tolist())) for part in order.split(4)] == [1, 1, 1]


def test_no_exchange_of_two_units_is_left_that_lowers_the_cost():
    cost = normal(12, 3)
    start = torch.arange(12) % 3
    cluster = exchanged(cost, start)
    total = cost.gather(1, cluster.unsqueeze(1)).sum()
    assert total < cost.gather(1, start.unsqueeze(1)).sum()
    for i in range(12):
        for j in range(12):
            other = cluster.clone()
            other[i], other[j] = cluster[j], cluster[i]
            assert cost.gather(1, other.unsqueeze(1)).sum() >= total - 1e-5


def test_moving_units_raises_the_energy_that_the_best_experts_hold():
    """Four groups of units, each on for its own tokens; some units start in the wrong group."""
    groups, tokens = torch.arange(16) // 4, torch.arange(80) % 4
    energy = (tokens.unsqueeze(1) == groups).double() + 0.2 * normal(80, 16).abs()
    energy = energy / energy.sum(dim=1, keepdim=True)
    start = groups.clone()
    start[[0, 4, 8, 12]] = torch.tensor([1, 2, 3, 0])
    better = raise_kept_energy(energy, start, 4, 1)
    assert torch.equal(better, groups)
    assert kept_energy(energy, better, 4, 1) > kept_energy(energy, start, 4, 1) * 1.1


def test_the_curves_are_those_of_loops_over_tokens_and_experts():
    R, L, N, C, D = 3, 5, 4, 6, 8
    curves = Curves(L, N)
    scores, change = normal(R, L), normal(R, L, seed=1).abs()
    logits, hidden = normal(7, N, seed=2), normal(7, D, seed=3)
    weight, gamma = normal(C, D, seed=4), normal(7, C, seed=5)
    curves.add_rows(scores, change)
    curves.add_routed(logits, hidden, weight, gamma)
    for keep in range(L + 1):
        lost = oracle = 0.0
        for row in range(R):
            ranked = sorted(range(L), key=lambda i: -scores[row, i].item())
            lost += sum(change[row, i].item() ** 2 for i in ranked[keep:])
            oracle += sum(c**2 for c in sorted(change[row].tolist(), reverse=True)[keep:])
        assert curves.update_lost[keep].item() == pytest.approx(lost)
        assert curves.update_lost_by_oracle[keep].item() == pytest.approx(oracle)
    for on in range(N + 1):
        lost = norm = oracle = 0.0
        for t in range(7):
            outputs = [gamma[t] * (weight[:, 2 * e : 2 * e + 2] @ hidden[t, 2 * e : 2 * e + 2]) for e in range(N)]
            ranked = sorted(range(N), key=lambda e: -logits[t, e].item())
            off = sum((outputs[e] for e in ranked[on:]), torch.zeros(C, dtype=torch.float64))
            lost += off.square().sum().item()
            norms = [output.norm().item() for output in outputs]
            norm += sum(norms[e] for e in ranked[:on])
            oracle += sum(sorted(norms, reverse=True)[:on])
        assert curves.output_lost[on].item() == pytest.approx(lost)
        assert curves.norm_kept[on].item() == pytest.approx(norm)
        assert curves.norm_kept_by_oracle[on].item() == pytest.approx(oracle)


def test_the_experts_outputs_add_up_to_the_ffn():
    hidden, weight, gamma = normal(4, 8), normal(6, 8, seed=1), normal(4, 6, seed=2)
    total = sum(expert_outputs(hidden, weight, gamma, 4))
    torch.testing.assert_close(total, gamma * F.linear(hidden, weight))


def test_token_divergence_is_the_sum_over_tokens_to_predict():
    expected, logits = normal(2, 3, 4).softmax(-1), normal(2, 3, 4, seed=1).softmax(-1)
    by_loop = torch.zeros(2, 3, dtype=torch.float64)
    for row in range(2):
        for token in range(3):
            for p, q in zip(expected[row, token], logits[row, token], strict=True):
                by_loop[row, token] += p * (p.log() - q.log())
    torch.testing.assert_close(token_divergence(expected.log(), logits.log()).double(), by_loop, atol=1e-6, rtol=1e-5)


def test_divergence_by_scale_compares_with_the_unpatched_model(tiny_var):
    labels, inputs = torch.tensor([1, 2, 3]), normal(3, tiny_var.L - 1, 8, dtype=torch.float32)
    with torch.no_grad():
        dense = tiny_var(labels, inputs).log_softmax(-1)
        apply_patch(tiny_var, CONFIG)
        patched = tiny_var(labels, inputs).log_softmax(-1)
    kl = (dense.exp() * (dense - patched)).sum(-1)
    found = divergence_by_scale(tiny_var, [(labels[:2], inputs[:2]), (labels[2:], inputs[2:])])
    assert found[:2] == pytest.approx([0, 0], abs=1e-6)
    assert found[2:] == pytest.approx([kl[:, 5:14].mean().item(), kl[:, 14:].mean().item()], rel=1e-4)
    assert tiny_var.actvar.config == CONFIG
    with pytest.raises(ValueError, match="at least one batch"):
        divergence_by_scale(tiny_var, [])


def test_samples_are_the_inputs_that_sampling_saw(tiny_var):
    tokens = []
    embedding = tiny_var.vae_proxy[0].quantize.embedding
    handle = embedding.register_forward_pre_hook(lambda _, arguments: tokens.append(arguments[0].clone()))
    batches = sampled_inputs(tiny_var, 5, 2, seed=3)
    handle.remove()
    assert sorted(torch.cat([labels for labels, _ in batches]).tolist()) == [0, 2, 4, 6, 8]
    looked_up = len(tokens) // len(batches)  # the tokens of 4 scales, and those that the inputs are made from
    for number, (_, inputs) in enumerate(batches):
        drawn = tokens[number * looked_up : number * looked_up + 4]
        torch.testing.assert_close(inputs, tiny_var.vae_proxy[0].quantize.teacher_input(drawn), atol=1e-5, rtol=0)
    assert sample(tiny_var).shape[1] == 1  # it decodes again


def test_embedded_rows_lead_to_the_models_logits(tiny_var):
    labels, inputs = torch.tensor([1, 10]), normal(2, tiny_var.L - 1, 8, dtype=torch.float32)
    with torch.no_grad():
        x, cond, *_ = VARFamily().embedded(tiny_var, labels, inputs).call
        for block in tiny_var.blocks:
            x = block(x=x, cond_BD=cond, attn_bias=tiny_var.attn_bias_for_masking)
        logits = tiny_var.get_logits(x, tiny_var.class_emb(labels))
        assert torch.equal(logits, tiny_var(labels, inputs))


def test_sensitivity_is_the_divergence_of_one_sparse_block(tiny_var):
    apply_patch(tiny_var, CONFIG)
    labels, inputs = torch.tensor([1, 2]), normal(2, tiny_var.L - 1, 8, dtype=torch.float32)
    found = divergence_per_block(tiny_var, CONFIG, labels, inputs)
    for block in range(2):
        one = tuple(0.75 if b == block else 1.0 for b in range(2))
        apply_patch(tiny_var, replace(CONFIG, token_rates=(one, one), ffn_rate=1.0))
        tokens = divergence_by_scale(tiny_var, [(labels, inputs)])
        half = tuple(0.5 if b == block else 1.0 for b in range(2))
        apply_patch(tiny_var, replace(CONFIG, token_rates=(1, 1), ffn_rate=(half, half)))
        experts = divergence_by_scale(tiny_var, [(labels, inputs)])
        for scale in (2, 3):
            assert found[block][scale] == pytest.approx((tokens[scale], experts[scale]), rel=1e-3)


def test_the_budget_is_kept_and_no_single_change_within_it_is_better(tiny_var):
    labels, curves, sensitivity = torch.tensor([0]), [], []
    for block in range(2):
        of_block = {}
        for scale, tokens in ((2, 9), (3, 25)):
            of_block[scale] = Curves(tokens, 8)
            of_block[scale].add_rows(normal(4, tokens, seed=block), normal(4, tokens, seed=block + 2))
            lost = torch.linspace(1, 0, 9, dtype=torch.float64) ** (1 + block)
            of_block[scale].output_lost = lost
        curves.append(of_block)
        sensitivity.append({2: (0.3, 0.1 + block), 3: (0.5 + block, 0.2)})
    chosen = rates_under_budget(tiny_var, CONFIG, labels, curves, sensitivity)
    assert blocks_flops(tiny_var, chosen, labels) <= blocks_flops(tiny_var, CONFIG, labels)
    assert chosen.num_blocks == 2
    assert chosen.ffn_rate[0][1] >= chosen.ffn_rate[0][0]  # the block where experts matter more keeps more
    assert chosen.token_rates[1][1] >= chosen.token_rates[1][0]


def test_a_budget_below_the_least_rates_is_refused(tiny_var):
    with pytest.raises(ValueError, match="ask for uniform rates"):
        calibrate(tiny_var, ActVARConfig(token_rates=(0.1, 0.1), ffn_rate=0.1, num_experts=8), images=4)


@pytest.fixture(scope="module")
def calibrated():
    var = make_tiny_var()
    return var, calibrate(var, CONFIG, images=8)


def test_calibration_keeps_more_than_chance_and_no_more_than_the_oracle(calibrated):
    var, report = calibrated
    uniform = calibrate(make_tiny_var(), CONFIG, images=16, uniform=True)
    assert len(uniform.kept) == 4
    for kept in uniform.kept:
        assert kept.update <= kept.update_by_oracle + 1e-9
        assert kept.norm <= kept.norm_by_oracle + 1e-9
    assert sum(k.norm for k in uniform.kept) > sum(k.ffn_rate for k in uniform.kept)
    assert sum(k.update for k in uniform.kept) > sum(k.token_rate for k in uniform.kept)
    assert report.flops["chosen"] <= report.flops["budget"] < report.flops["dense"]
    assert len(report.table().splitlines()) == 1 + 4 + 3
    assert sum(step.total for step in model_flops(var, 1)) > 0


def test_a_calibrated_model_without_sparsity_is_the_dense_one(calibrated):
    """The reordered FFN computes the same."""
    var, dense = calibrated[0], make_tiny_var()
    for block, original in zip(var.blocks, dense.blocks, strict=True):
        order = block.actvar.changed_order
        assert not torch.equal(order, torch.arange(len(order)))
        w1, b1, w2, b2 = (weight.double() for weight in VARFamily().ffn_weights(block))
        v1, c1, v2, c2 = (weight.double() for weight in VARFamily().ffn_weights(original))
        u = normal(6, 128)
        expected = F.gelu(u @ v1.T + c1, approximate="tanh") @ v2.T + c2
        torch.testing.assert_close(F.gelu(u @ w1.T + b1, approximate="tanh") @ w2.T + b2, expected, atol=1e-12, rtol=0)


def test_an_adapter_with_an_order_gives_the_same_images_and_comes_off_bit_for_bit(calibrated, tmp_path):
    var, path = calibrated[0], tmp_path / "adapter.safetensors"
    save_adapter(var, path)
    assert load_file(path)["blocks.0.order"].dtype == torch.int32
    other = make_tiny_var()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_adapter(apply_patch(other, read_adapter_config(path)), path)
    assert torch.equal(sample(other), sample(var))
    again = other.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    assert not torch.equal(other.blocks[0].ffn.fc1.weight, before["blocks.0.ffn.fc1.weight"])
    remove_patch(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.named_parameters())


def test_command_line_writes_adapter_and_report(tmp_path, capsys):
    var = make_tiny_var()
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), tmp_path / "vae.pth")
    source = ["--var", str(tmp_path / "var.pth"), "--vae", str(tmp_path / "vae.pth")]
    out = tmp_path / "adapter.safetensors"
    main(
        [
            "calibrate",
            *source,
            "--experts",
            "8",
            "--samples",
            "4",
            "--rates",
            "0.5",
            "0.75",
            "--uniform",
            "--out",
            str(out),
        ]
    )
    assert read_adapter_config(out) == ActVARConfig(scales=(-1,), token_rates=(0.5,), ffn_rate=0.75, num_experts=8)
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["images"] == 4
    assert [kept["ffn_rate"] for kept in written["kept"]] == [0.75, 0.75]
    assert "oracle" in capsys.readouterr().out
    main(["info", str(out)])
    assert "num_experts: 8" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", f"{__file__}/y/adapter.safetensors"], "--out: expected a folder at"),
        (["--out", "adapter.json"], "--out"),
        (["--out", "adapter.safetensors", "--rates", "0.5"], "--rates"),
        (["--out", "adapter.safetensors", "--rates", "1", "1", "1"], "no selector or router to fit"),
        (["--out", "adapter.safetensors", "--samples", "3"], "--samples: expected an integer of at least 4, got 3"),
        (["--out", "adapter.safetensors", "--cfg", "nan"], "--cfg: expected a finite number"),
        (["--out", "adapter.safetensors", "--experts", "7"], "--experts"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--model", "fashion-mnist", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_blocks_have_rates_of_their_own(tiny_var):
    config = ActVARConfig(token_rates=((0.5, 1.0), 0.75), ffn_rate=((0.5, 1.0), (1.0, 0.25)), num_experts=8)
    apply_patch(tiny_var, config)
    kept = [[(s.keep, s.experts) for s in block.actvar.schedule[-2:]] for block in tiny_var.blocks]
    assert kept == [[(5, 4), (19, 8)], [(9, 8), (19, 2)]]
    assert ActVARConfig.from_json(config.to_json()) == config
    assert sample(tiny_var).isfinite().all()


def test_sampling_and_teacher_forcing_agree_with_rates_per_block(tiny_var):
    config = ActVARConfig(token_rates=((0.5, 1.0), 0.75), ffn_rate=((0.5, 1.0), (1.0, 0.25)), num_experts=8)
    apply_patch(tiny_var, config)
    labels, inputs = torch.tensor([3, 4]), normal(2, tiny_var.L - 1, 8, dtype=torch.float32)
    with torch.no_grad():
        x, cond, *_ = VARFamily().embedded(tiny_var, labels, inputs).call
        for block in tiny_var.blocks:
            forced, parts = block(x, cond, tiny_var.attn_bias_for_masking), []
            block.attn.kv_caching(True)
            for part in x.split([side * side for side in tiny_var.patch_nums], dim=1):
                parts.append(block(x=part, cond_BD=cond, attn_bias=None))
            block.attn.kv_caching(False)
            x = torch.cat(parts, dim=1)
            torch.testing.assert_close(x, forced, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(token_rates=((0.5, 2.0), 0.75)), "token_rates"),
        (dict(token_rates=((), 0.75)), "token_rates"),
        (dict(token_rates=((0.5, 0.5), 0.75), ffn_rate=((0.5,), 0.5)), "equally many blocks"),
    ],
)
def test_wrong_rates_per_block_are_refused(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ActVARConfig(**values)


def test_rates_for_another_number_of_blocks_are_refused(tiny_var):
    with pytest.raises(ValueError, match="the model has 2 blocks, got 3 rates"):
        apply_patch(tiny_var, ActVARConfig(token_rates=((0.5,) * 3, 0.75)))
