"""A folder with a subfolder of images per class: its files, their classes, and those that cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from actvar.distill.images import check_image
from actvar.training.processes import rank, world_size
from actvar.utils.files import replacing
from actvar.utils.progress import progress

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SHOWN = 10
"""Files or folders that an error names at most."""
CHUNK = 1024
"""Files that are checked between two updates of the progress bar."""


@dataclass(frozen=True)
class ImageFolder:
    """Images by class.

    Args:
        root: the folder.
        files: images, those of a class together, in the order of their names.
        labels: the class of each file.
        skipped: number of other files, by suffix.
        unreadable: number of images that were left out because they cannot be read.
    """

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    skipped: Counter[str]
    unreadable: int = 0

    def described(self) -> str:
        """Return the numbers of files as text, such as `40 images in 2 classes, 3 skipped (.gif)`."""
        parts = [f"{len(self.files)} images in {len(set(self.labels))} classes"]
        if self.skipped:
            kinds = [f"{count} {suffix}" for suffix, count in self.skipped.most_common()]
            kinds = kinds[:SHOWN] if len(kinds) > 1 else list(self.skipped)
            parts.append(f"{self.skipped.total()} skipped ({', '.join(kinds)})")
        if self.unreadable:
            parts.append(f"{self.unreadable} left out that cannot be read")
        return ", ".join(parts)

    def key(self) -> str:
        """Return 16 hexadecimal digits that change with the files' names and sizes and with their classes."""
        sizes = [(self._name(file), file.stat().st_size) for file in self.files]
        return _digest([sizes, self.labels])

    def readable(self, side: int, channels: int, skip_bad: bool, cache: Path | None) -> ImageFolder:
        """Check all images and return the folder without those that cannot be read.

        Every process of a training calls this, checks a part of the files and gets the whole result.

        Args:
            side: pixels of a loaded image's side.
            channels: 1 (grey) or 3.
            skip_bad: leave out images that cannot be read.
            cache: folder that keeps the result until a file changes; None: nothing is kept.

        Raises:
            ValueError: some images cannot be read, without `skip_bad`, or none can.
        """
        bad = self._bad_files(side, channels, cache)
        if bad and (not skip_bad or len(bad) == len(self.files)):
            shown = "; ".join(list(bad.values())[:SHOWN]) + ("; ..." if len(bad) > SHOWN else "")
            todo = "mend or remove them, or leave them out with --skip-bad"
            raise ValueError(f"{len(bad)} of {len(self.files)} images cannot be read ({todo}): {shown}")
        kept = [
            (file, label) for file, label in zip(self.files, self.labels, strict=True) if self._name(file) not in bad
        ]
        files, labels = zip(*kept, strict=True)
        return ImageFolder(self.root, files, labels, self.skipped, len(bad))

    def _bad_files(self, side: int, channels: int, cache: Path | None) -> dict[str, str]:
        """Return the errors of files that cannot be read, by the file's name in the folder."""
        stats = [(self._name(file), *_size_and_time(file)) for file in self.files]
        known = cache and cache / f"images-{_digest([str(self.root.resolve()), stats, side, channels])}.json"
        if known and known.exists():
            return json.loads(known.read_text("utf-8"))
        mine = self.files[rank() :: world_size()]
        found = {self._name(file): reason for file, reason in _reasons(mine, side, channels)}
        if world_size() > 1:
            parts: list[dict[str, str]] = [{}] * world_size()
            dist.all_gather_object(parts, found)
            found = {name: part[name] for part in parts for name in part}
        found = dict(sorted(found.items()))
        if known and rank() == 0:
            with replacing(known) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        return found

    def _name(self, file: Path) -> str:
        return str(file.relative_to(self.root))


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _size_and_time(file: Path) -> tuple[int, int]:
    """Return size and time of change of the file, or of a link that leads nowhere."""
    stat = file.stat() if file.exists() else file.lstat()
    return stat.st_size, stat.st_mtime_ns


def find_images(root: Path, num_classes: int, mapping: Path | None = None) -> ImageFolder:
    """Find the images in the subfolders of `root`; names that begin with a dot are ignored.

    Args:
        root: folder with a subfolder per class.
        num_classes: of the model.
        mapping: a JSON file, an object with the class of each folder by its name. Without one, folders in the order of
            their names are the classes if there are as many, like in the public code. Otherwise the folders must have
            class numbers for names.

    Raises:
        ValueError: folders whose classes are not known, or no image; the error tells the remedy.
        OSError: a folder or the mapping cannot be read.
    """
    with os.scandir(root) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    names = [entry.name for entry in visible if entry.is_dir()]
    classes = _classes_of(root, names, num_classes) if mapping is None else _mapped(root, names, num_classes, mapping)
    files, labels, skipped = [], [], Counter()
    lost = sum(Path(entry.name).suffix.lower() in SUFFIXES for entry in visible if not entry.is_dir())
    if lost:
        skipped["in no class folder"] = lost
    for name in names:
        found = sorted(_files_in(root / name))
        images = [path for path in found if path.suffix.lower() in SUFFIXES]
        files += images
        labels += [classes[name]] * len(images)
        skipped.update(path.suffix.lower() or "no suffix" for path in found if path.suffix.lower() not in SUFFIXES)
    if not files:
        raise ValueError(f"{root}: expected images ({', '.join(sorted(SUFFIXES))}) in its subfolders, got none")
    return ImageFolder(root, tuple(files), tuple(labels), skipped)


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield the files in `folder` and below, except those that are hidden or in a hidden folder."""

    def fail(error: OSError):
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _classes_of(root: Path, names: Sequence[str], num_classes: int) -> dict[str, int]:
    """Return classes by folder without a mapping, see `find_images`."""
    todo = "name the folders by class numbers, or give --class-numbers FILE, a JSON object such as " + '{"cats": 281}'
    are_numbers = bool(names) and all(name.isdecimal() and name.isascii() for name in names)
    if len(names) == num_classes:
        if are_numbers and sorted(names, key=int) != list(names):
            first = next(name for index, name in enumerate(names) if int(name) != index)
            raise ValueError(
                f"{root}: expected folders whose names say their classes, got numbers that are not in the order of the "
                f"names, by which {first!r} would be class {names.index(first)}; pad the numbers with zeros (007), or "
                "give --class-numbers FILE, a JSON object such as " + '{"10": 10}'
            )
        return {name: index for index, name in enumerate(names)}
    if not are_numbers:
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        found = f"{len(names)} folders" + (f" ({shown})" if names else "")
        wanted = f"a subfolder for each of the model's {num_classes} classes"
        raise ValueError(f"{root}: expected {wanted}, got {found}; {todo}")
    classes = {name: int(name) for name in names}
    _expect_classes(f"{root}: expected folders named by classes", classes, num_classes)
    counts = Counter(classes.values())
    twice = [name for name in names if counts[classes[name]] > 1]
    if twice:
        raise ValueError(f"{root}: expected one folder per class, got {', '.join(twice[:SHOWN])}; {todo}")
    return classes


def _mapped(root: Path, names: Sequence[str], num_classes: int, mapping: Path) -> dict[str, int]:
    """Return the classes by folder that the file `mapping` holds."""
    wanted = "a JSON object with the class number of each folder by its name, such as " + '{"cats": 281}'
    try:
        classes = json.loads(mapping.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{mapping}: expected {wanted}: {error}") from error
    if not isinstance(classes, dict) or not all(type(label) is int for label in classes.values()):
        raise ValueError(f"{mapping}: expected {wanted}")
    _expect_classes(f"{mapping}: expected classes", classes, num_classes)
    missing = [name for name in names if name not in classes]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(f"{mapping}: expected the class of every folder in {root}, {len(missing)} missing: {shown}")
    return classes


def _expect_classes(expected: str, classes: dict[str, int], num_classes: int) -> None:
    outside = [f"{name} ({label})" for name, label in classes.items() if not 0 <= label < num_classes]
    if outside:
        shown = ", ".join(outside[:SHOWN]) + (", ..." if len(outside) > SHOWN else "")
        raise ValueError(f"{expected} from 0 to {num_classes - 1}, those of the model, got {shown}")


def _reasons(files: Sequence[Path], side: int, channels: int) -> Iterator[tuple[Path, str]]:
    """Yield the files that cannot be read, each with the error that names it."""

    def reason(file: Path) -> str | None:
        try:
            check_image(file, side, channels)
        except ValueError as error:
            return str(error)
        return None

    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(files), desc="checking images", unit="image", hidden=rank() != 0) as bar,
    ):
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            yield from ((file, why) for file, why in zip(chunk, pool.map(reason, chunk), strict=True) if why)
            bar.update(len(chunk))
