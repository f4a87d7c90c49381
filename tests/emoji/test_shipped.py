"""The shipped models: complete, small, loadable without us, and good enough to invert."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.emoji.vae import HELD_OUT, scenes
from rectiflow.flow.solver import integrate
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models.folder import INDEX
from rectiflow.models.generate import generate
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.load import WEIGHTS, load
from tests.presets import FIXED_POINT
from tests.straighten.stock import plainly_drawn, python

MODELS = ("emoji-vae", "emoji-clip", "emoji-sd3", "emoji-sd", "emoji-2rf", "emoji-instaflow")
MEBIBYTE = 2**20


def test_the_shipped_weights_keep_their_budget() -> None:
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert {file.relative_to(WEIGHTS).parts[0] for file in files} == set(MODELS)
    assert sum(file.stat().st_size for file in files) <= 72e6
    assert max(file.stat().st_size for file in files) <= 16 * MEBIBYTE
    for name in MODELS:
        assert (WEIGHTS / name / "README.md").read_text().startswith("---\nlicense:")


def test_stock_diffusers_loads_and_runs_the_pipeline_where_we_are_not_installed(
    tmp_path: Path,
) -> None:
    program = f"""
import sys
sys.modules["rectiflow"] = None
import torch
from diffusers import StableDiffusion3Pipeline
torch.set_num_threads(1)
pipe = StableDiffusion3Pipeline.from_pretrained({str(WEIGHTS / "emoji-sd3")!r}, dtype=torch.float32)
image = pipe("two lemons on a blue background", height=64, width=64, num_inference_steps=8,
             guidance_scale=3.0, max_sequence_length=1,
             generator=torch.Generator().manual_seed(0)).images[0]
image.save({str(tmp_path / "lemons.png")!r})
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    from PIL import Image

    with Image.open(tmp_path / "lemons.png") as image:
        assert image.size == (64, 64)
        red, _, blue = image.convert("RGB").getpixel((2, 60))  # type: ignore[misc]
    assert blue > red + 60  # a blue background


def test_the_diffusion_model_is_a_stock_pipeline(tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["rectiflow"] = None
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained({str(WEIGHTS / "emoji-sd")!r}, dtype=torch.float32)
image = pipe("a green apple on a red background", height=64, width=64, num_inference_steps=12,
             guidance_scale=5.0, generator=torch.Generator().manual_seed(0)).images[0]
image.save({str(tmp_path / "apple.png")!r})
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    from PIL import Image

    with Image.open(tmp_path / "apple.png") as image:
        red, green, _ = image.convert("RGB").getpixel((2, 2))  # type: ignore[misc]
    assert red > green + 60  # a red background


def test_every_pipeline_draws_as_it_is_loaded_plainly(tmp_path: Path) -> None:
    """The files are in half precision; the parts agree about the dtype, named or not."""
    folders = {name: str(WEIGHTS / name) for name in MODELS if (WEIGHTS / name / INDEX).is_file()}
    assert len(folders) == 4
    plainly_drawn(folders, tmp_path, height=64, width=64)
    python(
        f"""
import torch
from transformers import CLIPModel, CLIPTokenizer
folder = {str(WEIGHTS / "emoji-clip")!r}
words = CLIPTokenizer.from_pretrained(folder)("a red apple", return_tensors="pt")
CLIPModel.from_pretrained(folder)(**words, pixel_values=torch.zeros(1, 3, 64, 64))
""",
        tmp_path,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("preset", [PRESETS["exact"], FIXED_POINT], ids=["exact", "fixed point"])
def test_scenes_come_back_without_compensation(preset: Preset) -> None:
    """A garbage inversion would pass any test of the compensated reconstruction, not this one."""
    model = load("emoji-sd3")
    seeds = range(HELD_OUT + 100, HELD_OUT + 103)
    latents = model.encode_image(scenes(seeds))
    velocity = GuidedVelocity(model, model.encode_prompt([caption(sample(s)) for s in seeds]))
    grid = grid_for(model, preset, latents)
    path = invert_latents(velocity, latents, grid, preset)
    solver = SCHEMES[preset.scheme].solver(path, grid, torch.arange(len(seeds)))
    again = integrate(velocity, path.trajectory[0], grid, solver).x
    error = (model.decode(again) - model.decode(latents)).square().mean((1, 2, 3))
    assert preset.num_inference_steps == 30
    assert (-10 * torch.log10(error)).min() >= 40


@pytest.mark.parametrize(
    ("name", "steps"), [("emoji-2rf", 2), ("emoji-2rf", 8), ("emoji-instaflow", 1)]
)
def test_stock_diffusers_makes_the_pictures_of_the_straightened_models(
    tmp_path: Path, name: str, steps: int
) -> None:
    """As their cards have it; the same noise gives the same picture here."""
    program = f"""
import sys
sys.modules["rectiflow"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(WEIGHTS / name)!r}, torch_dtype=torch.float32)
draw = torch.Generator().manual_seed(3)
noise = torch.randn(pipe.unet.config.in_channels, 16, 16, generator=draw)[None]
pipe("two lemons on a blue background", latents=noise, height=64, width=64,
     num_inference_steps={steps}, guidance_scale=1).images[0].save({str(tmp_path / "a.png")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=170, cwd=tmp_path)
    model = load(name)
    assert model.default_guidance_scale == 1
    prompt = "two lemons on a blue background"
    ours = generate(model, prompt, seed=3, num_inference_steps=steps, grid="student")[0]
    theirs = np.asarray(Image.open(tmp_path / "a.png"), dtype=int)
    assert np.abs(np.asarray(ours, dtype=int) - theirs).max() <= 1


def test_the_one_step_model_takes_one_step() -> None:
    model = load("emoji-instaflow")
    seen: list[int] = []
    model.network.register_forward_pre_hook(lambda *_: seen.append(1))
    generate(model, ["a rose on a gray background"] * 2, seed=[0, 1])
    assert len(seen) == 1
