"""Whatever is handed in wrong is refused with a clear error before anything changes."""

from __future__ import annotations

import gzip
import json
import os
import struct
import zipfile

import fuzz
import numpy as np
import pytest
import torch
from faults import draw, expect_free, expect_same_state, small_model, state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import actvar
import actvar_kernels as ops
from actvar import ActVARConfig, AdapterError, CheckpointError, apply_patch, load_adapter, patched, remove_patch
from actvar.adapter import gate_parameters
from actvar.checkpoint import describe_checkpoint, load_var, read_tensors
from actvar.config import KV_MODES, SAMPLERS
from actvar.models import build_vae_var
from actvar.models.arguments import checked_labels
from actvar.patch import patch_silently
from actvar.zoo.fashion_mnist.data import load_split, read_idx
from actvar_kernels import cpu
from actvar_kernels.expert_ffn import cpu_kernel
from actvar_kernels.expert_ffn.op import SCHEDULES

HIDDEN, SCALES, NUM_CLASSES, V = 256, 3, 5, 32
NAN, INF = float("nan"), float("inf")

# Configurations

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
        expert_schedule=draw_one(st.sampled_from(SCHEDULES)),
        sampler=draw_one(st.sampled_from(SAMPLERS)),
    )


@pytest.fixture(scope="module")
def model():
    """A model, its state and an image; shared, since nothing may change it."""
    var = small_model()
    return var, state_of(var), draw(var)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=configurations())
def test_any_valid_configuration_patches_samples_and_comes_off_bit_for_bit(model, fields):
    var, before, image = model
    with np.errstate(all="ignore"):
        patch_silently(var, ActVARConfig(**fields))
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
    "expert_schedule": ["", "fast", None, ["auto"]],
    "sampler": ["", "slow", None, 3],
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    (dict(cfg="4"), TypeError, "cfg: expected a number"),
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
        (lambda var: setattr(var.blocks[1].ffn, "fc1", torch.nn.Linear(64, 256, bias=False)), "with a bias"),
        (lambda var: setattr(var.blocks[1].ffn, "fc2", torch.nn.Identity()), r"blocks\[1\].ffn.fc2 as nn.Linear"),
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
    with pytest.raises(ValueError, match="expected a model patched"):
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


# Adapters


@pytest.fixture
def adapter(tmp_path):
    """A patched model and the file of another's gates."""
    path, other = tmp_path / "adapter.safetensors", small_model(1)
    patch_silently(other, ActVARConfig(num_experts=8))
    for parameter in gate_parameters(other).values():
        parameter.add_(1)
    actvar.save_adapter(other, path)
    var = small_model()
    patch_silently(var, ActVARConfig(num_experts=8))
    return var, path


def change_adapter(path, tensors=None, **metadata):
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path) | (tensors or {}), path, old | metadata)


SIZES = dict(depth=2, width=64, hidden=256, patch_nums=[1, 2, 4])
BIAS = "blocks.1.router.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="[1]"), "sizes of a model"),
        (dict(model="null"), "sizes of a model"),
        (dict(model="[" * 50_000), "damaged"),
        (dict(model=json.dumps(SIZES | {"depth": "2"})), "sizes that are integers"),
        (dict(model=json.dumps(SIZES | {"depth": True})), "sizes that are integers"),
        (dict(model=json.dumps(SIZES | {"patch_nums": 3})), "sizes that are integers"),
        (dict(model=json.dumps(SIZES | {"more": 3})), "sizes of a model"),
        (dict(model=json.dumps(SIZES | {"width": 128})), "made for a model with"),
        (dict(config="[" * 50_000), "nested too deeply"),
        (dict(config='{"num_experts": 1' + "0" * 400 + "}"), "num_experts"),
        (dict(config='{"kv": ["all"]}'), "kv"),
        (dict(tensors={BIAS: torch.full((8,), 1e300, dtype=torch.float64)}), "finite values in torch.float32"),
        (dict(tensors={BIAS: torch.zeros(8).to(torch.float8_e4m3fn)}), "got torch.float8_e4m3fn"),
        (dict(tensors={BIAS: torch.zeros(8, dtype=torch.complex64)}), "got torch.complex64"),
        (dict(tensors={BIAS: torch.zeros(1, 8)}), r"expected shape \[8\]"),
        (dict(tensors={BIAS: torch.full((8,), -INF)}), "finite"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_adapter_that_lies_is_refused_and_the_gates_stay(adapter, change, message):
    var, path = adapter
    before = state_of(var)
    change_adapter(path, **change)
    with pytest.raises(AdapterError, match=message):
        load_adapter(var, path)
    expect_same_state(var, before)


def test_an_adapter_that_overflows_in_the_models_precision_is_refused(adapter):
    var, path = adapter
    change_adapter(path, {BIAS: torch.full((8,), 1e6)})
    load_adapter(var, path)
    var.half()
    with pytest.raises(AdapterError, match=r"finite values in torch.float16"):
        load_adapter(var, path)


def test_gates_that_are_not_finite_are_not_saved(adapter):
    var, path = adapter
    content = path.read_bytes()
    var.blocks[1].actvar.selector.weight[0, 3] = NAN
    with pytest.raises(ValueError, match=r"blocks.1.selector.weight: expected finite values"):
        actvar.save_adapter(var, path)
    assert path.read_bytes() == content


def test_a_checkpoint_is_no_adapter_and_an_adapter_no_checkpoint(adapter, tmp_path):
    var, path = adapter
    checkpoint = tmp_path / "var.safetensors"
    save_file(var.state_dict(), checkpoint)
    with pytest.raises(AdapterError, match="expected an ActVAR adapter"):
        load_adapter(var, checkpoint)
    with pytest.raises(CheckpointError, match="expected"):
        load_var(path, path)


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "var.pth"
    torch.save(small_model().state_dict(), path)
    return path


def test_a_zip_bomb_is_refused_before_it_unfolds(checkpoint):
    with zipfile.ZipFile(checkpoint) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in records.items():
            target.writestr(name, content + (b"\0" * 2**28 if name.endswith("data.pkl") else b""))
    assert checkpoint.stat().st_size < 2**21
    before = fuzz._peak_memory()
    with pytest.raises(CheckpointError, match="complete file") as caught:
        read_tensors(checkpoint)
    assert "compressed" in str(caught.value.__cause__)
    assert fuzz._peak_memory() - before < 2**26


def test_many_tensors_of_one_memory_are_refused(checkpoint):
    shared = torch.zeros(1000)
    torch.save({f"blocks.0.{i}": shared for i in range(100)}, checkpoint)
    with pytest.raises(CheckpointError, match="400000 bytes for its tensors together"):
        read_tensors(checkpoint)


def test_a_transformer_without_classes_is_refused(checkpoint):
    state = small_model().state_dict()
    torch.save(state | {"class_emb.weight": torch.zeros(1, 64)}, checkpoint)
    with pytest.raises(CheckpointError, match="one class or more"):
        describe_checkpoint(checkpoint)


def test_an_absurd_number_of_scales_takes_no_memory(tmp_path):
    path, vae = tmp_path / "vae.safetensors", small_model().vae_proxy[0]
    state = vae.state_dict() | {"quantize.ema_vocab_hit_SV": torch.zeros(500_000, 1)}
    save_file(state, path)
    before = fuzz._peak_memory()
    assert describe_checkpoint(path)["scales"] == 500_000
    assert fuzz._peak_memory() - before < 2**27


@pytest.mark.parametrize("device", ["nowhere", "meta", "cuda:99", 3.5])
def test_a_device_that_cannot_be_used_is_named_before_anything_is_read(device):
    with pytest.raises((ValueError, TypeError), match=r"device|argument"):
        load_var("missing.pth", "missing.pth", device=device)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match="expected a checkpoint file"):
        read_tensors(tmp_path / "var.pth")


# Image files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an idx file"),
        (b"\0\0\x08", "expected an idx file"),
        (b"\0\0\x09\x01\0\0\0\x01a", "expected an idx file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0\0\x01", "3 sizes in the header, the file ends"),
        (b"\0\0\x08\xff" + b"\xff" * 1020, "at most 1073741824 bytes"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "at most 1073741824 bytes"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"promises shape \(5,\), the file holds 3 bytes"),
        (b"\0\0\x08\x01\0\0\0\x02abc", r"promises shape \(2,\), the file holds more bytes"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_that_lies_is_refused(content, message, suffix, tmp_path):
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_damaged_and_endless_gzip_files_are_refused(tmp_path):
    path = tmp_path / "images.gz"
    good = gzip.compress(struct.pack(">HBBI", 0, 8, 1, 3) + b"abc")
    for content in (b"no gzip", good[:-9], good[:20] + b"\xff\xff" + good[22:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"gzip|promises|expected"):
            read_idx(path)
    path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 3) + b"\0" * 2**28))
    before = fuzz._peak_memory()
    with pytest.raises(ValueError, match="holds more bytes"):
        read_idx(path)
    assert fuzz._peak_memory() - before < 2**25


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [((2, 28, 28), [0], "labels"), ((2, 20, 20), [0, 1], "28"), ((2, 28, 28), [0, 10], "from 0 to 9, got 10")],
)
def test_images_and_labels_that_do_not_fit_are_refused(images, labels, message, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *images) + bytes(np.prod(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, len(labels)) + bytes(labels))
    with pytest.raises(ValueError, match=message):
        load_split(tmp_path, "train")


# Operations


def operation_arguments() -> dict[str, tuple]:
    """Name -> arguments that fit, of every operation with tensors: 2 sequences of 6 tokens, 4 of them kept, width 8."""
    x, rows, gamma = torch.randn(2, 6, 8), torch.randn(2, 4, 8), torch.randn(2, 1, 8)
    index = torch.tensor([[0, 1, 3, 5], [1, 2, 3, 4]])
    router = torch.randn(4, 8), torch.randn(4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    ffn = torch.randn(32, 8), torch.randn(32), torch.randn(8, 32), torch.randn(8)
    heads = torch.randn(2, 2, 4, 16)
    return {
        "select_tokens": (x, torch.randn(1, 8), torch.randn(1), gamma, gamma, 4),
        "normalize_modulate": (x, gamma, gamma),
        "subset_attention": (heads, heads, heads, None, torch.ones(2), 1.0),
        "add_normalize": (x, index, rows, gamma, gamma, gamma),
        "add_normalize_route": (x, index, rows, gamma, gamma, gamma, *router, 2),
        "route_experts": (rows, *router, 2),
        "expert_ffn": (rows, mask, 2, *ffn),
        "expert_ffn_scatter": (x, index, rows, rows, mask, 2, *ffn, gamma),
        "scatter_rows": (x, index, rows, rows, gamma),
        "sample_tokens": (torch.randn(2, 3, 8), 1.0, 4, 0.9, None, 0, torch.rand(1, 3, 8)),
    }


TENSOR_POSITIONS = [
    (name, position)
    for name, arguments in operation_arguments().items()
    for position, argument in enumerate(arguments)
    if isinstance(argument, torch.Tensor)
]


@pytest.mark.parametrize(("name", "position"), TENSOR_POSITIONS)
def test_an_operation_refuses_each_argument_of_another_type_shape_or_device(name, position):
    arguments, operation = operation_arguments()[name], getattr(ops, name)
    good = arguments[position]
    operation(*arguments)
    more_dimensions = [] if (name, position) == ("route_experts", 0) else [good.unsqueeze(0).expand(3, *good.shape)]
    for bad in ([1.0], "x", good.numpy(), good[..., :-1], good.to("meta"), *more_dimensions):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match="expected"):
            operation(*arguments[:position], bad, *arguments[position + 1 :])
        assert all(a is b or torch.equal(a, b) for a, b in zip(arguments, copies, strict=True) if a is not good)


@pytest.mark.parametrize("name", ["add_normalize", "add_normalize_route", "expert_ffn_scatter", "scatter_rows"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_an_index_that_is_not_int64_is_refused(name, dtype):
    first, index, *rest = operation_arguments()[name]
    with pytest.raises(TypeError, match="index: expected int64"):
        getattr(ops, name)(first, index.to(dtype), *rest)


@pytest.mark.parametrize(("name", "position"), TENSOR_POSITIONS)
def test_an_operation_takes_strided_expanded_and_inference_tensors_and_those_that_need_grad(name, position):
    arguments, operation = operation_arguments()[name], getattr(ops, name)
    good = arguments[position]

    def result(tensor: torch.Tensor) -> list[torch.Tensor]:
        found = operation(*arguments[:position], tensor, *arguments[position + 1 :])
        found = found if isinstance(found, tuple) else (found,)
        return [part.detach().clone() for part in found if part is not None]

    def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)

    expected = result(good)
    strided = torch.stack((good, good), dim=-1)[..., 0]
    assert not strided.is_contiguous() or strided.numel() == 1
    close(result(strided), expected)
    with torch.inference_mode():
        inference = good.clone()
    with torch.no_grad():
        close(result(inference), expected)
    if good.is_floating_point():
        close(result(good.clone().requires_grad_()), expected)
        close(result(good[:1].expand_as(good)), result(good[:1].expand_as(good).clone()))


def test_sizes_that_the_cpp_kernel_cannot_count_are_refused(monkeypatch):
    if cpu.why_unavailable() is not None:
        pytest.skip(cpu.why_unavailable())
    monkeypatch.setattr(cpu, "MOST", 7)
    rows, mask, _, *weights = operation_arguments()["expert_ffn"]
    with pytest.raises(ValueError, match=r"expected at most 7 rows and columns, got \(8, 8, 4, 8\)"):
        cpu_kernel.expert_ffn(rows, mask, *weights)


@pytest.mark.parametrize("rows", [0, 2])
def test_operations_take_no_rows_at_all(rows):
    x, gamma = torch.randn(rows, 6, 8), torch.randn(rows, 1, 8)
    with torch.no_grad():
        assert ops.normalize_modulate(x, gamma, gamma).shape == (rows, 6, 8)
        ffn = operation_arguments()["expert_ffn"][3:]
        assert ops.expert_ffn(x, torch.ones(rows, 6, 4, dtype=torch.bool), 2, *ffn).shape == (rows, 6, 8)


# Files of any kind


def test_a_small_part_of_the_fuzz_finds_nothing():
    counts = fuzz.run_fuzz(250, seed=7)
    assert counts["inputs"] == 250
    assert counts["refused"] > 150
