"""The models against numbers of the public VAR code: same keys, same logits, same tokens, same images."""

from __future__ import annotations

import math

import pytest
import torch
from support.golden import CASES, Golden, load_golden, manifest
from torch import Tensor, nn

from actvar.models import OFFICIAL_PATCH_NUMS, build_vae_var
from actvar.models import var as var_module
from actvar.models.build import skeleton

TOLERANCE = 1e-4
OFFICIAL_VARS = ("var_d16", "var_d20", "var_d24", "var_d30", "var_d36")
OFFICIAL_AUTOENCODERS = ("vae_ch160v4096z32_256px", "vae_ch160v4096z32_512px")
AUTOENCODER = dict(V=4096, Cvae=32, ch=160, share_quant_resi=4, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2)
SMALL = dict(V=8, Cvae=4, ch=32, patch_nums=(1, 2), num_classes=3, depth=1, ch_mult=(1,), num_res_blocks=1)


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="module")
def separate_adaln() -> Golden:
    return load_golden("separate_adaln")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def sample(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Image, tokens `[B, L]`, and the guided logits of every scale as the sampler gets them."""
    guided, drawn = [], []
    sampler = var_module.sample_top_k_top_p

    def recording_sampler(logits: Tensor, *args: object) -> Tensor:
        guided.append(logits.clone())
        return sampler(logits, *args)

    monkeypatch.setattr(var_module, "sample_top_k_top_p", recording_sampler)
    embedding = golden.var.vae_proxy[0].quantize.embedding
    hook = embedding.register_forward_hook(lambda module, args, output: drawn.append(args[0].flatten(1)))
    try:
        image = golden.var.autoregressive_infer_cfg(B=2, label_B=golden.tensors["labels"], **golden.sampling)
    finally:
        hook.remove()
    return image, torch.cat(drawn, dim=1), guided


@torch.no_grad()
def test_teacher_forced_logits_are_those_of_the_public_code(golden: Golden) -> None:
    logits = golden.var(golden.tensors["labels"], golden.tensors["teacher_input"])
    assert_close(logits, golden.tensors["teacher_logits"])


def test_a_sampling_run_has_the_logits_the_tokens_and_the_image_of_the_public_code(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, tokens, guided = sample(golden, monkeypatch)
    assert len(guided) == 5
    for step in (3, 4):
        assert_close(guided[step], golden.tensors[f"guided_logits_{step}"])
    assert torch.equal(tokens, golden.tensors["tokens"])
    assert_close(image, golden.tensors["image"])


def test_sampling_leaves_no_cache_behind(golden: Golden) -> None:
    golden.var.autoregressive_infer_cfg(B=1, label_B=0, g_seed=0)
    attentions = [block.attn for block in golden.var.blocks]
    assert [(a.caching, a.cached_k, a.cached_v) for a in attentions] == [(False, None, None)] * len(attentions)


def test_smoothed_sampling_draws_the_image_of_the_public_code(separate_adaln: Golden) -> None:
    tensors, g_seed = separate_adaln.tensors, separate_adaln.sampling["g_seed"]
    image = separate_adaln.var.autoregressive_infer_cfg(2, tensors["labels"], g_seed, cfg=4.0, more_smooth=True)
    assert_close(image, tensors["image_smooth"])


def test_the_autoencoder_finds_the_tokens_of_the_public_code(separate_adaln: Golden) -> None:
    token_maps = separate_adaln.vae.img_to_idxBl(separate_adaln.tensors["vae_input"])
    assert [token_map.shape[1] for token_map in token_maps] == [1, 4, 9, 16, 36]
    assert torch.equal(torch.cat(token_maps, dim=1), separate_adaln.tensors["vae_tokens"])


def test_the_autoencoder_decodes_tokens_to_the_image_of_the_public_code(separate_adaln: Golden) -> None:
    token_maps = separate_adaln.tensors["vae_tokens"].split([1, 4, 9, 16, 36], dim=1)
    assert_close(separate_adaln.vae.idxBl_to_img(token_maps), separate_adaln.tensors["vae_reconstruction"])


@torch.no_grad()
def test_tokens_give_the_teacher_input_of_the_public_code(separate_adaln: Golden) -> None:
    token_maps = separate_adaln.tensors["vae_tokens"].split([1, 4, 9, 16, 36], dim=1)
    teacher_input = separate_adaln.vae.quantize.teacher_input(token_maps)
    assert_close(teacher_input, separate_adaln.tensors["teacher_input_from_tokens"])


def signature(module: nn.Module) -> dict[str, list]:
    """Name -> [shape, dtype], as in the manifest."""
    state = module.state_dict()
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in state.items()}


def official_skeleton(config: dict, **overrides: object) -> tuple[nn.Module, nn.Module]:
    base = dict(num_classes=1, depth=1, shared_aln=False, attn_l2_norm=True, width=None, image_channels=3)
    config = dict(config, patch_nums=tuple(config["patch_nums"]))
    return skeleton(**{**base, **AUTOENCODER, **config, **overrides})


@pytest.mark.parametrize("name", OFFICIAL_VARS)
def test_a_transformer_of_official_size_has_the_published_keys_shapes_and_dtypes(name: str) -> None:
    entry = manifest()[name]
    _, var = official_skeleton(entry["config"])
    assert signature(var) == entry["state_dict"]
    assert sum(parameter.numel() for parameter in var.parameters()) == entry["parameters"]


@pytest.mark.parametrize("name", OFFICIAL_AUTOENCODERS)
def test_an_autoencoder_of_official_size_has_the_published_keys_shapes_and_dtypes(name: str) -> None:
    entry = manifest()[name]
    vae, _ = official_skeleton(entry["config"])
    assert signature(vae) == entry["state_dict"]


def test_the_manifest_has_no_file_that_is_not_compared() -> None:
    assert sorted(manifest()) == sorted(OFFICIAL_VARS + OFFICIAL_AUTOENCODERS)


def test_the_default_patch_nums_are_those_of_the_256_pixel_models() -> None:
    assert list(OFFICIAL_PATCH_NUMS) == manifest()["var_d16"]["config"]["patch_nums"]


def test_a_skeleton_takes_no_memory() -> None:
    vae, var = official_skeleton(manifest()["var_d36"]["config"])
    assert {t.device.type for module in (vae, var) for t in module.state_dict().values()} == {"meta"}


def test_building_changes_no_global_torch_state() -> None:
    def state() -> tuple:
        classes = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d, nn.GroupNorm)
        return (
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            [(c.__init__, getattr(c, "reset_parameters", None), c.forward) for c in classes],
        )

    torch.manual_seed(123)
    before = state()
    build_vae_var(**SMALL)
    assert state() == before
    layer = nn.Linear(64, 64)
    assert 0 < layer.weight.abs().max() <= 1 / math.sqrt(64)


def test_equal_seeds_build_equal_weights_and_other_seeds_other_ones() -> None:
    first, again, other = (build_vae_var(**SMALL, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        a, b, c = a.state_dict(), b.state_dict(), c.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert any(not torch.equal(a[name], c[name]) for name in a)


@torch.no_grad()
def test_labels_are_dropped_in_train_mode_and_never_in_eval_mode(separate_adaln: Golden) -> None:
    var, labels = separate_adaln.var, separate_adaln.tensors["labels"]
    teacher_input = separate_adaln.tensors["teacher_input"]
    conditional = separate_adaln.tensors["teacher_logits"]
    unconditional = var(torch.full_like(labels, var.num_classes), teacher_input)
    assert (conditional - unconditional).abs().max() > 100 * TOLERANCE
    rate, var.cond_drop_rate = var.cond_drop_rate, 1.0
    try:
        assert_close(var(labels, teacher_input), conditional)
        assert_close(var.train()(labels, teacher_input), unconditional)
    finally:
        var.eval().cond_drop_rate = rate


@torch.no_grad()
def test_about_a_tenth_of_the_labels_is_dropped_in_train_mode() -> None:
    _, var = build_vae_var(**SMALL)
    seen = []
    var.class_emb.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    torch.manual_seed(0)
    var.train()(torch.zeros(4000, dtype=torch.int64), torch.zeros(4000, 4, 4))
    dropped = (seen[0] == var.num_classes).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.02)
