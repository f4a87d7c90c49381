"""Whole edits against the network and the equations written out, and rules in bad company."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.invert import Preset, get_preset
from rectiflow.invert.features import attention_points, text_points
from rectiflow.invert.result import InversionResult
from rectiflow.models import SD3Model
from rectiflow.models.base import Conditioning
from rectiflow.models.taps import Point
from rectiflow.steer import (
    AdaLNReplacement,
    AttentionInjection,
    EditTask,
    align,
    controlled,
    edit_latents,
)
from rectiflow.steer.controls import Rows
from tests.steer.reference import reference_velocity
from tests.tiny import tiny_model

STEPS = 5
SOURCE = "a red apple on the left"
TARGETS = ("a red cat on the left", "apple")
ROWS = Rows(targets=(1, 2), sources=(0, 0), pairs=(0, 1))
T = torch.tensor(0.3)


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(t5=True, medium=True)


def token_maps(model: SD3Model) -> Tensor:
    return torch.stack([align(model, SOURCE, target).token_map for target in TARGETS])


def controls(model: SD3Model) -> list[AdaLNReplacement | AttentionInjection]:
    values = attention_points(model, get_preset("ftedit"))
    return [
        AdaLNReplacement(token_maps(model), 2, text_points(model)),
        AttentionInjection(2, values),
    ]


def hooks(model: SD3Model) -> int:
    modules = model.network.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def work(model: SD3Model, **given: Any) -> EditTask:
    """From a path that no network made: compensation has all to do."""
    return EditTask(
        path=InversionResult.unsolved([*torch.randn(STEPS + 1, 1, 4, 8, 12)]),
        grid=torch.tensor([0.0, 0.1, 0.3, 0.45, 0.8, 1.0]),
        source=model.encode_prompt(SOURCE),
        target=model.encode_prompt(TARGETS),
        owners=(0, 0),
        token_maps=token_maps(model),
        negative=model.encode_prompt("sad"),
        **given,
    )


def settings(**given: Any) -> Preset:
    everything = {"adaln_ratio": 0.8, "attention_ratio": 0.4, "mask_threshold": 0.0}
    everything |= {"scheme": "euler", "method": "two_branch", "source_features": "recompute"}
    return get_preset("exact", num_inference_steps=STEPS, **(everything | given))


@torch.no_grad()
def by_hand(model: SD3Model, task: EditTask, preset: Preset, target: int) -> Tensor:
    """FTEdit's algorithm 2 for one target: all rows in every step, no hook, no shortcut."""
    guidance, path, token_map = preset.guidance_scale, task.trajectory, task.token_maps[target]
    assert task.negative is not None
    cond = Conditioning.cat([task.negative, task.negative, task.source, task.target[target]])
    source = edited = path[0]
    for step in range(STEPS):
        if preset.compensate != "none":
            source = path[step]
        texts, values = step < 4, step < 2  # ratios 0.8 and 0.4 of 5 steps

        def text(features: Tensor, texts: bool = texts) -> Tensor:
            result = features.clone()
            for place, match in enumerate(token_map.tolist() if texts else ()):
                if match != -1:
                    result[3, place] = features[2, match]
            return result

        def projected(kind: str, stream: str, features: Tensor, values: bool = values) -> Tensor:
            touched = stream == "image" or preset.inject == "all"
            if not (values and touched and kind in preset.features):
                return features
            return torch.cat([features[:3], features[2:3]])

        rows, t = torch.cat([source, edited, source, edited]), float(task.grid[step])
        v = reference_velocity(model, rows, t, cond, text, projected)
        v_source, v_target = (v[:2] + guidance * (v[2:] - v[:2])).split(1)
        h = task.grid[step + 1] - task.grid[step]
        if preset.compensate == "both":
            v_target = v_target + (path[step + 1] - source) / h - v_source
        source, edited = source + h * v_source, edited + h * v_target
        if task.mask is not None:
            edited = torch.where(task.mask > 0, edited, path[step + 1])
    if task.mask is not None:
        edited = path[-1] + task.mask * (edited - path[-1])
    return edited[0]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("compensate", ["none", "source", "both"])
@pytest.mark.parametrize(
    ("inject", "features"), [("image", ("value",)), ("all", ("value",)), ("all", ("query", "key"))]
)
def test_edits_with_all_controls_by_the_equations(
    model: SD3Model, inject: str, features: tuple[str, ...], compensate: str, guidance: float
) -> None:
    task = work(model)
    preset = settings(
        compensate=compensate, guidance_scale=guidance, inject=inject, features=features
    )
    edited = edit_latents(model, task, preset).latents
    for target in range(len(TARGETS)):
        expected = by_hand(model, task, preset, target)
        torch.testing.assert_close(edited[target], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_a_soft_mask_by_the_equations(model: SD3Model, compensate: str) -> None:
    task = work(model, mask=(torch.rand(1, 1, 8, 12) - 0.3).clamp_min(0))
    preset = settings(compensate=compensate, guidance_scale=2.0)
    edited = edit_latents(model, task, preset).latents
    for target in range(len(TARGETS)):
        expected = by_hand(model, task, preset, target)
        torch.testing.assert_close(edited[target], expected, atol=1e-4, rtol=0)


def test_a_network_in_half_precision_keeps_a_float32_state() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    seen: list[Tensor] = []
    preset = settings(compensate="both", guidance_scale=2.0)
    task = work(model)
    edited = edit_latents(model, task, preset, lambda step, t, x: seen.append(x)).latents
    for x in (*seen, edited):
        assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
    # Compensation is in float32: with the source's prompt the source still comes back.
    same = dataclasses.replace(
        task,
        target=model.encode_prompt(SOURCE),
        owners=(0,),
        token_maps=align(model, SOURCE, SOURCE).token_map[None],
    )
    edited = edit_latents(model, same, preset).latents
    assert (edited - task.trajectory[-1]).abs().max() < 1e-4


def test_an_edit_that_is_broken_off_leaves_no_hook(model: SD3Model) -> None:
    def stop(step: int, t: Tensor, x: Tensor) -> None:
        assert hooks(model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_latents(model, work(model), settings(), stop)
    assert hooks(model) == 0


@torch.no_grad()
def test_a_rule_that_gives_up_inside_the_network(model: SD3Model) -> None:
    class Failing(AttentionInjection):
        def replace(self, *args: Any) -> Tensor:
            raise NotImplementedError

    x, cond = torch.randn(3, 4, 8, 8), model.encode_prompt([SOURCE, *TARGETS])
    before = model.velocity(x, T, cond)
    with controlled(model, [*controls(model), Failing(2, text_points(model))]) as network:
        with pytest.raises(NotImplementedError):
            network.velocity(x, T, cond, 0, ROWS)
        assert torch.equal(model.velocity(x, T, cond), before)
    assert hooks(model) == 0


@torch.no_grad()
def test_a_map_to_nothing_replaces_nothing(model: SD3Model) -> None:
    x, cond = torch.randn(3, 4, 8, 8), model.encode_prompt([SOURCE, *TARGETS])
    maps = torch.full_like(token_maps(model), -1)
    with controlled(model, [AdaLNReplacement(maps, 1, text_points(model))]) as network:
        found = network.velocity(x, T, cond, 0, ROWS)
    assert torch.equal(found, model.velocity(x, T, cond))


def test_rules_do_not_write_into_what_they_are_given() -> None:
    target, source = torch.randn(2, 2, 5, 8)
    kept = target.clone(), source.clone()
    maps = torch.zeros(2, 5, dtype=torch.long)
    point = Point(0, "text")
    AdaLNReplacement(maps, 1, [point]).replace(point, target, source, (0, 1), 0)
    AttentionInjection(1, [point]).replace(point, target, source, (0, 1), 0)
    assert torch.equal(target, kept[0]) and torch.equal(source, kept[1])


@pytest.mark.slow
@torch.no_grad()
def test_a_network_wrapped_by_torch_compile_honours_controls() -> None:
    """The other way to compile: `torch.compile(module)` is a module around the module."""
    model = tiny_model()
    x, cond = torch.randn(3, 4, 8, 8), model.encode_prompt([SOURCE, *TARGETS])
    before = model.velocity(x, T, cond)
    with controlled(model, controls(model)) as network:
        expected = network.velocity(x, T, cond, 0, ROWS)
    model.pipeline.transformer = torch.compile(model.network, backend="eager")
    torch.testing.assert_close(model.velocity(x, T, cond), before)  # compiled without hooks
    with controlled(model, controls(model)) as network:
        torch.testing.assert_close(network.velocity(x, T, cond, 0, ROWS), expected)
        torch.testing.assert_close(network.velocity(x, T, cond, 2, ROWS), before)
    torch.testing.assert_close(model.velocity(x, T, cond), before)
    assert hooks(model) == 0
