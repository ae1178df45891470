"""Configurations, arguments of sampling and models that are wrong are refused before anything changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.faults import draw, expect_free, expect_same_state, small_model, state_of

import actvar
from actvar import ActVARConfig, Execution, apply_patch, load_adapter, patched, remove_patch
from actvar.config import KV_MODES
from actvar.execution import EXPERT_EXECUTIONS, SAMPLERS
from actvar.models import build_vae_var
from actvar.models.arguments import checked_labels
from actvar.patching.adapter import gate_parameters
from actvar.patching.patch import patch_silently

HIDDEN, SCALES, NUM_CLASSES, V = 256, 3, 5, 32
NAN, INF = float("nan"), float("inf")

# Configurations

SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
rates = st.floats(0, 1, exclude_min=True) | st.sampled_from([1, 1.0, 1e-300])


@st.composite
def configurations(draw_one) -> dict:
    """Fields that fit the small model."""
    scales = draw_one(
        st.lists(st.integers(-SCALES, SCALES - 1), min_size=1, max_size=3, unique_by=lambda s: s % SCALES)
    )
    per_scale = st.lists(rates, min_size=len(scales), max_size=len(scales)).map(tuple)
    return dict(
        scales=draw_one(st.sampled_from([tuple, list]))(scales),
        token_rates=draw_one(per_scale),
        ffn_rate=draw_one(rates | per_scale),
        num_experts=draw_one(st.sampled_from([n for n in range(1, HIDDEN + 1) if HIDDEN % n == 0])),
        kv=draw_one(st.sampled_from(KV_MODES)),
        share_cfg_selection=draw_one(st.booleans()),
        fixed_tokens=draw_one(st.booleans()),
        always_sparse=draw_one(st.booleans()),
    )


executions = st.builds(
    Execution, sampler=st.sampled_from(SAMPLERS), expert_execution=st.sampled_from(EXPERT_EXECUTIONS)
)


@pytest.fixture(scope="module")
def model():
    """A model, its state and an image; shared, since nothing may change it."""
    var = small_model()
    return var, state_of(var), draw(var)


@settings(max_examples=40, deadline=None, suppress_health_check=SUPPRESSED)
@given(fields=configurations(), execution=executions)
def test_any_valid_configuration_patches_samples_and_comes_off_bit_for_bit(model, fields, execution):
    var, before, image = model
    with np.errstate(all="ignore"):
        patch_silently(var, ActVARConfig(**fields), execution)
        assert draw(var).isfinite().all()
    expect_free(var)
    remove_patch(var)
    expect_same_state(var, before)
    assert torch.equal(draw(var), image)


bad_rates = [0, -0.1, 1.0001, 2, NAN, INF, -INF, 10**400]
no_rates = [True, None, "0.5", 1j, [0.5, None], {"rate": 1}]
BAD_FIELDS = {
    "scales": [(), (3,), (-4,), (0, -3), (1.0,), (None,), "12", 5, None, (True,), (10**30,), {1, 2}],
    "token_rates": [(), *[(r, 0.5) for r in bad_rates + no_rates], (0.5,), (0.5,) * 3, 0.5, None, "ab"],
    "ffn_rate": [*bad_rates, *no_rates, (0.5,), (), (0.5, 0)],
    "num_experts": [0, -1, 3, 7, 512, 2**31, 10**400, 1.0, True, None, "16", NAN],
    "kv": ["", "none", None, 1, b"all", ["all"], np.array(["all"])],
    "share_cfg_selection": [1, 0, None, "yes"],
    "fixed_tokens": [1, 0, None, "yes"],
    "always_sparse": [1, None, "no"],
}


@settings(max_examples=150, deadline=None, suppress_health_check=SUPPRESSED)
@given(data=st.data(), fields=configurations())
def test_any_invalid_configuration_is_refused_and_leaves_the_model_alone(model, data, fields):
    var, before, _ = model
    name = data.draw(st.sampled_from(sorted(BAD_FIELDS)))
    value = data.draw(st.sampled_from(BAD_FIELDS[name]))
    fields |= {"scales": (-2, -1), "token_rates": (0.5, 0.5), "ffn_rate": 0.5, name: value}
    with pytest.raises((TypeError, ValueError), match=r"expected|the model has|is named twice"):
        apply_patch(var, ActVARConfig(**fields))
    expect_same_state(var, before)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"num_experts": 1e400}', '{"token_rates": [0.5, NaN]}', "null", "3"])
def test_json_that_is_no_configuration_is_refused(text):
    with pytest.raises((TypeError, ValueError), match="expected"):
        ActVARConfig.from_json(text)


# Sampling

BAD_ARGUMENTS = [
    (dict(B=0), ValueError, "B: expected an integer of at least 1, got 0"),
    (dict(B=-1), ValueError, "B: expected"),
    (dict(B=2.0), TypeError, "B: expected"),
    (dict(B=True), TypeError, "B: expected"),
    (dict(label_B=5), ValueError, "labels from 0 to 4, or negative for unconditional images, got 5"),
    (dict(label_B=torch.tensor([0, 5])), ValueError, "labels from 0 to 4, .*got 5"),
    (dict(label_B=torch.tensor([0, 2**40])), ValueError, "labels from 0 to 4"),
    (dict(label_B=torch.tensor([0, 1, 2])), ValueError, r"shape \[2\] on cpu, got \[3\] on cpu"),
    (dict(label_B=torch.tensor(1)), ValueError, r"shape \[2\]"),
    (dict(label_B=torch.tensor([[0, 1]])), ValueError, r"shape \[2\]"),
    (dict(label_B=torch.empty(2, dtype=torch.int64, device="meta")), ValueError, "on cpu, got .* on meta"),
    (dict(label_B=torch.tensor([0.0, 1.0])), TypeError, "expected an integer tensor, got torch.float32"),
    (dict(label_B=torch.tensor([True, False])), TypeError, "integer tensor"),
    (dict(label_B=torch.tensor([2**63, 0], dtype=torch.uint64)), TypeError, "integer tensor, got torch.uint64"),
    (dict(label_B=torch.tensor([1, 0]).to_sparse()), TypeError, "got torch.int64, torch.sparse_coo"),
    (dict(label_B=[0, 1]), TypeError, "got list"),
    (dict(label_B="1"), TypeError, "got str"),
    (dict(label_B=True), TypeError, "got bool"),
    (dict(g_seed=2**64), ValueError, "g_seed: expected an integer from"),
    (dict(g_seed=-(2**63) - 1), ValueError, "g_seed: expected"),
    (dict(g_seed=1.5), TypeError, "g_seed: expected"),
    (dict(cfg=NAN), ValueError, "cfg: expected a finite number"),
    (dict(cfg=-INF), ValueError, "cfg: expected a finite number"),
    (dict(cfg="4"), TypeError, "cfg: expected a finite number, got '4'"),
    (dict(top_k=-1), ValueError, "top_k: expected"),
    (dict(top_k=V + 1), ValueError, "32 tokens to choose from, got 33"),
    (dict(top_k=1.0), TypeError, "top_k: expected"),
    (dict(top_p=-0.1), ValueError, "top_p: expected a number from 0 to 1"),
    (dict(top_p=1.1), ValueError, "top_p: expected"),
    (dict(top_p=NAN), ValueError, "top_p: expected"),
    (dict(top_p=None), TypeError, "top_p: expected"),
]


@pytest.mark.parametrize("is_patched", [False, True], ids=["dense", "patched"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_of_sampling_is_refused_before_it_starts(model, is_patched, change, error, message, monkeypatch):
    var, before, image = model
    if is_patched:
        patch_silently(var, ActVARConfig(num_experts=8))
    arguments = dict(B=2, label_B=torch.tensor([1, -1]), g_seed=0, top_k=20, top_p=0.95)
    random_state = torch.get_rng_state()
    with monkeypatch.context() as forbidden:
        forbidden.setattr(type(var.blocks[0]), "forward", None)  # no block may run
        with pytest.raises(error, match=message):
            var.autoregressive_infer_cfg(**{**arguments, **change})
    assert torch.equal(torch.get_rng_state(), random_state)
    remove_patch(var)
    expect_same_state(var, before)
    assert torch.equal(var.autoregressive_infer_cfg(**arguments), image)


@pytest.mark.parametrize("is_patched", [False, True], ids=["dense", "patched"])
def test_negative_labels_are_unconditional_in_a_tensor_as_alone(is_patched):
    var = small_model()
    if is_patched:
        patch_silently(var, ActVARConfig(num_experts=8))

    def images(labels) -> torch.Tensor:
        return var.autoregressive_infer_cfg(2, labels, g_seed=3)

    alone, given_labels = images(-1), torch.tensor([-1, -7])
    assert torch.equal(images(given_labels), alone)
    assert given_labels.tolist() == [-1, -7]
    assert torch.equal(images(torch.tensor([-1, -1], dtype=torch.int8)), alone)
    assert torch.equal(images(np.int64(-2)), alone)
    assert not torch.equal(images(0), alone)
    mixed = images(torch.tensor([-1, 2]))
    assert torch.equal(mixed[0], alone[0])
    assert not torch.equal(mixed[1], alone[1])


@pytest.mark.parametrize("label", [0, 4, -1])
def test_labels_come_as_any_kind_of_tensor(model, label):
    var, _, _ = model
    expected = var.autoregressive_infer_cfg(2, label, g_seed=0)
    every_second = torch.tensor([label, 0, label, 0])[::2]
    for labels in (torch.tensor([label]).expand(2), every_second, every_second.int()):
        assert torch.equal(var.autoregressive_infer_cfg(2, labels, g_seed=0), expected)


def test_labels_are_not_read_where_that_is_impossible():
    with torch._subclasses.FakeTensorMode():
        labels = torch.empty(2, dtype=torch.int64)
        assert checked_labels(2, labels, 5, labels.device).shape == (2,)


class OnGPU(torch.Tensor):
    """Says that it lies on a GPU, where no value may be read on the way."""

    is_cuda = property(lambda self: True)

    def aminmax(self):
        raise AssertionError("this would wait for the GPU")


def test_labels_on_a_gpu_are_checked_by_an_assertion_in_the_stream():
    def checked(*labels: int) -> list[int]:
        return checked_labels(2, torch.tensor(labels).as_subclass(OnGPU), 5, torch.device("cpu")).tolist()

    assert checked(4, -3) == [4, 5]
    for label in (5, 6, 2**40):
        with pytest.raises(RuntimeError, match="label_B: expected labels from 0 to 4, or negative"):
            checked(0, label)


def test_weights_that_are_not_finite_end_a_sample_with_an_error_and_leave_the_model_usable():
    var = small_model()
    image, weight = draw(var), var.head.weight.clone()
    patch_silently(var, ActVARConfig(num_experts=8))
    var.head.weight.fill_(NAN)
    with pytest.raises(RuntimeError, match="nan"):
        draw(var)
    expect_free(var)
    var.head.weight.copy_(weight)
    assert torch.equal(draw(remove_patch(var)), image)


# Models


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda var: setattr(var.blocks[1].ffn, "fc1", torch.nn.Linear(64, 256, bias=False)),
            r"blocks\[1\]\.ffn: .*fc1 has no bias",
        ),
        (
            lambda var: setattr(var.blocks[1].ffn, "fc2", torch.nn.Identity()),
            r"blocks\[1\]\.ffn: .*fc2 is of .*Identity",
        ),
        (lambda var: setattr(var.blocks[1].ffn, "fc1", torch.nn.Linear(64, 128)), r"first block's sizes \(256, 64\)"),
        (lambda var: setattr(var, "blocks", torch.nn.ModuleList()), "at least one block"),
        (lambda var: setattr(var.blocks[1], "ffn", var.blocks[0].ffn), r"same one in blocks\[0\] and blocks\[1\]"),
    ],
)
def test_a_model_whose_blocks_do_not_fit_is_refused_and_unchanged(change, message):
    var = small_model()
    change(var)
    before = state_of(var)
    with pytest.raises(TypeError, match=message):
        apply_patch(var)
    expect_same_state(var, before)


@pytest.mark.parametrize("value", [None, 3, "var", torch.zeros(2)], ids=["None", "int", "str", "tensor"])
@pytest.mark.parametrize("function", [apply_patch, remove_patch, actvar.accelerate])
def test_what_is_no_model_is_a_type_error(function, value):
    with pytest.raises(TypeError, match="cannot be patched"):
        function(value)


@pytest.mark.parametrize("value", [None, 3, "var"], ids=repr)
def test_what_is_no_patched_model_has_nothing_to_record_or_save(value, tmp_path):
    for action in (actvar.record, actvar.guided_rows):
        with pytest.raises(ValueError, match="expected a model patched"), action(value):
            pass
    with pytest.raises(ValueError, match="expected a model patched"):
        actvar.save_adapter(value, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="cannot be patched"):
        load_adapter(value, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        (dict(depth=0), ValueError),
        (dict(width=0), ValueError),
        (dict(width=-64), ValueError),
        (dict(num_classes=0), ValueError),
        (dict(V=-1), ValueError),
        (dict(V=8.0), TypeError),
        (dict(share_quant_resi=-1), ValueError),
        (dict(patch_nums=(1, 2.5)), TypeError),
        (dict(patch_nums=(0, 2)), ValueError),
        (dict(patch_nums=(2, 1)), ValueError),
        (dict(patch_nums=(1,)), ValueError),
        (dict(ch_mult=(0,)), ValueError),
    ],
    ids=str,
)
def test_a_model_of_impossible_sizes_is_not_built(sizes, error):
    with pytest.raises(error, match=next(iter(sizes))):
        build_vae_var(**(dict(V=8, Cvae=4, ch=32, patch_nums=(1, 2), depth=1, ch_mult=(1,), device="meta") | sizes))


def test_weights_that_need_gradients_and_inference_mode_give_the_same_images(model):
    var, _, expected = model
    config = ActVARConfig(num_experts=8)
    with patched(var, config):
        sparse = draw(var)
    var = small_model().requires_grad_(True)
    assert torch.equal(draw(var), expected)
    with patched(var, config):
        assert torch.equal(draw(var), sparse)
        with torch.inference_mode():
            assert torch.equal(draw(var), sparse)
        assert torch.equal(draw(var), sparse)
    assert all(p.requires_grad and p.grad is None for p in var.parameters())


def test_what_is_built_loaded_or_patched_in_inference_mode_can_be_trained_outside(tmp_path):
    with torch.inference_mode():
        var = small_model()
        patch_silently(var, ActVARConfig(num_experts=8))
        actvar.save_adapter(var, tmp_path / "adapter.safetensors")
    assert not any(p.is_inference() for p in (*var.parameters(), *gate_parameters(var).values()))
    load_adapter(var, tmp_path / "adapter.safetensors")
    for parameter in gate_parameters(var).values():
        parameter.requires_grad_(True)
    labels, inputs = torch.tensor([1, 2]), torch.zeros(2, var.L - 1, 4)
    var(labels, inputs).sum().backward()
    assert var.blocks[0].actvar.router.weight.grad is not None
