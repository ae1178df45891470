"""Read damaged files by every reader: `PYTHONPATH=tests python -m support.fuzz --inputs 100000` from the root.

Valid files are mutated (bits, cuts, swapped chunks, numbers in headers, rewritten pickles and zip records) and read. A
reader may accept a file or raise its documented error; anything else, or much more memory than the files need, fails.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import random
import re
import resource
import struct
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from actvar import ActVARConfig, AdapterError, CheckpointError, apply_patch, load_adapter, load_var, save_adapter
from actvar.distill import Stage2
from actvar.models import VAR, build_vae_var
from actvar.models.checkpoint import describe_checkpoint
from actvar.patching.adapter import describe_adapter, gate_parameters
from actvar.training.checkpoint import load_trained, save_atomically
from actvar.training.plan import Plan
from actvar.zoo.fashion_mnist.data import read_idx

MOST_GROWTH = 512 * 2**20
"""Bytes that the process may grow by: the files have less than 2^20."""
NUMBERS = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
Reader = Callable[[Path], object]


def smallest_model() -> VAR:
    _, var = build_vae_var(
        V=8, Cvae=4, ch=32, patch_nums=(1, 2, 3), num_classes=3, depth=1, width=64, ch_mult=(1,), num_res_blocks=1,
        image_channels=1, share_quant_resi=1,
    )  # fmt: skip
    return var


class Targets:
    """Hold valid files by suffix, with the reader of each and the errors that it documents."""

    def __init__(self, folder: Path):
        self.folder, self.var = folder, smallest_model()
        vae = self.var.vae_proxy[0]
        states = {"var": self.var.half().state_dict(), "vae": vae.half().state_dict()}
        self.valid: dict[str, bytes] = {}
        for name, state in states.items():
            save_file(state, folder / f"{name}.safetensors")
            torch.save(state, folder / f"{name}.pth")
        torch.save(states["var"], folder / "old.pth", _use_new_zipfile_serialization=False)
        nested = {"epoch": 3, "trainer": {"ema": {f"module.{name}": t for name, t in states["var"].items()}}}
        torch.save(nested, folder / "nested.ckpt")
        weight_map = dict.fromkeys(states["var"], "var.safetensors")
        (folder / "var.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        apply_patch(self.var, ActVARConfig(num_experts=4))
        Stage2(self.var, lora=2).finish()
        save_adapter(self.var, folder / "adapter-factors.safetensors")
        apply_patch(self.var, ActVARConfig(num_experts=4))
        save_adapter(self.var, folder / "adapter.safetensors")
        images = bytes(range(256)) * 6
        (folder / "images").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2, 24, 32) + images)
        (folder / "images.gz").write_bytes(gzip.compress((folder / "images").read_bytes()))
        self.net = torch.nn.Linear(3, 2)
        self.plan = Plan("net", folder, 1, 1, 0.1)
        state = {"step": 1, "model": {k: v.detach() for k, v in self.net.named_parameters()}, "optimizers": [{}]}
        save_atomically(state, self.plan.checkpoint)
        for path in folder.iterdir():
            self.valid[path.name] = path.read_bytes()
        self.unchanged = self._tensors()

    def _tensors(self) -> list[torch.Tensor]:
        return [t.clone() for t in (*gate_parameters(self.var).values(), *self.net.parameters())]

    def read(self, name: str, content: bytes) -> bool:
        """Return whether the reader took the file; a model that refused one must be as it was."""
        path = self.folder / name
        path.write_bytes(content)
        reader, error = self._reader(name)
        try:
            reader(path)
        except error as refused:
            if not str(refused):
                raise AssertionError("an error without a message") from refused
            now = (*gate_parameters(self.var).values(), *self.net.parameters())
            if not all(map(torch.equal, now, self.unchanged)):
                raise AssertionError("a refused file changed the model") from refused
            return False
        finally:
            path.write_bytes(self.valid[name])
        self.unchanged = self._tensors()
        return True

    def _reader(self, name: str) -> tuple[Reader, type[Exception]]:
        if name.startswith("adapter"):
            return lambda path: (describe_adapter(path), load_adapter(self.var, path)), AdapterError
        if name.startswith("images"):
            return read_idx, ValueError
        if name.startswith("net"):
            return lambda _: load_trained(self.net, self.plan), ValueError
        if name == "vae.pth":  # the whole way once, the others up to names, shapes and kinds
            return lambda path: load_var(self.folder / "var.pth", path), CheckpointError
        return describe_checkpoint, CheckpointError


def mutated(valid: bytes, name: str, rng: random.Random) -> bytes:
    """Return `valid` with one to three mutations that its format is prone to."""
    content = valid
    mutations: list[Callable[[bytes, random.Random], bytes]] = [flip_bits, cut, swap_chunks, set_length]
    if name.endswith(".safetensors"):
        mutations += [change_header] * 4
    if content[:2] == b"PK":
        mutations += [change_records] * 4
    if name.endswith(".gz"):
        mutations += [change_compressed] * 2
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(mutations)(content, rng)
    return content


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, mostly near an end, where headers and directories are."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if changed else 0):
        reach = rng.choice((16, 512, 4096, len(changed)))
        position = min(rng.randrange(reach), len(changed) - 1)
        changed[position if rng.random() < 0.6 else -1 - position] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    end = rng.choice((0, 4, 8, rng.randrange(len(content) + 1), max(0, len(content) - rng.randrange(64))))
    return content[:end] if rng.random() < 0.8 else content + content[:end]


def swap_chunks(content: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def set_length(content: bytes, rng: random.Random) -> bytes:
    """Put another number in the place of 2, 4 or 8 bytes."""
    size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
    number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, order)
    position = rng.choice((0, 4, rng.randrange(len(content) + 1), max(0, len(content) - rng.randrange(64))))
    return content[:position] + number + content[position + size :]


def change_header(content: bytes, rng: random.Random) -> bytes:
    """Change numbers, dtypes, names and JSON of a safetensors header, and give it a length that fits again."""
    if len(content) < 8:
        return content
    length = int.from_bytes(content[:8], "little") % (len(content) + 1)
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(5)
    if kind == 0:
        header = _replace_one(header, rb"\d+", str(rng.choice(NUMBERS)).encode(), rng)
    elif kind == 1:
        dtypes = (b"F64", b"F16", b"BF16", b"I8", b"U64", b"BOOL", b"F8_E4M3", b"F8_E8M0", b"F4", b"C64", b"X")
        header = _replace_one(header, rb"(?<=\"dtype\":\")\w+", rng.choice(dtypes), rng)
    elif kind == 2:
        text = (
            b"x",
            b"",
            b"blocks.99.",
            b"blocks.0.",
            b"\\u0000",
            b"[" * 3000,
            b"{}",
            b"NaN",
            b"1e999",
            b"\xff",
            b"-1",
        )
        header = _replace_one(header, rb"[\w.]+", rng.choice(text), rng)
    elif kind == 3:
        header = _replace_one(header, rb"\[[\d, ]*\]", rng.choice((b"[]", b"[0]", b"[1,1,1]", b"[4294967296,0]")), rng)
    else:
        header = _replace_one(header, rb"\\\"[^,]*", rng.choice((b"[" * 20000, b"null", b'\\":1e999', b'\\":"')), rng)
    return struct.pack("<Q", len(header)) + header + data


def change_records(content: bytes, rng: random.Random) -> bytes:
    """Write another pickle into a zip file with correct checksums; records lack, are compressed or swapped."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # no zip file any more, by an earlier mutation
        return content
    if not records:
        return content
    kind, name = rng.randrange(5), rng.choice(list(records))
    if kind == 0:
        del records[name]
    elif kind == 1:
        records[name] = records[rng.choice(list(records))]
    elif kind == 2:
        records[name] = b"\0" * rng.choice((0, 1, 2**22))
    else:
        pickled = next((n for n in records if n.endswith("data.pkl")), name)
        mutation = rng.choice((flip_bits, flip_bits, set_length, swap_chunks, change_pickle))
        records[pickled] = mutation(records[pickled], rng)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return written.getvalue()


def change_pickle(content: bytes, rng: random.Random) -> bytes:
    """Name another function, or larger numbers."""
    if rng.random() < 0.5:
        names = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nbytearray\n", b"ctorch\nload\n")
        return _replace_one(content, rb"c[\w.]+\n\w+\n", rng.choice(names), rng)
    numbers = (b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"J\xff\xff\xff\xff", b"M\xff\xff")
    return _replace_one(content, rb"K.|M..", rng.choice(numbers), rng)


def change_compressed(content: bytes, rng: random.Random) -> bytes:
    try:
        raw = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        return content
    raw = rng.choice((flip_bits, set_length, cut))(raw, rng)
    return gzip.compress(raw + (b"\0" * 2**24 if rng.random() < 0.02 else b""), 1)


def _replace_one(content: bytes, pattern: bytes, by: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(pattern, content, re.DOTALL))
    if not found:
        return content
    match = rng.choice(found)
    return content[: match.start()] + by + content[match.end() :]


def run_fuzz(inputs: int, seed: int = 0) -> dict[str, float]:
    """Try `inputs` files; return `inputs`, `accepted`, `refused`, `seconds`, and `grown` bytes of peak memory.

    Raises:
        AssertionError: a reader let another error out, changed a model or took too much memory. The message has the
            number of the input and the seed; the error is its cause.
    """
    counts = {"inputs": 0, "accepted": 0, "refused": 0}
    before, start = _peak_memory(), time.perf_counter()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # adapters used with other rates
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        targets = Targets(Path(folder))
        for number in tqdm(range(inputs), desc="fuzz", mininterval=2, leave=False):
            rng = random.Random(f"{seed} {number}")
            name = rng.choice(list(targets.valid))
            content = mutated(targets.valid[name], name, rng)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    taken = targets.read(name, content)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise AssertionError(f"input {number} of seed {seed}, a mutated {name}: {error!r}") from error
            counts["inputs"] += 1
            counts["accepted" if taken else "refused"] += 1
            if _peak_memory() - before > MOST_GROWTH:
                raise AssertionError(f"input {number} of seed {seed}, a mutated {name}, took too much memory")
    logging.disable(level)
    return counts | {"seconds": time.perf_counter() - start, "grown": _peak_memory() - before}


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(counts: Mapping[str, float]) -> str:
    return (
        f"{counts['inputs']} damaged files: {counts['refused']} refused, {counts['accepted']} read, no other error, "
        f"{counts['seconds']:.0f} s, {counts['grown'] / 2**20:.0f} MiB more memory at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m support.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # 8 GiB more than now: an allocation beyond it fails, so that a file cannot bring the machine down
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 8 * 2**30,) * 2)
    print(summary(run_fuzz(options.inputs, options.seed)))


if __name__ == "__main__":
    main()
