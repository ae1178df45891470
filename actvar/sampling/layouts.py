"""Read the prompts of benchmarks of text-to-image models, and keep images where the tools of these look for them.

Every layout is read by the public scripts without changes: GenEval's `evaluate_images.py`, DPG-Bench's
`compute_dpg_bench.py`, and for ImageReward its own `test-benchmark.py` and Infinity's `cal_imagereward.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from actvar.sampling.image_files import PNGs
from actvar.utils.files import replacing
from actvar.utils.pictures import as_picture
from actvar.utils.progress import progress


class BenchmarkPrompt(NamedTuple):
    """Hold a prompt of a benchmark.

    Args:
        name: what its files are called by.
        text: the prompt.
        facts: the entry of the benchmark's file, JSON-compatible.
    """

    name: str
    text: str
    facts: dict[str, Any]


class Layout(PNGs):
    """Keep the images of a benchmark as PNGs, `each` of every prompt behind each other.

    Args:
        prompts: of the benchmark.
        each: images of a prompt.
    """

    name: str
    images_each: int
    """Images of a prompt that the benchmark asks for."""

    def __init__(self, prompts: Sequence[BenchmarkPrompt], each: int):
        self.prompts, self.each = prompts, each

    @property
    def labels(self) -> tuple[int, ...]:
        """Return the number of each image's prompt."""
        return tuple(number for number in range(len(self.prompts)) for _ in range(self.each))

    def finish(self, folder: Path) -> None:
        """Write what the benchmark's tools read beside the images, all of which are there."""
        raise NotImplementedError


class GenEval(Layout):
    """Keep image k of prompt n as `<n>/samples/<k>.png`, beside the prompt's entry as `<n>/metadata.jsonl`."""

    name, pattern, images_each = "geneval", "[0-9]*/samples/[0-9]*.png", 4

    def finish(self, folder: Path) -> None:
        """Write the entry of every prompt."""
        for number, prompt in enumerate(self.prompts):
            with replacing(folder / f"{number:05d}" / "metadata.jsonl") as temporary:
                temporary.write_text(json.dumps(prompt.facts), "utf-8")

    def _path(self, folder: Path, image: int) -> Path:
        number, sample = divmod(image, self.each)
        return folder / f"{number:05d}" / "samples" / f"{sample:05d}.png"


class DPGBench(Layout):
    """Keep the four images of a prompt as one picture, `images/<name>.png`, two by two; `tiles/` has each of them.

    Args:
        prompts, each: as in `Layout`.

    Raises:
        ValueError: another number of images than four.
    """

    name, pattern, images_each = "dpg", "tiles/*.png", 4

    def __init__(self, prompts: Sequence[BenchmarkPrompt], each: int):
        if each != self.images_each:
            raise ValueError(f"num: expected {self.images_each} images of each prompt for DPG-Bench, got {each}")
        super().__init__(prompts, each)

    def finish(self, folder: Path) -> None:
        """Write the picture of every prompt that has none yet."""
        for number, prompt in enumerate(progress(self.prompts, desc="pictures of four")):
            path = folder / "images" / f"{prompt.name}.png"
            if not _is_picture(path):
                tiles = [self._pixels(folder, number * self.each + k) for k in range(self.each)]
                pixels = np.concatenate([np.concatenate(row, axis=1) for row in (tiles[:2], tiles[2:])])
                with replacing(path) as temporary:
                    as_picture(pixels).save(temporary, format="PNG")

    def _pixels(self, folder: Path, image: int) -> np.ndarray:
        with Image.open(self._path(folder, image), formats=["PNG"]) as picture:
            return np.atleast_3d(np.asarray(picture))

    def _path(self, folder: Path, image: int) -> Path:
        number, sample = divmod(image, self.each)
        return folder / "tiles" / f"{self.prompts[number].name}-{sample}.png"


class ImageReward(Layout):
    """Keep image k of a prompt as `images/<id>_<k>.png`, and all entries with their files as `metadata.jsonl`.

    That file is one JSON list, in spite of the name that Infinity's scripts give it.
    """

    name, pattern, images_each = "image-reward", "images/*.png", 10

    def finish(self, folder: Path) -> None:
        """Write all entries with the full names of their files."""
        entries = []
        for number, prompt in enumerate(self.prompts):
            files = [self._path(folder, number * self.each + k).resolve() for k in range(self.each)]
            entries.append(prompt.facts | {"gen_image_paths": list(map(str, files))})
        with replacing(folder / "metadata.jsonl") as temporary:
            temporary.write_text(json.dumps(entries), "utf-8")

    def _path(self, folder: Path, image: int) -> Path:
        number, sample = divmod(image, self.each)
        return folder / "images" / f"{self.prompts[number].name}_{sample}.png"


def read_geneval(path: Path) -> list[BenchmarkPrompt]:
    """Return the prompts of a file with a JSON object in each line, such as `evaluation_metadata.jsonl`.

    Raises:
        ValueError: a line that is none, or has no `prompt`.
    """
    lines = [line for line in _text(path).splitlines() if line.strip()]
    entries = [_entry(_json(line, f"{path}, line {number}"), path, ()) for number, line in enumerate(lines, 1)]
    return [BenchmarkPrompt(f"{number:05d}", entry["prompt"], entry) for number, entry in enumerate(entries)]


def read_dpg(folder: Path) -> list[BenchmarkPrompt]:
    """Return the prompts of a folder with a text file each, in the order of their names.

    Raises:
        ValueError: no folder, or a name with a dot, behind which DPG-Bench would not look.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with a text file for each prompt, as DPG-Bench has it")
    files = sorted(folder.glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
    return [BenchmarkPrompt(_file_name(path.stem, folder), _text(path).strip(), {}) for path in files]


def read_image_reward(path: Path) -> list[BenchmarkPrompt]:
    """Return the prompts of a JSON list of objects with `id` and `prompt`, such as `benchmark-prompts.json`.

    Raises:
        ValueError: another content, or ids that are no names of files or stand twice.
    """
    found = _json(_text(path), str(path))
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a JSON list of prompts with their ids")
    entries = [_entry(each, path, ("id",)) for each in found]
    names = [_file_name(entry["id"], path) for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: expected an id of its own for each prompt")
    return [BenchmarkPrompt(name, entry["prompt"], entry) for name, entry in zip(names, entries, strict=True)]


LAYOUTS: dict[str, tuple[type[Layout], Callable[[Path], list[BenchmarkPrompt]]]] = {
    GenEval.name: (GenEval, read_geneval),
    DPGBench.name: (DPGBench, read_dpg),
    ImageReward.name: (ImageReward, read_image_reward),
}
"""Where images lie, and how prompts are read, by the name of a benchmark."""


def layout_of(name: str, prompts: Path, num: int | None) -> Layout:
    """Return the layout of a benchmark with its prompts.

    Args:
        name: one of `LAYOUTS`.
        prompts: file or folder of the prompts.
        num: number of all images; None for as many as the benchmark asks for.

    Raises:
        OSError, ValueError: prompts that cannot be read, or a number that they cannot share equally.
    """
    kind, read = LAYOUTS[name]
    found = read(prompts)
    if not found or not all(prompt.text for prompt in found):
        raise ValueError(f"{prompts}: expected prompts, got {'an empty one' if found else 'none'}")
    each, rest = divmod(len(found) * kind.images_each if num is None else num, len(found))
    if rest:
        raise ValueError(f"num: expected a multiple of the {len(found)} prompts, got {num}")
    return kind(found, each)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path}: expected a text file in UTF-8: {error}") from error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: expected JSON: {error}") from error


def _entry(entry: Any, path: Path, more: Sequence[str]) -> dict[str, Any]:
    """Return an entry of a benchmark's file, which must have texts of these names and a prompt."""
    for name in ("prompt", *more):
        if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
            raise ValueError(f"{path}: expected objects with a text {name!r}, got {entry!s:.100}")
    return entry


def _file_name(name: str, path: Path) -> str:
    """Return a name that files may begin with."""
    if not name or any(sign in name for sign in "./\\\0"):
        raise ValueError(f"{path}: expected names of files without a dot or slash, got {name!r:.100}")
    return name


def _is_picture(path: Path) -> bool:
    """Return whether a PNG is there and undamaged."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError):  # Pillow raises a SyntaxError for a damaged PNG
        return False
    return True
