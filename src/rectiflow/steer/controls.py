"""Controls: what a target's row takes over from its source's row inside the network.

A control is a rule without state: the loop says which step it is and which row is whose, and the
rule says what to replace. The source's features come from its row in the same batch, or from what
was kept while it was inverted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rectiflow.flow.device import replaced, take
from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import Conditioning
from rectiflow.models.taps import Point, TappedNetwork, tapped
from rectiflow.steer.alignment import NOTHING

Kept = Callable[[Point], Tensor]
"""The source's features at a point, a row per target."""


@dataclass(frozen=True)
class Rows:
    """Who is who in a batch: row `targets[k]` is edited from row `sources[k]`.

    Rows that are not named, unconditional ones above all, are never touched.
    """

    targets: tuple[int, ...]
    sources: tuple[int, ...]
    """Empty where the source's features are kept ones."""
    pairs: tuple[int, ...]
    """Which prompt pair each target is, as the token maps are numbered."""


class Control(Protocol):
    """A rule, asked at each of its points of each evaluation in each of its steps."""

    @property
    def steps(self) -> int:
        """It acts on steps 0 to `steps` − 1."""
        ...

    @property
    def points(self) -> Iterable[Point]:
        """Where it acts."""
        ...

    def replace(
        self, point: Point, target: Tensor, source: Tensor, pairs: Sequence[int], step: int
    ) -> Tensor:
        """The features that targets go on with, ``[n, tokens, D]``.

        Args:
            point: where.
            target: the targets' own features.
            source: their sources', like `target` but maybe of another number of tokens.
            pairs: which prompt pair each is.
            step: the step's number.
        """
        ...


@dataclass(frozen=True, eq=False)
class AdaLNReplacement:
    """Unchanged words keep the text features that the source has (FTEdit, section 3.3).

    In every block, what text enters attention as is ``M = norm(h)·(1 + scale) + shift``; for a
    target token with a counterpart, ``M̂_target[l] = M_source[map(l)]``.
    """

    token_maps: Tensor
    """int64 ``[pairs, L]``, from `align`, where the features are."""
    steps: int
    points: Sequence[Point]
    token_steps: Tensor | None = None
    """int64 ``[pairs, L]``: until which step each token is held, where words have their own."""

    def replace(
        self, point: Point, target: Tensor, source: Tensor, pairs: Sequence[int], step: int
    ) -> Tensor:
        """Replace the features of kept tokens."""
        maps = take(self.token_maps, pairs)
        kept = maps != NOTHING
        if self.token_steps is not None:
            kept = kept & (step < take(self.token_steps, pairs))
        positions = maps.clamp_min(0)[..., None].expand(-1, -1, target.shape[-1])
        return torch.where(kept[..., None], source.gather(1, positions), target)


@dataclass(frozen=True)
class AttentionInjection:
    """The target attends to the source's values (FTEdit, section 3.3), or keys, or queries.

    Of the image tokens; injected for the text tokens too, they weaken the prompt.
    """

    steps: int
    points: Sequence[Point]

    def replace(
        self, point: Point, target: Tensor, source: Tensor, pairs: Sequence[int], step: int
    ) -> Tensor:
        """The source's."""
        return source


class Watch(Protocol):
    """Looks at features as the controls leave them, and changes nothing."""

    @property
    def steps(self) -> int:
        """It looks in steps 0 to `steps` − 1."""
        ...

    @property
    def points(self) -> Iterable[Point]:
        """Where it looks; it is shown other points too."""
        ...

    def see(
        self,
        point: Point,
        features: Tensor,
        rows: Rows,
        cond: Conditioning,
        network: TappedNetwork,
    ) -> None:
        """Look at the features of all rows at a point, ``[B, tokens, D]``."""
        ...


class ControlledNetwork:
    """A model's network with controls installed; made by `controlled`."""

    def __init__(
        self, network: TappedNetwork, controls: Sequence[Control], watch: Watch | None = None
    ) -> None:
        self.network = network
        self.controls = controls
        self.watch = watch
        self._points = {id(control): frozenset(control.points) for control in controls}

    def active(self, step: int) -> list[Control]:
        """The controls that act on a step."""
        return [control for control in self.controls if step < control.steps]

    def points(self, step: int) -> set[Point]:
        """Where the source's features are wanted in a step."""
        return {point for control in self.active(step) for point in control.points}

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        step: int,
        rows: Rows,
        kept: Kept | None = None,
    ) -> Tensor:
        """`FlowModel.velocity` under the controls of a step.

        Args:
            x: states of all rows.
            t: time.
            cond: prompts of all rows.
            step: which controls act.
            rows: who is who; without sources among them, `kept` must be given.
            kept: the sources' features.
        """
        controls = self.active(step)
        watch = self.watch if self.watch is not None and step < self.watch.steps else None
        if not (controls or watch) or not rows.targets:
            return self.network.velocity(x, t, cond)
        targets, sources = rows.targets, rows.sources

        def tap(point: Point, features: Tensor) -> Tensor:
            acting = [control for control in controls if point in self._points[id(control)]]
            if acting:
                features = steered_by(acting, point, features)
            if watch is not None:
                watch.see(point, features, rows, cond, self.network)
            return features

        def steered_by(acting: list[Control], point: Point, features: Tensor) -> Tensor:
            source = take(features, sources) if kept is None else kept(point)
            steered = take(features, targets)
            for control in acting:
                steered = control.replace(point, steered, source, rows.pairs, step)
            return replaced(features, targets, steered)

        return self.network.velocity(x, t, cond, tap)


@contextmanager
def controlled(
    model: FlowModel, controls: Sequence[Control], watch: Watch | None = None
) -> Iterator[ControlledNetwork]:
    """Install controls, and something that watches, on a model for the length of a `with` block.

    Example:
        points = attention_points(model, preset)
        with controlled(model, [AttentionInjection(5, points)]) as network:
            v = network.velocity(x, t, cond, step=0, rows=rows)
    """
    points = {point for control in controls for point in control.points}
    points |= set(watch.points if watch is not None else ())
    with tapped(model, points, phases=watch is not None) as network:
        yield ControlledNetwork(network, controls, watch)
