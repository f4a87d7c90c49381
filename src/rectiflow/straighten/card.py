"""The model card: what a model is, how stock diffusers runs it, and how it came to be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from rectiflow.models.base import FlowModel
from rectiflow.settings_file import dump_yaml
from rectiflow.straighten.stock import stock_arguments
from rectiflow.straighten.training_record import MODEL, short_name

CARD = "README.md"
PROMPT = "a red apple on a white background"
MEASURES = {
    "straightness": "S(Z), straightness (0 is straight)",
    "straightness_error": "its standard error",
    "transport_cost": "transport cost E‖Z_1 − Z_0‖²",
    "pair_error": "accurate solution against the pairs",
}
"""Figures of training, in words; all are per dimension of a latent."""


def write_card(
    model: FlowModel, record: Mapping[str, Any], folder: Path, *, name: str, dtype: torch.dtype
) -> None:
    """Write the card of a model into its folder.

    Args:
        model: As it lies in the folder: with its metadata and its scheduler.
        record: Where it comes from.
        folder: Its folder, perhaps under a temporary name.
        name: What it is called.
        dtype: Of the weights in the files.
    """
    steps, guidance = model.default_num_inference_steps, model.default_guidance_scale
    arguments = {k: repr(v) for k, v in stock_arguments(model, steps, guidance).items()}
    if "sigmas" in arguments:
        arguments["sigmas"] = f"[1 - i / {steps} for i in range({steps})]"
    few = made_for_few_steps(record.get("config", {}))
    text = (
        environment()
        .get_template("card.md.j2")
        .render(
            front=dump_yaml(_front(model, record)),
            name=name,
            family=model.family,
            prediction=model.prediction_type,
            pipeline=type(model.pipeline).__name__,
            scheduler=type(model.pipeline.scheduler).__name__,
            stock=is_stock(model),
            dtype=str(dtype).removeprefix("torch."),
            prompt=PROMPT,
            arguments=arguments,
            steps=steps,
            guidance=guidance,
            guidance_embeds=model.guidance_embeds,
            made_for=(model.metadata.student_steps or ()) if few else (),
            kind=record.get("config", {}).get("kind"),
            timestep=_first_timestep(model),
            licence=model.metadata.licence,
            base=record.get("base_model"),
            phases=[phase(entry) for entry in lineage(record)],
            versions=record.get("versions", {}),
        )
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def made_for_few_steps(config: Mapping[str, Any]) -> bool:
    """Whether a training with these settings makes a student of few steps, not just a flow."""
    return bool(
        config.get("kind") == "distill" or config.get("windows") or config.get("time_law") == "grid"
    )


def is_stock(model: FlowModel) -> bool:
    """Whether every network is of a class that diffusers or transformers has."""
    libraries = ("diffusers", "transformers")
    kinds = [type(part).__module__.partition(".")[0] for part in model.modules.values()]
    return all(kind in libraries for kind in kinds)


def lineage(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The trainings that led to a model, the first one first."""
    found = []
    entry: Mapping[str, Any] | None = record
    while entry is not None:
        if "config" in entry:
            found.append(entry)
        entry = entry.get("before")
    return found[::-1]


def phase(record: Mapping[str, Any]) -> dict[str, Any]:
    """One training in words: `title`, `rows` (what, value) and `figures` (what, number)."""
    config, run = record["config"], record.get("run", {})
    steps = run.get("step", config.get("steps"))
    batch = config.get("batch_size")
    rows: list[tuple[str, Any]] = [
        ("begun as", _origin(record)),
        ("steps × batch", f"{steps} × {batch} = {steps * batch} samples"),
        ("loss", config.get("loss")),
        ("times", _times(config)),
        ("pairs", _pairs(record)),
        ("optimiser", _optimiser(config)),
        ("averaged weights (EMA)", config.get("ema_decay")),
        ("precision", config.get("mixed_precision")),
        ("processes", _processes(record.get("ran", ()))),
        ("seed", config.get("seed")),
    ]
    if config.get("lora_rank"):
        rows.append(("LoRA", f"rank {config['lora_rank']}, merged into the weights"))
    if config.get("stacked"):
        rows.append(("network", f"two U-Nets in series, {config['stacked']} weights"))
    if "loss" in run:
        rows.append(("loss at the end", _number(run["loss"])))
    measures = record.get("measures") or run.get("measures") or {}
    figures = [(_measure(key), _number(value)) for key, value in measures.items()]
    rows = [(what, value) for what, value in rows if value is not None]
    return {"title": config.get("recipe") or config.get("kind"), "rows": rows, "figures": figures}


def _front(model: FlowModel, record: Mapping[str, Any]) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if model.metadata.licence is not None:
        front["license"] = model.metadata.licence.lower()
    front |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    base = record.get("base_model")
    if base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        front["base_model"] = base
    tags = ["rectiflow", "rectified-flow" if model.diffusion_path is None else "diffusion"]
    if made_for_few_steps(record.get("config", {})) and model.default_num_inference_steps == 1:
        tags.append("one-step")
    return front | {"tags": tags}


def _origin(record: Mapping[str, Any]) -> str:
    began = record.get("began_as", {})
    name = Path(str(began.get("model", "?")))
    far = name.is_absolute() or len(name.parts) > 2 or name.name == MODEL
    shown = short_name(name) if far else str(name)
    start = record["config"].get("start")
    weights = f", weights `{began['weight_hash'][:12]}`" if "weight_hash" in began else ""
    return f"{shown}{weights} (start: {start})"


def _times(config: Mapping[str, Any]) -> str:
    steps = ", ".join(map(str, config.get("student_steps", ())))
    if config.get("kind") == "distill":
        return f"the start alone, then Euler in {steps} step(s) on the stock scheduler's grid"
    if config.get("windows"):
        return f"within {config['windows']} windows, {config.get('time_law')}"
    return str(config.get("time_law"))


def _optimiser(config: Mapping[str, Any]) -> str:
    said = f"{config.get('optimizer')}, learning rate {config.get('learning_rate')}"
    if muon := config.get("muon_learning_rate"):
        said += f"; the hidden matrices' by Muon, {muon}"
    return said


def _processes(ran: Sequence[Mapping[str, Any]]) -> str | None:
    """By how many a training was done, and on what; None where that was not noted down."""
    parts = []
    for part, later in zip(ran, [*ran[1:], None], strict=False):
        end = "" if later is None else f" to step {later['from_step']}"
        parts.append(f"{part['processes']} ({part['device']}){end}")
    return ", then ".join(parts) or None


def _pairs(record: Mapping[str, Any]) -> str:
    pairs, config = record.get("pairs"), record["config"]
    if pairs is None:
        made = f"made while training ({config.get('num_inference_steps')} steps"
        scales = ", ".join(map(str, config.get("guidance_scales", ())))
        return f"{made}, guidance {scales})"
    teacher = Path(str(pairs["model"])).name if "/" in str(pairs["model"]) else pairs["model"]
    return (
        f"{pairs['num']} of {teacher} (weights `{pairs['weight_hash'][:12]}`): "
        f"{pairs['num_inference_steps']} steps of {pairs['solver']}, guidance "
        f"{pairs['guidance_scale']}, {pairs['num_prompts']} prompts "
        f"(`{pairs['prompts_sha256'][:12]}`), seeds from {pairs.get('base_seed', '?')}"
    )


def _measure(key: str) -> str:
    match = re.fullmatch(r"(\d+)_step_(pair_)?error", key)
    if match is None:
        return MEASURES.get(key, key)
    against = "the pairs" if match[2] else "its accurate solution"
    return f"error of {match[1]} step{'s' * (match[1] != '1')} against {against}"


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"


def _first_timestep(model: FlowModel) -> int | None:
    total = model.pipeline.scheduler.config.get("num_train_timesteps")
    return None if total is None or model.family in ("sd3", "flux", "qwen-image") else total - 1


def environment() -> jinja2.Environment:
    """Where templates of Markdown are found, beside this file."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
