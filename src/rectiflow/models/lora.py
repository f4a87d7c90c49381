"""LoRA: small weights that change a network, through diffusers' own loader.

The layers stay beside the network's own and are not fused into them: what a hook sees of a
projection is its output with every LoRA added, and nothing of the network's precision is lost.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rectiflow.errors import InputError, install
from rectiflow.models.hub import first_sentence, hub_answers, refusal

FILE_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA's file where nothing else is said."""


@dataclass(frozen=True)
class Lora:
    """Where a LoRA is, and how strong it is to be.

    Example:
        >>> Lora.parse("style.safetensors@0.6")
        Lora(source='style.safetensors', scale=0.6)
        >>> Lora.parse("owner/name")
        Lora(source='owner/name', scale=1.0)
    """

    source: str
    """A file, a folder, `owner/name` of the hub, or `owner/name/file.safetensors` of it."""
    scale: float = 1.0
    """What its contribution is multiplied by."""

    @classmethod
    def parse(cls, text: str | Path) -> Lora:
        """Read `FILE_OR_ID[@SCALE]`.

        Raises:
            InputError: There is no name in it, or the scale is not finite.
        """
        source, scale = str(text), 1.0
        before, found, number = source.rpartition("@")
        if found:
            # What follows an @ in a name is no number.
            with suppress(ValueError):
                source, scale = before, float(number)
        if not source or not math.isfinite(scale):
            raise InputError(f"--lora {text}: write FILE_OR_ID or FILE_OR_ID@SCALE, as in a.b@0.8")
        return cls(source, scale)


def add_loras(pipeline: Any, loras: Sequence[str | Path], name: str) -> None:
    """Load LoRAs into a pipeline's networks; together, each at its scale.

    Args:
        pipeline: Of diffusers, its weights loaded.
        loras: `FILE_OR_ID[@SCALE]` each.
        name: The model's, for messages.

    Raises:
        InputError: peft is missing or too old, a LoRA is not there, or is not for this model.
    """
    wanted = [Lora.parse(text) for text in loras]
    if not wanted:
        return
    require_peft("a LoRA")
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"{name}: diffusers loads no LoRA into a {type(pipeline).__name__}")
    adapters = {f"lora_{number}": lora for number, lora in enumerate(wanted)}
    for adapter, lora in adapters.items():
        _load(pipeline, lora, adapter, name)
    pipeline.set_adapters(list(adapters), [lora.scale for lora in adapters.values()])


def merge_loras(part: nn.Module) -> None:
    """Add a network's LoRAs into its weights, and take their layers out; in place."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in part.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    recurse_remove_peft_layers(part)
    del part.peft_config
    part._hf_peft_config_loaded = False  # type: ignore[assignment]


def _load(pipeline: Any, lora: Lora, adapter: str, name: str) -> None:
    from safetensors import SafetensorError

    place, options = _locate(lora.source)
    try:
        pipeline.load_lora_weights(place, adapter_name=adapter, use_safetensors=True, **options)
    except ImportError as error:  # transformers' minimum is another one than diffusers'
        from transformers.integrations.peft import MIN_PEFT_VERSION

        raise _peft_too_old(f"the LoRA {lora.source}", "transformers", MIN_PEFT_VERSION) from error
    # Keys that fit nothing end in the strangest places of diffusers and peft.
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise (
            refusal(lora.source, error)
            or InputError(
                f"the LoRA {lora.source} cannot be loaded into {name}: {first_sentence(error)}"
            )
        ) from error
    if not any(adapter in known for known in pipeline.get_list_adapters().values()):
        raise InputError(f"the LoRA {lora.source} is not for {name}: no layer of it fits")


def require_peft(wanted: str) -> None:
    """Refuse to go on without a peft that diffusers works with.

    Args:
        wanted: What needs it, to begin the message with.

    Raises:
        InputError: It is missing, or older than diffusers' own minimum.
    """
    from diffusers.utils import is_peft_version
    from diffusers.utils.constants import MIN_PEFT_VERSION

    if importlib.util.find_spec("peft") is None:
        raise InputError(f"{wanted} needs peft: {install('lora')}")
    if is_peft_version("<", MIN_PEFT_VERSION):
        raise _peft_too_old(wanted, "diffusers", MIN_PEFT_VERSION)


def _peft_too_old(wanted: str, library: str, minimum: str) -> InputError:
    here = {name: importlib.metadata.version(name) for name in (library, "peft")}
    return InputError(
        f"{wanted} needs peft {minimum} or newer beside {library} {here[library]}, and here is "
        f"{here['peft']}: pip install 'peft>={minimum}' (if there is none yet, "
        f"{install('lora')} takes versions that work together)"
    )


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """What diffusers is to be given: a folder or an id, and the file in it."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"the LoRA {source} is no .safetensors file; others may run code")
        return str(path.parent), {"weight_name": path.name, "local_files_only": True}
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if FILE_NAME not in names and len(names) != 1:
            found = ", ".join(names) or "none"
            raise InputError(f"the folder {source} has no {FILE_NAME}: name the file ({found})")
        weight = FILE_NAME if FILE_NAME in names else names[0]
        return str(path), {"weight_name": weight, "local_files_only": True}
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+?)(?:/(.+\.safetensors))?", source)
    if match is None or (source.endswith(".safetensors") and match[2] is None):
        raise InputError(f"there is no LoRA {source}: give a file, a folder or a hub id")
    local = not hub_answers(match[1])
    options: dict[str, Any] = {"local_files_only": local}
    if match[2] is not None or local:  # without the hub nobody can look what the file is called
        options["weight_name"] = match[2] or FILE_NAME
    return match[1], options
