"""The authors' weights, held to the authors' numbers; the run folder that is made of them."""
import json

import numpy as np
import pytest
import torch

import evaluate
import import_authors
import train
import transfusion as tf
from helpers import AUTHORS, HERE, argv_for, authors_state, contents, refused, rows_of, run_of
from runs import load_model, saved_settings
from transfusion import TransFusion

pytestmark = pytest.mark.network


# ---------------------------------------------------------------- the authors' numbers

@pytest.fixture(scope="module")
def authors():
    model = TransFusion(32, **AUTHORS).eval()
    import_authors.load_authors_weights(model, authors_state())
    with np.load(HERE / "authors_ch32.npz") as file:
        return model, {name: torch.from_numpy(file[name]) for name in file.files}


def test_authors_heads_and_one_reverse_step(authors):
    model, theirs = authors
    with torch.no_grad():
        heads = model.net(theirs["x"], theirs["guide"], theirs["t"])
        for ours, name in zip(heads, ("anomaly", "normal", "mask_logit")):
            assert torch.allclose(ours, theirs[name], atol=1e-4), name
        eps_t, n_t, logit = model.predict(theirs["x"], theirs["guide"], theirs["t"])
    beta_t, beta_prev = (model.beta[theirs["t"] - k][:, None, None, None] for k in (0, 1))
    x_prev = tf.reverse_step(theirs["x"], (logit > 0).float(), eps_t, n_t, beta_t, beta_prev)
    assert torch.allclose(x_prev, theirs["x_prev"], atol=1e-4)


def test_authors_whole_restoration(authors):
    model, theirs = authors
    result = model.restore(theirs["loop_x"])
    assert torch.allclose(result.M_disc, theirs["loop_m_disc"], atol=1e-4)
    assert torch.allclose(result.x_0, theirs["loop_x0"], atol=1e-4)


def test_authors_names_at_the_released_size():
    keys = json.loads((HERE / "authors_keys_ch64.json").read_text())
    ours = {import_authors.authors_name(name): list(value.shape)
            for name, value in TransFusion(64, **AUTHORS).net.state_dict().items()}
    theirs = {name: shape for name, (shape, _) in keys.items() if not name.endswith("inv_freq")}
    assert ours == theirs


def test_weights_that_do_not_fit_are_refused_by_name():
    model, state = TransFusion(32, **AUTHORS), authors_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del state["model.final.bias"]
    state["model.surplus"] = torch.zeros(1)
    state["model.norm.weight"] = torch.zeros(7)
    with pytest.raises(ValueError) as caught:
        import_authors.load_authors_weights(model, state)
    for part in ("missing: model.final.bias", "not known: model.surplus",
                 "model.norm.weight is [7], not [32]"):
        assert part in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- the run folder

def import_argv(parts, file="bolt_model.pkl", name="authors") -> list[str]:
    """Arguments that import weights of 32 channels as the run of parts/bolt with this --name."""
    return [str(parts.parent / file), str(run_of(parts, name)), "--data", str(parts), "--root",
            str(parts.parent), "--channels", "32", "--resize", "32", "--crop", "32", "--device",
            "cpu", "--hold-out", "0"]


def import_weights(parts, *more: str) -> None:
    """Import the authors' weights as the run runs/parts/bolt-authors."""
    torch.save(authors_state(), parts.parent / "bolt_model.pkl")
    assert import_authors.main([*import_argv(parts), *more]) == 0


def test_the_authors_weights_become_a_run_that_is_scored(parts, capsys):
    import_weights(parts)
    folder = run_of(parts, "authors")
    assert (f"{folder} holds the weights; python evaluate.py {folder} scores them"
            in capsys.readouterr().out)
    assert set(contents(folder)) == {"config.json", "last.pt"}
    s = saved_settings(folder)
    assert (s.preset, s.category, s.name, s.channels) == ("authors", "bolt", "authors", 32)
    model, trained, state = load_model(folder / "last.pt", torch.device("cpu"))
    assert trained == s and state["step"] == 0
    assert torch.equal(model.net.normal_head.weight, authors_state()["model.final_mean.weight"])
    assert evaluate.main([str(folder), "--device", "cpu"]) == 0
    results = json.loads((folder / "metrics.json").read_text())
    assert results["infer_steps"] == 18 and results["step"] == 0
    assert 0 <= results["image_auroc"] <= 1


def test_a_training_continues_from_the_authors_weights(parts, capsys):
    import_weights(parts, "--infer-steps", "1")
    folder = run_of(parts, "authors")
    assert evaluate.main([str(folder), "--device", "cpu"]) == 0      # its results are no training's
    identity = ["--data", str(parts), "--category", "bolt", "--name", "authors", "--out",
                str(parts.parent / "runs"), "--device", "cpu"]
    refused(capsys, [*identity, "--preset", "authors", "--channels", "32", "--resize", "32",
                     "--crop", "32", "--hold-out", "0", "--infer-steps", "1"],
            "holds an unfinished run", "--resume")
    assert train.main([*identity, "--resume", "--epochs", "1"]) == 0       # 12 images: two steps
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["step"] == 2 and state["settings"]["preset"] == "authors"
    weights = authors_state()
    changes = [(value - weights[import_authors.authors_name(name[4:])]).abs().max().item()
               for name, value in state["model"].items() if name.endswith(("weight", "bias"))]
    lr, decay = state["settings"]["lr"], state["settings"]["weight_decay"]
    assert 0 < max(changes) < 2 * lr * (1 + 10 * decay)        # AdamW's two steps from there
    assert [row["step"] for row in rows_of(folder / "log.csv")] == ["2"]
    assert json.loads((folder / "metrics.json").read_text())["step"] == 2


def test_what_an_import_refuses(parts, capsys):
    import_weights(parts)

    def refuses(argv, *expected):
        before = {p: p.read_bytes() for p in (parts.parent / "runs").rglob("*") if p.is_file()}
        refused(capsys, argv, *expected, command=import_authors.main)
        assert before == {p: p.read_bytes() for p in (parts.parent / "runs").rglob("*")
                          if p.is_file()}

    argv = import_argv(parts, name="other")
    refuses(import_argv(parts), "holds a model already", "another name")
    refuses([*argv, "--preset", "quick"], "bolt_model.pkl: the weights do not fit the network",
            "image_proj.weight is [32, 5, 3, 3]")
    refuses(import_argv(parts, "absent.pkl", "other"), "absent.pkl does not exist")
    (parts.parent / "text.pkl").write_text("no weights")
    refuses(import_argv(parts, "text.pkl", "other"), "text.pkl is not a checkpoint")
    refuses(import_argv(parts, name=""), "bolt: call it OUT/DATA/CATEGORY-NAME")
    refuses([*argv, "--name", "third"], "bolt-other: these flags are of a run in", "bolt-third")
    refuses([*argv, "--method", "draem", "--preset", "quick"], "draem")
    refuses([*argv, "--channels", "12"], "--channels 12", "multiple of 8")
    refuses([*argv, "--no-such-flag"], "--no-such-flag")


def test_a_trained_run_is_not_overwritten(factory, capsys):
    torch.save(authors_state(), factory / "bolt_model.pkl")
    parts = factory / "parts"
    assert train.main(argv_for(parts, "--name", "trained", "--steps", "1", "--infer-steps",
                               "1")) == 0
    before = contents(run_of(parts, "trained"))
    refused(capsys, import_argv(parts, name="trained"), "holds a model already", "another name",
            command=import_authors.main)
    assert contents(run_of(parts, "trained")) == before
