"""What a folder must be before libraries look into it: whole where that can be told, and harmless.

diffusers and transformers take files at their word: they build as many layers as a number says, and
raise whatever happens to break. Folders that rectiflow wrote are compared with their hashes; of
others the JSON and the headers of the weights are read, and numbers are kept to what can be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rectiflow.checksums import verify
from rectiflow.errors import InputError
from rectiflow.guarded import Unreadable, opened_tensors, read_json

MOST = {
    r"layers|blocks|depth|heads|groups": 1000,
    r"timesteps|steps": 100_000,
    r"_max_length|theta|seed": math.inf,  # transformers writes 10**30 for none
    r"": 10**7,
}
"""What a number in a configuration may be, by what its key has in it; the first that fits."""
MOST_ENTRIES = 10_000
SPARE = 4
"""How many times more weights a configuration may describe than the files hold, in which quantised
ones are packed."""


def inspect_folder(folder: Path) -> bool:
    """Look at a saved pipeline or model.

    Returns:
        Whether its files are known to be what was written, by `checksums.json`; a folder from
        elsewhere has none.

    Raises:
        InputError: A file is not what was written, cannot be read, or asks for what cannot be.
    """
    try:
        if verify(folder):
            return True
    except Unreadable as error:
        raise InputError(
            f"{error}: copy or export the folder again (or, if the change is yours, remove "
            "checksums.json to use it unverified)"
        ) from error
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        said = read_json(file, None)
        if file.name.endswith(".index.json"):
            _check_shards(file, said)
        elif "config" in file.name or file.name == "model_index.json":
            if not isinstance(said, dict):
                raise Unreadable(file, "holds no settings")
            if "tokenizer" not in file.name:
                _check_numbers(file, "", said)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
        try:
            with opened_tensors(file):
                pass
        except Unreadable as error:
            raise InputError(f"{error}: download it again (git lfs pull, in a clone)") from error
    return False


def check_index(file: Path, index: dict[str, Any]) -> None:
    """See that the entries of a `model_index.json` are what diffusers writes.

    Raises:
        InputError: One is not.
    """
    for name, value in index.items():
        kind = isinstance(value, list) and len(value) == 2
        pair = kind and all(entry is None or isinstance(entry, str) for entry in value)
        if (isinstance(value, list) and not pair) or isinstance(value, dict):
            raise InputError(f"{file}: {name} is not a part: it should be [library, class]")
        if pair and not re.fullmatch(r"\w+", name):
            raise InputError(f"{file}: {name!r} is no name of a part")


def check_size(part: Path, files: Iterable[Path], network: Any) -> None:
    """See that a network is no larger than its weights, before there is memory for it.

    Args:
        part: Its folder.
        files: Of its weights.
        network: Built without memory, on the device `meta`.

    Raises:
        InputError: It is.
    """
    stored = 0
    for file in files:
        with opened_tensors(file) as opened:
            stored += sum(math.prod(opened.get_slice(n).get_shape()) for n in opened.keys())
    described = sum(weight.numel() for weight in network.parameters())
    if described > SPARE * stored + 10**6:
        raise InputError(
            f"{part / 'config.json'} describes {described} weights, and the files beside it hold "
            f"{stored}"
        )


def _check_numbers(file: Path, key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(file, name, inner)
    elif isinstance(value, list):
        if len(value) > MOST_ENTRIES:
            raise Unreadable(file, f"has {len(value)} entries in {key}")
        for inner in value:
            _check_numbers(file, key, inner)
    elif isinstance(value, int | float) and math.isfinite(value):
        most = next(most for pattern, most in MOST.items() if re.search(pattern, key))
        if abs(value) > most:
            raise Unreadable(file, f"says {key}: {value!r:.40}, which nothing has")


def _check_shards(file: Path, said: Any) -> None:
    names = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise Unreadable(file, "has no weight_map")
    for name in sorted(set(names.values())):
        if "/" in name or "\\" in name or not (file.parent / name).is_file():
            raise Unreadable(file, f"names a file that is not beside it: {name}")
