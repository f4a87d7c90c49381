from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rectiflow.emoji.edits import KINDS
from rectiflow.errors import InputError
from rectiflow.evaluate.edit_parts import read_part, write_part
from rectiflow.evaluate.edit_scores import pictures
from rectiflow.evaluate.edit_table import evaluate_emoji_edits, per_edit, per_method, ties
from rectiflow.evaluate.emoji_edits import (
    REPORTED_SEED,
    Benchmark,
    cases,
    chosen_methods,
    invert_cases,
    methods_for,
    reconstruction_psnr,
)
from rectiflow.invert.presets import PRESETS, get_preset
from rectiflow.models import SD3Model
from rectiflow.steer.editing import edit_latents
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(max_sequence_length=2)


def test_the_benchmark_is_twenty_of_each_kind_and_its_beginning_is_balanced() -> None:
    edits = cases()
    assert Counter(case.kind for case in edits) == dict.fromkeys(KINDS, 20)
    assert [case.kind for case in cases(12)] == list(KINDS)
    assert cases(30) == edits[:30]
    assert not {case.source for case in edits} & {case.source for case in cases(120, 1_000_000)}
    assert REPORTED_SEED == 2_000_000


def test_a_case_fares_the_same_in_any_company(model: SD3Model) -> None:
    edits = cases(3)
    preset = get_preset("exact", num_inference_steps=3)
    bench = Benchmark(model)
    together = bench.run(edits, preset, "exact")
    for index, case in enumerate(edits):
        alone = bench.run([case], preset, "exact")
        assert (alone.images[0].int() - together.images[index].int()).abs().max() <= 1
        assert alone.columns["nfe"][0] == pytest.approx(together.columns["nfe"][index])


def test_figures_name_every_method_and_pair_ours_with_each(model: SD3Model) -> None:
    rows = chosen_methods(model, ["nothing", "bound", "euler", "ftedit", "exact", "fast"], {})
    figures, parts, edits = evaluate_emoji_edits(Benchmark(model), rows, limit=2)
    assert list(figures["methods"]) == ["nothing", "bound", "euler", "ftedit", "exact", "fast"]
    assert set(figures["paired"]) == {
        *(f"exact - {name}" for name in ("nothing", "euler", "ftedit", "fast")),
        *(f"fast - {name}" for name in ("nothing", "euler", "ftedit", "exact")),
    }
    # Euler: one evaluation a step each way. FTEdit: three, then two prompts with guidance and the
    # source's row where a control reads it, which its AdaLN replacement does in every step.
    assert figures["methods"]["euler"]["nfe"] == 60
    assert figures["methods"]["ftedit"]["nfe"] == 30 * 3 + 30 * 3
    assert figures["masks"] == "none" and figures["n"] == 2
    assert figures["seeds"] == [2_000_000, 2_000_000]
    assert {
        "target_psnr",
        "inside_mse",
        "outside_mse",
        "outside_n",
        "nfe",
        "seconds",
        "by_kind",
    } <= {*figures["methods"]["exact"]}
    assert len(per_edit(parts, edits)) == 2 * 6 and len(per_method(figures)) == 6
    assert len({tuple(row) for row in per_method(figures)}) == 1  # one shape, for CSV
    assert set(ties(figures, "fast")) == {
        name.removeprefix("fast - ")
        for name, pair in figures["paired"].items()
        if name.startswith("fast - ") and pair["low"] <= 0 <= pair["high"]
    }


def test_all_presets_are_compared_but_those_for_another_family(model: SD3Model) -> None:
    names = methods_for(model)
    assert {"exact", "fast", "ftedit", "euler"} <= set(names) <= set(PRESETS)
    for_flux = {name for name in PRESETS if name.endswith("-flux")}
    assert set(PRESETS) - set(names) == for_flux | {"subject"}
    rows = chosen_methods(model, ["euler"], {"euler": {"num_inference_steps": 3}, "exact": {}})
    assert list(rows) == ["euler", "euler (tuned)"]
    assert rows["euler (tuned)"] == get_preset("euler", num_inference_steps=3)
    assert list(chosen_methods(model, ["euler (tuned)"], {"euler": {}})) == ["euler (tuned)"]
    for wrong in ("eulr", "euler (tuned)"):
        with pytest.raises(InputError, match="no method"):
            chosen_methods(model, [wrong], {})


def test_a_given_mask_leaves_cells_outside_as_the_source(model: SD3Model) -> None:
    preset = get_preset("exact", num_inference_steps=3)
    edits = [case for case in cases(12) if case.mask().mean() < 0.5][:3]
    task = invert_cases(model, edits, preset, "given")
    assert task.mask is not None and task.mask.shape == (3, 1, *task.trajectory.shape[-2:])
    edited = edit_latents(model, task, preset).latents
    outside = (task.mask == 0).expand_as(edited)
    assert outside.any()
    assert torch.equal(edited[outside], task.trajectory[-1][outside])
    # A cell may change as soon as one of its pixels does.
    factor = model.factor
    for case, cells in zip(edits, task.mask[:, 0].bool(), strict=True):
        pixels = torch.from_numpy(case.mask()).unflatten(0, (-1, factor)).unflatten(2, (-1, factor))
        assert torch.equal(cells, pixels.any(3).any(1))


def test_uncompensated_reconstruction_is_worse_the_less_the_inversion_is_solved(
    model: SD3Model,
) -> None:
    edits = cases(2)
    found = []
    for iterations in (0, 3, 20):
        solved = {"iterations": iterations, "average": False}
        preset = get_preset("ftedit", num_inference_steps=4, **solved)
        task = invert_cases(model, edits, preset)
        found.append(reconstruction_psnr(model, task, preset))
    assert (found[0] < found[1]).all() and (found[1] < found[2]).all() and found[2].min() > 60


def test_parts_are_taken_up_where_they_end_and_never_mixed(model: SD3Model, tmp_path: Path) -> None:
    preset = get_preset("euler", num_inference_steps=2)
    bench = Benchmark(model, tmp_path, batch_size=2)
    edits = cases(5)
    whole = bench.run(edits, preset, "euler")
    (file,) = tmp_path.iterdir()
    made = bench.made(preset)
    assert file == made.file(tmp_path, "euler")

    # What is there is taken as it is, so marks in it stay; a batch that was not full is made again.
    marked = whole.first(3)
    marked.columns["target_psnr"] = marked.columns["target_psnr"] + 1
    write_part(marked, made, file)
    again = bench.run(edits, preset, "euler")
    difference = again.columns["target_psnr"] - whole.columns["target_psnr"]
    assert difference.tolist() == [1, 1, 0, 0, 0]
    assert torch.equal(again.images, whole.images)
    assert len(bench.run(edits[:2], preset, "euler")) == 2
    kept = read_part(made, file)
    assert kept is not None and len(kept) == 5

    # Other settings, seeds, masks, batches: another file.
    bench.run(edits[:1], dataclasses.replace(preset, guidance_scale=2.0), "euler")
    dataclasses.replace(bench, batch_size=3).run(edits[:1], preset, "euler")
    dataclasses.replace(bench, masks="given").run(edits[:1], preset, "euler")
    assert len(list(tmp_path.iterdir())) == 4
    # The words about a preset are no setting of it.
    renamed = dataclasses.replace(preset, reference="the same")
    assert bench.made(renamed).file(tmp_path, "euler") == file

    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        bench.run(edits, preset, "euler")


def test_references_are_the_codec(model: SD3Model) -> None:
    edits = cases(2)
    part = Benchmark(model).run(edits, "bound", "bound")
    through = model.decode(model.encode_image(pictures([case.target for case in edits])))
    assert torch.equal(part.images, (through * 255).round().byte())
    assert np.all(part.columns["nfe"] == 0)
