"""A task small enough to train in a test: flow matching from noise to that noise turned by 90°.

Run as a program, it trains in the folder it is given and can be killed at any moment.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.trainer import Trainer


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.Linear(32, 2)
        )

    def forward(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        x_t = torch.lerp(x_0, x_1, t)
        return (self.network(torch.cat([x_t, t], 1)) - (x_1 - x_0)).square().mean(1)


class ToyTask:
    def __init__(self, poison_step: int | None = None) -> None:
        self.network: nn.Module = Objective()
        self.poison = poison_step

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = []
        for index in indices:
            generator = torch.Generator().manual_seed(index)
            rows.append(torch.randn(3, generator=generator))
        drawn = torch.stack(rows)
        x_1 = drawn[:, :2] @ torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
        if self.poison is not None and indices[0] >= self.poison * len(indices):
            x_1 = x_1 * torch.nan
        return {"x_0": drawn[:, :2], "x_1": x_1, "t": torch.sigmoid(drawn[:, 2:])}

    def draw_samples(self, path: Path) -> None:
        path.write_bytes(b"")

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.Tensor.numpy(self.network.state_dict()["network.0.bias"]).tofile(folder / "bias.bin")


def config(**settings: object) -> TrainConfig:
    defaults: dict[str, object] = {
        "recipe": "toy",
        "steps": 60,
        "batch_size": 16,
        "warmup_steps": 5,
        "decay_steps": 20,
        "muon_learning_rate": 1e-2,
        "log_every": 1,
        "checkpoint_minutes": 1e-9,  # after every step
    }
    return TrainConfig.model_validate(defaults | settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = Trainer(ToyTask(), config(), Path(sys.argv[1]))
    trainer.resume()
    trainer.train()
