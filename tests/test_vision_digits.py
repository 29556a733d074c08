"""What sparsity costs on real images: scikit-learn's digits, a small model, three seeds."""

import json

import pytest

from blockshock.block_sparse.__main__ import main

pytest.importorskip("sklearn", reason="the extra vision is not installed")


def top1(folder, seed, sparsity):
    """Accuracy in percent of the shipped config, converted to BSR where it is sparse."""
    storage = "bsr" if sparsity else "dense"
    settings = {
        "run": folder,
        "device": "cpu",
        "train.seed": seed,
        "sparse.linear": sparsity,
        "use.storage": storage,
        "train.evaluate_every": 0,
        "log.every": 200,
    }
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    for command in ("train", "evaluate"):
        assert main([command, "--config", "digits", *given]) == 0
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["apart"] < 1e-5
    return found["converted"]["top1"]


@pytest.mark.slow
def test_the_kept_tiles_know_the_digits_as_well_as_the_dense_model(one_thread, tmp_path):
    means = {}
    for sparsity in (0.0, 0.8, 0.9):
        found = [top1(tmp_path / f"{sparsity}-{seed}", seed, sparsity) for seed in range(3)]
        means[sparsity] = sum(found) / len(found)
    assert means[0.0] > 96
    assert means[0.8] > means[0.0] - 1.0
    assert means[0.9] > means[0.0] - 2.0
