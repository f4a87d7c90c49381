"""What a store of pairs is: its manifest, its prompts and the names of its files.

A store is a folder of

- `manifest.json`: `Manifest`, written first and never changed;
- `prompts.jsonl.gz`: the prompts in order, a JSON string on each line;
- `shard-000000.safetensors` and on: the pairs (`shard.py`), each with `shard-000000.json` beside;
- `complete.json`: the checksum of every shard, written when all of them are there.

No file holds a time, a host or a writer, so that a store is the same to the last byte whoever made
it and whatever happened on the way, on the same kind of device, with the same number of threads
and the same libraries.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rectiflow.errors import InputError
from rectiflow.guarded import Unreadable, parse_json, unpack
from rectiflow.straighten.folder import Folder, dump_json, sha256

MANIFEST = "manifest.json"
PROMPTS = "prompts.jsonl.gz"
COMPLETE = "complete.json"
FORMAT = 2
"""Of 1 the teacher was known by its weights alone."""


class Manifest(BaseModel):
    """All that the pairs of a store follow from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    """Version of the files; readers refuse a later one."""
    kind: Literal["generated", "inverted"] = "generated"
    """`generated`: x_0 is noise and x_1 what the teacher made of it. `inverted`: x_1 is a real
    image and x_0 what the teacher's flow, run backwards, makes of it."""
    model: str
    """The teacher's name."""
    weight_hash: str
    """SHA-256 of the teacher's weights as they were loaded."""
    family: str
    solver: str
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float
    negative_prompt: str | None = None
    """What guidance pushes away from; the empty prompt if None."""
    height: int
    """In pixels."""
    width: int
    """In pixels."""
    latent_shape: tuple[int, int, int]
    """[C, h, w]."""
    dtype: str
    """What the network computed in: `float32`, `bfloat16`, `float16`."""
    device: str
    """Where: `cpu`, `cuda`, ..."""
    torch: str
    diffusers: str
    threads: int = Field(ge=1)
    """Threads of PyTorch on the CPU, on which the last bits of its sums depend."""
    base_seed: int = Field(ge=0)
    """Pair i has seed `base_seed + i`."""
    num: int = Field(ge=1)
    """Pairs."""
    shard_size: int = Field(ge=1)
    """Pairs in each shard but the last."""
    batch_size: int = Field(ge=1)
    """Rows that went through the network together: within a shard, `batch_size` after another."""
    prompts_sha256: str
    """Of the prompts, as `hash_prompts` has it."""
    num_prompts: int = Field(ge=1)
    """Pair i has prompt `i % num_prompts`."""
    images_sha256: str | None = None
    """Of the files that inverted pairs were made from, in order."""
    identity: dict[str, Any] | None = None
    """What the teacher's field is beside its weights, `FlowModel.identity`, and the settings of the
    solver where that is one of diffusers'; None of a store of format 1."""

    @property
    def num_shards(self) -> int:
        """How many shards there are, or will be."""
        return -(-self.num // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """The indices of a shard's pairs."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num))

    def prompt_index(self, pair: int) -> int:
        """Which prompt a pair has."""
        return pair % self.num_prompts

    def seed(self, pair: int) -> int:
        """What the noise of a pair is drawn from, where it is drawn."""
        return self.base_seed + pair

    def to_bytes(self) -> bytes:
        """The file."""
        said = self.model_dump(mode="json")
        if self.identity is None:  # as format 1 was written
            del said["identity"]
        return dump_json(said)

    @property
    def versions(self) -> dict[str, str]:
        """The libraries that the store was begun with, on which the last bits depend."""
        return {"torch": self.torch, "diffusers": self.diffusers}

    @staticmethod
    def from_bytes(data: bytes, where: str) -> Manifest:
        """Read the file.

        Args:
            data: All of it.
            where: What to call it in an error.

        Raises:
            InputError: It is not a manifest, or of a later version of this package.
        """
        try:
            found = parse_json(data, where)
            if isinstance(later := found.get("format"), int) and later > FORMAT:
                raise InputError(
                    f"{where} is of format {later}, and this version reads up to {FORMAT}: "
                    "update rectiflow"
                )
            return Manifest.model_validate_json(data)
        except (ValidationError, Unreadable) as error:
            raise InputError(
                f"{where} is not the manifest of a store of pairs: it is damaged, or something else"
            ) from error


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a store.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    data = folder.read(MANIFEST)
    if data is None:
        raise InputError(f"there is no store of pairs at {folder.uri}: it has no {MANIFEST}")
    return Manifest.from_bytes(data, f"{folder.uri}/{MANIFEST}")


def shard_name(shard: int) -> str:
    """The file of a shard's pairs.

    Example:
        >>> shard_name(12), sidecar_name(12)
        ('shard-000012.safetensors', 'shard-000012.json')
    """
    return f"shard-{shard:06d}.safetensors"


def sidecar_name(shard: int) -> str:
    """The file that says what is in a shard."""
    return f"shard-{shard:06d}.json"


def hash_prompts(prompts: Sequence[str]) -> str:
    """SHA-256 over the lines of the prompt file, before it is packed."""
    return sha256(_lines(prompts))


def pack_prompts(prompts: Sequence[str]) -> bytes:
    """The prompt file: the same bytes for the same prompts.

    Example:
        >>> unpack_prompts(pack_prompts(["a cat", "zwei Äpfel"]), "here")
        ['a cat', 'zwei Äpfel']
    """
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        file.write(_lines(prompts))
    return packed.getvalue()


def unpack_prompts(data: bytes, where: str) -> list[str]:
    """Read the prompt file.

    Args:
        data: All of it.
        where: What to call it in an error.

    Raises:
        InputError: It is damaged.
    """
    try:
        lines = unpack(data, where).splitlines()
        prompts: list[str] = [parse_json(line, where, str) for line in lines]
    except Unreadable as error:
        raise InputError(
            f"{where} is damaged: remove it, and make the pairs again with the same command, which "
            "writes only what is missing"
        ) from error
    return prompts


def read_prompts(folder: Folder, manifest: Manifest) -> list[str]:
    """The prompts of a store, known to be those it was made with.

    Raises:
        InputError: They are missing or damaged.
    """
    where = f"{folder.uri}/{PROMPTS}"
    data = folder.read(PROMPTS)
    if data is None:
        raise InputError(
            f"{where} is missing: make the pairs again with the same command, which writes only "
            "what is missing"
        )
    prompts = unpack_prompts(data, where)
    if len(prompts) != manifest.num_prompts or hash_prompts(prompts) != manifest.prompts_sha256:
        raise InputError(
            f"{where} is not the prompt list of the manifest: it has been changed; make the pairs "
            "again with the same command, which writes the list that they were made with"
        )
    return prompts


def _lines(prompts: Sequence[str]) -> bytes:
    # ASCII, so that no reader's idea of a line break (U+2028) divides a prompt.
    return b"".join(json.dumps(prompt).encode() + b"\n" for prompt in prompts)
