"""Distillation of the toy flow as a program, for several processes: twenty steps into a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rectiflow.straighten.straightening import StraightenTask
from rectiflow.straighten.trainer import Trainer
from tests.straighten.test_coupling import PAIRS
from tests.straighten.test_straightening import settings
from tests.straighten.toy_flow import ToyFlow

if __name__ == "__main__":
    torch.set_num_threads(1)
    given = {"kind": "distill", "steps": 20, "decay_steps": 0, "log_every": 1, "batch_size": 16}
    config = settings(**given, student_steps=[1, 2])
    task = StraightenTask(config, ToyFlow(), PAIRS)
    Trainer(task, config, Path(sys.argv[1])).train()
