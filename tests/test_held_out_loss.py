"""tools/held_out_loss.py: the same samples for every model, without the images trained on."""
import shutil

import numpy as np
import pytest
import torch

import held_out_loss
import perlin
from helpers import refused, rows_of


def test_each_model_is_measured_on_the_same_samples(factory, tmp_path, monkeypatch):
    run, seen, synthesize = factory / "runs/parts/bolt", [], perlin.synthesize
    other = shutil.copytree(run, run.with_name("other"))
    state = torch.load(other / "last.pt", weights_only=True)
    for weights in (state["model"], state["ema"]):
        for name in weights:
            if name.startswith("net.normal_head"):
                weights[name] = weights[name] + 0.1
    torch.save(state, other / "last.pt")

    def watched(images, foreground, textures, opaque, rng):
        anomalies = synthesize(images, foreground, textures, opaque, rng)
        seen.append((images, anomalies.M, opaque))
        return anomalies

    monkeypatch.setattr(perlin, "synthesize", watched)
    table = tmp_path / "losses.csv"
    assert held_out_loss.main([str(run), str(other), "--samples", "50", "--device", "cpu", "--csv",
                               str(table)]) == 0
    assert [len(images) for images, *_ in seen] == [32, 18, 32, 18]
    for one, two in zip(seen[:2], seen[2:]):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert [int(M.flatten(1).any(1).sum()) for _, M, _ in seen[:2]] == [16, 9]
    assert sum(int(opaque.sum()) for *_, opaque in seen[:2]) == 2               # t = 20 of 1..20
    rows = rows_of(table)
    assert float(rows[1]["n"]) > float(rows[0]["n"]) and rows[0]["m"] == rows[1]["m"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(sum(float(row[k]) for k in "nmac"), abs=1e-4)


def test_the_images_are_those_held_out(factory, monkeypatch):
    taken = []
    monkeypatch.setattr(held_out_loss, "held_out_losses",
                        lambda model, run_data, *_: taken.append(run_data) or {"loss": 1.0})
    assert held_out_loss.main([str(factory / "runs/parts/bolt"), "--device", "cpu"]) == 0
    run_data, = taken
    assert len(run_data.held_out) and not np.isin(run_data.held_out, run_data.train_indices).any()


def test_mistakes_are_refused_in_one_line(factory, capsys, monkeypatch):
    run = factory / "runs/parts/bolt"
    refused(capsys, [str(run), "--samples", "0"], "--samples 0", command=held_out_loss.main)
    refused(capsys, [str(run.with_name("gone"))], "does not exist", command=held_out_loss.main)
    load = held_out_loss.load_run_data

    def without(*args, **kwargs):
        run_data = load(*args, **kwargs)
        run_data.held_out = run_data.held_out[:0]
        return run_data

    monkeypatch.setattr(held_out_loss, "load_run_data", without)
    refused(capsys, [str(run), "--device", "cpu"], "holds no images out", command=held_out_loss.main)
