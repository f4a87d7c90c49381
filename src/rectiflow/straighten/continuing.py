"""Settings of a run that may have been begun: they stay what they were, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError
from rectiflow.settings_file import read_yaml
from rectiflow.straighten.config import Config, validate


def continued(kind: type[Config], given: Mapping[str, Any], run: Path) -> Config:
    """The validated configuration; of a run that exists already its own, lengthened at most.

    Args:
        kind: Of configuration.
        given: What file and options say.
        run: The run's folder.

    Raises:
        InputError: a setting is wrong, or the run was begun with another one.
    """
    asked = validate(kind, dict(given))
    saved = run / "config.yaml"
    if not saved.is_file():
        return asked
    before = read_yaml(saved)
    if before.get("recipe") != asked.recipe:
        raise InputError(f"{run} is a run of {before.get('recipe')}: choose another folder with -o")
    kept = validate(kind, before)
    wanted, had = asked.model_dump(mode="json"), kept.model_dump(mode="json")
    for key in given:
        if key not in kind.CHANGEABLE and wanted[key] != had[key]:
            raise InputError(
                f"{run} was begun with {key} {had[key]} and not {wanted[key]}: leave the setting "
                "out to go on with it, or choose another folder with -o"
            )
    changed = {key: given[key] for key in given if key in kind.CHANGEABLE}
    return validate(kind, before | changed)
