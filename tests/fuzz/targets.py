"""What is damaged: one of each kind of file that is read, with what must be read from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rectiflow.app.cli import main
from rectiflow.invert import Inversion, get_preset, invert
from rectiflow.models import Metadata
from rectiflow.models.load import load
from rectiflow.report import read_png, save_png
from rectiflow.settings_file import dump_yaml, read_yaml
from rectiflow.straighten import checkpoint
from rectiflow.straighten.export import save_pipeline
from rectiflow.straighten.prompt_list import load_prompts
from rectiflow.straighten.reading import PairStore
from tests.fuzz import lines
from tests.fuzz.mutations import damage
from tests.straighten.stores import make_store
from tests.tiny import tiny_model

Read = Callable[[Path], str]
"""Reads a folder as a user's command would; a digest of what came out."""


@dataclasses.dataclass
class Target:
    """A kind of files."""

    files: dict[str, bytes]
    """What is whole, by path."""
    read: Read
    vouched: bool = True
    """Whether something vouches for the content: what is read must then be what was written."""
    whole: str = ""
    """The digest of what is read from it."""

    def case(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], None]]:
        """Damage a copy; what was done, and the attempt to read it.

        The attempt raises AssertionError where other content is read than was written.
        """
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if not self.whole:
            self.whole = self.read(folder)
        what = damage(rng, folder)

        def attempt() -> None:
            found = self.read(folder)
            assert not self.vouched or found == self.whole, "read other content, in silence"

        return what, attempt


class CommandLines:
    """Random words of the command line, tried in an empty folder."""

    def case(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], None]]:
        """A line, and the attempt to run it."""
        line = lines.line(rng)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

        def attempt() -> None:
            with lines.within(folder):
                assert main(line) in (0, 1, 2, 75)

        return " ".join(line)[:200], attempt


def targets(folder: Path) -> Mapping[str, Target | CommandLines]:
    """One of each kind, made in a folder."""
    model = tiny_model(max_sequence_length=2)
    make_store(folder / "store", num=11)
    state = {
        "network": {"a": torch.randn(4, 5), "b": torch.arange(3)},
        "optimizers": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}],
        "progress": {"step": 3, "identity": {"model": "x"}, "losses": torch.ones(1, 2)},
    }
    checkpoint.save(folder / "run", 3, state, keep_last=1)
    picture = Image.radial_gradient("L").convert("RGB").resize((40, 32))
    preset = get_preset("exact", num_inference_steps=2)
    invert(model, picture, "a cat", preset=preset).save(folder / "inversion" / "a.safetensors")
    made = {
        "command": "edit",
        "prompts": ["a cat", "ein Bär 🐻"],
        "seed": 3,
        "grid": [0.0, 0.5, 1.0],
    }
    save_png(picture, folder / "png" / "a.png", made | {"settings": {"scheme": "euler", "n": [1]}})
    save_pipeline(model, folder / "exported", dtype=torch.float32)
    shutil.copytree(folder / "exported", folder / "foreign")
    (folder / "foreign/checksums.json").unlink()
    (folder / "texts").mkdir()
    (folder / "texts/a.json").write_text(json.dumps(["a cat", {"prompt": "two dogs"}]))
    (folder / "texts/a.yaml").write_text(
        dump_yaml({"steps": 3, "betas": [0.9, 0.99], "a": {"b": 1}})
    )
    packed = make_store(folder / "packed", num=2)
    assert packed.num == 2
    (folder / "texts/prompts.jsonl.gz").write_bytes(
        (folder / "packed/prompts.jsonl.gz").read_bytes()
    )

    def of(name: str, read: Read, vouched: bool = True) -> Target:
        place = folder / name
        files = {
            file.relative_to(place).as_posix(): file.read_bytes()
            for file in sorted(place.rglob("*"))
            if file.is_file() and file.name != "README.md"
        }
        return Target(files, read, vouched)

    return {
        "store": of("store", _store),
        "checkpoint": of("run/checkpoint-3", lambda place: _digest(checkpoint.load(place))),
        "inversion": of("inversion", lambda place: _inversion(place, model)),
        "png": of("png", _png, vouched=False),
        "exported": of("exported", _model),
        "foreign": of("foreign", _model, vouched=False),
        "texts": of("texts", _texts, vouched=False),
        "lines": CommandLines(),
    }


def _store(place: Path) -> str:
    store = PairStore.open(place)
    pairs = store.pairs(range(store.manifest.num))
    return _digest([pairs.x_0, pairs.x_1, pairs.cost, pairs.prompts, pairs.seed])


def _inversion(place: Path, model: Any) -> str:
    found = Inversion.load(place / "a.safetensors", model)
    said = [found.source_prompt, dataclasses.asdict(found.preset), found.nfe, found.guidance_scale]
    assert found.picture is not None
    return _digest(
        [found.trajectory, found.grid, found.path.residuals, said, found.picture.tobytes()]
    )


def _png(place: Path) -> str:
    file = next(iter(sorted(place.glob("*.png"))), place / "a.png")
    found = read_png(file)
    with lines.within(place):
        assert main(["info", str(file)]) == 0 == main(["info", str(file), "--json"])
    return _digest(found)


def _model(place: Path) -> str:
    model = load(place)
    assert isinstance(model.metadata, Metadata)
    return model.weight_hash + model.field_hash + model.metadata.model_dump_json()


def _texts(place: Path) -> str:
    from rectiflow.errors import InputError

    found: list[Any] = []
    for file in ("a.json", "a.yaml", "prompts.jsonl.gz"):
        try:
            read = read_yaml if file.endswith("yaml") else load_prompts
            found.append(read(place / file))  # type: ignore[operator]
        except InputError as error:
            assert len(str(error).splitlines()) == 1, error
    return _digest(found)


def _digest(data: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode() + value.numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                add([key, value[key]])
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for inner in value:
                add(inner)
        else:
            digest.update(repr(value).encode())

    add(data)
    return digest.hexdigest()
