"""Presets are data: every field can be overridden, and wrong ones are named in one line."""

from __future__ import annotations

import dataclasses

import pytest

from rectiflow.errors import InputError
from rectiflow.flow.grid import active_steps
from rectiflow.invert import PRESETS, SCHEMES, Preset, get_preset
from rectiflow.invert.presets import INVERSION_SETTINGS, TWINS, method_name
from rectiflow.steer import METHODS


def test_the_papers_preset() -> None:
    preset = get_preset("ftedit")
    assert (preset.num_inference_steps, preset.grid, preset.time) == (30, "diffusers", "noisier")
    assert (preset.iterations, preset.average, preset.warm_start) == (2, True, False)
    assert (preset.guidance_scale, preset.adaln_ratio, preset.attention_ratio) == (2.0, 1.0, 0.15)
    assert (preset.inject, preset.features, preset.compensate) == ("all", ("value",), "source")


def test_every_preset_passes_its_own_check() -> None:
    assert list(PRESETS)[:4] == ["fast", "exact", "ftedit", "euler"]  # our own come first
    for preset in PRESETS.values():
        preset.check()


def test_every_preset_has_a_reference_of_its_own_and_is_known_by_it() -> None:
    assert len({preset.reference for preset in PRESETS.values()}) == len(PRESETS)
    for name, preset in PRESETS.items():
        assert method_name(preset) == name
        assert (
            method_name(dataclasses.replace(preset, num_inference_steps=77)) == f"{name}, changed"
        )


# What the papers and their scripts say; guidance is the target's.
PEERS: dict[str, dict[str, object]] = {
    "directedit": {"num_inference_steps": 30, "guidance_scale": 2.0, "time": "noisier"},
    "directedit-flux": {"num_inference_steps": 30, "guidance_scale": 2.0, "time": "noisier"},
    "rf-solver": {"num_inference_steps": 30, "guidance_scale": 2.0, "scheme": "midpoint"},
    "fireflow": {"num_inference_steps": 8, "guidance_scale": 2.0, "scheme": "fireflow"},
    "rf-inversion": {"num_inference_steps": 28, "gamma": 0.5, "eta": 0.9, "eta_ratio": 0.25},
    "uniedit": {"num_inference_steps": 15, "strength": 0.6, "omega": 5.0},
    "uniedit-flux": {"num_inference_steps": 15, "strength": 0.6, "rounding": "nearest"},
    "flowedit": {"source_guidance_scale": 3.5, "guidance_scale": 13.5, "n_avg": 1, "n_min": 0},
    "flowedit-flux": {"source_guidance_scale": 1.5, "guidance_scale": 5.5, "n_avg": 1, "n_min": 0},
    "dnaedit": {"num_inference_steps": 40, "guidance_scale": 3.5, "eta": 0.8},
    "dnaedit-flux": {"num_inference_steps": 28, "guidance_scale": 2.5, "eta": 0.8},
}


@pytest.mark.parametrize("name", PEERS)
def test_the_peers_presets(name: str) -> None:
    for field, value in PEERS[name].items():
        assert getattr(PRESETS[name], field) == value, field


@pytest.mark.parametrize(
    ("name", "steps", "gone"),
    [
        ("uniedit", 15, 9),
        ("uniedit-flux", 15, 9),
        ("flowedit", 50, 33),
        ("flowedit-flux", 28, 24),
        ("dnaedit", 40, 27),
        ("dnaedit-flux", 28, 24),
    ],
)
def test_how_many_steps_are_gone(name: str, steps: int, gone: int) -> None:
    preset = PRESETS[name]
    assert preset.num_inference_steps == steps
    assert preset.steps == gone


@pytest.mark.parametrize(
    ("name", "ratio", "steps", "sites"),
    [("rf-solver", 5, 30, 18), ("fireflow", 1, 8, 38), ("directedit-flux", 4, 30, 38)],
)
def test_where_features_are_shared_on_flux(name: str, ratio: int, steps: int, sites: int) -> None:
    """Of its 19 double and 38 single blocks."""
    preset = PRESETS[name]
    assert active_steps(preset.attention_ratio, steps) == ratio
    assert 57 - int(preset.first_site * 57 + 1e-9) == sites
    assert (preset.features, preset.inject, preset.adaln_ratio) == (("value",), "all", 0.0)


@pytest.mark.parametrize(
    ("strength", "steps", "down", "nearest"),
    [(0.6, 8, 4, 5), (0.7, 15, 10, 10), (0.8, 12, 9, 10), (0.75, 10, 7, 8), (0.29, 100, 29, 29)],
)
def test_a_share_of_the_steps_is_rounded(
    strength: float, steps: int, down: int, nearest: int
) -> None:
    """UniEdit's code floors α N on Stable Diffusion 3, and rounds it on FLUX."""
    settings = {"strength": strength, "num_inference_steps": steps}
    assert get_preset("uniedit", "sd3", **settings).steps == down
    assert get_preset("uniedit", "flux", **settings).steps == nearest == round(strength * steps)


@pytest.mark.parametrize("name", TWINS)
def test_a_name_stands_for_what_was_published_for_a_family(name: str) -> None:
    own, twin = PRESETS[name], PRESETS[f"{name}-flux"]
    assert own != twin and own.grid == "diffusers"
    for family in ("sd3", "sd", "sdxl", "qwen-image", None):
        assert get_preset(name, family) == own
    assert get_preset(name, "flux") == twin and get_preset(f"{name}-flux", "sd3") == twin
    assert get_preset(own, "flux") == own  # a preset, unlike its name, is what it is
    # What is set by hand stays, also where it is what was published for the other family.
    given = {"num_inference_steps": own.num_inference_steps, "guidance_scale": 7.25}
    changed = get_preset(name, "flux", **given)
    assert changed == dataclasses.replace(twin, **given)
    assert method_name(twin, name) == method_name(twin) == f"{name}-flux"
    assert method_name(changed, name) == f"{name}-flux, changed"
    assert method_name(own, name) == name


def test_a_setting_without_effect_is_refused() -> None:
    with pytest.raises(InputError, match="omega has no effect on the scheme query_offset with"):
        get_preset("exact", omega=1.0)
    with pytest.raises(InputError, match="iterations has no effect on the scheme uni_inv"):
        get_preset("uniedit", iterations=3)
    assert get_preset("uniedit", iterations=None, omega=1.0).omega == 1.0
    # What a field that is read replaces may make others readable.
    assert get_preset("exact", scheme="euler", time="cleaner").time == "cleaner"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_path_that_the_method_does_not_read_is_refused(scheme: str, method: str) -> None:
    """Else an inversion would be paid for, and change nothing."""
    names = {"scheme": scheme, "method": method}
    unread = method == "flow_edit" and scheme != "interpolation"
    if unread or (scheme == "renoising" and method != "two_branch"):
        with pytest.raises(InputError, match=f"the method {method} .* scheme"):
            get_preset(dataclasses.replace(PRESETS["euler"], **names))  # type: ignore[arg-type]
    else:
        get_preset(dataclasses.replace(PRESETS["euler"], **names))  # type: ignore[arg-type]


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
        ({"nonsense": 1}, "unknown setting 'nonsense'"),
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
        ({"strength": 0.01}, "strength 0.01 of 30 steps leaves none"),
        ({"method": "prompting"}, "method is 'prompting'; one of: two_branch, "),
        ({"eta": 1.5}, "eta is 1.5; from 0 to 1"),
        ({"n_avg": 0}, "n_avg is 0; at least 1"),
        ({"n_min": -1}, "n_min is -1; at least 0"),
        ({"omega": float("inf")}, "omega is inf; a finite number"),
        ({"features": ("value", "output")}, "features is 'output'; one of: query, key, value"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        get_preset("exact", **settings)
    assert "\n" not in str(caught.value)


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="preset is 'best'; one of: fast, exact, ftedit, euler, "):
        get_preset("best")
