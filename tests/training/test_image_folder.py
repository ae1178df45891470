"""A folder of images is looked at before any work: classes, files left out, errors that say what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from support.helpers import NUM_CLASSES, make_tiny_var

from actvar.distill import data, image_folder
from actvar.distill.image_folder import find_images
from actvar.distill.images import check_image, load_image


def make_images(root: Path, folders: list[str], count: int = 2) -> Path:
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 20), (number, index, 0)).save(root / folder / f"{index}.png")
    return root


def labels_by_folder(root: Path, num_classes: int, mapping: Path | None = None) -> dict[str, int]:
    found = find_images(root, num_classes, mapping)
    return {file.parent.name: label for file, label in zip(found.files, found.labels, strict=True)}


def test_hidden_names_are_ignored_and_others_are_counted(tmp_path):
    root = make_images(tmp_path, ["cats", "dogs"], 20)
    for hidden in (".git", "cats/.ipynb_checkpoints"):
        make_images(root, [hidden])
    for name in (".DS_Store", "cats/._0.png", "dogs/.hidden.jpg"):
        (root / name).write_bytes(b"\0")
    found = find_images(root, 2)
    assert found.described() == "40 images in 2 classes"
    for name in ("a", "b", "c"):
        (root / "cats" / f"{name}.gif").touch()
    assert find_images(root, 2).described() == "40 images in 2 classes, 3 skipped (.gif)"
    (root / "dogs" / "notes.TXT").touch()
    (root / "dogs" / "README").touch()
    (root / "lost.png").touch()
    found = find_images(root, 2)
    expected = "40 images in 2 classes, 6 skipped (3 .gif, 1 in no class folder, 1 no suffix, 1 .txt)"
    assert found.described() == expected
    assert [file.name for file in found.files] == sorted(f"{n}.png" for n in range(20)) * 2
    assert found.labels == (0,) * 20 + (1,) * 20


def test_nested_folders_and_upper_case_suffixes_are_read(tmp_path):
    root = make_images(tmp_path, ["cats/old/grey", "dogs"])
    (root / "dogs" / "0.png").rename(root / "dogs" / "0.PNG")
    assert find_images(root, 2).labels == (0, 0, 1, 1)


def test_as_many_folders_as_classes_are_these_in_the_order_of_their_names(tmp_path):
    assert labels_by_folder(make_images(tmp_path, ["b", "a", "C"]), 3) == {"C": 0, "a": 1, "b": 2}


@pytest.mark.parametrize(
    ("names", "num_classes", "expected"),
    [
        (["0", "7", "12"], 20, {"0": 0, "7": 7, "12": 12}),
        (["007", "012"], 20, {"007": 7, "012": 12}),
        (["00", "01", "02"], 3, {"00": 0, "01": 1, "02": 2}),
        (["1990", "1991"], 2, {"1990": 0, "1991": 1}),
    ],
)
def test_folders_may_have_class_numbers_for_names(tmp_path, names, num_classes, expected):
    assert labels_by_folder(make_images(tmp_path, names), num_classes) == expected


def test_a_mapping_says_which_class_a_folder_is(tmp_path):
    root, mapping = make_images(tmp_path / "images", ["cats", "dogs", "wolves"]), tmp_path / "classes.json"
    mapping.write_text(json.dumps({"dogs": 207, "wolves": 207, "cats": 281, "unused": 3}))
    assert labels_by_folder(root, 1000, mapping) == {"cats": 281, "dogs": 207, "wolves": 207}
    assert labels_by_folder(root, 1000, mapping) == labels_by_folder(root, 282, mapping)


FOLDERS = [f"class{number:04d}" for number in range(300)]


@pytest.mark.parametrize(
    ("names", "num_classes", "mapping", "message"),
    [
        (
            [],
            3,
            None,
            "each of the model's 3 classes, got 0 folders; name the folders by class numbers, or give --class-numbers",
        ),
        (["a", "b"], 3, None, r"each of the model's 3 classes, got 2 folders \(a, b\); .*--class-numbers FILE"),
        (["0", "b"], 3, None, r"got 2 folders \(0, b\)"),
        (FOLDERS, 1000, None, r"got 300 folders \(class0000, .*, class0009, \.\.\.\); name"),
        (
            [str(n) for n in range(12)],
            12,
            None,
            "numbers that are not in the order of the names, by which '10' would be ",
        ),
        (["0", "3"], 3, None, r"from 0 to 2, those of the model, got 3 \(3\)"),
        (["0", "1", "2", "5"], 3, None, r"got 5 \(5\)"),
        (["1", "01"], 3, None, "one folder per class, got 01, 1"),
        (["²", "1"], 3, None, "got 2 folders"),
        (["a", "b"], 3, '{"a": 1}', r"classes\.json: expected the class of every folder in .*, 1 missing: b$"),
        (FOLDERS, 3, '{"class0000": 1}', r"299 missing: class0001, .*, class0010, \.\.\.$"),
        (["a"], 3, '{"a": 3}', r"classes\.json: expected classes from 0 to 2, those of the model, got a \(3\)"),
        (["a"], 3, '{"a": true}', "expected a JSON object"),
        (["a"], 3, '{"a": "1"}', "expected a JSON object"),
        (["a"], 3, '["a"]', "expected a JSON object"),
        (["a"], 3, "a 1", "expected a JSON object"),
        (["a"], 3, "[" * 100_000, "expected a JSON object"),
    ],
)
def test_folders_of_unknown_classes_are_refused_with_what_to_do(tmp_path, names, num_classes, mapping, message):
    root, file = tmp_path / "images", tmp_path / "classes.json"
    root.mkdir()
    for name in names:
        (root / name).mkdir()
    if mapping is not None:
        file.write_text(mapping)
    with pytest.raises(ValueError, match=message) as refused:
        find_images(root, num_classes, None if mapping is None else file)
    assert len(str(refused.value)) < 600 + len(str(tmp_path)) * 3


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.gif").touch()
    with pytest.raises(ValueError, match=r"expected images \(\.bmp, \.jpeg, .*\) in its subfolders, got none"):
        find_images(tmp_path, 1)


def test_bad_images_are_all_named_at_once_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "CHUNK", 7)
    root = make_images(tmp_path, ["a", "b"], 10)
    bad = ["a/3.png", "b/0.png", "b/9.png"]
    for name in bad:
        (root / name).write_bytes(b"broken")
    found = find_images(root, 2)
    with pytest.raises(ValueError, match=r"^3 of 20 images cannot be read \(.*--skip-bad\)") as refused:
        found.readable(16, 1, skip_bad=False, cache=None)
    assert [str(refused.value).count(f"{root / name}: expected an image") for name in bad] == [1, 1, 1]
    kept = found.readable(16, 1, skip_bad=True, cache=None)
    assert kept.described() == "17 images in 2 classes, 3 left out that cannot be read"
    assert set(found.files) - set(kept.files) == {root / name for name in bad}
    assert kept.labels == (0,) * 9 + (1,) * 8
    assert kept.key() != found.key()


def test_of_many_bad_images_ten_are_named_and_of_none_good_nothing_is_left(tmp_path):
    root = make_images(tmp_path, ["a"], 15)
    for file in (root / "a").iterdir():
        file.write_bytes(b"broken")
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=r"15 of 15 images cannot be read .*; \.\.\.$") as refused:
            find_images(root, 1).readable(16, 1, skip_bad, cache=None)
        assert str(refused.value).count("expected an image") == 10


def test_images_are_looked_at_once_until_one_changes(tmp_path, monkeypatch):
    root, cache, seen = make_images(tmp_path / "images", ["a"], 3), tmp_path / "cache", []
    (root / "a" / "1.png").write_bytes(b"broken")

    def checking(path, *arguments):
        seen.append(path)
        check_image(path, *arguments)

    monkeypatch.setattr(image_folder, "check_image", checking)
    for _ in range(2):
        kept = find_images(root, 1).readable(16, 1, True, cache)
        assert [file.name for file in kept.files] == ["0.png", "2.png"]
        assert len(seen) == 3
    os.utime(root / "a" / "2.png", ns=(0, 0))
    find_images(root, 1).readable(16, 1, True, cache)
    assert len(seen) == 6
    assert all(path.name.startswith("images-") for path in cache.iterdir())


def test_processes_share_the_files_and_all_get_the_whole_result(tmp_path, monkeypatch):
    """Two processes in turn; what the first would get from the second is found by a call before."""
    root = make_images(tmp_path / "images", ["a"], 5)
    for name in ("1", "2"):
        (root / "a" / f"{name}.png").write_bytes(b"broken")
    sent: list[dict] = []

    def gather(parts, found):
        sent.append(found)
        parts[:] = sent[-2:]

    monkeypatch.setattr(image_folder, "world_size", lambda: 2)
    monkeypatch.setattr(image_folder.dist, "all_gather_object", gather)
    for rank in (0, 1):
        monkeypatch.setattr(image_folder, "rank", lambda rank=rank: rank)
        if rank == 0:
            sent.append({})
        kept = find_images(root, 1).readable(16, 1, True, None)
    assert [sorted(found) for found in sent] == [[], ["a/2.png"], ["a/1.png"]]
    assert [file.name for file in kept.files] == ["0.png", "3.png", "4.png"]


def test_the_key_changes_with_the_files_and_their_classes(tmp_path):
    root, mapping = make_images(tmp_path / "images", ["a", "b"]), tmp_path / "classes.json"
    keys = [find_images(root, 2).key(), find_images(root, 2).key()]
    assert keys[0] == keys[1]
    mapping.write_text('{"a": 1, "b": 0}')
    keys.append(find_images(root, 2, mapping).key())
    Image.new("RGB", (200, 200)).save(root / "a" / "0.png")
    keys.append(find_images(root, 2).key())
    (root / "a" / "0.png").rename(root / "a" / "5.png")
    keys.append(find_images(root, 2).key())
    assert len(set(keys)) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    root = make_images(tmp_path, ["a/b"])
    (root / "a" / "b").chmod(0)
    with pytest.raises(PermissionError, match="b"):
        find_images(root, 1)


def test_names_that_are_no_text_are_read(tmp_path):
    root = make_images(tmp_path, ["a"], 1)
    (root / "a" / "0.png").rename(root / "a" / os.fsdecode(b"\xff.png"))
    found = find_images(root, 1).readable(16, 1, False, tmp_path / "cache")
    assert len(found.files) == 1
    assert load_image(found.files[0], 16, 1).shape == (1, 16, 16)


def test_a_source_of_images_describes_itself_and_gives_the_classes_of_the_mapping(tmp_path):
    var, mapping = make_tiny_var(), tmp_path / "classes.json"
    root = make_images(tmp_path / "images", ["cats", "dogs"])
    (root / "cats" / "bad.png").touch()
    mapping.write_text('{"cats": 7, "dogs": 2}')
    options = dict(samples=1, seed=0, mapping=mapping, cache=tmp_path)
    with pytest.raises(ValueError, match=r"1 of 5 images cannot be read"):
        data.source_of(str(root), var.vae_proxy[0], var, **options)
    source = data.source_of(str(root), var.vae_proxy[0], var, **options, skip_bad=True)
    assert source.description == "4 images in 2 classes, 1 left out that cannot be read"
    assert source.conditions.tolist() == [7, 7, 2, 2]
    assert source.tokens_of(0, 4).shape == (4, var.L)
    assert NUM_CLASSES == 10
    for other in ("none", str(tmp_path)):
        (tmp_path / "train-images-idx3-ubyte").touch()
        with pytest.raises(ValueError, match="expected a folder of images for --class-numbers and --skip-bad"):
            data.source_of(other, var.vae_proxy[0], var, 1, 0, skip_bad=True)
