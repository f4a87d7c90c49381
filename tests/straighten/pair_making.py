"""A store of pairs by a tiny teacher, for the tests of making them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from rectiflow.models.base import FlowModel
from rectiflow.straighten.pair_maker import PairsMade, make_pairs

LIST = ["a red cat", "two apples", "a dog", "a happy face on the left", "a red cat"]
NUM, SHARD, BATCH = 23, 7, 3
SETTINGS: dict[str, Any] = {
    "num": NUM,
    "shard_size": SHARD,
    "batch_size": BATCH,
    "solver": "euler",
    "num_inference_steps": 2,
    "guidance_scale": 2.5,
    "seed": 40,
}
BATCHES = 3 + 3 + 3 + 1  # of three shards of 7, and one of 2


def make(model: FlowModel, uri: str | Path, **changes: Any) -> PairsMade:
    settings = SETTINGS | changes
    return make_pairs(model, settings.pop("prompts", LIST), uri, **settings)


def contents(uri: str | Path) -> dict[str, bytes]:
    """Every file of a store."""
    fs, root = fsspec.url_to_fs(str(uri))
    paths = fs.ls(root, detail=False) if fs.exists(root) else []
    return {path.rpartition("/")[2]: fs.cat_file(path) for path in paths}


class Calls:
    """Counts the calls of modules by name while it is open."""

    def __init__(self, **modules: torch.nn.Module) -> None:
        self.count: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.dtypes: set[torch.dtype] = set()
        self.handles = [
            module.register_forward_pre_hook(self._seen(name), with_kwargs=True)
            for name, module in modules.items()
        ]

    def _seen(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.count[name] += 1
            first = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_ids"))
            self.rows[name] += len(first)

        return hook

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def stop_after(model: FlowModel, calls: int) -> Calls:
    """Interrupt the network at a call, as Ctrl-C would."""
    counted = Calls(network=model.network)

    def stop(*_: object) -> None:
        if counted.count["network"] > calls:
            raise KeyboardInterrupt

    counted.handles.append(model.network.register_forward_pre_hook(stop))
    return counted


def rows(store: Path, name: str) -> Tensor:
    files = sorted(store.glob("shard-*.safetensors"))
    return torch.cat([load_file(file)[name] for file in files])
