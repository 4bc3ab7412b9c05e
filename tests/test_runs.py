"""A run's model: its start, and the authors' weights held to the authors' numbers."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
import transfusion as tf
from test_transfusion import AUTHORS, tiny
from transfusion import TransFusion

HERE = Path(__file__).parent


def test_identity_initialisation_returns_the_input():
    model = tiny()
    runs.start_from_identity(model.net)
    x, t = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([3, 20])
    _, n_t, logit = model.predict(x, torch.zeros(2, 1, 16, 16), t)
    assert torch.allclose(n_t, x, atol=1e-6) and 0 < logit.sigmoid().max() < 0.4


# ---------------------------------------------------------------- the authors' numbers

def authors_state(channels=32):
    """The fixture's weights, filled by the rule under which its numbers were computed."""
    state = {}
    keys = json.loads((HERE / f"authors_keys_ch{channels}.json").read_text())
    for k, (name, (shape, kind)) in enumerate(keys.items()):
        r = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + k))
        if kind == "int64":
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith(("running_var", "inv_freq")):
            state[name] = torch.ones(shape)
        elif len(shape) >= 2:
            state[name] = r * r[0].numel() ** -0.5 * (0.1 if "projection" in name else 0.7)
        else:
            state[name] = 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
    return state


@pytest.fixture(scope="module")
def authors():
    model = TransFusion(32, **AUTHORS).eval()
    runs.load_authors_weights(model, authors_state())
    with np.load(HERE / "authors_ch32.npz") as file:
        return model, {name: torch.from_numpy(file[name]) for name in file.files}


def test_authors_heads_and_one_reverse_step(authors):
    model, want = authors
    with torch.no_grad():
        heads = model.net(want["x"], want["guide"], want["t"])
        for got, name in zip(heads, ("anomaly", "normal", "mask_logit")):
            assert torch.allclose(got, want[name], atol=1e-4), name
        eps_t, n_t, logit = model.predict(want["x"], want["guide"], want["t"])
    beta_t, beta_prev = (model.beta[want["t"] - k][:, None, None, None] for k in (0, 1))
    x_prev = tf.reverse_step(want["x"], (logit > 0).float(), eps_t, n_t, beta_t, beta_prev)
    assert torch.allclose(x_prev, want["x_prev"], atol=1e-4)


def test_authors_whole_restoration(authors):
    model, want = authors
    result = model.restore(want["loop_x"])
    assert torch.allclose(result.M_disc, want["loop_m_disc"], atol=1e-4)
    assert torch.allclose(result.x_0, want["loop_x0"], atol=1e-4)


def test_authors_names_at_the_released_size():
    keys = json.loads((HERE / "authors_keys_ch64.json").read_text())
    ours = {runs.authors_name(name): list(value.shape)
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
        runs.load_authors_weights(model, state)
    for part in ("missing: model.final.bias", "not known: model.surplus",
                 "model.norm.weight is [7], not [32]"):
        assert part in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
