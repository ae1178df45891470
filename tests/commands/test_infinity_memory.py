"""Memory of Infinity by part: the formulas against the bytes of the tensors that a sample has."""

from __future__ import annotations

import pytest
import torch
from support.infinity import CASES, TINY_SCHEDULE, load_infinity_golden, tiny_infinity, tiny_text

from actvar import ActVARConfig
from actvar.calibrate.calibration import fits_of
from actvar.config import DENSE
from actvar.families.conditions import Texts
from actvar.models import Infinity, build_infinity, scale_schedule
from actvar.models.infinity.build import OFFICIAL_SIZES
from actvar.reports.infinity.memory import CALIBRATED, calibration_bytes, decoder_bytes, memory_by_part
from actvar.sampling.token_maps import sampled_inputs
from actvar.utils.live_memory import peak_live_bytes
from actvar_kernels.linear.quantized import quantized_weight

WITHOUT_LAST, ALL, PUBLIC = "K/V without the last scale's", "K/V of all scales", "K/V as the public code keeps them"
SCHEDULE = scale_schedule(1.0, "0.06M")
PARTS = {
    "infinity-2b": {PUBLIC: 7.7, ALL: 5.1, WITHOUT_LAST: 3.1},
    "infinity-8b": {PUBLIC: 16.9, ALL: 11.2, WITHOUT_LAST: 6.9},
}


@pytest.mark.parametrize("model", PARTS)
def test_keys_and_values_of_the_official_sizes_at_1024_px(model):
    infinity = build_infinity(**OFFICIAL_SIZES[model], device="meta")[1]
    memory = memory_by_part(infinity, scale_schedule(), 1, 64)
    assert {part: round(memory[part] / 2**30, 1) for part in PARTS[model]} == PARTS[model]


def meta_copy(**changes) -> Infinity:
    sizes = dict(bits=4, spatial_patchify=0, depth=4, embed_dim=64, num_heads=2, block_chunks=1, text_channels=128)
    return build_infinity(**{**sizes, **changes}, text_maxlen=12, ch=32, device="meta")[1]


def peak_of_a_sample(depth: int, width: int) -> int:
    """Return the most bytes of tensors at once while a model without a decoder samples two images."""
    infinity = tiny_infinity(depth=depth, block_chunks=1)[1]
    if width == 2:
        for block in infinity.unregistered_blocks:
            block.bfloat16()
    infinity.decode = lambda features: torch.zeros(1)
    infinity.sample(*tiny_text([5, 5]), SCHEDULE)  # angles are kept for the next sample
    return peak_live_bytes(lambda: infinity.sample(*tiny_text([5, 5]), SCHEDULE))


@pytest.mark.parametrize("width", [2, 4])
def test_more_blocks_need_the_memory_of_their_keys_and_values(width):
    by_formula = [memory_by_part(meta_copy(depth=depth), SCHEDULE, 2, 5, width=width) for depth in (2, 6)]
    wanted = sum(by_formula[1][part] - by_formula[0][part] for part in (WITHOUT_LAST, "K/V of the texts"))
    assert peak_of_a_sample(6, width) - peak_of_a_sample(2, width) == pytest.approx(wanted, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_sample_has_at_most_a_tenth_more_than_the_formula(case):
    golden = load_infinity_golden(case)
    text, lengths = golden.text
    names = ("bits", "depth", "embed_dim", "num_heads", "block_chunks", "text_channels")
    meta = meta_copy(**{name: golden.facts[name] for name in names}, spatial_patchify=golden.facts["patchify"])
    memory = memory_by_part(meta, golden.schedule, len(lengths), max(lengths), width=4)
    transformer = memory[WITHOUT_LAST] + memory["K/V of the texts"] + memory["activations of a block"]
    golden.infinity.sample(text, lengths, golden.schedule)  # angles are kept for the next sample
    peak = peak_live_bytes(lambda: golden.infinity.sample(text, lengths, golden.schedule))
    assert peak <= 1.1 * max(transformer, memory["activations of the decoder"])


def test_weights_are_those_of_a_model_in_bfloat16():
    tokenizer, infinity = tiny_infinity()
    for block in infinity.unregistered_blocks:
        block.bfloat16()
    memory = memory_by_part(meta_copy(), TINY_SCHEDULE, 1, 5)
    in_blocks = sum(p.nbytes for block in infinity.unregistered_blocks for p in block.parameters())
    assert memory["weights of the blocks"] == in_blocks
    assert memory["other weights of the transformer"] == sum(p.nbytes for p in infinity.parameters()) - in_blocks
    assert memory["weights of the tokenizer"] == sum(p.nbytes for p in tokenizer.parameters())


def test_eight_bits_keep_a_byte_a_number_and_the_scales_beside_the_weights():
    _, infinity = tiny_infinity()
    layers = [
        layer
        for block in infinity.unregistered_blocks
        for layer in (block.sa.mat_qkv, block.sa.proj, block.ffn.fc1, block.ffn.fc2)
    ]
    kept = sum(part.nbytes for layer in layers for part in quantized_weight(layer.weight, torch.int8))
    assert memory_by_part(meta_copy(), TINY_SCHEDULE, 1, 5)["their copies, with int8 or fp8"] == kept


def test_activations_are_the_residual_stream_and_the_operands_of_the_ffn():
    _, infinity = tiny_infinity()
    for block in infinity.unregistered_blocks:
        block.bfloat16()
    sizes: dict[str, int] = {}
    block = infinity.unregistered_blocks[0]
    block.register_forward_hook(lambda _block, _inputs, output: sizes.update(x=output.nbytes))
    block.ffn.fc1.register_forward_hook(
        lambda _layer, inputs, output: sizes.update(u=inputs[0].nbytes, hidden=output.nbytes)
    )
    infinity.sample(*tiny_text([5]), TINY_SCHEDULE)
    assert memory_by_part(meta_copy(), TINY_SCHEDULE, 1, 5)["activations of a block"] == sum(sizes.values())


def test_actvar_keeps_fewer_keys_and_no_unconditional_ones_after_guidance():
    (_, *scales), C, depth, images = (h * w for _, h, w in TINY_SCHEDULE), 64, 4, 3
    rates = dict(scales=(-2, -1), token_rates=(0.5, 0.5), guidance_until=-1)
    compact, whole = (
        memory_by_part(meta_copy(), TINY_SCHEDULE, images, 5, ActVARConfig(**rates, kv=kv)) for kv in ("compact", "all")
    )
    each = 2 * 2 * C * depth  # bytes of keys and values of a token in all blocks
    assert compact[WITHOUT_LAST] == 2 * images * (1 + scales[0] // 2) * each
    assert compact[ALL] == max(compact[WITHOUT_LAST], images * (1 + sum(scales) // 2) * each)
    assert whole[WITHOUT_LAST] == 2 * images * (1 + scales[0]) * each
    assert whole[ALL] == images * (1 + sum(scales)) * each
    assert compact[PUBLIC] == whole[PUBLIC] == 2 * images * (1 + sum(scales)) * depth * C * 6
    assert (
        compact["activations of a block"]
        < memory_by_part(meta_copy(), TINY_SCHEDULE, images, 5, DENSE)["activations of a block"]
    )


def test_calibration_keeps_input_output_and_ffn_input_of_every_sample():
    _, infinity = tiny_infinity()
    for block in infinity.unregistered_blocks:
        block.bfloat16()
    features, lengths = tiny_text([5, 4])
    texts = Texts(features.split(lengths), SCHEDULE)

    def peak(images: int) -> int:
        batches = sampled_inputs(infinity, images, 4, texts=texts)
        return peak_live_bytes(lambda: fits_of(infinity, ActVARConfig(num_experts=8), batches))

    grown = calibration_bytes(meta_copy(), SCHEDULE, 16, 2)
    assert peak(32) - peak(16) == pytest.approx(grown, rel=0.15)  # the tokens that are clustered vary in number


def test_calibration_of_2b_at_1024_px_fits_a_card_of_24_gb():
    infinity = build_infinity(**OFFICIAL_SIZES["infinity-2b"], device="meta")[1]
    memory = memory_by_part(infinity, scale_schedule(), 1, 64)
    weights = sum(bytes_of for part, bytes_of in memory.items() if part.startswith(("weights", "other weights")))
    sampling = memory[WITHOUT_LAST] + memory["activations of the decoder"]  # if none was freed before the decoder
    fitting = calibration_bytes(infinity, scale_schedule(), CALIBRATED, 2)
    tokens, hidden = 10521, 8192
    mask, in_float32 = 4 * tokens**2, 4 * hidden * (4096 + 2 * 4096 + 4 * 2048)  # tokens' units and FFN weights
    assert weights + max(sampling, fitting + mask + in_float32 + 2 * 2 * tokens * hidden) < 0.75 * 24e9


def test_the_decoder_is_measured_on_its_own_operators():
    tokenizer, infinity = tiny_infinity()
    features = torch.zeros(2, 4, 3, 4)
    measured = peak_live_bytes(lambda: tokenizer.decode(features))
    assert decoder_bytes(meta_copy(), TINY_SCHEDULE, 2) == pytest.approx(measured, rel=0.1)
    assert infinity.vae_proxy == (tokenizer,)


def test_live_tensors_are_added_up_and_freed_ones_are_not():
    kept, weight = [], torch.ones(1000)

    def run() -> None:
        kept.append(torch.ones(100))
        for _ in range(3):
            torch.ones(200).add_(1)  # in place, and freed
        kept.append(kept[0][:50])  # a view
        weight.view(10, 100)

    assert peak_live_bytes(run) == 4 * 300


def test_memory_of_a_freed_argument_counts_again_for_others():
    def run() -> None:
        for _ in range(20):
            torch.tensor([1.0] * 1000)  # not made by an operator, and freed
            torch.ones(1000)

    assert 4000 <= peak_live_bytes(run) <= 8000
