"""Pages: the plain data of reports laid out by the templates beside this file.

A page carries everything inside it and its content policy forbids it to load anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from rectiflow._version import __version__
from rectiflow.report import pictures, words
from rectiflow.report.edit_report import EditEntry, EditReport
from rectiflow.report.pictures import Picture, picture
from rectiflow.report.plots import StepPlot, step_plot


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("rectiflow.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": words.number,
        "duration": words.duration,
        "decibels": words.decibels,
        "setting": words.setting,
        "svg": lambda plot: Markup(plot.svg),  # our own markup; its texts are escaped there
    }
    made.globals |= {"version": __version__}
    return made


def edit_page(report: EditReport) -> str:
    """The page of one report."""
    return (
        _environment()
        .get_template("edit.html.j2")
        .render(r=_view(report, "r"), command=report.command)
    )


def gallery_page(
    reports: Sequence[EditReport],
    *,
    title: str,
    introduction: str,
    links: Sequence[str | None],
    command: str,
    environment: Mapping[str, object],
) -> str:
    """The page of many reports."""
    cases = [
        _view(report, f"case{number}") | {"link": link}
        for number, (report, link) in enumerate(zip(reports, links, strict=True), start=1)
    ]
    known = [edit for case in cases for edit in case["edits"] if edit["target"]]
    return (
        _environment()
        .get_template("gallery.html.j2")
        .render(
            title=title,
            introduction=introduction,
            cases=cases,
            command=command,
            environment=environment,
            mean_psnr=_mean([edit["target_psnr"] for edit in known]),
            mean_nothing=_mean([edit["nothing_psnr"] for edit in known]),
            known_words=any(edit["columns"] for case in cases for edit in case["edits"]),
            nfe=sum(report.nfe for report in reports),
            seconds=_total([report.seconds for report in reports]),
        )
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _view(report: EditReport, name: str) -> dict[str, Any]:
    """What a template needs of one report; ids of the page start with `name`."""
    differences = [pictures.difference(edit.image, report.source) for edit in report.edits]
    factor = pictures.amplification(differences)
    prompt = report.source_prompt or ""
    return {
        "name": name,
        "data": report,
        "nfe_parts": words.samples(
            report.nfe_inversion, report.nfe_editing, report.nfe_reconstruction
        ),
        "prompt": prompt,
        "ratio": report.source.width / report.source.height,
        "source": picture(
            report.source, f"Source: {prompt}" if prompt else "Source", pictures.LARGEST
        ),
        "shown_smaller": max(report.source.size) > pictures.LARGEST,
        "edits": [
            _edit_view(report, edit, change, factor)
            for edit, change in zip(report.edits, differences, strict=True)
        ],
        "change": _amplified("Change", factor),
        "panels": _reconstruction_panels(report),
        "plots": _plots(report, name),
        "noise": words.judge_noise(report.noise) if report.noise else [],
    }


def _amplified(name: str, factor: int) -> str:
    return name if factor == 1 else f"{name} ×{factor}"


def _edit_view(report: EditReport, edit: EditEntry, change: Any, factor: int) -> dict[str, Any]:
    mask = None if edit.mask is None else edit.mask.astype(bool)
    columns = words.columns(edit.alignment) if edit.alignment else []
    return {
        "data": edit,
        "image": picture(edit.image, f"Edit: {edit.prompt or 'empty prompt'}", pictures.LARGEST),
        "target": picture(edit.target, "True target") if edit.target is not None else None,
        "target_psnr": pictures.psnr(edit.image, edit.target) if edit.target is not None else None,
        "nothing_psnr": (
            pictures.psnr(report.source, edit.target) if edit.target is not None else None
        ),
        "change": picture(
            pictures.difference_map(change, factor, mask),
            _amplified("Difference of edit and source", factor),
        ),
        "masked": mask is not None,
        "columns": columns,
        "columns_in_words": words.alignment_in_words(columns),
    }


def _reconstruction_panels(report: EditReport) -> list[tuple[Picture, str, str]]:
    """Pictures of how well the source comes back, each with a name and a remark."""
    if report.reconstruction is None:
        return []
    psnr = pictures.psnr
    panels = [(picture(report.source, "Source"), "Source", "")]
    if report.codec is not None:
        remark = f"PSNR {words.decibels(psnr(report.codec, report.source))} to the source"
        panels.append((picture(report.codec, "Source, encoded and decoded"), "Codec alone", remark))
    if report.uncompensated is not None:
        reference = report.codec or report.source
        name = "the codec’s" if report.codec else "the source"
        remark = f"PSNR {words.decibels(psnr(report.uncompensated, reference))} to {name}"
        panels.append(
            (
                picture(report.uncompensated, "Reconstruction without compensation"),
                "Without compensation",
                remark,
            )
        )
    remark = f"PSNR {words.decibels(psnr(report.reconstruction, report.source))} to the source"
    if report.codec is not None:
        remark += f", {words.decibels(psnr(report.reconstruction, report.codec))} to the codec’s"
    panels.append((picture(report.reconstruction, "Reconstruction"), "Reconstruction", remark))
    error = pictures.difference(report.reconstruction, report.source)
    factor = pictures.amplification([error])
    alt = _amplified("Difference of reconstruction and source", factor)
    panels.append(
        (
            picture(pictures.difference_map(error, factor), alt),
            _amplified("Difference", factor),
            "black: none",
        )
    )
    return panels


def _plots(report: EditReport, name: str) -> list[tuple[str, str, StepPlot]]:
    """Title, explanation and plot of each per-step figure there is."""
    plots = []
    if len(report.residuals):
        plots.append(
            (
                "Residual of the inversion",
                "How far each inversion step is from the exact inverse of the generation step.",
                step_plot(
                    report.times,
                    report.residuals,
                    name=f"{name}-residual",
                    label="relative residual",
                ),
            )
        )
    if len(report.compensation):
        plots.append(
            (
                "Velocity compensation",
                "What is added to the velocity so that the source is retraced, relative to it.",
                step_plot(
                    report.times,
                    report.compensation,
                    name=f"{name}-compensation",
                    label="relative size ‖c‖ / ‖v‖",
                    colour=1,
                ),
            )
        )
    return plots
