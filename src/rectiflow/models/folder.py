"""Pipelines that diffusers saved: a folder here, or the same on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rectiflow.errors import InputError
from rectiflow.guarded import read_json
from rectiflow.models.hub import first_sentence, hub_answers, partly_cached, refusal, unreachable
from rectiflow.models.inspection import check_index, check_size, inspect_folder
from rectiflow.models.metadata import FILE_NAME, Metadata, read_metadata
from rectiflow.models.weights import stored_dtype

INDEX = "model_index.json"
WEIGHTS = r"([^/]+)/[^/.]+(?:\.([^/]+?))?(?:-\d+-of-\d+)?\.safetensors"
"""A part's file of weights, perhaps one of several: (the part's folder, the variant)."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that nothing here asks: Stable Diffusion's filter of its own pictures, what
brings them to it, and what reads pictures for an IP adapter."""

BUILT_AS = {"RectifiedFlowPipeline": "StableDiffusionPipeline"}
"""Pipelines that diffusers does not have, and the one of its own with the same parts."""

REFINER = "StableDiffusionXLImg2ImgPipeline"
"""What SDXL's refiner was saved as; with `requires_aesthetics_score` it has no twin below."""

TEXT_TO_IMAGE = {
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    REFINER: "StableDiffusionXLPipeline",
}
"""Pipelines that begin with a picture, and those with the same parts that begin with noise."""


def load_in_float32(folder: Path) -> None:
    """Have the parts of transformers in a folder loaded in float32 where nobody names a dtype.

    diffusers then loads its own parts in float32, whatever dtype the files are in, and
    transformers what `config.json` says; a pipeline of both would have half of either.

    Args:
        folder: That `save_pretrained` wrote, of a pipeline or of one model; the weights stay.
    """
    for file in [*folder.glob("*/config.json"), *folder.glob("config.json")]:
        said = read_json(file)
        if "transformers_version" in said and (kept := _in_float32(said)) != said:
            text = json.dumps(kept, indent=2, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")


def _in_float32(config: dict[str, Any]) -> dict[str, Any]:
    """With the dtype of the model, and of those it is made of."""
    parts = {
        key: _in_float32(value)
        for key, value in config.items()
        if isinstance(value, dict) and key in ("text_config", "vision_config")
    }
    dtypes = {key: "float32" for key in ("dtype", "torch_dtype") if config.get(key)}
    return config | parts | dtypes


class Folder:
    """A saved pipeline: where it is and what its index says.

    Args:
        source: A folder, or the id of a model on the hub.
        name: What to call it in messages.
        families: The pipelines that are understood.
        variant: Of the weight files, as diffusers means it (`"fp16"`).
        revision: Of the model on the hub: a branch, a tag or a commit.

    Raises:
        InputError: It is not there, cannot be reached, or is of no family of ours.
    """

    def __init__(
        self,
        source: Path | str,
        name: str,
        families: Collection[str],
        variant: str | None = None,
        revision: str | None = None,
    ) -> None:
        if revision is not None and isinstance(source, Path):
            raise InputError(
                f"revision {revision} is of a model on the hub, and {name} is a folder here: leave "
                "--revision out"
            )
        self.source = source
        self.name = name
        self.variant = variant
        self.revision = revision
        self.local = isinstance(source, Path) or not hub_answers(source)
        """Whether to do without the hub."""
        self.verified = isinstance(source, Path) and inspect_folder(source)
        """Whether all its files are known to be what was written; of others nobody can tell."""
        self.config = self._index(families)

    @property
    def class_name(self) -> str:
        """The diffusers pipeline that it is."""
        return str(self.config["_class_name"])

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """The parts it was saved with: name -> (library, class)."""
        return {
            name: (kind[0], kind[1])
            for name, kind in self.config.items()
            if isinstance(kind, list) and kind[0]
        }

    @property
    def left_out(self) -> dict[str, None]:
        """The parts it was saved without, an SD3's T5 say, which diffusers wants to be told."""
        return {name: None for name, kind in self.config.items() if kind == [None, None]}

    @property
    def unused(self) -> dict[str, Any]:
        """The parts that it is loaded without, as diffusers wants to be told."""
        told: dict[str, Any] = {part: None for part in UNUSED if part in self.config}
        return told | ({"requires_safety_checker": False} if "safety_checker" in told else {})

    def metadata(self) -> Metadata:
        """What `rectiflow.json` says, if there is one."""
        if isinstance(self.source, Path):
            return read_metadata(self.source / FILE_NAME)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            file = hf_hub_download(
                self.source, FILE_NAME, local_files_only=self.local, revision=self.revision
            )
        except EntryNotFoundError:  # somebody else's checkpoint, or an offline copy of one
            return Metadata()
        return read_metadata(Path(file))

    def pipeline(self, dtype: torch.dtype, **given: Any) -> Any:
        """The pipeline with its weights.

        Args:
            dtype: Of network and text encoders; the codec is in float32.
            **given: Parts to use instead of the saved ones.
        """
        import diffusers

        # A part of ours, which diffusers takes only from a module that has been imported.
        from rectiflow.models import stacked_unet  # noqa: F401

        return getattr(diffusers, BUILT_AS.get(self.class_name, self.class_name)).from_pretrained(
            str(self.source),
            dtype={"default": dtype, "vae": torch.float32},
            variant=self.variant,
            revision=self.revision,
            use_safetensors=True,
            local_files_only=self.local,
            **self.left_out | self.unused,
            **self.text_encoders(dtype, without=given),
            **given,
        )

    def stored_dtype(self) -> torch.dtype:
        """What the network is to compute in where nobody says: the dtype of its weight files."""
        part = "unet" if "unet" in self.parts else "transformer"
        for file in sorted(self._files):
            match = re.fullmatch(WEIGHTS, file)
            if match and match[1] == part and match[2] == self.place_of(part)["variant"]:
                return stored_dtype(self._fetched(file))
        return torch.float32  # there are none, and loading says so

    def _fetched(self, file: str) -> Path:
        if isinstance(self.source, Path):
            return self.source / file
        from huggingface_hub import hf_hub_download

        found = hf_hub_download(
            self.source, file, local_files_only=self.local, revision=self.revision
        )
        return Path(found)

    def text_encoders(self, dtype: torch.dtype, without: Collection[str] = ()) -> dict[str, Any]:
        """The text encoders, loaded apart: a pipeline would not say that weights are missing.

        Args:
            dtype: To load them in.
            without: Those to leave out.
        """
        import transformers

        self._check_variant()
        encoders = {}
        for part, (_, kind) in self.parts.items():
            if not part.startswith("text_encoder") or part in without:
                continue
            encoder = getattr(transformers, kind)
            if isinstance(self.source, Path) and not self.verified:
                place = self.source / part
                described = encoder.config_class.from_pretrained(place)
                with torch.device("meta"):
                    check_size(place, place.glob("*.safetensors"), encoder(described))
            encoders[part], info = encoder.from_pretrained(
                str(self.source),
                subfolder=part,
                output_loading_info=True,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=self.local,
                **self.place_of(part),
            )
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])[0]
                raise InputError(
                    f"{self.name}: the weights are incomplete ({part}.{missing} is missing)"
                )
        return encoders

    def place_of(self, part: str) -> dict[str, Any]:
        """Which files of a part are its weights, as `from_pretrained` wants to be told.

        Args:
            part: Its name. Where it has no weights of the variant it has the others, as in
                diffusers.
        """
        there = self.variant is not None and self.variant in self._variants(part)
        return {"variant": self.variant if there else None, "revision": self.revision}

    def failure(self, error: BaseException) -> InputError:
        """The line for what a library raised while it loaded weights from here."""
        if isinstance(self.source, str):
            refused = refusal(self.source, error)
            if refused is not None:
                return refused
            if self.local:
                return partly_cached(self.name, first_sentence(error))
            try:
                self._check_variant()
            except InputError as wrong:
                return wrong
        return InputError(
            f"{self.name} cannot be loaded: {first_sentence(error)} (a complete diffusers folder "
            "with safetensors weights is needed)"
        )

    def _index(self, families: Collection[str]) -> dict[str, Any]:
        """`model_index.json`, known to name a family and, in a folder, parts that are there."""
        from diffusers import DiffusionPipeline

        source, name = self.source, self.name
        try:
            config: dict[str, Any] = DiffusionPipeline.load_config(
                str(source), local_files_only=self.local, revision=self.revision
            )
        except (OSError, ValueError) as error:
            if isinstance(source, Path):
                raise InputError(
                    f"{source / INDEX} cannot be read: {first_sentence(error)}"
                ) from error
            raise (refusal(source, error) or self._no_index(error)) from error
        class_name = str(config.get("_class_name"))
        if not config.get("requires_aesthetics_score"):
            class_name = config["_class_name"] = TEXT_TO_IMAGE.get(class_name, class_name)
        if isinstance(source, Path):
            check_index(source / INDEX, config)
        if class_name not in families:
            raise InputError(
                f"{name} is a {class_name}, which is not supported: use a {', '.join(families)}"
            )
        place = source if isinstance(source, Path) else self._cached()
        if place is not None:
            # transformers makes up a tokenizer where there are no files of one.
            for part, kind in config.items():
                needed = isinstance(kind, list) and kind[0] and part not in UNUSED
                if needed and not (place / part).is_dir():
                    what = f"the folder {part} is missing"
                    if isinstance(source, str):
                        raise partly_cached(name, what)
                    raise InputError(f"{name} is incomplete: {what}")
        return config

    def _check_variant(self) -> None:
        """See that every part has weights of the variant, or of none where none was asked for."""
        if isinstance(self.source, str) and not self.local and self.variant is None:
            return  # the hub is asked for a list only if something is missing
        found = {part: self._variants(part) for part in self.parts if part not in UNUSED}
        named = sorted({name for names in found.values() for name in names if name is not None})
        if self.variant is not None and self.variant not in named:
            there = f"those of {', '.join(named)}" if named else "none of any variant"
            raise InputError(
                f"{self.name} has no weight files of the variant {self.variant}: there are {there}"
            )
        for part, names in found.items():
            if names and not {None, self.variant} & names:
                other = sorted(name for name in names if name is not None)[0]
                raise InputError(
                    f"{self.name}: {part} has weight files of the variant {other} alone: give "
                    f"variant={other!r} (--variant {other})"
                )

    def _variants(self, part: str) -> set[str | None]:
        """The variants of the weight files of a part; None is for those without a name."""
        matches = (re.fullmatch(WEIGHTS, file) for file in self._files if file.startswith(part))
        return {match[2] for match in matches if match is not None and match[1] == part}

    @cached_property
    def _files(self) -> list[str]:
        place = self.source if isinstance(self.source, Path) else self._cached()
        if place is not None:
            return [file.relative_to(place).as_posix() for file in place.glob("*/*.safetensors")]
        from huggingface_hub import HfApi

        return list(HfApi().list_repo_files(str(self.source), revision=self.revision))

    def _cached(self) -> Path | None:
        """Where the hub's cache has this model, if it is all there is to load from."""
        from huggingface_hub import try_to_load_from_cache

        if not self.local:
            return None
        found = try_to_load_from_cache(str(self.source), INDEX, revision=self.revision)
        return Path(found).parent if isinstance(found, str) else None

    def _no_index(self, error: BaseException) -> InputError:
        if self.local:
            return unreachable(self.name)
        return InputError(
            f"there is no folder {self.name!r}, and no pipeline of that id could be had from the "
            f"hub ({first_sentence(error)})"
        )
