"""Making pairs: what a teacher makes of noise, kept in a store that any number of writers fill.

Source: Liu et al. 2024, InstaFlow, arXiv 2309.06380, eq. 3: `X_1 = ODE[v_k](X_0 | T)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from rectiflow.arguments import LARGEST_SEED, checked
from rectiflow.errors import InputError
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import check_guidance
from rectiflow.models.prompts import as_prompts
from rectiflow.models.schedulers import solver_settings
from rectiflow.straighten.folder import Folder
from rectiflow.straighten.manifest import MANIFEST, Manifest, hash_prompts, read_manifest
from rectiflow.straighten.pair_progress import progress_bar
from rectiflow.straighten.pair_source import Generated, Inverted, Source, hash_files
from rectiflow.straighten.store_writer import (
    PairProgress,
    Report,
    StoreWriter,
    check_same,
    existing_manifest,
)
from rectiflow.straighten.text_cache import remembering_prompts
from rectiflow.straighten.training_record import short_name

SHARD_SIZE = 1024
"""Pairs of a shard: 32 MiB of Stable Diffusion 1.5's latents."""
BATCH_SIZE = 16


@dataclass(frozen=True)
class PairsMade:
    """What `make_pairs` did."""

    uri: str
    manifest: Manifest
    total: int
    """Pairs of this writer."""
    made: int
    """Pairs that went through the network in this sitting."""
    remade: tuple[str, ...]
    """Shards that were damaged and have been made again."""
    bytes: int
    """Of this writer's shards, sidecars included."""
    complete: bool
    """Whether the whole store is there, other writers' shards included."""


@checked
def make_pairs(
    model: FlowModel,
    prompts: str | Sequence[str],
    uri: str | Path,
    *,
    num: int | None = None,
    guidance_scale: float = 5.0,
    negative_prompt: str | None = None,
    solver: str | None = None,
    num_inference_steps: int = 25,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    batch_size: int = BATCH_SIZE,
    images: Sequence[str | Path] | None = None,
    threads: int | None = None,
    worker: int = 0,
    num_workers: int = 1,
    keep_seconds: float = 30.0,
    other_versions: bool = False,
    progress: Callable[[PairProgress], None] | None = None,
    on_event: Report | None = None,
) -> PairsMade:
    """Make pairs of noise and latents, or those that a store still lacks.

    Pair i has prompt `prompts[i % len(prompts)]` and seed `seed + i`. The same call goes on where a
    killed one was; the finished store is the same to the last byte whatever happened on the way and
    however many writers there were. Shards that are there are read and checked; a damaged one is
    made again.

    Args:
        model: The teacher.
        prompts: One or more, all of which fit into memory. Text is a prompt, as everywhere:
            `load_prompts` reads those of a file.
        uri: Where the store is, or is to be: a folder, or any address that fsspec knows.
        num: How many pairs; as many as prompts if None.
        guidance_scale: Of the teacher. 5 for Stable Diffusion: 6 saturates (InstaFlow, §3.2).
        negative_prompt: What guidance pushes away from; the empty prompt if None.
        solver: As in `generate_latents`; if None the model's default, or rk4 for `images`.
        num_inference_steps: N.
        height: In pixels; the model's default if None.
        width: Likewise.
        seed: Of pair 0.
        shard_size: Pairs of a file.
        batch_size: Rows that go through the network together. Their last bits depend on it, so it
            is a setting of the store.
        images: Make pairs of these instead, image i having prompt i: x_0 is what the flow, run
            backwards by a solver of `flow.SOLVERS`, makes of an image, which is resized to cover
            the size and cropped to it around the centre.
        threads: Of PyTorch on the CPU, while the pairs are made. Last bits depend on it, so it is a
            setting of the store; by default that of the store, or for a new one the current one.
        worker: Which writer this is, from 0.
        num_workers: How many there are; the number may change from sitting to sitting.
        keep_seconds: How often the pairs of an unfinished shard are kept.
        other_versions: Make what is missing also with other versions of PyTorch or diffusers than
            the store was begun with. Their last bits may differ; each such shard says what made it.
        progress: Called after each batch, instead of showing a bar.
        on_event: Told of damaged files.

    Returns:
        What was done.

    Raises:
        InputError: An argument is wrong, or does not fit the store that is there, which is left as
            it is.
        WorkError: A pair could not be made, or a file not be written; what is there is sound.
        KeyboardInterrupt: A signal asked to stop; the pairs that are made are kept.
    """
    folder = Folder(uri)
    begun = existing_manifest(folder)
    prompts = as_prompts(prompts)
    files = None if images is None else [Path(one) for one in images]
    if files is not None and len(files) != len(prompts):
        raise InputError(f"{len(prompts)} captions for {len(files)} images: give one each")
    num = len(prompts) if num is None else num
    _check_counts(
        num=num,
        shard_size=shard_size,
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        threads=1 if threads is None else threads,
    )
    if not 0 <= seed <= LARGEST_SEED - num:
        raise InputError(f"seed is {seed}: give one from 0 to {LARGEST_SEED - num}")
    if not 0 <= worker < num_workers:
        raise InputError(f"worker is {worker} of {num_workers}: they are numbered from 0")
    if files is not None and num > len(files):
        raise InputError(f"num is {num}, and there are {len(files)} images: give no more")
    check_guidance("guidance_scale", guidance_scale)
    solver = solver or (model.default_solver if images is None else "rk4")
    height = model.default_size if height is None else height
    width = model.default_size if width is None else width
    wanted = Manifest(
        kind="generated" if files is None else "inverted",
        model=_name(model.name),
        weight_hash=model.weight_hash,
        family=model.family,
        solver=solver,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt or None,
        height=height,
        width=width,
        latent_shape=model.latent_shape(height, width),
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        torch=str(torch.__version__),
        diffusers=str(diffusers.__version__),
        threads=threads or torch.get_num_threads(),
        base_seed=seed,
        num=num,
        shard_size=shard_size,
        batch_size=batch_size,
        prompts_sha256=hash_prompts(prompts),
        num_prompts=len(prompts),
        images_sha256=None if files is None else hash_files(files),
        identity=model.identity | solver_settings(model, solver),
    )
    with remembering_prompts(model):
        if begun is None:
            _source(model, wanted, prompts, files).trial()
            folder.check_writable()
            folder.write(MANIFEST, wanted.to_bytes(), new=True)
            # Of several writers that begin together the first has written it.
            begun = read_manifest(folder)
        if threads is None:
            wanted = wanted.model_copy(update={"threads": begun.threads})
        check_same(folder, begun, wanted, model.name)
        with cpu_threads(begun.threads), progress_bar(worker, num_workers) as bar:
            writer = StoreWriter(
                folder,
                begun,
                worker,
                num_workers,
                keep_seconds,
                progress or bar,
                on_event,
                versions=wanted.versions,
                other_versions=other_versions,
            )
            complete = writer.write(prompts, _source(model, begun, prompts, files))
    return PairsMade(
        uri=folder.uri,
        manifest=begun,
        total=writer.total,
        made=writer.made,
        remade=tuple(writer.remade),
        bytes=writer.bytes,
        complete=complete,
    )


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads in the block."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def _name(name: str) -> str:
    """A model's name: of a folder the last part, so that a store is the same wherever it lies."""
    path = Path(name).expanduser()
    return short_name(path) if path.exists() else name


def _source(
    model: FlowModel, manifest: Manifest, prompts: Sequence[str], images: Sequence[Path] | None
) -> Source:
    if images is None:
        return Generated(model, manifest, prompts)
    return Inverted(model, manifest, prompts, images)


def _check_counts(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} is {value}: give 1 or more")
