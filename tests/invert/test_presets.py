"""Presets are data: every field can be overridden, and wrong ones are named in one line."""

from __future__ import annotations

import dataclasses

import pytest

from rectiflow.errors import InputError
from rectiflow.invert import PRESETS, Preset, get_preset
from rectiflow.invert.presets import INVERSION_SETTINGS


def test_the_papers_preset() -> None:
    preset = get_preset("ftedit")
    assert (preset.num_inference_steps, preset.grid, preset.time) == (30, "diffusers", "noisier")
    assert (preset.iterations, preset.average, preset.warm_start) == (2, True, False)
    assert (preset.guidance_scale, preset.adaln_ratio, preset.attention_ratio) == (2.0, 1.0, 0.15)
    assert (preset.inject, preset.features, preset.compensate) == ("all", ("value",), "source")


def test_every_preset_passes_its_own_check() -> None:
    assert {"exact", "ftedit", "euler"} <= set(PRESETS)
    for preset in PRESETS.values():
        preset.check()


def test_fields_are_replaced_and_none_leaves_them_alone() -> None:
    preset = get_preset("exact", guidance_scale=2.5, adaln_ratio=None)
    assert preset == dataclasses.replace(PRESETS["exact"], guidance_scale=2.5)
    assert get_preset(preset, inject="all").inject == "all"
    assert get_preset(PRESETS["euler"]) is not None


def test_editing_after_anothers_inversion() -> None:
    mixed = PRESETS["euler"].inverted_as(PRESETS["ftedit"])
    for field in dataclasses.fields(Preset):
        origin = "ftedit" if field.name in INVERSION_SETTINGS else "euler"
        assert getattr(mixed, field.name) == getattr(PRESETS[origin], field.name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nonsense": 1}, "unknown setting 'nonsense'; there are: adaln_ratio, "),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"iterations": -1}, "iterations is -1"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"adaln_ratio": 1.2}, "adaln_ratio is 1.2; from 0 to 1"),
        ({"attention_ratio": -0.2}, "attention_ratio is -0.2; from 0 to 1"),
        ({"mask_threshold": 3}, "mask_threshold is 3; from 0 to 1"),
        ({"compensate": "target"}, "compensate is 'target'; one of: source, both, none"),
        ({"inject": "text"}, "inject is 'text'; one of: image, all"),
        ({"scheme": "newton"}, "scheme is 'newton'; one of"),
        ({"time": "middle"}, "time is 'middle'; one of"),
        ({"features": ("value", "output")}, "features is 'output'; one of: query, key, value"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        get_preset("exact", **settings)
    assert "\n" not in str(caught.value)


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="preset is 'best'; one of: exact, ftedit, euler"):
        get_preset("best")
