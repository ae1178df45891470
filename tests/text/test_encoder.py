"""Prompts become features: of their own tokens, off the GPU afterwards, and once only with a cache."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.infinity import TINY_SCHEDULE, tiny_infinity
from support.tiny_t5 import CHANNELS, StandIn, save_tiny_t5

import actvar
from actvar.cli import info
from actvar.text import FeatureCache, TextEncoder
from actvar.text import encoder as encoder_module

PROMPTS = ["a red dog", "cat", "a red dog"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(encoder_module, "load_t5", lambda name, dtype: made.loaded)
    return made


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


def test_features_lie_behind_each_other_in_the_order_of_the_prompts(stand_in: StandIn) -> None:
    text, lengths = TextEncoder()(PROMPTS)
    assert lengths == [10, 4, 10]
    assert text.shape == (24, CHANNELS)
    assert text.dtype == torch.float32
    assert torch.equal(text[:10], stand_in.table[[*map(ord, "a red dog"), 1]])
    assert torch.equal(text[10:14], stand_in.table[[*map(ord, "cat"), 1]])
    assert torch.equal(text[14:], text[:10])
    assert stand_in.prompts == ["a red dog", "cat"]


def test_the_encoder_is_on_the_device_during_a_call_only(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = TextEncoder()
    encode(["a", "b"])
    encode(["c"])
    assert stand_in.moves == ["cpu", "run", "run", "cpu", "cpu", "run", "cpu"]
    monkeypatch.setattr(StandIn, "encoder", lambda self, input_ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(["d"])
    assert stand_in.moves[-2:] == ["run", "cpu"]


def test_on_a_gpu_weights_have_16_bits_as_in_the_public_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "usable_device", torch.device)
    assert TextEncoder(device="cuda").dtype == torch.float16
    assert TextEncoder(device="cpu").dtype == torch.float32


def test_a_model_draws_from_the_result(stand_in: StandIn) -> None:
    _, infinity = tiny_infinity()
    images = infinity.sample(*actvar.TextEncoder()(["dog", "red cat"]), TINY_SCHEDULE, g_seed=0)
    assert images.shape == (2, 3, 48, 64)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("a dog", TypeError, "prompts: expected a sequence of strings, got 'a dog'"),
        (["a dog", 3], TypeError, "prompts: expected a sequence of strings"),
        ([], ValueError, "prompts: expected one or more, got none"),
        (["a\udcff"], ValueError, "prompts: expected texts in UTF-8"),
        (["cat", "a" * 20], ValueError, "prompt: expected at most 12 tokens, got 21; shorten 'aaaa"),
    ],
)
def test_wrong_prompts_are_refused(prompts: object, error: type, message: str, stand_in: StandIn) -> None:
    with pytest.raises(error, match=message):
        TextEncoder()(prompts, 12)
    assert "run" not in stand_in.moves


# The cache.


def test_a_cached_prompt_is_not_encoded_again(stand_in: StandIn, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    first = TextEncoder("t5", cache=cache)(PROMPTS)
    again = TextEncoder("t5", cache=FeatureCache(tmp_path / "cache"))([*PROMPTS, "bird"])
    assert torch.equal(again[0][:24], first[0])
    assert again[1] == [*first[1], 5]
    assert stand_in.prompts == ["a red dog", "cat", "bird"]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    TextEncoder("another", cache=cache)(["cat"])
    assert stand_in.prompts[-1] == "cat"


def test_a_prompt_in_the_cache_needs_no_transformers_but_may_be_too_long(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TextEncoder("t5", cache=FeatureCache(tmp_path))(["a red dog"])
    monkeypatch.setattr(encoder_module, "load_t5", None)
    assert TextEncoder("t5", cache=FeatureCache(tmp_path))(["a red dog"])[1] == [10]
    with pytest.raises(ValueError, match="expected at most 9 tokens, got 10"):
        TextEncoder("t5", cache=FeatureCache(tmp_path))(["a red dog"], 9)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"truncated"])
def test_a_damaged_file_is_made_anew(content: bytes, stand_in: StandIn, tmp_path: Path) -> None:
    encode = TextEncoder("t5", cache=FeatureCache(tmp_path))
    text, _ = encode(["cat"])
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[:-8] if content == b"truncated" else content)
    assert torch.equal(encode(["cat"])[0], text)
    assert file.read_bytes() == good
    assert stand_in.prompts == ["cat", "cat"]


@pytest.mark.parametrize("features", [torch.zeros(3), torch.full((2, 4), torch.nan), torch.zeros(2, 4).int()])
def test_values_that_are_no_features_are_not_used(features: torch.Tensor, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.write("key", features)
    assert cache.read("key") is None


def test_files_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    features = torch.zeros(4, 64)
    cache = FeatureCache(tmp_path)
    for number, key in enumerate("abc"):
        cache.write(key, features)
        os.utime(tmp_path / f"{key}.safetensors", ns=(number, number))
    size = (tmp_path / "a.safetensors").stat().st_size
    assert cache.read("a") is not None  # used now
    FeatureCache(tmp_path, most_bytes=3 * size).write("d", features)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_a_cache_that_cannot_be_written_is_a_warning(
    stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    text, _ = TextEncoder("t5", cache=FeatureCache(tmp_path / "file" / "folder"))(["cat"])
    assert torch.equal(text, stand_in.table[[*map(ord, "cat"), 1]])
    assert "not kept for the next time" in caplog.text


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert actvar.text.default_folder() == tmp_path / "actvar" / "prompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert actvar.text.default_folder() == tmp_path / ".cache" / "actvar" / "prompts"


# A T5 of transformers.


def test_features_are_those_of_the_public_code(tiny_t5: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    text, lengths = TextEncoder(tiny_t5)(["a red dog", "cat"])
    tokens = AutoTokenizer.from_pretrained(tiny_t5)(
        text=["a red dog", "cat"], max_length=512, padding="max_length", truncation=True, return_tensors="pt"
    )
    model, mask = T5EncoderModel.from_pretrained(tiny_t5).eval(), tokens.attention_mask
    with torch.no_grad():
        hidden = model(input_ids=tokens.input_ids, attention_mask=mask)["last_hidden_state"].float()
    assert lengths == mask.sum(dim=-1).tolist()
    public = torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(text, public, rtol=1e-5, atol=1e-5)


def test_a_changed_folder_does_not_find_the_features_of_the_old_one(tiny_t5: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_t5, tmp_path / "t5"))
    cache = FeatureCache(tmp_path / "cache")
    TextEncoder(folder, cache=cache)(["cat"])
    TextEncoder(folder, cache=cache)(["cat"])
    assert len(list(cache.folder.iterdir())) == 1
    (folder / "model.safetensors").touch()
    TextEncoder(folder, cache=cache)(["cat"])
    assert len(list(cache.folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["kind", "no weights", "truncated", "not all", "no tokenizer", "config"])
def test_a_folder_that_is_no_t5_is_refused(damage: str, tiny_t5: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_t5, tmp_path / "t5"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "kind":
        config.write_text(json.dumps({"model_type": "bert"}))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "not all":
        tensors = load_file(weights)
        del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        config.write_text("{")
    with pytest.raises((ValueError, FileNotFoundError), match="expected a folder with a T5 of transformers") as caught:
        TextEncoder(folder)(["cat"])
    assert str(folder) in str(caught.value)


def test_code_beside_the_weights_is_not_run(tiny_t5: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_t5, tmp_path / "t5"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    facts = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps(facts | {"auto_map": auto}))
    TextEncoder(folder)(["cat"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_info_says_whether_prompts_can_be_encoded(
    is_there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "is_installed", lambda: is_there)
    monkeypatch.setattr(info, "version", lambda package: f"1.2 of {package}")
    info.run(argparse.Namespace(file=None, key=None, json=True))
    wanted = "by transformers 1.2 of transformers" if is_there else "no, run pip install actvar[text]"
    assert json.loads(capsys.readouterr().out)["prompts"] == wanted


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(encoder_module, "is_installed", lambda: False)
    with pytest.raises(ImportError, match=r"pip install actvar\[text\]"):
        TextEncoder()(["cat"])
