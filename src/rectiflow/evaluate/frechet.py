"""Fréchet distance between two sets of features: how far apart two piles of pictures are.

The name is the features': with a CLIP's they make a "Fréchet distance in CLIP features", and only
with Inception's of 2015 is it the FID of the literature.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save_file

from rectiflow.errors import InputError
from rectiflow.files import replacing
from rectiflow.guarded import Missing, Unreadable, read_tensors

PARTS = 10
"""Of the jackknife."""


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean and covariance of features, all that the distance sees of them; float64."""

    mean: NDArray[np.float64]
    """[D]."""
    covariance: NDArray[np.float64]
    """[D, D], divided by count - 1; zeros of a single feature vector."""
    count: int

    @classmethod
    def of(cls, features: ArrayLike) -> GaussianStatistics:
        """The statistics of features [N, D].

        Raises:
            InputError: There are none, or they are not numbers.

        Example:
            >>> GaussianStatistics.of([[0.0], [2.0]]).covariance
            array([[2.]])
        """
        rows = np.asarray(features, np.float64)
        if rows.ndim != 2 or len(rows) == 0 or not np.isfinite(rows).all():
            raise InputError(f"features are finite numbers [N, D], not {list(rows.shape)} of them")
        mean = rows.mean(0)
        centred = rows - mean
        return cls(mean, centred.T @ centred / max(1, len(rows) - 1), len(rows))

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """The statistics of both sets together, to rounding (Chan et al. 1979)."""
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = sum(part.covariance * (part.count - 1) for part in (self, other))
        scatter += np.outer(step, step) * (self.count * other.count / count)
        mean = self.mean + step * (other.count / count)
        return GaussianStatistics(mean, scatter / (count - 1), count)

    def digest(self) -> str:
        """SHA-256 over the numbers' bytes: what a table names its reference by.

        It is kept by `save` and `load`. Computed again on another machine or in other batches the
        numbers may differ in their last bits, and then so does this.
        """
        found = hashlib.sha256(str(self.count).encode())
        for numbers in (self.mean, self.covariance):
            found.update(np.ascontiguousarray(numbers, "<f8").tobytes())
        return found.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "mean": np.ascontiguousarray(self.mean),
            "covariance": np.ascontiguousarray(self.covariance),
            "count": np.array(self.count, np.int64),
        }
        with replacing(path, shared=True) as unfinished:
            save_file(arrays, unfinished, {"digest": self.digest()})

    @classmethod
    def load(cls, path: Path, digest: str | None = None) -> GaussianStatistics:
        """Read what `save` wrote.

        Args:
            path: The file.
            digest: What it is pinned to.

        Raises:
            InputError: There is no such file, it holds something else, or it has another digest.
        """
        try:
            tensors, texts = read_tensors(path)
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            found = cls(arrays["mean"], arrays["covariance"], int(arrays["count"]))
            if texts.get("digest", found.digest()) != found.digest():
                raise Unreadable(path, "is not what was written")
        except Missing as error:
            raise InputError(f"there is no file {path} of reference statistics") from error
        except (Unreadable, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no statistics of features: make it again") from error
        if digest is not None and found.digest() != digest:
            raise InputError(
                f"{path} holds other reference statistics ({found.digest()[:12]}) than are asked "
                f"for ({digest[:12]}): figures against the two do not compare"
            )
        return found


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """`‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½)`, squared as in the literature; 0 or more.

    The trace of the root is the sum of the singular values of `Σ_a^½ Σ_b^½`, which takes no root
    of a small difference. Of finite sets it is too large, by about 1 / N: compare equal N.
    Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6.

    Raises:
        InputError: A set has fewer than two members, or they have different features.

    Example:
        >>> one, two = ([[0.0], [2.0]], [[3.0], [9.0]])  # means 1 and 6, deviations √2 and √18
        >>> round(frechet_distance(GaussianStatistics.of(one), GaussianStatistics.of(two)), 9)
        33.0
    """
    if min(a.count, b.count) < 2:
        raise InputError("a Fréchet distance needs two or more pictures on either side")
    if a.mean.shape != b.mean.shape:
        raise InputError(f"features of {len(a.mean)} and of {len(b.mean)} numbers do not compare")
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    total = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(0.0, float(np.square(a.mean - b.mean).sum() + total))


@dataclass(frozen=True)
class FrechetEstimate:
    """A Fréchet distance of a set of pictures from a reference, and how well it is known."""

    value: float
    left_out: tuple[float, ...]
    """The distance with each part of the set left out in turn."""
    count: int
    """Pictures in the set."""
    dimensions: int
    """Of their features."""

    @property
    def caution(self) -> str | None:
        """What makes the figure mostly an accident of a small set; None if the set is large enough.

        N pictures span N - 1 directions at most, so that up to as many as there are dimensions
        their covariance is singular, and the distance mostly its bias.
        """
        if self.count > self.dimensions:
            return None
        return (
            f"{self.count} pictures are too few for features of {self.dimensions} dimensions: "
            f"their covariance is singular and the figure mostly bias; give more than "
            f"{self.dimensions} (published ones have 5000 or 30 000), and compare at equal numbers"
        )

    @property
    def standard_error(self) -> float:
        """See `jackknife_error`: of the drawing of the set's pictures, the reference being fixed;
        it does not cover the bias of a finite set, nor how the model happened to be trained.
        """
        return jackknife_error(self.left_out)


def frechet_estimate(
    features: ArrayLike, reference: GaussianStatistics, parts: int = PARTS
) -> FrechetEstimate:
    """The Fréchet distance of features from a reference, with its jackknife.

    Args:
        features: [N, D].
        reference: What they are compared with.
        parts: Part j has the features j, j + parts, …; there are at most N.

    Raises:
        InputError: As `frechet_distance`; or there are fewer than three features.
    """
    rows = np.asarray(features, np.float64)
    if len(rows) < 3:
        raise InputError(f"{len(rows)} pictures say nothing of a Fréchet distance: give 3 or more")
    parts = min(parts, len(rows))
    each = [GaussianStatistics.of(rows[j::parts]) for j in range(parts)]
    left_out = (
        frechet_distance(
            functools.reduce(GaussianStatistics.merge, each[:j] + each[j + 1 :]), reference
        )
        for j in range(parts)
    )
    return FrechetEstimate(
        frechet_distance(GaussianStatistics.of(rows), reference), tuple(left_out), *rows.shape
    )


def jackknife_error(left_out: Sequence[float]) -> float:
    """The delete-a-group standard error `√((g - 1)/g Σ_j (θ_(j) - mean)²)` of g values.

    `θ_(j)` is the figure without part j. Source: Shao and Tu, The Jackknife and Bootstrap (1995),
    section 2.3. Of a mean it is the usual standard error, by g parts.

    Example:
        >>> jackknife_error([2.5, 2.0, 1.5])  # the mean of 1, 2, 3
        0.577
    """
    values = np.asarray(left_out, np.float64)
    g = len(values)
    return math.sqrt((g - 1) / g * float(np.square(values - values.mean()).sum()))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric square root; what is negative by rounding counts as 0."""
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root
