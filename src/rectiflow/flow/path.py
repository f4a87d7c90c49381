"""Paths between noise and data, and the exact conversions between what networks predict.

A path is `x_t = a_t x_1 + b_t x_0`. A network on it predicts some `p x_1 + q x_0`, so one
prediction and the state are two linear equations in the two unknowns `E[x_1 | x_t]` and
`E[x_0 | x_t]`: every prediction follows from any other (`convert`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rectiflow.errors import InputError

Scalar = float | Tensor
Weights = tuple[Scalar, Scalar]

_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Weights]] = {  # (p, q) of p x_1 + q x_0
    "epsilon": lambda a, b: (0.0, 1.0),
    "sample": lambda a, b: (1.0, 0.0),
    "v_prediction": lambda a, b: (-b, a),
    "velocity": lambda a, b: (1.0, -1.0),
}
PREDICTIONS = tuple(_WEIGHTS)


def convert(
    value: Tensor, x_t: Tensor, a: Scalar, b: Scalar, *, source: str, target: str
) -> Tensor:
    """Turn one prediction at `x_t = a x_1 + b x_0` into another, exactly.

    The predictions are `"epsilon"` = E[x_0], `"sample"` = E[x_1], `"v_prediction"` =
    a E[x_0] - b E[x_1] (diffusion v: Salimans & Ho 2022, arXiv 2202.00512, appendix D) and
    `"velocity"` = E[x_1] - E[x_0] (rectified flow).

    Args:
        value: The prediction, shape [B, ...].
        x_t: The state it was made at, same shape; its dtype is the result's.
        a: Weight of the data in `x_t`: a number, or one per sample, shape [B].
        b: Weight of the noise in `x_t`, likewise.
        source: What `value` is.
        target: What it becomes.

    Returns:
        The target prediction, shape [B, ...].

    Raises:
        InputError: An unknown prediction, or one that does not determine the others:
            ε where a = 0, x_1 where b = 0.

    Example:
        >>> x_0, x_1 = torch.tensor([[2.0]]), torch.tensor([[5.0]])
        >>> convert(x_0, 0.6 * x_1 + 0.8 * x_0, 0.6, 0.8, source="epsilon", target="velocity")
        tensor([[3.]])
    """
    a, b = as_tensor(a), as_tensor(b)
    return _solve(value, x_t, a, b, _weights(source, a, b), _weights(target, a, b))


def to_straight(x_t: Tensor, a: Scalar, b: Scalar) -> tuple[Tensor, Tensor]:
    """Bring a state of any affine path to the straight one: `x = x_t / (a + b)`, `s = a / (a + b)`.

    There `x = s x_1 + (1 - s) x_0` for the same x_0 and x_1, and the path's own probability flow
    becomes `dx/ds = E[x_1 | x] - E[x_0 | x]`: the "velocity" of `convert`.

    Returns:
        `x`, shape and dtype of `x_t`, and the straight time `s`, shape of `a`.

    Example:
        >>> to_straight(torch.tensor([2.8]), 0.6, 0.8)[0]
        tensor([2.])
    """
    a, b = as_tensor(a), as_tensor(b)
    return x_t / _expand(a + b, x_t), a / (a + b)


def from_straight(x: Tensor, a: Scalar, b: Scalar) -> Tensor:
    """Bring a state of the straight path at `s = a / (a + b)` back to `x_t = (a + b) x`.

    Example:
        >>> from_straight(torch.tensor([2.0]), 0.6, 0.8)
        tensor([2.8000])
    """
    return x * _expand(as_tensor(a) + as_tensor(b), x)


@dataclass(frozen=True)
class PathSample:
    """A point of a path: `x_t` at time `t` between `x_0` and `x_1`, with its velocity `dx_t`."""

    x_t: Tensor
    x_0: Tensor
    x_1: Tensor
    t: Tensor
    dx_t: Tensor


class AffinePath:
    """`x_t = a(t) x_1 + b(t) x_0` for any two differentiable functions of time.

    Args:
        a: Weight of the data, a torch function of times of any shape; a(0) is (near) 0.
        b: Weight of the noise; b(1) is (near) 0.

    Example:
        >>> quarter_circle = AffinePath(lambda t: (t * torch.pi / 2).sin(),
        ...                             lambda t: (t * torch.pi / 2).cos())
        >>> quarter_circle.sample(torch.ones(1, 2), torch.zeros(1, 2), 0.0).x_t
        tensor([[1., 1.]])
    """

    def __init__(self, a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor]) -> None:
        self._a, self._b = a, b

    def coefficients(self, t: Scalar) -> tuple[Tensor, Tensor]:
        """(a, b) at times `t`."""
        t = as_tensor(t)
        return self._a(t), self._b(t)

    def derivatives(self, t: Scalar) -> tuple[Tensor, Tensor]:
        """(da/dt, db/dt) at times `t`, by forward-mode differentiation."""
        t = as_tensor(t)
        one = torch.ones_like(t)
        return torch.func.jvp(self._a, (t,), (one,))[1], torch.func.jvp(self._b, (t,), (one,))[1]

    def sample(self, x_0: Tensor, x_1: Tensor, t: Scalar) -> PathSample:
        """The point at time `t` and its velocity, the target of flow matching.

        Args:
            x_0: Noise, shape [B, ...].
            x_1: Data, same shape.
            t: One time, or one per sample, shape [B].

        Returns:
            `x_t = a x_1 + b x_0` and `dx_t = a' x_1 + b' x_0` with what they were made of.
        """
        t = as_tensor(t)
        (a, b), (da, db) = self.coefficients(t), self.derivatives(t)
        x_t = _expand(a, x_0) * x_1 + _expand(b, x_0) * x_0
        dx_t = _expand(da, x_0) * x_1 + _expand(db, x_0) * x_0
        return PathSample(x_t=x_t, x_0=x_0, x_1=x_1, t=t, dx_t=dx_t)

    def velocity(self, value: Tensor, x_t: Tensor, t: Scalar, *, source: str) -> Tensor:
        """The velocity of this path's own probability flow, `a' E[x_1 | x_t] + b' E[x_0 | x_t]`.

        Args:
            value: A prediction made at `x_t`, shape [B, ...].
            x_t: The state, same shape.
            t: One time, or one per sample, shape [B].
            source: What `value` is, as in `convert`.
        """
        a, b = self.coefficients(t)
        return _solve(value, x_t, a, b, _weights(source, a, b), self.derivatives(t))


class StraightPath(AffinePath):
    """`x_t = (1 - t) x_0 + t x_1` (rectified flow, Liu et al. 2022, arXiv 2209.03003, eq. 1).

    Example:
        >>> point = StraightPath().sample(torch.zeros(1, 2), torch.ones(1, 2), 0.25)
        >>> point.x_t, point.dx_t
        (tensor([[0.2500, 0.2500]]), tensor([[1., 1.]]))
    """

    def __init__(self) -> None:
        super().__init__(lambda t: t, lambda t: 1 - t)

    def derivatives(self, t: Scalar) -> tuple[Tensor, Tensor]:
        """(1, -1): no need to differentiate."""
        one = torch.ones_like(as_tensor(t))
        return one, -one


def _weights(prediction: str, a: Tensor, b: Tensor) -> Weights:
    if prediction not in _WEIGHTS:
        raise InputError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")
    return _WEIGHTS[prediction](a, b)


def _solve(
    value: Tensor, x_t: Tensor, a: Tensor, b: Tensor, source: Weights, target: Weights
) -> Tensor:
    """`p' x_1 + q' x_0` from `a x_1 + b x_0 = x_t` and `p x_1 + q x_0 = value` (Cramer's rule)."""
    (p, q), (p_, q_) = source, target
    determinant = a * q - b * p
    # On an accelerator the question would make every step wait; what comes out there is not finite,
    # which is looked at once, at the end.
    if determinant.device.type == "cpu" and bool((determinant == 0).any()):
        raise InputError("this prediction does not determine the path here: keep a and b above 0")
    of_value = _expand((a * q_ - b * p_) / determinant, x_t)
    of_state = _expand((p_ * q - q_ * p) / determinant, x_t)
    return of_value * value + of_state * x_t


def as_tensor(value: Scalar) -> Tensor:
    """A number in float64, so that no precision is lost before it meets a tensor."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape [] or [B] in the dtype of `x` [B, ...], ready to multiply it."""
    if coefficient.ndim == 0:  # may stay on the CPU, from where a copy would wait for the device
        return coefficient.to(x.dtype)
    return coefficient.to(x).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
