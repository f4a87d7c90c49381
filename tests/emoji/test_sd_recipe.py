"""The recipe of `emoji-sd`: its samples depend on their numbers alone, its target is as stated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rectiflow.emoji import latents
from rectiflow.emoji.sd import SdConfig, SdTask
from rectiflow.flow.diffusion import variance_preserving

DISTINCT = 100


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SdConfig]:
    """Of a hundred scenes: encoding the thousand of a chunk takes half a minute."""
    config = SdConfig(distinct=DISTINCT, latents=tmp_path_factory.mktemp("latents"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "CHUNK", 100)
        yield config.model_copy(update={"scenes": 100})


@pytest.fixture(scope="module")
def task(config: SdConfig) -> SdTask:
    return SdTask(config)


def test_the_target_is_the_noise_that_the_teacher_expects(task: SdTask) -> None:
    indices = range(8)
    x_1, x_0, timestep, captions = task._draw(indices)
    batch, s = task.batch(indices), task.path.straight_time(timestep)
    a, b = (c.float().reshape(-1, 1, 1, 1) for c in variance_preserving(s))
    # The state is on the diffusion's path, of latents without the codec's shift …
    raw = x_1 / task.vae.config.scaling_factor + task.vae.config.shift_factor
    torch.testing.assert_close(
        batch["x_t"], a * raw * task.vae.config.scaling_factor + b * x_0, atol=1e-5, rtol=1e-5
    )
    # … and x_1 and the expected noise, put together again, are the teacher's velocity.
    time = s.float().reshape(-1, 1, 1, 1)
    x = (1 - time) * x_0 + time * x_1
    v = task.teacher.velocity(x, s.float(), task.teacher.encode_prompt(captions))
    torch.testing.assert_close((x - batch["epsilon"]) / time, v, atol=0.02, rtol=0.01)
    # It is no copy of the noise, and correlates with it.
    error = (batch["epsilon"] - x_0).square().mean()
    assert 1e-4 < error < 0.5


def test_samples_depend_on_their_number_alone(config: SdConfig, task: SdTask) -> None:
    first = task.batch(range(40, 104))
    other = SdTask(config)
    halves = [
        other.batch(range(DISTINCT + start, DISTINCT + start + 16)) for start in range(40, 104, 16)
    ]
    for name, value in first.items():
        assert torch.equal(value, torch.cat([half[name] for half in halves])), name


def test_a_perfect_prediction_has_no_loss(task: SdTask) -> None:
    batch = task.batch(range(6))
    weight = batch["s"].square().reciprocal().clamp(max=25.0)

    class Answer(torch.nn.Module):
        def forward(self, *_: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (batch["epsilon"] + self.off,)

    objective, answer = task.network, Answer()
    unet, objective.unet = objective.unet, answer
    try:
        for off in (0.0, 0.5):
            answer.off = off
            torch.testing.assert_close(objective(**batch), weight * off**2)
    finally:
        objective.unet = unet
