"""Taps: reading and replacing a network's features at its attention sites, by torch hooks.

Hooks exist only inside a `with` block, on the points asked for, and are silent except during an
evaluation that is given a tap: without one the network is untouched to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rectiflow.flow.grid import active_steps
from rectiflow.models.base import AttentionSite, FlowModel
from rectiflow.models.prompts import Conditioning

Feature = Literal["text", "query", "key", "value"]
Stream = Literal["image", "text"]


@dataclass(frozen=True)
class Point:
    """What is read at one place of the network."""

    site: int
    """The number of the attention, among `FlowModel.every_site`."""
    feature: Feature
    """`"text"`: what the text stream enters attention as; else what is projected from a stream,
    before norm and rotation."""
    stream: Stream = "text"


Tap = Callable[[Point, Tensor], Tensor]
"""Given the features of all rows at a point, [B, tokens, D]; returns those to go on with."""


class TappedNetwork:
    """A model's network with hooks installed; made by `tapped`."""

    def __init__(self, model: FlowModel) -> None:
        self.model = model
        self._tap: Tap | None = None
        self._text_tokens = 0
        self._rotary: Any = None

    @property
    def phases(self) -> tuple[Tensor, Tensor] | None:
        """How the attention that is being tapped rotates queries and keys of text and of image:
        complex [tokens, d/2] each, of neighbouring pairs of a head's d; None if it does not.
        """
        if self._rotary is None:
            return None
        first, second = self._rotary
        if first.is_complex():  # Qwen-Image: of the image, of the text
            return second.to(torch.complex64), first.to(torch.complex64)
        both = torch.complex(first[:, ::2].float(), second[:, ::2].float())  # FLUX: cos, sin, twice
        return both[: self._text_tokens], both[self._text_tokens :]

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning, tap: Tap | None = None) -> Tensor:
        """`FlowModel.velocity`, the tap called at every point that `tapped` was asked for."""
        if tap is None:
            return self.model.velocity(x, t, cond)
        self._tap, self._text_tokens = tap, cond.embeds.shape[1]
        try:
            # A compiled network would go on without hooks added after its first call.
            with torch.compiler.set_stance("force_eager"):
                return self.model.velocity(x, t, cond)
        finally:
            self._tap = self._rotary = None

    def _told(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before an attention: what it is told about positions."""
        self._rotary = kwargs.get("image_rotary_emb")

    def _entering(self, site: int, fused: bool) -> Callable[..., Any]:
        """A hook before an attention: its text stream, alone or as a part of the fused one."""
        name = "hidden_states" if fused else "encoder_hidden_states"

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._tap is None:
                return None
            features = self._part(kwargs[name], "text", self._tap, Point(site, "text"), fused)
            return args, kwargs | {name: features}

        return hook

    def _projected(self, points: list[Point], fused: bool) -> Callable[..., Any]:
        """A hook after a projection, of one stream or of the fused one."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._tap is None:
                return None
            for point in points:
                output = self._part(output, point.stream, self._tap, point, fused)
            return output

        return hook

    def _part(
        self, features: Tensor, stream: Stream, tap: Tap, point: Point, fused: bool
    ) -> Tensor:
        """Give a tap its stream, cut out of the fused one and put back where they are fused."""
        if not fused:
            return tap(point, features)
        first = self.model.text_first == (stream == "text")  # does it stand in front?
        text = self._text_tokens
        cut = text if self.model.text_first else features.shape[1] - text
        front, back = features[:, :cut], features[:, cut:]
        front, back = (tap(point, front), back) if first else (front, tap(point, back))
        return torch.cat([front, back], dim=1)


@contextmanager
def tapped(
    model: FlowModel, points: Iterable[Point], phases: bool = False
) -> Iterator[TappedNetwork]:
    """Install hooks at points of a model for the length of a `with` block.

    They are removed on leaving, also by an exception.

    Args:
        model: Whose network.
        points: Where taps are called.
        phases: Whether `TappedNetwork.phases` is wanted there, which takes further hooks.

    Example:
        with tapped(model, every_point(model, [("value", "image")])) as network:
            v = network.velocity(x, t, cond, tap=lambda point, features: 0 * features)
    """
    network, wanted = TappedNetwork(model), set(points)
    with ExitStack() as stack:
        for number, site in enumerate(model.every_site() if wanted else ()):
            if Point(number, "text") in wanted:
                stack.callback(
                    site.attention.register_forward_pre_hook(
                        network._entering(number, site.fused), with_kwargs=True
                    ).remove
                )
            here = {p for p in wanted if p.site == number and p.feature != "text"}
            if phases and here:
                told = site.attention.register_forward_pre_hook(network._told, with_kwargs=True)
                stack.callback(told.remove)
            for module, read in _modules(site, here).items():
                hook = network._projected(read, site.fused)
                stack.callback(module.register_forward_hook(hook).remove)
        yield network


def every_point(
    model: FlowModel,
    kinds: Iterable[tuple[Feature, Stream]],
    first: float = 0.0,
    ending: bool = False,
) -> list[Point]:
    """The points of some kinds at all sites but the first share of them.

    Args:
        model: Whose sites.
        kinds: Features and the streams they are of.
        first: Sites before this share of their number are left out.
        ending: Also at the site where text ends, if there is one.
    """
    count = len(model.attention_sites())
    sites = range(active_steps(first, count), len(model.every_site()) if ending else count)
    return [Point(site, feature, stream) for site in sites for feature, stream in kinds]


def _modules(site: AttentionSite, points: set[Point]) -> dict[nn.Module, list[Point]]:
    """The projections to be hooked at a site, with what is read at each."""
    modules: dict[nn.Module, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.feature, point.stream)):
        assert point.feature != "text"
        streams = site.text if point.stream == "text" and site.text is not None else site.image
        modules.setdefault(streams[point.feature], []).append(point)
    return modules
