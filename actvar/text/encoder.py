"""Encode prompts by the encoder of a T5, such as the flan-t5-xl that Infinity was trained with."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from actvar.models.checkpoint import usable_device
from actvar.text.cache import FeatureCache
from actvar.utils.files import first_line
from actvar.utils.progress import progress

DEFAULT_ENCODER = "google/flan-t5-xl"
MOST_TOKENS = 512
"""Tokens that the public code gives an encoder; it cuts longer prompts off, which are an error here."""
HOW_TO_INSTALL = "run pip install actvar[text]"
_CACHE_VERSION = 1

logger = logging.getLogger(__name__)


class TextEncoder:
    """Encode prompts as Infinity reads them: the features of a prompt's own tokens, without padding.

    Tokenizer and encoder are loaded for the first prompt that the cache does not have. The encoder stays in main
    memory, is moved to the device for a call, and off it afterwards. Its weights are float16 on a GPU, as in the public
    code, and float32 elsewhere. Each prompt is encoded alone, so its features do not depend on the others.

    Args:
        name: a folder with a T5, as `save_pretrained` of `transformers` writes it, or its name on the hub, from where
            `transformers` downloads it.
        device: where the encoder runs, and the features go.
        cache: where features are kept between runs; None for nowhere.
    """

    def __init__(
        self,
        name: str | os.PathLike[str] = DEFAULT_ENCODER,
        device: str | torch.device = "cpu",
        cache: FeatureCache | None = None,
    ):
        self.name, self.cache = os.fspath(name), cache
        self.device = usable_device(device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], most_tokens: int = MOST_TOKENS) -> tuple[torch.Tensor, list[int]]:
        """Return the features of all prompts behind each other, and the number of tokens of each.

        The first is `[sum of lengths, channels]` float32 on the device. `Infinity.sample` takes both.

        Args:
            prompts: one text or more; an empty text has one token.
            most_tokens: tokens that a prompt may have, `text_maxlen` of the model.

        Raises:
            TypeError: prompts that are no sequence of strings.
            ValueError: no prompt, a prompt with more tokens, or files that are not those of a T5.
            FileNotFoundError: no such folder, and none of that name on the hub.
            ImportError: `transformers` is not installed, and the cache does not have the prompts.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts: expected a sequence of strings, got {prompts!r:.100}")
        if not prompts:
            raise ValueError("prompts: expected one or more, got none")
        for prompt in prompts:
            if not is_unicode(prompt):
                raise ValueError(f"prompts: expected texts in UTF-8, got {prompt!r:.100}")
        keys = {prompt: self._key(prompt) for prompt in prompts}
        features = {prompt: self._cached(key) for prompt, key in keys.items()}
        missing = [prompt for prompt, found in features.items() if found is None]
        if missing:
            features |= self._encoded(missing, keys, most_tokens)
        texts = []
        for prompt in prompts:
            texts.append(features[prompt])
            expect_short(prompt, len(texts[-1]), most_tokens)
        return torch.cat(texts).to(self.device, torch.float32), [len(text) for text in texts]

    def _encoded(self, prompts: Sequence[str], keys: dict[str, str], most_tokens: int) -> dict[str, torch.Tensor]:
        """Return the features of prompts that the cache does not have, on the CPU, and put them there."""
        tokenizer, encoder = self._tokenizer_and_encoder()
        tokens = {prompt: tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts}
        for prompt, ids in tokens.items():
            expect_short(prompt, ids.shape[1], most_tokens)
        features = {}
        try:
            encoder.to(self.device)
            for prompt, ids in progress(tokens.items(), desc="encoding prompts", leave=False):
                features[prompt] = encoder(input_ids=ids.to(self.device)).last_hidden_state[0].cpu()
                if self.cache is not None:
                    self.cache.write(keys[prompt], features[prompt])
        finally:
            encoder.to("cpu")
        return features

    def _tokenizer_and_encoder(self) -> tuple[Any, Any]:
        """Return tokenizer and encoder, which are loaded at the first call."""
        if self._loaded is None:
            logger.info("loading the text encoder %s", self.name)
            self._loaded = load_t5(self.name, self.dtype)
        return self._loaded

    def _cached(self, key: str) -> torch.Tensor | None:
        return None if self.cache is None else self.cache.read(key)

    def _key(self, prompt: str) -> str:
        """Return a hash of the encoder and a prompt; that of a folder changes when its files do."""
        folder, files = Path(self.name).expanduser(), []
        if folder.is_dir():
            stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
            files = [str(folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
        facts = [_CACHE_VERSION, files or self.name, str(self.dtype), prompt]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def expect_short(prompt: str, tokens: int, most: int) -> None:
    """Raise a ValueError if a prompt has more than `most` tokens."""
    if tokens > most:
        raise ValueError(f"prompt: expected at most {most} tokens, got {tokens}; shorten {prompt!r:.60}")


def is_unicode(prompt: str) -> bool:
    """Return whether a text can be encoded as UTF-8; bytes of another encoding on the command line cannot."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_installed() -> bool:
    """Return whether `transformers`, which the extra `text` brings, is installed."""
    return find_spec("transformers") is not None


def load_t5(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return tokenizer and encoder of a T5 on the CPU, in eval mode and without gradients.

    Code in the files is not run, and pickled files are read as weights only.

    Args:
        name: a folder, or a name on the hub.
        dtype: of the encoder's weights.

    Raises:
        ImportError, FileNotFoundError, ValueError: as in `TextEncoder`.
    """
    if not is_installed():
        raise ImportError(f"prompts need the package transformers: {HOW_TO_INSTALL}")
    from transformers import AutoConfig, AutoTokenizer, T5EncoderModel  # pyright: ignore[reportMissingImports]

    folder = Path(name).expanduser()
    place = os.fspath(folder) if folder.is_dir() else name
    expected = f"{name}: expected a folder with a T5 of transformers, or its name on the hub"
    try:
        with _without_bars():
            kind = AutoConfig.from_pretrained(place, trust_remote_code=False).model_type
            if kind != "t5":
                raise ValueError(f"{expected}, found a model of the kind {kind!r}")
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            loaded: Any = T5EncoderModel.from_pretrained(
                place, dtype=dtype, trust_remote_code=False, weights_only=True, output_loading_info=True
            )
            encoder, facts = loaded
    except OSError as error:
        raise FileNotFoundError(f"{expected}, found none: {first_line(error)}") from error
    except Exception as error:  # each format of files has errors of its own
        if str(error).startswith(expected):
            raise
        raise ValueError(f"{expected}, found damaged files: {first_line(error)}") from error
    missing = sorted(facts["missing_keys"])
    if missing:
        raise ValueError(f"{expected}, found {len(missing)} tensors missing, such as `{missing[0]}`")
    return tokenizer, encoder.eval().requires_grad_(False)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Show none of transformers' own progress bars while the context is open."""
    from transformers.utils import logging as bars  # pyright: ignore[reportMissingImports]

    were_shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            bars.enable_progress_bar()
