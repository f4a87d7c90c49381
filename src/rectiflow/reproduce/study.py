"""A study as data: stores of pairs, students, and the rows that are measured on them.

Everything has a name and says what it needs by name, so that any number of processes can work on
one study, each making what is ready and not yet there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Settings = dict[str, Any]
CLIP = "emoji-clip"
"""In whose features pictures are compared."""


@dataclass(frozen=True)
class Store:
    """Pairs that a teacher makes.

    Args:
        name: Of the store; unique among all items of a study.
        teacher: A model, or the name of a student.
        num: How many pairs.
        num_inference_steps: Of the teacher.
        guidance_scale: Of the teacher.
        solver: Of the teacher, as in `make_pairs`.
        held_out: Make them of captions that no training sees; to measure on.
    """

    name: str
    teacher: str
    num: int
    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    solver: str = "dpmpp"
    held_out: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of what must be there before."""
        return (self.teacher,)


@dataclass(frozen=True)
class Student:
    """A model that is trained in one phase or several, one after the other.

    Args:
        name: Of the student.
        begins: A model, or the name of a student.
        pairs: The name of a store; None for a student that makes its own.
        phases: Settings of `StraightenConfig` for each.
    """

    name: str
    begins: str
    pairs: str | None
    phases: tuple[Settings, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of what must be there before."""
        judges = {phase["lpips_weights"] for phase in self.phases if "lpips_weights" in phase}
        return (self.begins, *((self.pairs,) if self.pairs else ()), *sorted(judges))

    @property
    def samples(self) -> int:
        """Training samples of all its phases."""
        return sum(phase["steps"] * phase["batch_size"] for phase in self.phases)


@dataclass(frozen=True)
class Pictures:
    """A row of figures about pictures: a model at a number of steps.

    Args:
        name: Of the row.
        model: A model, or the name of a student.
        num_inference_steps: N.
        guidance_scale: α.
        solver: As in `generate_latents`; None for Euler on the student's own grid.
        num: How many pictures.
        against: The names of rows whose pictures of the same seeds it is compared with.
        judged: How many of the first the sprite judge sees.
        spacing: Of the timesteps of diffusers' solvers; None: as the model's scheduler says.
    """

    name: str
    model: str
    num_inference_steps: int
    guidance_scale: float = 1.0
    solver: str | None = None
    num: int = 1000
    against: tuple[str, ...] = ()
    judged: int = 200
    spacing: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of what must be there before."""
        return (self.model, *self.against, CLIP)


@dataclass(frozen=True)
class Flow:
    """A row of figures about a model's trajectories: straightness and transport cost.

    Args:
        name: Of the row.
        model: A model, or the name of a student.
        guidance_scale: α of the field.
        num: How many trajectories.
        pairs: A store of held-out pairs: the errors of few steps against its latents are measured.
        straight: Whether to follow trajectories at all; else the errors alone are measured.
    """

    name: str
    model: str
    guidance_scale: float = 1.0
    num: int = 256
    pairs: str | None = None
    straight: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of what must be there before."""
        return (self.model, *((self.pairs,) if self.pairs else ()))


Item = Store | Student | Pictures | Flow


@dataclass(frozen=True)
class Study:
    """Items in the order in which they are best made.

    Args:
        name: Of the paper.
        size: How much of it.
        items: All of them.
    """

    name: str
    size: Literal["small", "full"]
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        names = [item.name for item in self.items]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"two items are called {', '.join(double)}")

    def item(self, name: str) -> Item | None:
        """The item of a name; None if it is a model's."""
        return next((item for item in self.items if item.name == name), None)

    def only(self, wanted: Iterable[str]) -> list[Item]:
        """Some items and all that they need, in order.

        Args:
            wanted: Names; what is no name is the beginning of some: `direct` is that of `direct-0`
                and `direct-1`.

        Raises:
            KeyError: A name is nothing's beginning.
        """
        taken: set[str] = set()
        waiting: list[str] = []
        for name in wanted:
            if self.item(name) is not None:
                found = [name]
            else:
                found = [item.name for item in self.items if item.name.startswith(name)]
            if not found:
                raise KeyError(name)
            waiting += found
        while waiting:
            item = self.item(waiting.pop())
            if item is not None and item.name not in taken:
                taken.add(item.name)
                waiting += item.needs
        return [item for item in self.items if item.name in taken]


def trained_samples(study: Study, name: str) -> int:
    """Training samples of a student and of those it descends from; 0 of a model from elsewhere."""
    student = study.item(name)
    if not isinstance(student, Student):
        return 0
    return student.samples + trained_samples(study, student.begins)
