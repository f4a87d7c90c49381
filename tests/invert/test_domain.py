"""Whether a model knows an image: the statistics, their ranges, and what they tell apart."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import rectiflow as rf
from rectiflow.emoji.caption import caption
from rectiflow.emoji.render import render
from rectiflow.emoji.scene import sample
from rectiflow.errors import InputError
from rectiflow.flow.measure import noise_statistics
from rectiflow.invert.domain import (
    GENERAL,
    denoising_error,
    findings,
    path_statistics,
    unusual,
    usual,
    usual_of,
)
from rectiflow.invert.inverting import draw, from_latents
from rectiflow.invert.presets import PRESETS
from rectiflow.invert.result import InversionResult
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models import FlowModel, Metadata, SD3Model, read_metadata, write_metadata
from rectiflow.models.images import fit
from rectiflow.models.load import WEIGHTS
from rectiflow.report.edit_report import Noise
from rectiflow.report.words import judge_noise
from rectiflow.steer.warnings import unknown_image
from tests.tiny import tiny_model

PROMPT = "a red apple"
RECORDED = Path(__file__).parents[2] / "docs/results/domain.json"
GRID = torch.tensor([0.0, 0.25, 0.7, 1.0])


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


def picture() -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(values)


def renoised(away: float) -> InversionResult:
    """Two images under noise, and a field that errs about the second by `away` everywhere."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 4, 8, 8, generator=generator)
    noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
    t = GRID[:-1].reshape(-1, 1, 1, 1, 1)
    states = [*((1 - t) * noise + t * image), image]
    velocities = image - noise + torch.tensor([0.0, away]).reshape(1, 2, 1, 1, 1)
    return InversionResult.unsolved(states[::-1], velocities=velocities)


def test_the_denoising_error_is_that_of_the_straight_way() -> None:
    """``E‖v − (x_1 − ε)‖²`` per dimension, of each image by itself."""
    error = denoising_error(renoised(0.5), GRID)
    assert error.tolist() == pytest.approx([0.0, 0.25], abs=1e-5)


def test_the_denoising_error_of_a_network_is_its_training_loss(model: SD3Model) -> None:
    made = rf.invert(model, picture(), PROMPT, preset="fast", num_inference_steps=4, noise_seed=3)
    cond, x = model.encode_prompt([PROMPT]), made.latents
    losses = []
    for noise, t in zip(draw([3], x, 4), made.grid[:-1], strict=True):
        v = model.velocity((1 - t) * noise + t * x, t, cond)
        losses.append((v - (x - noise)).square().mean())
    error = denoising_error(made.path, made.grid)
    assert error.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_what_a_path_tells_depends_on_its_scheme() -> None:
    path = renoised(1.0)
    drawn = path_statistics(SCHEMES["renoising"], path, GRID)
    assert [set(row) for row in drawn] == [{"denoising_error"}] * 2
    assert drawn[1]["denoising_error"] == pytest.approx(1, rel=1e-4)
    found = path_statistics(SCHEMES["query_offset"], path, GRID)
    for row, noise in zip(found, path.trajectory[0], strict=True):
        assert row == dataclasses.asdict(noise_statistics(noise[None]))
    # Under guidance the source is asked later; these end at a noise that was given to them.
    unasked = dataclasses.replace(path, velocities=None)
    assert path_statistics(SCHEMES["renoising"], unasked, GRID) == [{}, {}]
    for name in ("rf_inversion", "dna", "interpolation"):
        assert path_statistics(SCHEMES[name], path, GRID) == [{}, {}]


def test_ranges() -> None:
    assert not unusual({"norm": 1.25, "autocorrelation": -0.25, "kurtosis": 50.0}, GENERAL)
    (found,) = unusual({"norm": 1.3, "autocorrelation": 0.0}, GENERAL)
    assert (found.name, found.value, found.low, found.high) == ("norm", 1.3, 0.75, 1.25)
    assert unusual({"autocorrelation": math.nan}, GENERAL)
    assert not unusual({}, GENERAL)


def with_domain(model: SD3Model, **ranges: tuple[float, float]) -> SD3Model:
    """Whatever the scheme and the number of steps."""
    domain = {scheme: {name: {4: ends} for name, ends in ranges.items()} for scheme in SCHEMES}
    return SD3Model(model.pipeline, metadata=Metadata(domain=domain))


@pytest.mark.parametrize(
    ("preset", "name"), [("exact", "norm"), ("fast", "denoising_error"), ("euler", "kurtosis")]
)
def test_a_model_s_own_ranges_go_before_the_general_ones(
    model: SD3Model, preset: str, name: str
) -> None:
    settings: dict[str, Any] = {"preset": preset, "num_inference_steps": 4}
    knows = with_domain(model, **{name: (-1e6, 1e6)})
    assert not unknown_image(rf.invert(knows, picture(), PROMPT, **settings))
    strange = with_domain(model, **{name: (1e6, 2e6)})
    (found,) = findings(rf.invert(strange, picture(), PROMPT, **settings))
    assert found.name == name
    # Part of the way, and what the model made itself.
    assert not unknown_image(rf.invert(strange, picture(), PROMPT, strength=0.5, **settings))
    result = rf.edit(strange, seed=1, source_prompt=PROMPT, prompts="a lemon", **settings)
    assert not result.warnings


def test_the_warning_says_what_was_seen_what_it_means_and_what_to_do(model: SD3Model) -> None:
    strange = with_domain(model, norm=(7.0, 8.0))
    (said,) = unknown_image(rf.invert(strange, picture(), PROMPT, num_inference_steps=2))
    assert "unlike N(0, I)" in said and "usual: 7.00 to 8.00" in said
    # What comes back is what the codec keeps, and no more.
    latents = strange.encode_image(fit(picture(), strange.size_policy)[0])
    kept = (strange.decode(latents) - fit(picture(), strange.size_policy)[0]).square().mean()
    assert f"comes back at {-10 * kept.log10():.1f} dB" in said and "may look wrong" in said
    assert "--model" in said
    assert "A source prompt that says what the image shows" in said and "\n" not in said


def test_ranges_are_kept_with_the_model(tmp_path: Path) -> None:
    metadata = Metadata(domain={"euler": {"norm": {6: (0.5, 0.75), 30: (0.6, 0.9)}}})
    write_metadata(metadata, tmp_path)
    file = tmp_path / "rectiflow.json"
    assert read_metadata(file) == metadata
    file.write_text('{"domain": {"euler": {"norm": {"6": [2, 1]}}}}')
    with pytest.raises(InputError, match=r"domain\.euler\.norm\.6: .* the smaller one goes first"):
        read_metadata(file)


# The embedded model.


@pytest.fixture(scope="module")
def embedded() -> FlowModel:
    return rf.load("emoji-sd3")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_the_embedded_model_tells_what_it_knows_from_photographs_and_noise(
    embedded: FlowModel, preset: str
) -> None:
    """In as few steps as anybody takes, where a scene's noise is much too small."""
    scene = sample(2_900_000)
    own = "two lemons on a blue background"
    (made,) = rf.generate(embedded, own, seed=4, guidance_scale=3.0, num_inference_steps=10)
    woman = Image.fromarray(skimage.data.astronaut()).crop((100, 0, 400, 300)).resize((64, 64))
    rng = np.random.default_rng(5)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    settings: dict[str, Any] = {"preset": preset, "num_inference_steps": 6}
    for image, prompt in ((render(scene), caption(scene)), (made, own)):
        known = rf.invert(embedded, image, prompt, **settings)
        assert not unknown_image(known)
        if known.noise_statistics is not None:
            numbers = dataclasses.astuple(known.noise_statistics)
            judged = judge_noise(Noise(*numbers, usual=usual_of(known)))
            assert "poor" not in [judgement.level for judgement in judged]
    for image, prompt in ((woman, "a woman in an orange suit"), (noise, "")):
        (said,) = unknown_image(rf.invert(embedded, image, prompt, **settings))
        assert "it knows small scenes of emoji" in said
    if preset == "exact":
        return
    # The same picture under words for another one: `exact` sees only every other such prompt.
    other = caption(sample(2_900_007))
    wrong = from_latents(embedded, known.latents, known.restore, other, **settings)
    assert len(unknown_image(wrong)) == 1


def test_the_recorded_calibration_is_the_model_s() -> None:
    """`docs/calibrate.py` wrote both, and its counts follow from its values."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    metadata = read_metadata(WEIGHTS / recorded["model"] / "rectiflow.json")
    assert metadata.domain == Metadata(domain=recorded["ranges"]).domain
    for preset, kinds in recorded["presets"].items():
        warned, count = Counter[str](), Counter[str]()
        for kind, by_steps in kinds.items():
            for steps, entry in by_steps.items():
                ranges = usual(metadata, PRESETS[preset].scheme, int(steps))
                (name,) = ranges
                strange = sum(bool(unusual({name: value}, ranges)) for value in entry["values"])
                assert strange == entry["warned"]
                group = "known" if kind.startswith(("scenes", "generated")) else kind
                warned[group] += strange
                count[group] += len(entry["values"])
        assert warned["known"] <= 0.02 * count["known"], preset
        assert warned["noise"] == count["noise"]
        assert warned["photographs"] >= 0.95 * count["photographs"]
