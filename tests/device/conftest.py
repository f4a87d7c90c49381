"""The fake accelerator, while the cases of a file last."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from tests.device.fake import fake_accelerator


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    with fake_accelerator() as found:
        yield found


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    return Image.fromarray(pixels)
