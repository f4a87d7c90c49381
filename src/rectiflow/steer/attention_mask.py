"""A mask from attention: where the image looks at the words that changed.

``A = softmax(q [k_image, k_text]ᵀ / √d)`` of the image's queries is what the network itself
computes (after cross-attention maps, arXiv 2208.01626, here in joint attention); what of it goes to
the changed words is averaged over heads, sites and the first steps. Queries and keys are read where
they are projected, so no further sample goes through the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rectiflow.flow.device import take
from rectiflow.models.base import AttentionSite, FlowModel
from rectiflow.models.prompts import Conditioning
from rectiflow.models.taps import Point, TappedNetwork
from rectiflow.steer.alignment import NOTHING
from rectiflow.steer.controls import Rows
from rectiflow.steer.masks import Gathered

SITES = (0.25, 0.75)
"""The share of a network's attentions, in order, between which they are read: the middle ones
place things."""
_PARTS = (("query", "image"), ("key", "image"), ("key", "text"))


def changed_tokens(
    model: FlowModel, source_prompt: str, target_prompt: str, token_map: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens of the words of either prompt that the other does not have.

    Args:
        model: whose tokenizers.
        source_prompt: what the image shows.
        target_prompt: what it should show.
        token_map: int64 ``[L]``, from `align`.

    Returns:
        Of the target and of the source, bool ``[L]`` each.
    """
    real = [torch.zeros(len(token_map), dtype=torch.bool) for _ in range(2)]
    for segment in model.tokenize([source_prompt, target_prompt]):
        for row, places in enumerate(real):
            for position in range(segment.length):
                places[segment.start + position] = (
                    not segment.pad_mask[row][position]
                    and segment.ids[row][position] not in segment.special
                )
    met = torch.zeros_like(real[0])
    met[token_map[token_map != NOTHING]] = True
    return real[1] & (token_map == NOTHING), real[0] & ~met


class AttentionMask(Gathered):
    """Where a target's new words are looked at; if it has none, where its deleted ones are.

    Args:
        model: whose attentions.
        threshold: as for every gathered mask; evidence begins at the smallest of an image.
        steps: of the editing.
        changed: the targets' new tokens, bool ``[T, L]``.
        deleted: the tokens of their sources that they lack, bool ``[T, L]``.
        shape: of the latents, ``[..., h, w]``.
    """

    def __init__(
        self,
        model: FlowModel,
        threshold: float,
        steps: int,
        changed: Tensor,
        deleted: Tensor,
        shape: Sequence[int],
    ) -> None:
        super().__init__(threshold, steps)
        self.changed, self.deleted = changed, deleted
        self.shape = (shape[-2], shape[-1])
        self.cells = (shape[-2] // model.patch, shape[-1] // model.patch)
        # Deleted words stand in the source's prompt alone, so its row has to run for them.
        deletions = ~changed.any(1) & deleted.any(1)
        self.source_steps = self.steps if deletions.any() else 0
        self._sites = model.attention_sites()
        first, last = (share * len(self._sites) for share in SITES)
        self.points = [
            Point(site, feature, stream)  # type: ignore[arg-type]
            for site in range(int(first), max(int(first) + 1, round(last)))
            for feature, stream in _PARTS
        ]
        self._wanted = frozenset(self.points)
        self._parts: dict[Point, Tensor] = {}
        self._sum = torch.zeros(len(changed), self.cells[0] * self.cells[1])
        self._count = 0

    def see(
        self,
        point: Point,
        features: Tensor,
        rows: Rows,
        cond: Conditioning,
        network: TappedNetwork,
    ) -> None:
        """Look at the features of all rows at a point; a site is read once it is whole."""
        if point not in self._wanted:
            return
        self._parts[point] = features
        parts = [self._parts.get(Point(point.site, *part)) for part in _PARTS]  # type: ignore[arg-type]
        if any(part is None for part in parts):
            return
        self._parts.clear()
        if not self._count:
            self._sum = self._sum.to(features.device)
        query, key, text = self._prepared(self._sites[point.site], parts, network)
        for number, row in enumerate(rows.targets):
            tokens = self.changed[rows.pairs[number]]
            if not tokens.any():
                tokens = self.deleted[rows.pairs[number]]
                if not (tokens.any() and rows.sources):
                    continue
                row = rows.sources[number]
            attended = None if cond.mask is None else cond.mask[row]
            self._sum[number] += attention_to(query[row], key[row], text[row], tokens, attended)
        self._count += 1

    def mask(self) -> Tensor:
        """1 where the edit belongs, 0 where the source stays, ``[T, 1, h, w]``."""
        heat = (self._sum / max(1, self._count)).unflatten(1, (1, *self.cells))
        heat = heat - heat.amin((2, 3), keepdim=True)
        return F.interpolate(self.cut(heat), size=self.shape, mode="bilinear")

    def _prepared(self, site: AttentionSite, parts: Any, network: TappedNetwork) -> list[Tensor]:
        """Image queries, image keys and text keys as they meet, ``[B, n, heads, d]`` in float32."""
        attention: Any = site.attention
        names = ("norm_q", "norm_k", "norm_k" if site.fused else "norm_added_k")
        phases = network.phases
        turned = (None,) * 3 if phases is None else (phases[1], phases[1], phases[0])
        made = []
        for part, name, phase in zip(parts, names, turned, strict=True):
            x, norm = part.unflatten(-1, (attention.heads, -1)), getattr(attention, name)
            x = (x if norm is None else norm(x)).float()
            made.append(x if phase is None else rotated(x, phase))
        return made


def attention_to(
    query: Tensor, key: Tensor, text: Tensor, tokens: Tensor, attended: Tensor | None = None
) -> Tensor:
    """How much of each image token's attention goes to some text tokens, mean over heads: ``[n]``.

    Args:
        query: of the image tokens, ``[n, heads, d]``.
        key: likewise.
        text: keys of the text tokens, ``[L, heads, d]``.
        tokens: which text tokens, bool ``[L]`` on the CPU.
        attended: which text tokens are attended to at all, bool ``[L]``; all if None.
    """
    keys = torch.cat([text, key])
    seen = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    if attended is not None:
        seen[: len(text)] = attended.bool()
    chosen = tokens.nonzero()[:, 0]
    total = query.new_zeros(len(query))
    for head in range(query.shape[1]):  # one head at a time: the whole is large
        scores = query[:, head] @ keys[:, head].T / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        total += take(scores.softmax(-1), chosen, 1).sum(-1)
    return total / query.shape[1]


def rotated(x: Tensor, phases: Tensor) -> Tensor:
    """Rotary embedding: neighbouring pairs of ``[B, n, heads, d]`` turned by ``[n, d/2]``."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * phases[:, None]).flatten(-2)
