"""Encoded texts: the latest in memory, all of a run's in a folder, from which one text is read at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.disk import free_bytes, gb, make_room
from instep.core.files import write_tensors
from instep.core.fingerprint import network_fingerprint

# bytes of encoded texts that stay in memory
MEMORY_LIMIT = 2**29
# a file is written once it has so many texts or bytes, whichever comes first
SHARD_TEXTS, SHARD_BYTES = 256, 2**27
# texts by whose size that of all is estimated
FEW = 16
# bytes of a folder that several models share
DISK_LIMIT = 256 * 10**9
_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}\.safetensors")
# key of the checksums in the header of a safetensors file
CHECKSUMS = "crc32"

# what the encoders make of one text: tensors by name, on the CPU, in the encoders' own dtype
Encoded = Mapping[str, Tensor]


class PromptCache:
    """Encoded texts by content: the latest used, up to `limit` bytes, in memory; with a folder also safetensors files of up to 256 texts each.

    Memory does not grow with the number of texts, apart from an index of about 200 bytes a text. A folder that holds more than `DISK_LIMIT` bytes loses files
    of other encoders, and a run that reads one of these encodes its texts again. The files of a folder are named by the encoders' identity,
    so different models, and processes at the same time, may share one. A file is written whole or not at all. One that is damaged all the same (its header
    does not fit, or a checksum) is ignored with one printed line.
    """

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self.limit, self.nbytes = limit, 0
        self.identity: str | None = None
        self.folder: Path | None = None
        self._memory: OrderedDict[str, Encoded] = OrderedDict()
        self._files: dict[str, Path] = {}

    def open(self, folder: Path, identity: str) -> None:
        """Looks texts up in `folder` from now on, among those of these encoders (see `encoder_identity`). ValueError if it is a file."""
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"prompt_cache: {folder} is a file, which is not allowed; give a folder, or leave it out (each run has its own)")
        if identity != self.identity:
            self._memory.clear()
            self.nbytes = 0
        self.folder, self.identity, self._files = folder, identity, {}
        for path in sorted(folder.glob(f"{identity}-*.safetensors")):
            self._files |= dict.fromkeys(_keys_in(path), path)
            with contextlib.suppress(OSError):  # of another user
                os.utime(path)
        # files of other encoders go, those not used for longest first
        encoded = (path for path in folder.glob("*.safetensors") if _NAME.fullmatch(path.name))
        make_room(encoded, DISK_LIMIT, stays=lambda path: path.name.startswith(f"{identity}-"))

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The different texts that the folder does not hold, in order."""
        return [text for text in dict.fromkeys(texts) if _key(text) not in self._files]

    def find(self, texts: Iterable[str]) -> dict[str, Encoded]:
        """What memory and folder hold of these texts; each file is opened once."""
        found: dict[str, Encoded] = {}
        on_disk: dict[Path, list[str]] = {}
        for text in dict.fromkeys(texts):
            if text in self._memory:
                self._memory.move_to_end(text)
                found[text] = self._memory[text]
            elif path := self._files.get(_key(text)):
                on_disk.setdefault(path, []).append(text)
        for path, there in on_disk.items():
            for text, encoded in self._read(path, there).items():
                found[text] = encoded
                self.keep(text, encoded)
        return found

    def keep(self, text: str, encoded: Encoded) -> None:
        """Keeps a text in memory; those not used for longest make room."""
        if (before := self._memory.pop(text, None)) is not None:
            self.nbytes -= _nbytes(before)
        self._memory[text] = encoded
        self.nbytes += _nbytes(encoded)
        while self.nbytes > self.limit:
            _, oldest = self._memory.popitem(last=False)
            self.nbytes -= _nbytes(oldest)

    def fill(self, texts: Sequence[str], encode: Callable[[str], Encoded], step: Callable[[], None]) -> None:
        """Writes texts that the folder lacks, from memory or encoded now, and calls `step` after each. What is killed loses the file in progress.

        ValueError, after the first few, where the disk has no room for all of them; OSError if it is full.
        """
        shard: dict[str, Encoded] = {}
        for i, text in enumerate(texts):
            if i == FEW:
                self._check_room(sum(map(_nbytes, shard.values())) / FEW, len(texts))
            found = self.find([text]).get(text)
            shard[text] = encode(text) if found is None else found
            self.keep(text, shard[text])
            if len(shard) == SHARD_TEXTS or sum(map(_nbytes, shard.values())) >= SHARD_BYTES:
                self._write(shard)
                shard = {}
            step()
        if shard:
            self._write(shard)

    def _check_room(self, each: float, count: int) -> None:
        assert self.folder is not None
        free, needed = free_bytes(self.folder), each * count
        if free < needed:
            raise ValueError(
                f"prompt_cache: {count:,} encoded texts need about {gb(needed)} in {self.folder}, and {gb(free)} are free there; free some space, give another "
                "folder with --prompt-cache, or fewer prompts"
            )

    def _write(self, shard: Mapping[str, Encoded]) -> None:
        assert self.folder is not None
        path = self.folder / f"{self.identity}-{uuid.uuid4().hex}.safetensors"
        checksums = {_key(text): _checksum(encoded) for text, encoded in shard.items()}
        tensors = {f"{_key(text)}.{name}": value for text, encoded in shard.items() for name, value in encoded.items()}
        write_tensors(path, tensors, {CHECKSUMS: json.dumps(checksums)})
        self._files |= dict.fromkeys(checksums, path)

    def _read(self, path: Path, texts: Sequence[str]) -> dict[str, Encoded]:
        """Texts of one file; none if it is damaged by now, or gone."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                checksums, names = json.loads(file.metadata()[CHECKSUMS]), [name.partition(".") for name in file.keys()]  # noqa: SIM118
                read: dict[str, Encoded] = {}
                for text in texts:
                    key = _key(text)
                    # a copy: what safetensors returns lies in the mapped file and would keep all of it
                    read[text] = {name: file.get_tensor(f"{key}.{name}").clone() for owner, _, name in names if owner == key}
                    if _checksum(read[text]) != checksums[key]:
                        raise ValueError("a checksum differs")
                return read
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            _ignored(path, error)
            self._files = {key: where for key, where in self._files.items() if where != path}
            return {}


def encoder_identity(encoders: Mapping[str, nn.Module | None], tokenizers: Mapping[str, Any], **about: str | int) -> str:
    """32 hexadecimal digits for what an encoded text depends on besides the text: the encoders' configurations and a few values of each of their tensors, the
    tokenizers, and what else is given (the maximum length).
    """
    parts: list[Any] = [sorted(about.items())]
    for name, encoder in sorted(encoders.items()):
        parts.append([name, None if encoder is None else [type(encoder).__name__, _config(encoder), network_fingerprint(encoder)]])
    parts += [[name, None if tokenizer is None else _tokenizer(tokenizer)] for name, tokenizer in sorted(tokenizers.items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _config(encoder: Any) -> dict[str, Any]:
    """The configuration without where the encoder was loaded from, by which version and in which dtype (which the fingerprint of its tensors has)."""
    config = getattr(encoder, "config", None)
    values = {} if config is None else config.to_dict()
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in ("transformers_version", "dtype", "torch_dtype")}


def _tokenizer(tokenizer: Any) -> list[Any]:
    """Class, limit, special tokens, vocabulary and rules; not the padding of the latest call, which a fast tokenizer keeps."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if fast is None else {key: value for key, value in json.loads(fast.to_str()).items() if key not in ("truncation", "padding")}
    vocabulary = sorted(tokenizer.get_vocab().items()) if fast is None else None
    return [type(tokenizer).__name__, tokenizer.model_max_length, tokenizer.special_tokens_map, rules, vocabulary]


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _nbytes(encoded: Encoded) -> int:
    return sum(value.nbytes for value in encoded.values())


def _checksum(encoded: Encoded) -> int:
    checksum = 0
    for _, value in sorted(encoded.items()):
        checksum = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    return checksum


def _keys_in(path: Path) -> list[str]:
    """Of the texts in a file, from its header alone; none if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(json.loads(file.metadata()[CHECKSUMS]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        _ignored(path, error)
        return []


def _ignored(path: Path, error: Exception) -> None:
    print(f"prompt cache: {path} is damaged or gone ({error}) and ignored; its texts are encoded again")
