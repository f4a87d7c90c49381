"""Files of tensors that know their own checksum: what is read is what was written, or it is said.

A safetensors file with one text in its header, under `rectiflow`: JSON data about the tensors, and
in it `sha256`, over that data and every tensor's name, kind, shape and bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rectiflow.files import replacing
from rectiflow.guarded import Unreadable, parse_json, read_tensors

KEY, CHECKSUM = "rectiflow", "sha256"


def save_sealed(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and JSON data about them, whole or not at all.

    Args:
        file: In a folder that is there; several processes may write it at a time.
        tensors: On any device.
        about: Without a key `sha256`.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = json.loads(json.dumps(dict(about)))
    said[CHECKSUM] = _checksum(kept, said)
    with replacing(file, shared=True) as unfinished:
        # One key: safetensors writes several in a random order.
        save_file(kept, unfinished, {KEY: json.dumps(said, ensure_ascii=False, sort_keys=True)})


def load_sealed(file: Path, *, earlier: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_sealed` wrote: tensors, and what is said of them.

    Args:
        file: Of any name.
        earlier: Take what has no checksum as well, as earlier versions wrote it.

    Raises:
        Unreadable: It is another kind of file, is cut short, or is not what was written. `Missing`
            if it is not there.
    """
    tensors, texts = read_tensors(file)
    if KEY not in texts:
        raise Unreadable(file, "was not written by rectiflow")
    about: dict[str, Any] = parse_json(texts[KEY], file)
    checksum = about.pop(CHECKSUM, None)
    if checksum is None and not earlier:
        raise Unreadable(file, "has no checksum: an earlier version wrote it")
    if checksum is not None and checksum != _checksum(tensors, about):
        raise Unreadable(file, "is not what was written: its checksum differs")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
