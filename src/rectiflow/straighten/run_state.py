"""What a checkpoint of a run holds, and taking it up again: nothing that a later step depends on
is left out, and nothing is taken from another run.

Trained parameters and buffers are in it and frozen parameters are not, so that a LoRA's checkpoint
has the size of the LoRA; what they were is the business of the run's identity.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.models.identity import difference
from rectiflow.straighten.processes import split_like, whole

if TYPE_CHECKING:
    from rectiflow.straighten.learner import Learner

REMEDY = "go on with what it was begun with, or choose another folder"


def collect(learner: Learner, identity: dict[str, Any]) -> dict[str, Any]:
    """The state of a run; all processes call it, and the first has the whole.

    Raises:
        WorkError: a weight is not finite.
    """
    network, keep = learner.task.network, learner.accelerator.is_main_process
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    weights = {n: whole(t, keep) for n, t in network.state_dict().items() if n not in frozen}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WorkError(
                f"the weight {name} is not a number by step {learner.step}: the last checkpoint "
                "is as it was; begin another run with a lower learning rate"
            )
    losses = torch.stack(learner.losses) if learner.losses else torch.zeros(0)
    progress: dict[str, Any] = {
        "step": learner.step,
        "skipped": learner.skipped,
        "ran": learner.ran,
        "losses": learner.accelerator.gather(losses[None].to(learner.device)),
        "norms": torch.stack(learner.norms) if learner.norms else torch.zeros(0),
        "identity": identity,
        "config": learner.config.model_dump(mode="json"),
    }
    return {
        "network": weights,
        "ema": whole(learner.ema.state_dict(), keep),
        "optimizers": [whole(optimizer.state_dict(), keep) for optimizer in learner.optimizers],
        "scaler": learner.scaler.state_dict(),
        "progress": progress,
    }


def restore(learner: Learner, identity: dict[str, Any], state: dict[str, Any], found: Path) -> None:
    """Put a checkpoint's state into a learner.

    Checkpoints of the first versions, which lack identity, configuration, scaler and the losses
    since the last line of the log, are read too.

    Raises:
        InputError: the checkpoint is of another model, other data or another configuration.
    """
    progress = state["progress"]
    _same(learner, identity, progress, found)
    _load_weights(learner, state["network"], found)
    ema, shadows = state["ema"], learner.ema.shadow_params
    if len(ema["shadow_params"]) != len(shadows):
        raise _other(
            found, "the number of trained weights", len(ema["shadow_params"]), len(shadows)
        )
    split = zip(ema["shadow_params"], shadows, strict=True)
    placed = [split_like(t.to(like.device, like.dtype), like) for t, like in split]
    learner.ema.load_state_dict({name: v for name, v in ema.items() if name != "shadow_params"})
    learner.ema.shadow_params = placed
    _load_optimizers(learner, state["optimizers"], found)
    if state.get("scaler") and learner.scaler.is_enabled():
        learner.scaler.load_state_dict(state["scaler"])
    learner.step, learner.skipped = int(progress["step"]), int(progress.get("skipped", 0))
    learner.ran = [dict(part) for part in progress.get("ran", ())]
    losses, norms = progress.get("losses", torch.zeros(1, 0)), progress.get("norms", ())
    rank, ranks = learner.accelerator.process_index, learner.accelerator.num_processes
    mine = losses[rank] if len(losses) == ranks else losses.mean(0)
    learner.losses = list(mine.to(learner.device))
    learner.norms = [norm.to(learner.device) for norm in norms]


def _same(
    learner: Learner, identity: dict[str, Any], progress: dict[str, Any], found: Path
) -> None:
    """Refuse a checkpoint of another run."""
    if "identity" in progress:
        had, now = dict(progress["identity"]), dict(identity)
        model = str(getattr(learner.config, "model", "the model"))
        teacher = getattr(learner.config, "teacher", None) or model
        _same_field(had, now, "identity", model, found)
        _same_field(had, now, "teacher_identity", teacher, found)
        # Of a store each setting by itself, and its field in the same way.
        stores = [identity.pop("pairs", None) or {} for identity in (had, now)]
        had |= {f"{key} of the pairs": value for key, value in stores[0].items()}
        now |= {f"{key} of the pairs": value for key, value in stores[1].items()}
        _same_field(had, now, "identity of the pairs", "the store", found)
        for key in sorted({*had, *now} - {"format of the pairs"}):
            if had.get(key) != now.get(key):
                raise _other(found, key, had.get(key), now.get(key))
    config = learner.config.model_dump(mode="json")
    for key, had in progress.get("config", {}).items():
        if key in config and key not in learner.config.CHANGEABLE and config[key] != had:
            raise _other(found, key, had, config[key])


def _same_field(had: dict[str, Any], now: dict[str, Any], key: str, name: str, found: Path) -> None:
    """Refuse another `FlowModel.identity`; runs and stores of earlier versions have none."""
    kept, current = had.pop(key, None), now.pop(key, None)
    if words := difference(kept, current or {}, "the checkpoint", name):
        raise InputError(f"{found} is of another run: {words}; {REMEDY}")


def _load_weights(learner: Learner, saved: dict[str, Tensor], found: Path) -> None:
    network = learner.task.network
    now = network.state_dict()
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    for name in sorted({*saved, *now}):
        if name not in now or (name not in saved and name not in frozen):
            raise _other(found, f"the weight {name}", name in saved, name in now)
        if name in saved and saved[name].shape != now[name].shape:
            shapes = tuple(saved[name].shape), tuple(now[name].shape)
            raise _other(found, f"the shape of {name}", *shapes)
    placed = {name: split_like(tensor, now[name]) for name, tensor in saved.items()}
    network.load_state_dict(placed, strict=False)


def _load_optimizers(learner: Learner, saved: list[dict[str, Any]], found: Path) -> None:
    if len(saved) != len(learner.optimizers):
        raise _other(found, "the number of optimisers", len(saved), len(learner.optimizers))
    for optimizer, state in zip(learner.optimizers, saved, strict=True):
        # Rates and the like come from the configuration; what it was is checked above.
        groups = optimizer.state_dict()["param_groups"]
        sizes = [[len(g["params"]) for g in part] for part in (state["param_groups"], groups)]
        if sizes[0] != sizes[1]:
            raise _other(found, "the number of weights of an optimiser", *sizes)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        placed = {
            key: {name: _place(value, parameters[key]) for name, value in entry.items()}
            for key, entry in state["state"].items()
        }
        optimizer.load_state_dict({"state": placed, "param_groups": groups})


def _place(value: Any, like: Tensor) -> Any:
    return split_like(value, like) if isinstance(value, Tensor) else value


def _other(found: Path, what: str, had: Any, now: Any) -> InputError:
    return InputError(f"{found} is of another run: {what} was {had!r} and is now {now!r}; {REMEDY}")
