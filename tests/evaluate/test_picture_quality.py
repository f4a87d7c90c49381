from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from torch.nn import functional as F

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.errors import InputError
from rectiflow.evaluate.clip_features import as_array, clip_scores, image_features
from rectiflow.evaluate.emoji_models import Clip, draw_captions, load_clip
from rectiflow.evaluate.metrics import clip_score
from rectiflow.evaluate.picture_quality import (
    draw,
    reference_statistics,
    score_pictures,
    true_pictures,
)
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate
from rectiflow.models.images import to_tensor
from rectiflow.models.load import WEIGHTS, load

SEEDS = range(2_000_000, 2_000_006)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(WEIGHTS / "emoji-clip")


@pytest.fixture(scope="module")
def model() -> FlowModel:
    return load("emoji-sd")


@pytest.fixture(scope="module")
def drawn(model: FlowModel) -> np.ndarray:
    return draw(model, SEEDS, num_inference_steps=2, solver="euler", grid="student")


def test_pictures_are_the_models_own_whatever_the_batch(
    model: FlowModel, drawn: np.ndarray
) -> None:
    settings = {"num_inference_steps": 2, "solver": "euler", "grid": "student"}
    assert drawn.shape == (6, 64, 64, 3) and drawn.dtype == np.uint8
    by_two = draw(model, SEEDS[2:6], batch_size=2, **settings)
    assert np.abs(by_two.astype(int) - drawn[2:]).max() <= 1
    alone = generate(model, caption(sample(SEEDS[3])), seed=SEEDS[3], **settings)[0]
    assert np.abs(np.asarray(alone).astype(int) - drawn[3]).max() <= 1
    # With the model's own solver it is what `evaluate emoji-models` draws.
    usual = draw_captions(model, SEEDS[:2], num_inference_steps=2)
    ours = draw(model, SEEDS[:2], num_inference_steps=2)
    np.testing.assert_array_equal(ours, as_array(usual))


def test_features_are_the_clips_own_embeddings(clip: Clip) -> None:
    pictures = [Image.fromarray(picture) for picture in true_pictures(SEEDS)]
    captions = [caption(sample(seed)) for seed in SEEDS]
    inputs = clip.processor(images=pictures, return_tensors="pt")
    tokens = clip.tokenizer(captions, padding=True, return_tensors="pt")
    output = clip.model(**inputs, **tokens)
    features = image_features(clip, pictures, batch_size=4)
    assert features.dtype == np.float32 and features.shape == (6, 128)
    lengths = np.linalg.norm(features, axis=1)
    np.testing.assert_allclose(features / lengths[:, None], output.image_embeds.detach(), atol=1e-5)
    assert lengths.std() > 1e-3  # the lengths are kept
    scores = clip_scores(clip, features, captions, batch_size=4)
    cosines = F.cosine_similarity(output.image_embeds, output.text_embeds).detach()
    np.testing.assert_allclose(scores, cosines, atol=1e-5)
    as_tensors = [to_tensor(picture) for picture in pictures]
    percent = [clip_score(clip, *pair) for pair in zip(as_tensors, zip(captions), strict=True)]
    np.testing.assert_allclose(100 * scores, np.concatenate(percent), atol=1e-3)


def test_pictures_of_another_size_go_through_the_clips_processor(clip: Clip) -> None:
    large = [Image.fromarray(p).resize((96, 80)) for p in true_pictures(SEEDS[:2])]
    pixels = clip.processor(images=large, return_tensors="pt")["pixel_values"]
    seen = clip.model.vision_model(pixel_values=pixels).pooler_output
    expected = clip.model.visual_projection(seen).detach()
    np.testing.assert_allclose(image_features(clip, large), expected, atol=1e-4)


def test_true_pictures_are_better_than_two_steps_of_the_model(
    clip: Clip, drawn: np.ndarray
) -> None:
    reference = reference_statistics(clip, SEEDS)
    true = score_pictures(
        true_pictures(SEEDS), SEEDS, clip=clip, reference=reference, teacher=drawn, judged=2
    )
    few_steps = score_pictures(
        drawn, SEEDS, clip=clip, reference=reference, teacher=drawn, judged=0
    )
    best, found = true.summary(), few_steps.summary()
    assert best["frechet_emoji_clip"] == pytest.approx(0, abs=1e-3)
    assert found["frechet_emoji_clip"] > 0.1 and found["frechet_error"] > 0
    assert best["clip_score"]["mean"] > found["clip_score"]["mean"]
    assert best["judge"]["n"] == 2 and best["judge"]["emoji"] == best["judge"]["all"] == 1
    assert len(best["judge"]["interval"]["emoji"]) == 2
    assert found["teacher_distance"]["mse"]["mean"] == 0
    assert found["teacher_distance"]["clip"]["mean"] == pytest.approx(0, abs=1e-6)
    square = np.square((true_pictures(SEEDS).astype(float) - drawn) / 255).mean()
    assert best["teacher_distance"]["mse"]["mean"] == pytest.approx(square, rel=1e-5)
    assert json.loads(json.dumps(best)) == best


def test_what_is_not_asked_for_is_not_there(clip: Clip, drawn: np.ndarray) -> None:
    reference = reference_statistics(clip, range(2_000_000, 2_000_008))
    assert reference.count == 8
    pictures = [Image.fromarray(picture) for picture in drawn]
    found = score_pictures(pictures, SEEDS, clip=clip, reference=reference, judged=0).summary()
    assert found["n"] == 6
    assert set(found) == {
        "n", "frechet_emoji_clip", "frechet_error", "frechet_left_out", "clip_score",
    }  # fmt: skip


def test_bad_input_is_refused(model: FlowModel, clip: Clip, drawn: np.ndarray) -> None:
    reference = reference_statistics(clip, SEEDS)
    with pytest.raises(InputError, match="6 pictures of 5 scenes"):
        score_pictures(drawn, SEEDS[:5], clip=clip, reference=reference)
    with pytest.raises(InputError, match="do not pair up"):
        score_pictures(drawn, SEEDS, clip=clip, reference=reference, teacher=drawn[:5])
    with pytest.raises(InputError, match="3 or more"):
        score_pictures(drawn[:2], SEEDS[:2], clip=clip, reference=reference, judged=0)
    with pytest.raises(InputError, match="one or more"):
        as_array([])
    with pytest.raises(InputError, match="8 bits"):
        as_array(drawn / 255)
    with pytest.raises(InputError, match="no seeds"):
        draw(model, [])
