"""The shipped models: complete, small, loadable without us, and good enough to invert."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.emoji.tokenizer import KNOWS, words
from rectiflow.emoji.vae import HELD_OUT, scenes
from rectiflow.flow.solver import integrate
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models.folder import INDEX
from rectiflow.models.generate import generate
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.load import WEIGHTS, load
from rectiflow.models.metadata import FILE_NAME, read_metadata
from tests.presets import FIXED_POINT
from tests.straighten.stock import plainly_drawn, python

MODELS = ("emoji-vae", "emoji-clip", "emoji-sd3", "emoji-sd", "emoji-2rf", "emoji-instaflow")
STRAIGHT = {"emoji-2rf": (2, 8), "emoji-instaflow": (1,)}
"""By how many steps each is held to stock diffusers."""
MEBIBYTE = 2**20


def test_the_shipped_weights_keep_their_budget() -> None:
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert {file.relative_to(WEIGHTS).parts[0] for file in files} == set(MODELS)
    assert sum(file.stat().st_size for file in files) <= 72e6
    assert max(file.stat().st_size for file in files) <= 16 * MEBIBYTE
    for name in MODELS:
        assert (WEIGHTS / name / "README.md").read_text().startswith("---\nlicense:")


PROMPT = "two lemons on a blue background"
DRAW = f"""
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

torch.set_num_threads(1)
size = {{"height": 64, "width": 64}}

def loaded(name, kind=DiffusionPipeline):
    return kind.from_pretrained(f"{WEIGHTS}/{{name}}", dtype=torch.float32)

def seeded(seed):
    return torch.Generator().manual_seed(seed)

loaded("emoji-sd3", StableDiffusion3Pipeline)(
    {PROMPT!r}, **size, num_inference_steps=8, guidance_scale=3.0, max_sequence_length=1,
    generator=seeded(0)).images[0].save("emoji-sd3.png")
loaded("emoji-sd", StableDiffusionPipeline)(
    "a green apple on a red background", **size, num_inference_steps=12, guidance_scale=5.0,
    generator=seeded(0)).images[0].save("emoji-sd.png")
for name, counts in {STRAIGHT!r}.items():
    pipe = loaded(name)
    noise = torch.randn(pipe.unet.config.in_channels, 16, 16, generator=seeded(3))[None]
    for steps in counts:
        pipe({PROMPT!r}, latents=noise, **size, num_inference_steps=steps, guidance_scale=1
             ).images[0].save(f"{{name}}-{{steps}}.png")
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where stock pipelines left their pictures, called as the models' cards have it."""
    folder = tmp_path_factory.mktemp("drawn")
    python(DRAW, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "more", "less"), [("emoji-sd3", "blue", "red"), ("emoji-sd", "red", "green")]
)
def test_stock_diffusers_draws_the_background(drawn: Path, name: str, more: str, less: str) -> None:
    with Image.open(drawn / f"{name}.png") as image:
        assert image.size == (64, 64)
        pixel = image.convert("RGB").getpixel((2, 60))
        corner = dict(zip(("red", "green", "blue"), pixel, strict=True))  # type: ignore[arg-type]
    assert corner[more] > corner[less] + 60


CLIP = f"""
from transformers import CLIPModel, CLIPTokenizer
folder = {str(WEIGHTS / "emoji-clip")!r}
words = CLIPTokenizer.from_pretrained(folder)("a red apple", return_tensors="pt")
CLIPModel.from_pretrained(folder)(**words, pixel_values=torch.zeros(1, 3, 64, 64))
"""


def test_every_pipeline_draws_as_it_is_loaded_plainly(tmp_path: Path) -> None:
    """The files are in half precision; the parts agree about the dtype, named or not."""
    folders = {name: str(WEIGHTS / name) for name in MODELS if (WEIGHTS / name / INDEX).is_file()}
    assert len(folders) == 4
    plainly_drawn(folders, tmp_path, then=CLIP, height=64, width=64)


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


@pytest.mark.parametrize("name", STRAIGHT)
def test_stock_diffusers_makes_the_pictures_of_the_straightened_models(
    drawn: Path, name: str
) -> None:
    """The same noise gives the same picture here."""
    model = load(name)
    assert model.default_guidance_scale == 1
    for steps in STRAIGHT[name]:
        ours = generate(model, PROMPT, seed=3, num_inference_steps=steps, grid="student")[0]
        theirs = np.asarray(Image.open(drawn / f"{name}-{steps}.png"), dtype=int)
        assert np.abs(np.asarray(ours, dtype=int) - theirs).max() <= 1


def test_the_one_step_model_takes_one_step() -> None:
    model = load("emoji-instaflow")
    seen: list[int] = []
    model.network.register_forward_pre_hook(lambda *_: seen.append(1))
    generate(model, ["a rose on a gray background"] * 2, seed=[0, 1])
    assert len(seen) == 1


def test_the_words_the_world_s_models_know_are_those_of_its_captions() -> None:
    """Captions of all seeds have no other words, and one that they lack is warned about."""
    for name in ("emoji-sd3", "emoji-sd", "emoji-2rf", "emoji-instaflow"):
        metadata = read_metadata(WEIGHTS / name / FILE_NAME)
        assert metadata.vocabulary == " ".join(words()) and metadata.knows == KNOWS
        assert not any(metadata.doubt_of_words(name, caption(sample(n))) for n in range(300))
        said = metadata.doubt_of_words(name, "Two tulips, upside-down, on a Beach at 5 o'clock")
        assert said and "the words 'tulips', '5', 'o', 'clock'" in said


def test_an_unknown_word_is_warned_about_in_python_and_on_the_command_line() -> None:
    with pytest.warns(UserWarning, match="emoji-sd3 does not know the word 'tulip'"):
        model = load("emoji-sd3")
        model.encode_prompt(["a tulip on a red background"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompt([caption(sample(3)), ""])
    command = [sys.executable, "-m", "rectiflow", "models", "emoji-sd3"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {"lemon", "lemons", "meadow", "sketch"} <= set(listed.split())
    assert "tulip" not in listed and KNOWS in listed
