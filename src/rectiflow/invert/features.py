"""What the network felt while it inverted: features kept for the edits that will want them.

While editing, the source's row is a replay: what controls take from it has been computed before,
in the last evaluation of each inversion step. Kept from there, it need not be computed again.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.device import RowNumbers, replaced, take
from rectiflow.flow.grid import active_steps
from rectiflow.flow.solver import Velocity
from rectiflow.invert.preset import METHOD_FIELDS, Preset
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.taps import Feature as PointFeature
from rectiflow.models.taps import Point, Stream, TappedNetwork, every_point

Where = Literal["memory", "cpu", "disk"]
Wanted = Mapping[Point, int]
"""Of each point, the number of steps, from the noise on, that are kept."""


def text_points(model: FlowModel) -> list[Point]:
    """Where AdaLN replacement acts: what text enters every attention as."""
    return every_point(model, [("text", "text")])


def attention_points(model: FlowModel, preset: Preset) -> list[Point]:
    """Where attention injection acts."""
    streams: tuple[Stream, ...] = ("image",) if preset.inject == "image" else ("image", "text")
    kinds: list[tuple[PointFeature, Stream]] = [
        (feature, stream) for feature in preset.features for stream in streams
    ]
    return every_point(model, kinds, preset.first_site, preset.last_block)


def check_controls(model: FlowModel, preset: Preset, windows: bool = False) -> None:
    """Refuse an editing that acts on joint attentions where the network has none, as U-Nets do.

    Args:
        model: whose network.
        preset: the editing.
        windows: whether words have windows of their own.

    Raises:
        InputError: the preset acts on some; the line says what to do without.
    """
    if "adaln_ratio" not in METHOD_FIELDS[preset.method] or model.attention_sites():
        return
    steps = preset.steps
    asked = [
        name
        for name, wanted in (
            ("adaln_ratio", active_steps(preset.adaln_ratio, steps)),
            ("attention_ratio", active_steps(preset.attention_ratio, steps)),
            ("mask_from attention", bool(preset.mask_threshold) and preset.mask_from != "velocity"),
            ("windows", windows),
        )
        if wanted
    ]
    if asked:
        raise InputError(
            f"{model.name} has no joint attention of text and image, as {', '.join(asked)} would "
            "need: use the preset flowedit, sdedit or euler, or set adaln_ratio=0 and "
            "attention_ratio=0"
        )


def wanted_features(model: FlowModel, preset: Preset, steps: int) -> dict[Point, int]:
    """What a preset's editing will want of the source, of which points for how many steps.

    Nothing where it does not keep features, or has no source row.
    """
    if preset.method != "two_branch" or preset.source_features != "inversion":
        return {}
    texts = active_steps(preset.adaln_ratio, steps)
    attentions = active_steps(preset.attention_ratio, steps)
    wanted = dict.fromkeys(text_points(model), texts)
    wanted |= dict.fromkeys(attention_points(model, preset), attentions)
    return {point: until for point, until in wanted.items() if until}


class FeatureStore:
    """Features of B rows by step, evaluation within the step, and point.

    Args:
        wanted: what is kept.
        where: `"memory"` leaves them on the device, `"cpu"` brings them to (pinned) main memory,
            `"disk"` to a temporary folder that goes with the store.
    """

    def __init__(self, wanted: Wanted, where: Where = "memory") -> None:
        self.wanted = dict(wanted)
        self.where = where
        self._kept: dict[tuple[int, int], dict[Point, Tensor]] = {}
        self._on_disk: set[tuple[int, int]] = set()
        self._read: tuple[tuple[int, int], dict[Point, Tensor]] | None = None
        self._folder = tempfile.TemporaryDirectory("-rectiflow") if where == "disk" else None

    def points(self, step: int) -> list[Point]:
        """What is kept of a step."""
        return [point for point, steps in self.wanted.items() if step < steps]

    def covers(self, step: int, points: Iterable[Point]) -> bool:
        """Whether a step's features at all these points are there."""
        return self._evaluations(step) > 0 and set(points) <= set(self.points(step))

    def put(self, step: int, inner: int, point: Point, features: Tensor) -> None:
        """Keep the features ``[B, tokens, D]`` of all rows."""
        own = torch.empty(
            features.shape,
            dtype=features.dtype,
            device=features.device if self.where == "memory" else "cpu",
            pin_memory=self.where == "cpu" and torch.accelerator.is_available(),
        )
        # What goes to a file has to be there; pinned memory is read by the device alone, later.
        own.copy_(features, non_blocking=self.where == "cpu")
        self._kept.setdefault((step, inner), {})[point] = own

    def seal(self, step: int) -> None:
        """No more of this step will come; it can leave main memory."""
        if self._folder is None:
            return
        for key in [key for key in self._kept if key[0] == step]:
            named = {
                f"{p.site} {p.feature} {p.stream}": f.contiguous()
                for p, f in self._kept.pop(key).items()
            }
            save_file(named, self._file(key))
            self._on_disk.add(key)

    def get(self, step: int, inner: int, point: Point, device: torch.device) -> Tensor:
        """The features ``[B, tokens, D]`` of an evaluation of a step, or of the step's last."""
        key = (step, min(inner, self._evaluations(step) - 1))
        return self._load(key)[point].to(device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """The bytes in main and device memory."""
        held = (f for kept in self._kept.values() for f in kept.values())
        return sum(f.nbytes for f in held)

    def _evaluations(self, step: int) -> int:
        return sum(1 for key in (*self._kept, *self._on_disk) if key[0] == step)

    def _load(self, key: tuple[int, int]) -> dict[Point, Tensor]:
        if key in self._kept:
            return self._kept[key]
        if self._read is None or self._read[0] != key:
            named = {tuple(name.split()): f for name, f in load_file(self._file(key)).items()}
            # The names were written by `seal`.
            read = {Point(int(n), kind, stream): f for (n, kind, stream), f in named.items()}  # type: ignore[arg-type]
            self._read = (key, read)
        return self._read[1]

    def _file(self, key: tuple[int, int]) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{key[0]}-{key[1]}.safetensors"


class RecordingField:
    """A field that keeps the features of its evaluations, row by row.

    Args:
        velocity: the field, without classifier-free guidance.
        network: its model, tapped at the points wanted.
        rows: how many rows there are.
        store: where the features go.
        accepts: keep what `accept` names, rather than every evaluation of a step.
    """

    samples_per_row = 1

    def __init__(
        self,
        velocity: GuidedVelocity,
        network: TappedNetwork,
        rows: int,
        store: FeatureStore,
        accepts: bool,
    ) -> None:
        assert velocity.cfg_scale == 1
        self.velocity = velocity
        self.network = network
        self.rows = rows
        self.store = store
        self.accepts = accepts
        self._step, self._inner = -1, 0
        self._last: dict[Point, Tensor] = {}
        self._last_rows: list[int] = []
        self._accepted: dict[Point, Tensor] = {}

    @property
    def model(self) -> FlowModel:
        """Whose field it is."""
        return self.velocity.model

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        """The velocity of all rows."""
        return self._evaluate(x, t, step, list(range(self.rows)))

    def select(self, rows: RowNumbers) -> Velocity:
        """The field of the rows with these numbers."""
        return lambda x, t, step: self._evaluate(x, t, step, [int(row) for row in rows])

    def accept(self, step: int, rows: Tensor | None = None) -> None:
        """Keep what the last evaluation, of this step, found: for all its rows, or bool ``[n]``."""
        for point, features in self._last.items():
            before = self._accepted.get(point)
            if before is not None and rows is not None:
                mine = take(before, self._last_rows)
                features = torch.where(rows[:, None, None], features, mine)
                features = replaced(before, self._last_rows, features)
            self._accepted[point] = features

    def close(self) -> None:
        """The last step is over."""
        for point, features in self._accepted.items():
            self.store.put(self._step, 0, point, features)
        self._accepted = {}
        self.store.seal(self._step)

    def _evaluate(self, x: Tensor, t: Tensor, step: int, rows: list[int]) -> Tensor:
        if step != self._step:
            self.close()
            self._step, self._inner = step, 0
        if self.velocity.on_step is not None:
            self.velocity.on_step(step)
        wanted = set(self.store.points(step))
        self._last, self._last_rows = {}, rows

        def keep(point: Point, features: Tensor) -> Tensor:
            if point in wanted:
                self._last[point] = features
            return features

        cond = self.velocity.cond.rows(self.rows)[rows]
        v = self.network.velocity(x, t, cond, keep if wanted else None)
        if not self.accepts:
            for point, features in self._last.items():
                self.store.put(step, self._inner, point, features)
        self._inner += 1
        return v


def kept_bytes(model: FlowModel, preset: Preset, height: int, width: int) -> int:
    """How much an edit by a preset will keep of one image's features, before it begins.

    Args:
        model: whose features.
        preset: what is kept, and for how many steps.
        height: of the image as the model sees it, in pixels.
        width: likewise.
    """
    wanted = wanted_features(model, preset, preset.steps)
    _, h, w = model.latent_shape(height, width)
    text = model.tokenize("")[-1].stop
    return recorded_bytes(model, wanted, h * w // model.patch**2, text)


def recorded_bytes(
    model: FlowModel, wanted: Wanted, image_tokens: int, text_tokens: int, rows: int = 1
) -> int:
    """How much a recording will hold, before it is made; of one evaluation a step.

    Args:
        model: whose features.
        wanted: what is to be kept.
        image_tokens: tokens of an image.
        text_tokens: tokens of the text stream.
        rows: images.
    """
    sites = model.every_site()
    item = torch.empty(0, dtype=model.dtype).element_size()
    total = 0
    for point, steps in wanted.items():
        site = sites[point.site]
        modules: Any = site.image if point.stream == "image" or site.text is None else site.text
        linear = modules["value" if point.feature == "text" else point.feature]
        width = linear.in_features if point.feature == "text" else linear.out_features
        total += steps * width * (image_tokens if point.stream == "image" else text_tokens)
    return math.ceil(total * item * rows)
