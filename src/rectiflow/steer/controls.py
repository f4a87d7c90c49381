"""Controls: what a target's row takes over from its source's row inside the network.

A control is a rule without state: the loop says which step it is and which row is whose, and the
rule says what to replace. Hooks carry the rules into the network; they exist only inside a `with`
block, and without controls the network is untouched to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from rectiflow.models.base import Conditioning, FlowModel, Projection
from rectiflow.steer.alignment import NOTHING


def active_steps(ratio: float, steps: int) -> int:
    """How many steps, from the noise on, a ratio covers; robust against 0.3 · 10 = 2.999…"""
    return int(ratio * steps + 1e-9)


@dataclass(frozen=True)
class Rows:
    """Who is who in a batch: row `targets[k]` is edited from row `sources[k]`.

    Rows that are not named, unconditional ones above all, are never touched.
    """

    targets: tuple[int, ...]
    sources: tuple[int, ...]
    pairs: tuple[int, ...]
    """Which prompt pair each target is, as the token maps are numbered."""


class Control(Protocol):
    """A rule, asked at each hook point of each evaluation; it returns the features to use."""

    @property
    def steps(self) -> int:
        """It acts on steps 0 to `steps` − 1."""
        ...

    @property
    def features(self) -> tuple[Projection, ...]:
        """Which attention features it wants to see in `projected`."""
        ...

    def text(self, features: Tensor, rows: Rows) -> Tensor:
        """Replace text-stream features entering a joint attention, ``[B, L, D]``."""
        ...

    def projected(
        self, features: Tensor, rows: Rows, kind: Projection, stream: Literal["image", "text"]
    ) -> Tensor:
        """Replace queries, keys or values of one stream, ``[B, T, D]``."""
        ...


@dataclass(frozen=True, eq=False)
class AdaLNReplacement:
    """Unchanged words keep the text features that the source has (FTEdit, section 3.3).

    In every block, what text enters attention as is ``M = norm(h)·(1 + scale) + shift``; for a
    target token with a counterpart, ``M̂_target[l] = M_source[map(l)]``.
    """

    token_maps: Tensor
    """int64 ``[pairs, L]``, from `align`."""
    steps: int
    features: ClassVar[tuple[Projection, ...]] = ()

    def text(self, features: Tensor, rows: Rows) -> Tensor:
        """Replace the features of kept tokens."""
        maps = self.token_maps[list(rows.pairs)].to(features.device)
        source = features[list(rows.sources)]
        positions = maps.clamp_min(0)[..., None].expand(-1, -1, features.shape[-1])
        target = features[list(rows.targets)]
        kept = (maps != NOTHING)[..., None]
        result = features.clone()
        result[list(rows.targets)] = torch.where(kept, source.gather(1, positions), target)
        return result

    def projected(
        self, features: Tensor, rows: Rows, kind: Projection, stream: Literal["image", "text"]
    ) -> Tensor:
        """Leave attention alone."""
        return features


@dataclass(frozen=True)
class AttentionInjection:
    """The target attends to the source's values (FTEdit, section 3.3), or keys, or queries."""

    steps: int
    inject: Literal["image", "all"] = "image"
    """Those of image tokens, or of the text tokens too (which weakens the prompt)."""
    features: tuple[Projection, ...] = ("value",)

    def text(self, features: Tensor, rows: Rows) -> Tensor:
        """Leave the text stream alone."""
        return features

    def projected(
        self, features: Tensor, rows: Rows, kind: Projection, stream: Literal["image", "text"]
    ) -> Tensor:
        """Replace the chosen features of the target's rows by the source's."""
        if kind not in self.features or (stream == "text" and self.inject == "image"):
            return features
        result = features.clone()
        result[list(rows.targets)] = features[list(rows.sources)]
        return result


@dataclass
class ControlledNetwork:
    """A model's network with controls installed; made by `controlled`."""

    model: FlowModel
    controls: Sequence[Control]
    _now: tuple[Sequence[Control], Rows] | None = field(default=None, init=False)

    def active(self, step: int) -> list[Control]:
        """The controls that act on a step."""
        return [control for control in self.controls if step < control.steps]

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning, step: int, rows: Rows) -> Tensor:
        """`FlowModel.velocity` under the controls of a step."""
        controls = self.active(step)
        if not controls or not rows.targets:
            return self.model.velocity(x, t, cond)
        self._now = (controls, rows)
        try:
            # A compiled network would go on without hooks added after its first call.
            with torch.compiler.set_stance("force_eager"):
                return self.model.velocity(x, t, cond)
        finally:
            self._now = None

    def _text_hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._now is None:
            return None
        controls, rows = self._now
        features = kwargs["encoder_hidden_states"]
        for control in controls:
            features = control.text(features, rows)
        return args, kwargs | {"encoder_hidden_states": features}

    def _projection_hook(
        self, kind: Projection, stream: Literal["image", "text"]
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._now is None:
                return None
            controls, rows = self._now
            for control in controls:
                output = control.projected(output, rows, kind, stream)
            return output

        return hook


@contextmanager
def controlled(model: FlowModel, controls: Sequence[Control]) -> Iterator[ControlledNetwork]:
    """Install controls on a model for the length of a `with` block.

    Hooks go on all joint blocks whose text stream goes on, whatever their number. They are removed
    on leaving, also by an exception.

    Example:
        with controlled(model, [AttentionInjection(steps=5)]) as network:
            v = network.velocity(x, t, cond, step=0, rows=rows)
    """
    network = ControlledNetwork(model, controls)
    kinds = sorted({kind for control in controls for kind in control.features})
    with ExitStack() as stack:
        for block in model.text_blocks() if controls else ():
            attention = model.joint_attention(block)
            handle = attention.register_forward_pre_hook(network._text_hook, with_kwargs=True)
            stack.callback(handle.remove)
            for kind in kinds:
                image, text = model.projections(block, kind)
                for handle in (
                    image.register_forward_hook(network._projection_hook(kind, "image")),
                    text.register_forward_hook(network._projection_hook(kind, "text")),
                ):
                    stack.callback(handle.remove)
        yield network
