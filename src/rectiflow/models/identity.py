"""What a model's field is beside its weights: settings of its parts, as data to keep and compare.

The same weights are another field under another `prediction_type`, noise schedule, scaling of
latents, number of attention heads or tokenizer. Whatever is made by a model and goes on to be used
with it (stores of pairs, runs, saved inversions) keeps `weight_hash` and `FlowModel.identity`, and
asks `difference` whether it is still that model's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rectiflow.models.base import FlowModel

Identity = Mapping[str, Any]
"""`PART.SETTING` -> JSON value."""

DIFFUSION = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
FLOW = ("num_train_timesteps", "flow_shift", "shift", "use_dynamic_shifting", "time_shift_type")
DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "shift_terminal")
"""Settings of a scheduler that belong to the field and its grid; others are a solver's."""
UNRELATED = {
    *("architectures", "dtype", "id2label", "label2id", "name_or_path", "torch_dtype"),
    *("requires_safety_checker", "transformers_version"),
}
"""Notes in configurations that no picture depends on; `weight_hash` knows the dtype."""
PROBE = "Two cats & a dog, 3 o'clock: déjà vu"
"""What tokenizers are known by is the tokens they make of it, padding included."""
_SHOWN = 3
_TABLE = 4
"""Parts of the table of ᾱ whose ends are kept, since a scheduler's class decides on it as well."""


def identity_of(model: FlowModel) -> dict[str, Any]:
    """The settings that a model's field, codec and prompts depend on, as it is now."""
    found: dict[str, Any] = {"model.family": model.family, "model.convention": model.convention}
    found |= {f"scheduler.{name}": value for name, value in _schedule(model).items()}
    segments = model.tokenize(PROBE)
    ids = json.dumps([[part.name, part.ids] for part in segments])
    found["text.length"] = sum(part.length for part in segments)
    found["text.tokenizer"] = hashlib.sha256(ids.encode()).hexdigest()[:12]
    settings = {"pipeline": getattr(model.pipeline, "config", {})}
    settings |= {name: getattr(part, "config", {}) for name, part in model.modules.items()}
    for part, config in settings.items():
        found |= {f"{part}.{name}": value for name, value in plain(config).items()}
    return found


def plain(config: Any) -> dict[str, Any]:
    """A configuration of diffusers or transformers as JSON data, without bookkeeping."""
    said = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    parts = {name: value for name, value in said.items() if not _is_component(value)}
    told: dict[str, Any] = json.loads(json.dumps(_related(parts), default=_as_json))
    return told


def difference(kept: Identity | None, now: Identity, kept_in: str, name: str) -> str:
    """In words what differs, with both values; empty if nothing does.

    A setting that one of them does not have says nothing: it came with another version of a
    library, or of this package.

    Args:
        kept: What was kept; None of something that was made before identities were kept.
        now: Of the model.
        kept_in: What to call the place where the first is: `the store`.
        name: The model's.

    Example:
        >>> kept = {"scheduler.prediction_type": "epsilon", "vae.scaling_factor": 0.18215}
        >>> now = kept | {"scheduler.prediction_type": "v_prediction"}
        >>> difference(kept, now, "the store", "sd")
        'prediction_type: epsilon in the store, v_prediction in sd/scheduler/scheduler_config.json'
    """
    words: dict[str, str] = {}
    for key, had in (kept or {}).items():
        part, _, setting = key.partition(".")
        # ᾱ follows from the settings before it, and a solver's from its scheduler's.
        follows = setting in words or (words and setting == "alphas_cumprod")
        if key in now and not same(had, now[key]) and not follows:
            place = _place(part, name)
            words[setting] = f"{setting}: {_short(had)} in {kept_in}, {_short(now[key])} in {place}"
    more = [f"and {len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return "; ".join([*words.values()][:_SHOWN] + more)


def fingerprint(identity: Identity) -> str:
    """A short hash of an identity, where whether it is another is all that is asked.

    Numbers are taken to four digits: the last bits of a table of noise differ between machines.
    """

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.4g}"
        return [rounded(part) for part in value] if isinstance(value, list) else value

    told = {name: rounded(value) for name, value in identity.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same, numbers up to the last bits of float32."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-5)
    return bool(one == other)


def _schedule(model: FlowModel) -> dict[str, Any]:
    """What the network predicts, and at which times and levels of noise it is asked."""
    scheduler = getattr(model.pipeline, "scheduler", None)
    config = getattr(scheduler, "config", {})
    path = model.diffusion_path
    found = {"prediction_type": config.get("prediction_type", model.prediction_type)}
    names: tuple[str, ...] = FLOW if path is None else DIFFUSION
    if path is None and config.get("use_dynamic_shifting"):
        names += DYNAMIC
    found |= plain({name: config[name] for name in names if name in config})
    if path is not None:
        last = len(path.log_snr) - 1
        table = torch.sigmoid(path.log_snr[[last * i // _TABLE for i in range(_TABLE + 1)]])
        found["alphas_cumprod"] = [float(f"{entry:.6g}") for entry in table]
    return found


_LIBRARIES = (None, "diffusers", "transformers", "rectiflow")


def _is_component(value: Any) -> bool:
    """Whether an entry of a pipeline's configuration says which class a part is of."""
    return isinstance(value, tuple | list) and len(value) == 2 and value[0] in _LIBRARIES


def _related(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if k not in UNRELATED and not str(k).startswith("_")}
        return {str(k): _related(v) for k, v in kept.items()}
    # JSON has no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _as_json(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _place(part: str, name: str) -> str:
    """Where a setting is written, or what it follows from."""
    files = {
        "model": name,
        "pipeline": f"{name}/model_index.json",
        "scheduler": f"{name}/scheduler/scheduler_config.json",
        "solver": f"{name}/scheduler/scheduler_config.json",
        "text": f"{name}/rectiflow.json or its tokenizers",
    }
    return files.get(part, f"{name}/{part}/config.json")
