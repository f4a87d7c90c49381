"""A flow model of one pixel: small enough to be trained to its optimum, which is known.

Noise N(0, 1) becomes N(m, s²), m and s by the prompt. The network is linear in the state, as the
true fields are: `v = slope(t, prompt) x + offset(t, prompt)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rectiflow.flow.grid import uniform
from rectiflow.models import Conditioning, FlowModel
from tests.flow.gaussians import TwoGaussians

WORLD = {"wide": TwoGaussians(1.0, 3.0), "narrow": TwoGaussians(-1.0, 0.5)}
PROMPTS = list(WORLD)


class Line(nn.Module):
    """Slope and offset of the velocity as functions of time, one network per prompt."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        told = torch.cat([t[:, None], embeds[:, 0]], 1)
        slope, offset = self.inner(told)[..., None, None, None].unbind(1)
        return slope * x + offset


class ToyFlow(FlowModel):
    family: ClassVar[str] = "toy"
    text_first: ClassVar[bool] = True
    t_min = 0.0
    t_max = 1.0
    prediction_type = "velocity"
    diffusion_path = None
    factor = patch = channels = 1
    largest = default_size = 64
    default_guidance_scale = 1.0
    default_num_inference_steps = 20
    shift = 1.0

    def __init__(self, network: nn.Module | None = None) -> None:
        if network is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = Line()
        self._network = network
        super().__init__(pipeline=None, name="toy")

    @property
    def network(self) -> Any:
        return self._network

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [[float(text == name) for name in PROMPTS] for text in prompts]
        return Conditioning(torch.tensor(rows)[:, None])

    def differentiable_velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
        return self.network(x, t, cond.embeds)

    def velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        with torch.no_grad():
            return self.differentiable_velocity(x, t, cond)

    def initial_state(self, x_0: Tensor) -> Tensor:
        return x_0

    def student_grid(self, num_steps: int) -> Tensor:
        return uniform(num_steps).float()

    def tokenize(self, prompts: str | Sequence[str]) -> list[Any]:
        return []

    def encode_image(self, images: Tensor) -> Tensor:
        return images[:, :1]

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    def attention_sites(self) -> list[Any]:
        return []


class World(nn.Module):
    """The true field, in the place of a network: the teacher."""

    def forward(self, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        rows = []
        for row, time, which in zip(x, t, embeds[:, 0].argmax(1), strict=True):
            rows.append(WORLD[PROMPTS[int(which)]].velocity(row, time))
        return torch.stack(rows).float()


class TrainedWorld(World):
    """The same with a parameter, as `FlowModel.dtype` and trainers want one."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))


def numbers(count: int, start: int = 0) -> range:
    return range(start, start + count)
