"""Making pairs: what they are, that nothing is lost, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.models import generate_latents
from rectiflow.models.base import FlowModel
from rectiflow.models.images import to_tensor
from rectiflow.straighten.folder import TEMPORARY
from rectiflow.straighten.manifest import COMPLETE, MANIFEST, PROMPTS
from rectiflow.straighten.pair_maker import PairsMade, make_pairs
from rectiflow.straighten.store_writer import PairProgress
from rectiflow.straighten.text_cache import TextCache, remembering_prompts
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model

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


@pytest.fixture(scope="module")
def model() -> FlowModel:
    return tiny_model()


def make(model: FlowModel, uri: str | Path, **changes: Any) -> PairsMade:
    settings = SETTINGS | changes
    return make_pairs(model, settings.pop("prompts", LIST), uri, **settings)


def contents(uri: str | Path) -> dict[str, bytes]:
    """Every file of a store."""
    fs, root = fsspec.url_to_fs(str(uri))
    paths = fs.ls(root, detail=False) if fs.exists(root) else []
    return {path.rpartition("/")[2]: fs.cat_file(path) for path in paths}


@pytest.fixture(scope="module")
def whole(model: FlowModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store made without any interruption; tests only read it."""
    store = tmp_path_factory.mktemp("pairs") / "store"
    done = make(model, store)
    assert done.complete and done.made == done.total == NUM and not done.remade
    return store


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in contents(whole).items():
        (copy / name).write_bytes(data)
    return copy


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


# What pairs are.


def rows(store: Path, name: str) -> Tensor:
    files = sorted(store.glob("shard-*.safetensors"))
    return torch.cat([load_file(file)[name] for file in files])


def test_pairs_are_what_the_teacher_generates(model: FlowModel, whole: Path) -> None:
    """Pair by pair with the noise of its seed, in the same batches: to the last bit of float16."""
    noise = [
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + i)) for i in range(NUM)
    ]
    expected = []
    for shard in range(0, NUM, SHARD):
        stop = min(shard + SHARD, NUM)
        for row in range(shard, stop, BATCH):
            batch = range(row, min(row + BATCH, stop))
            solution = generate_latents(
                model,
                [LIST[i % len(LIST)] for i in batch],
                torch.stack([noise[i] for i in batch]),
                num_inference_steps=2,
                guidance_scale=2.5,
                solver="euler",
            )
            expected.append(solution.x.half())
    x_1 = rows(whole, "x_1")
    assert x_1.dtype == torch.float16 and torch.equal(x_1, torch.cat(expected))
    cost = (x_1.double() - torch.stack(noise).double()).square().mean((1, 2, 3))
    assert torch.allclose(rows(whole, "cost").double(), cost, rtol=1e-6)
    for number, shard in enumerate(range(0, NUM, SHARD)):
        sidecar = json.loads((whole / f"shard-{number:06d}.json").read_text())
        x_0 = torch.stack(noise[shard : shard + SHARD]).numpy()
        assert sidecar["x_0_sha256"] == hashlib.sha256(x_0.tobytes()).hexdigest()


def test_what_a_finished_store_says(model: FlowModel, whole: Path) -> None:
    files = contents(whole)
    shards = [f"shard-{i:06d}" for i in range(4)]
    expected = {f"{shard}.{kind}" for shard in shards for kind in ("safetensors", "json")}
    assert set(files) == expected | {MANIFEST, PROMPTS, COMPLETE}
    manifest = json.loads(files[MANIFEST])
    said = {name: manifest[name] for name in ("weight_hash", "dtype", "num_prompts", "base_seed")}
    assert said == {
        "weight_hash": model.weight_hash,
        "dtype": "float32",
        "num_prompts": 5,
        "base_seed": 40,
    }
    complete = json.loads(files[COMPLETE])
    assert complete["num"] == NUM and complete["shards"] == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in sorted(files.items())
        if name.endswith(".safetensors")
    }


def test_what_guidance_pushes_away_from(model: FlowModel, tmp_path: Path) -> None:
    make(model, tmp_path / "store", num=3, negative_prompt="a dog")
    noise = [
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + i)) for i in range(3)
    ]
    x = [
        generate_latents(
            model,
            LIST[:3],
            torch.stack(noise),
            negative_prompt=negative,
            num_inference_steps=2,
            guidance_scale=2.5,
            solver="euler",
        ).x.half()
        for negative in ("a dog", None)
    ]
    stored = rows(tmp_path / "store", "x_1")
    assert torch.equal(stored, x[0]) and not torch.equal(stored, x[1])


def test_half_precision_teachers(tmp_path: Path) -> None:
    """The network in its dtype, the states in float32: what `generate_latents` does."""
    model = tiny_model(dtype=torch.bfloat16)
    make(model, tmp_path / "store", num=3)
    noise = [
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + i)) for i in range(3)
    ]
    x = generate_latents(
        model,
        LIST[:3],
        torch.stack(noise),
        num_inference_steps=2,
        guidance_scale=2.5,
        solver="euler",
    ).x
    assert x.dtype == torch.float32
    assert torch.equal(rows(tmp_path / "store", "x_1"), x.half())
    assert json.loads((tmp_path / "store" / MANIFEST).read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("solver", ["dpmpp", "ddim"])
def test_diffusion_teachers_by_the_schedulers_of_diffusers(tmp_path: Path, solver: str) -> None:
    """Against the pipeline of diffusers itself, given the same noise."""
    model = tiny_sd_model()
    make(model, tmp_path / "store", solver=solver, num=4, batch_size=2, num_inference_steps=4)
    noise = [
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + i)) for i in range(4)
    ]
    pipeline = type(model.pipeline)(**model.pipeline.components)
    made = DPMSolverMultistepScheduler if solver == "dpmpp" else DDIMScheduler
    pipeline.scheduler = made.from_config(model.pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = [
        pipeline(
            LIST[i : i + 2],
            latents=torch.stack(noise[i : i + 2]),
            num_inference_steps=4,
            guidance_scale=2.5,
            output_type="latent",
        ).images
        for i in (0, 2)
    ]
    x_1 = rows(tmp_path / "store", "x_1").float()
    assert torch.allclose(x_1, torch.cat(expected), rtol=2e-3, atol=2e-3)


def test_text_is_embedded_once_and_the_network_runs_no_more_than_it_must(
    model: FlowModel, tmp_path: Path
) -> None:
    encoders = {"one": model.pipeline.text_encoder, "two": model.pipeline.text_encoder_2}
    with Calls(network=model.network, **encoders) as calls:
        make(model, tmp_path / "store")
    # Four distinct prompts and the empty one; two steps of each batch, and one row's trial.
    assert calls.count == {"one": 5, "two": 5, "network": 2 * BATCHES + 1}
    assert calls.rows["network"] == 2 * 2 * NUM + 2
    assert "encode_prompt" not in vars(model)
    with Calls(network=model.network, **encoders) as calls:
        done = make(model, tmp_path / "store")
    assert not calls.count and done.complete and done.made == 0


def test_remembered_prompts_are_bounded_and_the_same(model: FlowModel) -> None:
    fresh = model.encode_prompt(LIST)
    one = fresh.embeds[0].nbytes + fresh.pooled[0].nbytes  # type: ignore[index]
    with Calls(text=model.pipeline.text_encoder) as calls:
        cache = TextCache(model, budget=2 * one)
        for _ in range(3):
            found = cache.encode_prompt(LIST)
            assert torch.equal(found.embeds, fresh.embeds)
            assert found.pooled is not None and torch.equal(found.pooled, fresh.pooled)  # type: ignore[arg-type]
            assert cache.bytes <= 2 * one
        # The last two are remembered, the other two are not.
        assert calls.count["text"] == 4 + 2 + 2
        cache = TextCache(model, budget=2 * one)
        for prompt in ("a", "b", "a", "c", "a"):  # b is what was asked for longest ago
            cache.encode_prompt(prompt)
        assert calls.count["text"] == 8 + 3
    with remembering_prompts(model), pytest.raises(ZeroDivisionError):
        assert "encode_prompt" in vars(model)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), remembering_prompts(model):
        raise ZeroDivisionError
    assert "encode_prompt" not in vars(model)


def test_a_shards_bytes_are_its_latents(model: FlowModel, tmp_path: Path) -> None:
    """At the size of Stable Diffusion's latents and shards, sidecar and all, within 2 %."""
    done = make(
        model, tmp_path / "store", num=64, shard_size=64, batch_size=64, height=96, width=96
    )
    assert done.bytes == sum(
        len(data) for name, data in contents(done.uri).items() if name.startswith("shard-")
    )
    latents = 2 * 4 * 24 * 24
    assert latents <= done.bytes / 64 <= 1.02 * latents


# Nothing is lost, nothing is made twice.


@pytest.mark.parametrize(
    ("workers", "scheme"), [(2, "local"), (3, "local"), (7, "local"), (1, "memory"), (3, "memory")]
)
def test_any_number_of_workers_make_the_same_store(
    model: FlowModel, whole: Path, tmp_path: Path, workers: int, scheme: str
) -> None:
    uri = str(tmp_path / "store") if scheme == "local" else f"memory://{tmp_path.name}/{workers}"
    order = list(range(workers))[::-1]
    done = [make(model, uri, worker=worker, num_workers=workers) for worker in order]
    assert [one.complete for one in done[-4:]].count(True) >= 1
    assert sum(one.made for one in done) == sum(one.total for one in done) == NUM
    assert contents(uri) == contents(whole)


@pytest.mark.parametrize("calls", [0, 1, 4, 12])
def test_an_interruption_costs_one_batch(
    model: FlowModel, whole: Path, tmp_path: Path, calls: int
) -> None:
    store = tmp_path / "store"
    with stop_after(model, calls), pytest.raises(KeyboardInterrupt):
        make(model, store, keep_seconds=0)
    before = contents(store)
    with Calls(network=model.network) as second:
        done = make(model, store, keep_seconds=0)
    if calls == 0:  # in the trial: nothing has been written
        assert not before
    else:
        finished = (calls - 1) // 2
        assert second.count["network"] == 2 * (BATCHES - finished)
        assert done.total == NUM and done.complete
    assert contents(store) == contents(whole)


def test_without_keeping_an_interruption_costs_the_shard(
    model: FlowModel, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with stop_after(model, 1 + 2 * 5), pytest.raises(KeyboardInterrupt):
        make(model, store)
    assert not [name for name in contents(store) if name.startswith(TEMPORARY)]
    with Calls(network=model.network) as second:
        make(model, store)
    assert second.count["network"] == 2 * (BATCHES - 3)
    assert contents(store) == contents(whole)


def test_damaged_parts_are_not_used(model: FlowModel, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with stop_after(model, 1 + 2 * 2), pytest.raises(KeyboardInterrupt):
        make(model, store, keep_seconds=0)
    parts = sorted(store.glob(f"{TEMPORARY}part-*"))
    assert len(parts) == 2
    # The last byte is of a latent: the file is sound, and says something else.
    data = parts[0].read_bytes()
    parts[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    make(model, store, keep_seconds=0)
    assert contents(store) == contents(whole)


def test_another_number_of_workers_goes_on(model: FlowModel, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with stop_after(model, 12), pytest.raises(KeyboardInterrupt):
        make(model, store, worker=1, num_workers=2, keep_seconds=0)
        make(model, store, worker=0, num_workers=2, keep_seconds=0)
    for worker in (2, 0, 1):
        done = make(model, store, worker=worker, num_workers=3)
    assert done.complete and contents(store) == contents(whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-000001.safetensors", lambda data: data[:-5]),
        ("shard-000003.safetensors", lambda data: data[:200] + b"\x13\x37" + data[202:]),
        ("shard-000000.safetensors", lambda data: b""),
        ("shard-000002.json", lambda data: data[:20]),
        ("shard-000002.json", lambda data: data.replace(b'"first": 14', b'"first": 7')),
    ],
)
def test_damaged_shards_are_named_and_made_again(
    model: FlowModel, whole: Path, begun: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    (begun / name).write_bytes(damage((begun / name).read_bytes()))
    shard = name.partition(".")[0] + ".safetensors"
    said: list[str] = []
    done = make(model, begun, on_event=said.append)
    assert done.remade == (shard,) and done.complete
    assert done.made == (2 if "3" in shard else 7)
    assert len(said) == 1 and said[0].startswith(f"{shard} is damaged (")
    assert contents(begun) == contents(whole)


@pytest.mark.parametrize(
    "missing",
    [
        ["shard-000001.safetensors"],
        ["shard-000001.json"],
        ["shard-000000.safetensors", "shard-000003.json", COMPLETE],
        [COMPLETE],
        [PROMPTS],
    ],
)
def test_missing_files_are_made_again(
    model: FlowModel, whole: Path, begun: Path, missing: list[str]
) -> None:
    for name in missing:
        (begun / name).unlink()
    done = make(model, begun)
    assert done.complete and not done.remade
    assert contents(begun) == contents(whole)


def test_leftovers_are_cleaned_and_damaged_prompts_written_again(
    model: FlowModel, whole: Path, begun: Path
) -> None:
    for name in (f"{TEMPORARY}shard-000001.json-9-ab", f"{TEMPORARY}manifest.json-9-ab"):
        (begun / name).write_bytes(b"half")
    (begun / PROMPTS).write_bytes(b"half")
    said: list[str] = []
    make(model, begun, on_event=said.append)
    assert said == ["prompts.jsonl.gz is damaged: writing it again"]
    assert contents(begun) == contents(whole)


def test_a_kill_before_the_manifest_leaves_a_free_folder(
    model: FlowModel, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / f"{TEMPORARY}manifest.json-9-ab").write_bytes(b'{"fo')
    make(model, store)
    assert contents(store) == contents(whole)


def test_progress(model: FlowModel, begun: Path) -> None:
    (begun / "shard-000001.json").unlink()
    seen: list[PairProgress] = []
    done = make(model, begun, progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1] == PairProgress(done=NUM, total=NUM, made=7, bytes=done.bytes)
    assert sum(len(d) for n, d in contents(begun).items() if n.startswith("shard")) == done.bytes


def test_threads_are_those_of_the_store(model: FlowModel, tmp_path: Path) -> None:
    store = tmp_path / "store"
    seen: set[int] = set()
    handle = model.network.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        make(model, store, threads=2, worker=0, num_workers=2, num=4, shard_size=2)
        assert json.loads((store / MANIFEST).read_text())["threads"] == 2
        seen.clear()
        make(model, store, worker=1, num_workers=2, num=4, shard_size=2)
    finally:
        handle.remove()
    assert seen == {2} and torch.get_num_threads() == 1
    with pytest.raises(InputError, match="with threads 2, and 1 is asked for"):
        make(model, store, threads=1, num=4, shard_size=2)


# Bad input: one line, and nothing is overwritten.


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num": 30}, r"with num 23, and 30 are asked for: .* the other 7 .* with seed 63"),
        ({"num": 20}, "with num 23, and 20 is asked for: give the same, or another address"),
        ({"solver": "heun"}, "with solver 'euler', and 'heun' is asked for"),
        ({"num_inference_steps": 3}, "with num_inference_steps 2, and 3 is asked for"),
        ({"guidance_scale": 5.0}, "with guidance_scale 2.5, and 5.0 is asked for"),
        ({"negative_prompt": "a dog"}, "with negative_prompt None, and 'a dog' is asked for"),
        ({"seed": 41}, "with base_seed 40, and 41 is asked for"),
        ({"batch_size": 4}, "with batch_size 3, and 4 is asked for"),
        ({"shard_size": 8}, "with shard_size 7, and 8 is asked for"),
        ({"height": 40}, "with height 32, and 40 is asked for"),
        ({"prompts": LIST[:4]}, "with another prompt list, of 5 prompts with prompts_sha256"),
        ({"prompts": [*LIST[:4], "a cat"]}, "with another prompt list"),
    ],
)
def test_other_settings_are_refused(
    model: FlowModel, whole: Path, change: dict[str, Any], line: str
) -> None:
    before = contents(whole)
    with pytest.raises(InputError, match=line) as error:
        make(model, whole, **change)
    assert "\n" not in str(error.value) and str(whole) in str(error.value)
    assert contents(whole) == before


def test_another_teacher_is_refused(whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(InputError, match="is of another teacher, tiny with weight_hash"):
        make(tiny_model(seed=1), whole)
    with pytest.raises(InputError, match="with dtype 'float32', and 'bfloat16' is asked for"):
        make(tiny_model(dtype=torch.bfloat16), whole)
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"prompts": []}, "there are no prompts: give at least one"),
        ({"num": 0}, "num is 0: give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"solver": "dpmm"}, "unknown solver 'dpmm'"),
        ({"height": 33}, "height 33 and width 32 must both be multiples of 8"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63 - 2}, "give one from 0 to"),
        ({"worker": 3, "num_workers": 3}, "worker is 3 of 3"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"images": [Path("a.png")]}, "5 captions for 1 images"),
    ],
)
def test_impossible_settings_write_nothing(
    model: FlowModel, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=line):
        make(model, tmp_path / "store", **change)
    assert not (tmp_path / "store").exists()


def test_folders_of_something_else_are_left_alone(model: FlowModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        InputError, match=r"holds something else .* \(thesis.txt\): choose an empty"
    ):
        make(model, tmp_path)
    (tmp_path / MANIFEST).write_text('{"name": "my web app"}')
    with pytest.raises(InputError, match=r"manifest.json is not the manifest of a store of pairs"):
        make(model, tmp_path)
    assert set(contents(tmp_path)) == {"thesis.txt", MANIFEST}


def test_pairs_that_are_not_numbers_are_not_stored(tmp_path: Path) -> None:
    """Found only in the second batch: what was made before it is kept."""
    model = tiny_model()
    calls = 0

    def spoil(module: torch.nn.Module, args: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        return (output[0] * (1e6 if calls > 1 + 2 * 3 else 1),)

    model.network.register_forward_hook(spoil)
    with pytest.raises(WorkError, match="pairs 7 to 9: latents that float16 cannot hold"):
        make(model, tmp_path / "store")
    files = set(contents(tmp_path / "store"))
    assert files == {MANIFEST, PROMPTS, "shard-000000.safetensors", "shard-000000.json"}


# Real images with their inversions.


def test_inverted_pairs_of_a_diffusion_model(pictures: list[Path], tmp_path: Path) -> None:
    """Its flow begins at t_min, from a multiple of the noise; it is that noise which is stored."""
    model = tiny_sd_model()
    # What a random network adds to the field is wild, and would need many more steps.
    model.network.conv_out.weight.mul_(0.1)
    settings = {"num_inference_steps": 12, "guidance_scale": 1.0, "solver": "rk4"}
    two = {"images": pictures[:2], "prompts": LIST[:2], "num": None}
    make(model, tmp_path / "store", **two, **settings)
    x_0, x_1 = rows(tmp_path / "store", "x_0").float(), rows(tmp_path / "store", "x_1").float()

    def error(noise: Tensor) -> float:
        end = generate_latents(model, LIST[:2], noise, **settings).x
        return float((end - x_1).norm() / (x_1 - x_0).norm())

    assert error(x_0) < 0.02 < 0.05 < error(model.initial_state(x_0))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        small = rng.integers(0, 256, (4, 5 + i, 3), np.uint8)
        Image.fromarray(small).resize((40 + 8 * i, 48)).save(file)
    return files


def test_inverted_pairs(model: FlowModel, pictures: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    settings = {"num": None, "solver": "rk4", "num_inference_steps": 8, "guidance_scale": 1.0}
    done = make(model, store, images=pictures, shard_size=3, batch_size=2, **settings)
    assert done.complete and done.manifest.kind == "inverted" and done.manifest.num == 5
    x_0, x_1 = rows(store, "x_0"), rows(store, "x_1")
    fitted = [ImageOps.fit(Image.open(f), (32, 32), Image.Resampling.LANCZOS) for f in pictures]
    encoded = model.encode_image(torch.cat([to_tensor(picture) for picture in fitted]))
    assert torch.allclose(x_1.float(), encoded, atol=2e-3)
    # The flow from x_0 leads back to the image.
    back = generate_latents(
        model, LIST, x_0.float(), num_inference_steps=8, guidance_scale=1.0, solver="rk4"
    ).x
    distance = (x_1.float() - x_0.float()).square().mean().sqrt()
    assert (back - x_1.float()).square().mean().sqrt() < 0.02 * distance
    sidecar = json.loads((store / "shard-000000.json").read_text())
    stored = x_0[:3].float().numpy().tobytes()
    assert sidecar["x_0_sha256"] == hashlib.sha256(stored).hexdigest()
    # Interrupted, and by two writers: the same.
    again = tmp_path / "again"
    with stop_after(model, 40), pytest.raises(KeyboardInterrupt):
        make(model, again, images=pictures, shard_size=3, batch_size=2, keep_seconds=0, **settings)
    for worker in (1, 0):
        done = make(
            model,
            again,
            images=pictures,
            shard_size=3,
            batch_size=2,
            worker=worker,
            num_workers=2,
            **settings,
        )
    assert done.complete and contents(again) == contents(store)
    # Another picture under the same name is another store.
    Image.new("RGB", (40, 40)).save(pictures[2])
    with pytest.raises(InputError, match="with images_sha256"):
        make(model, store, images=pictures, shard_size=3, batch_size=2, **settings)
    with pytest.raises(InputError, match="num is 6, and there are 5 images"):
        make(model, tmp_path / "new", images=pictures, **settings | {"num": 6})
