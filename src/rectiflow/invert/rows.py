"""A guided field whose rows can be asked alone, for schemes that finish with rows one by one."""

from __future__ import annotations

from torch import Tensor

from rectiflow.models.base import Conditioning, GuidedVelocity


class RowwiseGuidedVelocity:
    """A `GuidedVelocity` as a `RowwiseVelocity`.

    Args:
        velocity: the field.
        rows: how many rows there are.
    """

    def __init__(self, velocity: GuidedVelocity, rows: int) -> None:
        self.velocity = velocity
        self.rows = rows

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        """The velocity of all rows."""
        return self.velocity(x, t, step)

    def select(self, rows: Tensor) -> GuidedVelocity:
        """The field of the rows with these numbers."""

        def chosen(prompts: Conditioning) -> Conditioning:
            return prompts.rows(self.rows)[rows]

        field, negative = self.velocity, self.velocity.negative
        return GuidedVelocity(
            field.model,
            chosen(field.cond),
            None if negative is None else chosen(negative),
            field.guidance_scale,
        )
