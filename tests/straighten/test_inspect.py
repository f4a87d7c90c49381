from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rectiflow.app.console import json_text
from rectiflow.errors import InputError
from rectiflow.straighten.inspect import inspect
from tests.straighten.stores import inverted_noise, latents, make_store, noise


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make_store(tmp_path / "pairs", num=30, shard_size=8)
    return tmp_path / "pairs"


def ends(indices: range) -> tuple[np.ndarray, np.ndarray]:
    """x_0 and x_1 in float64, not by way of the reader."""
    x_0 = torch.stack([noise(100 + i) for i in indices])
    return x_0.double().numpy(), torch.stack([latents(i) for i in indices]).double().numpy()


def test_counts_and_bytes(store: Path) -> None:
    found = inspect(store)
    assert (found.complete, found.shards, found.pairs, found.examined) == (True, 4, 30, 30)
    size = sum(file.stat().st_size for file in store.iterdir())
    assert found.bytes == size and found.bytes_per_pair == size / 30
    assert found.latent_bytes == 2 * 4 * 6 * 8
    assert not found.faults and not found.unfinished
    assert found.pairs_per_prompt == (7, 8) and not found.repeated_prompts
    assert found.manifest.model == "tiny"


def test_statistics_are_those_of_the_pairs(store: Path) -> None:
    found = inspect(store)
    x_0, x_1 = ends(range(30))
    np.testing.assert_allclose(found.x_0.mean, x_0.mean((0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(found.x_0.std, x_0.std((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(found.x_1.mean, x_1.mean((0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(found.x_1.std, x_1.std((0, 2, 3)), rtol=1e-10)
    z = (x_1 - x_0).reshape(30, -1)
    expected = {
        "l2_squared": (z**2).mean(1),
        "l2": np.linalg.norm(z, axis=1) / np.sqrt(z.shape[1]),
        "log_cosh": np.log(np.cosh(z)).mean(1),
    }
    assert found.transport_cost.keys() == expected.keys()
    for name, samples in expected.items():
        cost = found.transport_cost[name]
        assert cost.value == pytest.approx(samples.mean(), rel=1e-6)
        assert cost.standard_error == pytest.approx(samples.std(ddof=1) / 30**0.5, rel=1e-6)
    assert found.noise is not None
    norms = np.linalg.norm(x_0.reshape(30, -1), axis=1) / np.sqrt(z.shape[1])
    assert found.noise.norm == pytest.approx(norms.mean(), rel=1e-6)
    order = sorted(range(30), key=expected["l2_squared"].__getitem__)
    assert [index for index, _ in found.shortest] == order[:4]
    assert [index for index, _ in found.longest] == order[::-1][:4]
    assert found.longest[0][1] == pytest.approx(expected["l2_squared"].max(), rel=1e-6)


def test_a_limit_takes_pairs_from_all_over_the_store(store: Path) -> None:
    found = inspect(store, limit=6, extremes=50)
    assert found.examined == 6 and found.pairs == 30
    x_0, x_1 = ends(range(30))
    each = ((x_1 - x_0) ** 2).mean((1, 2, 3))
    samples = found.transport_cost["l2_squared"].samples.numpy()
    measured = [int(np.abs(each - sample).argmin()) for sample in samples]
    np.testing.assert_allclose(each[measured], samples, rtol=1e-6)
    assert [index // 5 for index in measured] == list(range(6))
    # Lengths are stored, and those of all pairs are compared.
    assert len(found.shortest) == len(found.longest) == 30
    with pytest.raises(InputError, match="limit is 0"):
        inspect(store, limit=0)


def test_a_limit_does_not_keep_step_with_the_prompts(tmp_path: Path) -> None:
    make_store(tmp_path, num=120, shard_size=60, latent_shape=(1, 2, 2), prompts=("a", "b", "c"))
    assert len({index % 3 for index in inspect(tmp_path, limit=10).sample}) == 3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_pairs_that_are_not_finite(tmp_path: Path) -> None:
    broken = {2: latents(2) / 0, 9: latents(9).clone()}
    broken[9][1, 2, 3] = torch.nan
    make_store(tmp_path, num=10, x_1=broken)
    found = inspect(tmp_path)
    assert found.x_1.not_finite == 2 and found.x_0.not_finite == 0 and found.examined == 10
    good = [i for i in range(10) if i not in broken]
    x_1 = torch.stack([latents(i) for i in good]).double()
    assert found.x_1.mean == pytest.approx(x_1.mean((0, 2, 3)).tolist())
    assert len(found.transport_cost["l2"].samples) == 8


def test_duplicates_of_images(tmp_path: Path) -> None:
    make_store(tmp_path, num=20, x_1={3: latents(11), 17: latents(11), 5: latents(6)})
    found = inspect(tmp_path)
    assert found.duplicate_images == [[3, 11, 17], [5, 6]] and found.num_duplicate_images == 3
    assert found.duplicate_seeds == [] and found.num_duplicate_seeds == 0


def test_duplicates_of_noise_of_inverted_pairs(tmp_path: Path) -> None:
    """The same picture twice in the folder that was inverted."""
    from rectiflow.straighten.folder import Folder
    from rectiflow.straighten.manifest import COMPLETE
    from rectiflow.straighten.shard import shard_of, write_shard

    make_store(tmp_path, num=6, shard_size=6, kind="inverted")
    order = [0, 1, 2, 1, 4, 0]
    x_0, x_1 = (torch.stack([f(i) for i in order]) for f in (inverted_noise, latents))
    folder = Folder(tmp_path)
    write_shard(folder, 0, shard_of(x_0, x_1, keep_x_0=True), 0, x_0)
    folder.remove([COMPLETE])
    found = inspect(tmp_path)
    assert found.duplicate_seeds == found.duplicate_images == [[0, 5], [1, 3]]
    assert found.num_duplicate_seeds == 2


def test_all_that_is_wrong_is_named(store: Path) -> None:
    (store / "shard-000000.safetensors").unlink()
    file = store / "shard-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    found = inspect(store)
    assert (found.shards, found.pairs, found.complete) == (2, 14, True)
    first, second = found.faults
    assert "shard-000000.safetensors is missing" in first and "run the same" in first
    assert "shard-000002.safetensors is damaged" in second
    x_0, x_1 = ends(range(30))
    there = [*range(8, 16), *range(24, 30)]
    cost = ((x_1 - x_0) ** 2).mean((1, 2, 3))[there].mean()
    assert found.transport_cost["l2_squared"].value == pytest.approx(cost, rel=1e-6)


def test_a_store_that_is_still_being_made(tmp_path: Path) -> None:
    make_store(tmp_path, num=30, shard_size=8, shards=[1])
    seen: list[tuple[int, int]] = []
    found = inspect(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert (found.complete, found.shards, found.pairs) == (False, 1, 8)
    assert not found.faults and len(found.unfinished) == 3
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_nothing_made_yet(tmp_path: Path) -> None:
    make_store(tmp_path, shards=[])
    found = inspect(tmp_path)
    assert (found.shards, found.pairs, found.transport_cost) == (0, 0, {})
    assert found.noise is None and found.longest == []
    assert json.loads(json_text(found.to_dict()))["bytes_per_pair"] is None


def test_prompts_that_are_repeated(tmp_path: Path) -> None:
    make_store(tmp_path, prompts=("a", "b", "a", "c", "b", "a"), num=8)
    found = inspect(tmp_path)
    assert found.repeated_prompts == {"a": 3, "b": 2}
    assert found.pairs_per_prompt == (1, 2)


def test_it_is_json(store: Path) -> None:
    data = json.loads(json_text(inspect(store).to_dict()))
    assert data["manifest"]["num"] == 30 and data["pairs"] == 30
    assert data["transport_cost"]["l2"].keys() == {"value", "standard_error"}
    assert len(data["x_1"]["std"]) == 4
    assert data["longest"][0][1] > data["shortest"][0][1]


def test_other_addresses() -> None:
    make_store("memory://inspecting/pairs")
    found = inspect("memory://inspecting/pairs")
    assert found.pairs == 23 and found.bytes > 23 * found.latent_bytes
