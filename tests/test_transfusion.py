"""Every equation against plain loops written from the paper; the network; the restoration."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import perlin
import transfusion as tf
from baselines import METHODS
from helpers import AUTHORS, tiny
from settings import parse
from transfusion import TransFusion

pytestmark = pytest.mark.network


def random_parts(seed=0, B=2, S=6):
    g = torch.Generator().manual_seed(seed)
    n, eps = (torch.rand(B, 3, S, S, generator=g, dtype=torch.float64) * 2 - 1 for _ in range(2))
    M = (torch.rand(B, 1, S, S, generator=g) > 0.5).double()
    return n, eps, M


def pixels(*tensors):
    """All (b, c, y, x) of the first tensor."""
    return np.ndindex(*tensors[0].shape)


# ---------------------------------------------------------------- Eq. 1-4

def test_eq1_compose():
    N, A, M = random_parts()
    beta = 0.3
    I = tf.compose(N, A, M, beta)
    for b, c, y, x in pixels(N):
        m = M[b, 0, y, x]
        want = A[b, c, y, x] * beta + N[b, c, y, x] * (1 - beta) if m else N[b, c, y, x]
        assert I[b, c, y, x] == pytest.approx(float(want), abs=1e-12)


def test_eq2_forward_process_runs_from_normal_to_opaque():
    n, eps, M = random_parts()
    assert torch.equal(tf.forward_process(n, eps, M, 0.0), n)
    assert torch.equal(tf.forward_process(n, eps, M, 1.0), torch.where(M.bool(), eps, n))
    beta = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)                 # one opacity per image
    x = tf.forward_process(n, eps, M, beta)
    for b, c, y, x_ in pixels(n):
        w = float(beta[b] * M[b, 0, y, x_])
        assert x[b, c, y, x_] == pytest.approx(
            float((1 - w) * n[b, c, y, x_] + w * eps[b, c, y, x_]), abs=1e-7)


def test_eq4_is_the_difference_of_eq2_and_eq3():
    n, eps, M = random_parts()
    x_t, x_prev = (tf.forward_process(n, eps, M, beta) for beta in (0.7, 0.45))
    assert torch.allclose(tf.reverse_step(x_t, M, eps, n, 0.7, 0.45), x_prev, atol=1e-12)


def test_eq4_against_a_loop_with_a_soft_mask():
    n, eps, M = random_parts()
    x_t, M_t = torch.rand_like(n), torch.rand_like(M)
    x_prev = tf.reverse_step(x_t, M_t, eps, n, 0.7, 0.45)
    for b, c, y, x in pixels(n):
        m, e, normal = M_t[b, 0, y, x], eps[b, c, y, x], n[b, c, y, x]
        want = x_t[b, c, y, x] - (0.7 - 0.45) * m * e + (0.7 - 0.45) * m * normal
        assert x_prev[b, c, y, x] == pytest.approx(float(want), abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "quadratic", "root"])
@pytest.mark.parametrize("path", [range(20, -1, -1), (20, 15, 10, 5, 0), (20, 0)])
def test_eq4_with_perfect_predictions_gives_the_normal_image_back(kind, path):
    n, eps, M = random_parts()
    beta = tf.transparency_schedule(20, kind).double()
    x = tf.forward_process(n, eps, M, beta[20])
    for t, s in zip(path, path[1:]):
        x = tf.reverse_step(x, M, eps, n, beta[t], beta[s])
        assert torch.allclose(x, tf.forward_process(n, eps, M, beta[s]), atol=1e-12)
    assert torch.allclose(x, n, atol=1e-12)


def test_schedules():
    for kind, law in (("linear", lambda u: u), ("quadratic", lambda u: u * u),
                      ("root", math.sqrt)):
        beta = tf.transparency_schedule(20, kind)
        assert len(beta) == 21 and beta.dtype == torch.float32
        assert beta.tolist() == pytest.approx([law(k / 20) for k in range(21)], abs=1e-7)
    authors = tf.transparency_schedule(20, authors=True)
    assert authors.tolist() == pytest.approx([k / 19 for k in range(20)], abs=1e-7)
    assert tf.transparency_schedule(1).tolist() == [0, 1]
    assert tf.transparency_schedule(3, authors=True).tolist() == [0, 0.5, 1]
    for bad, authors in ((0, False), (-3, False), (2, True)):
        with pytest.raises(ValueError, match="T ="):
            tf.transparency_schedule(bad, authors=authors)
    with pytest.raises(ValueError, match="cubic"):
        tf.transparency_schedule(20, "cubic")


# ---------------------------------------------------------------- Eq. 5-9

def ssim_loop(a, b):
    """Wang et al. (2004), window by window."""
    w = np.array([math.exp(-(k - 5) ** 2 / (2 * 1.5 ** 2)) for k in range(11)])
    w = np.outer(w, w) / w.sum() ** 2
    C1, C2, values = (0.01 * 2) ** 2, (0.03 * 2) ** 2, []
    B, C, H, W = a.shape
    for i, c, y, x in np.ndindex(B, C, H - 10, W - 10):
        p, q = (v[i, c, y:y + 11, x:x + 11] for v in (a, b))
        mp, mq = (w * p).sum(), (w * q).sum()
        vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
        cov = (w * (p - mp) * (q - mq)).sum()
        values.append((2 * mp * mq + C1) * (2 * cov + C2)
                      / ((mp ** 2 + mq ** 2 + C1) * (vp + vq + C2)))
    return np.mean(values)


def test_eq5_normal_loss():
    a, b, _ = random_parts(S=14)
    b = 0.7 * a + 0.3 * b
    assert float(tf.ssim(a, b)) == pytest.approx(ssim_loop(a.numpy(), b.numpy()), abs=1e-9)
    assert float(tf.ssim(a, a)) == pytest.approx(1)
    l1 = np.mean([abs(float(a[k] - b[k])) for k in pixels(a)])
    assert float(tf.normal_loss(a, b)) == pytest.approx(1 - ssim_loop(a.numpy(), b.numpy()) + l1)
    assert float(tf.normal_loss(a, a)) == pytest.approx(0, abs=1e-9)


def test_eq6_mask_loss():
    _, _, M = random_parts()
    g = torch.Generator().manual_seed(1)
    logit = 2 * torch.randn(M.shape, generator=g, dtype=torch.float64)
    focal, smooth = [], []
    for k in pixels(M):
        p, m = 1 / (1 + math.exp(-float(logit[k]))), float(M[k])
        p_true, weight = (p, 0.25) if m else (1 - p, 0.75)
        focal.append(-weight * (1 - p_true) ** 2 * math.log(p_true))
        d = abs(p - m)
        smooth.append(d * d / 2 if d < 1 else d - 0.5)
    assert float(tf.mask_loss(logit, M)) == pytest.approx(5 * np.mean(focal) + np.mean(smooth))


def test_eq7_anomaly_loss():
    eps_t, eps, _ = random_parts()
    want = np.mean([float(eps_t[k] - eps[k]) ** 2 for k in pixels(eps)])
    assert float(tf.anomaly_loss(eps_t, eps)) == pytest.approx(want)


def test_eq8_consistency_loss():
    n, eps, M = random_parts(0)
    n_t, eps_t, _ = random_parts(1)
    M_t = torch.rand(M.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_t, x_prev = (tf.forward_process(n, eps, M, beta) for beta in (0.5, 0.4))
    squares = []
    for b, c, y, x in pixels(n):
        k = b, c, y, x
        predicted = x_t[k] - 0.1 * M_t[b, 0, y, x] * (eps_t[k] - n_t[k])
        squares.append(float(predicted - x_prev[k]) ** 2)
    loss = tf.consistency_loss(x_t, M_t, eps_t, n_t, 0.5, 0.4, x_prev)
    assert float(loss) == pytest.approx(np.mean(squares))
    assert float(tf.consistency_loss(x_t, M, eps, n, 0.5, 0.4, x_prev)) == pytest.approx(0, abs=1e-20)



def tiny_batch(seed=0, S=16):
    n, eps, M = (part.float() for part in random_parts(seed, S=S))
    return n, eps * M, M, M, torch.tensor([3, 20])


def test_eq9_total_loss_is_the_sum_of_its_terms():
    model = tiny()
    losses = model.losses(*tiny_batch())
    assert set(losses) == {"loss", "n", "m", "a", "c"}
    losses = {k: v.detach() for k, v in losses.items()}
    assert float(losses["loss"]) == pytest.approx(sum(float(losses[k]) for k in "nmac"))
    for letter in "nmac":
        part = model.losses(*tiny_batch(), drop=letter)
        assert float(part["loss"].detach()) == pytest.approx(
            sum(float(losses[k]) for k in "nmac" if k != letter))


class Oracle(torch.nn.Module):
    """A network that knows the truth: records its inputs and returns perfect predictions."""

    def __init__(self, n, eps, M, target=lambda eps, t: eps):
        super().__init__()
        self.n, self.eps, self.M, self.target, self.calls = n, eps, M, target, []

    def forward(self, x_t, M_a, t):
        self.calls.append((t.tolist(), x_t.clone(), M_a.clone()))
        return self.target(self.eps, t), self.n, 40 * (self.M - 0.5)


class Fake(torch.nn.Module):
    """A network that is the function it is given."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_t, M_a, t):
        return self.function(x_t, M_a, t)


def test_losses_see_eq2_and_vanish_for_perfect_predictions():
    x, eps, M, M_a, t = tiny_batch()
    model = tiny()
    model.net = Oracle(x, eps, M)
    losses = model.losses(x, eps, M, M_a, t)
    assert all(float(losses[k]) < 1e-6 for k in losses)
    _, x_t, guide = model.net.calls[0]
    assert torch.allclose(x_t, tf.forward_process(x, eps, M, torch.tensor([0.15, 1.0])
                                                  .view(2, 1, 1, 1)))
    assert torch.equal(guide, M_a)


@pytest.mark.parametrize("soft", [True, False])
def test_losses_of_imperfect_predictions_are_those_of_eq5_to_eq8(soft):
    """Every term by hand, with a guide that is not M and predictions that are not the truth."""
    x, eps, M, _, t = tiny_batch()
    M_a = 1 - M
    n, e, logit = x + 0.1, eps - 0.2, 3 * (torch.rand(M.shape, generator=torch.Generator()
                                                      .manual_seed(3)) - 0.5)
    model = tiny(soft_consistency=soft)
    model.net = Fake(lambda *_: (e, n, logit))
    losses = model.losses(x, eps, M, M_a, t)
    beta_t, beta_prev = (torch.tensor(v).view(2, 1, 1, 1) for v in ([0.15, 1.0], [0.10, 0.95]))
    x_t, x_prev = ((1 - M) * x + b * M * eps + (1 - b) * M * x for b in (beta_t, beta_prev))
    M_t = logit.sigmoid() if soft else (logit.sigmoid() > 0.5).float()
    step = x_t - (beta_t - beta_prev) * M_t * e + (beta_t - beta_prev) * M_t * n
    assert float(losses["c"]) == pytest.approx(float(((step - x_prev) ** 2).mean()), rel=1e-4)
    assert float(losses["a"]) == pytest.approx(float(((e - eps) ** 2).mean()), rel=1e-5)
    assert float(losses["n"]) == pytest.approx(float(tf.normal_loss(n, x)), rel=1e-5)
    assert float(losses["m"]) == pytest.approx(float(tf.mask_loss(logit, M)), rel=1e-5)


def test_restoration_reports_the_error_and_the_last_mask():
    """A network that changes the image and whose mask depends on t."""
    x = torch.full((1, 3, 8, 8), 0.5)
    model = tiny()
    model.net = Fake(lambda x_t, M_a, t: (x_t, x_t - 0.2,
                                          torch.full_like(x_t[:, :1], float(t[0]))))
    steps, restored = list(model.reverse_process(x)), model.restore(x)
    assert torch.allclose(restored.M_recon, ((x - steps[-1].x_prev) / 2)[:, :1] ** 2, atol=1e-7)
    assert float(restored.M_recon.min()) > 1e-3
    assert float(restored.M_last.mean()) == pytest.approx(1 / (1 + math.exp(-1)))
    assert float(restored.M_disc.mean()) == pytest.approx(
        np.mean([1 / (1 + math.exp(-t)) for t in range(1, 21)]))


def test_the_papers_lambda_and_filter_are_the_defaults():
    a, b = (torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    assert torch.equal(tf.final_mask(a, b), tf.final_mask(a, b, 0.95, 7))


def test_authors_anomaly_target_is_beta_eps():
    x, eps, M, M_a, t = tiny_batch()
    model = tiny(anomaly_target="beta_eps")
    model.net = Oracle(x, eps, M, lambda e, t: model.beta[t][:, None, None, None] * e)
    assert float(model.losses(x, eps, M, M_a, t)["loss"]) < 1e-6
    assert torch.allclose(model.predict(x, M_a, t)[0], eps, atol=1e-6)


@pytest.mark.parametrize("soft", [True, False])
def test_only_the_soft_mask_carries_the_gradient_of_eq8(soft):
    model = tiny(soft_consistency=soft)
    model.losses(*tiny_batch(), drop="nma")["loss"].backward()
    gradient = model.net.mask_head[2].weight.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == soft


# ---------------------------------------------------------------- section 3.4, Eq. 10, 11

@pytest.mark.parametrize("infer_steps, calls", [(0, 20), (20, 20), (5, 5), (1, 1)])
def test_restoration_with_a_perfect_network(infer_steps, calls):
    n, eps, M = (part.float() for part in random_parts(S=8))
    model = tiny()
    model.net = Oracle(n, eps, M)
    result = model.restore(tf.forward_process(n, eps, M, 1.0), infer_steps)
    assert torch.allclose(result.x_0, n, atol=1e-5)
    assert torch.allclose(result.M_disc, M, atol=1e-6) and torch.equal(result.M_disc > 0.5, M > 0)
    seen = model.net.calls
    assert [t[0] for t, _, _ in seen] == [round(20 - k * 20 / calls) for k in range(calls)]
    assert not seen[0][2].any()                                     # zero guide at first
    assert all(torch.equal(guide, M) for _, _, guide in seen[1:])   # then the binary mask


def test_reverse_process_yields_every_step():
    n, eps, M = (part.float() for part in random_parts(S=8))
    model = tiny()
    model.net = Oracle(n, eps, M)
    steps = list(model.reverse_process(tf.forward_process(n, eps, M, 1.0)))
    assert [step.t for step in steps] == list(range(20, 0, -1))
    for step, following in zip(steps, steps[1:]):
        assert torch.equal(step.x_prev, following.x_t)


def test_eq4_at_inference_uses_the_binary_mask():
    n, eps, M = (part.float() for part in random_parts(S=8))
    model = tiny()
    model.net = Oracle(n, eps, 0.5 + (M - 0.5) * 0.01)               # M_t is 0.45 or 0.55
    assert torch.allclose(model.restore(tf.forward_process(n, eps, M, 1.0)).x_0, n, atol=1e-5)


def test_a_mask_of_one_half_is_not_above_it():
    x, eps, M, M_a, t = tiny_batch()
    model = tiny(soft_consistency=False)
    model.net = Fake(lambda x_t, *_: (x_t + 1, x_t - 1, torch.zeros_like(x_t[:, :1])))
    assert torch.equal(model.restore(x).x_0, x)                      # nothing is restored
    x_t, x_prev = (tf.forward_process(x, eps, M, model.beta_at(step)) for step in (t, t - 1))
    assert float(model.losses(x, eps, M, M_a, t)["c"]) == pytest.approx(
        float(((x_t - x_prev) ** 2).mean()))


def test_authors_restoration_starts_late_and_divides_by_one_more():
    n, eps, M = (part.float() for part in random_parts(S=8))
    model = tiny(**AUTHORS)
    model.net = Oracle(n, eps, M, lambda e, t: model.beta[t][:, None, None, None] * e)
    result = model.restore(n)
    assert [t[0] for t, _, _ in model.net.calls] == list(range(18, 0, -1))
    assert float(result.M_disc.max()) == pytest.approx(18 / 19)


@pytest.mark.parametrize("bad", [21, -1])
def test_infer_steps_out_of_range(bad):
    with pytest.raises(ValueError, match="1 to 20"):
        tiny().path(bad)


def test_reconstruction_error():
    x, x_0, _ = random_parts()
    x_0 = 1.5 * x_0
    error = tf.reconstruction_error(x, x_0)
    for b, y, col in np.ndindex(2, 6, 6):
        want = np.mean([(float(x[b, c, y, col]) / 2
                         - float(x_0[b, c, y, col].clip(-1, 1)) / 2) ** 2 for c in range(3)])
        assert float(error[b, 0, y, col]) == pytest.approx(want)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_eq10_final_mask(n):
    g = torch.Generator().manual_seed(0)
    M_disc, M_recon = torch.rand(2, 1, 9, 9, generator=g), torch.rand(2, 1, 9, 9, generator=g)
    M_final = tf.final_mask(M_disc, M_recon, 0.95, n)
    for b, y, x in np.ndindex(2, 9, 9):
        total = 0.0
        for dy, dx in np.ndindex(n, n):
            i, j = y + dy - n // 2, x + dx - n // 2
            if 0 <= i < 9 and 0 <= j < 9:
                total += 0.95 * float(M_disc[b, 0, i, j]) + 0.05 * float(M_recon[b, 0, i, j])
        assert float(M_final[b, 0, y, x]) == pytest.approx(total / n ** 2, abs=1e-6)
    for bad in (0, 4):
        with pytest.raises(ValueError, match="odd"):
            tf.final_mask(M_disc, M_recon, 0.95, bad)


def test_eq11_anomaly_score():
    M_final = torch.zeros(2, 1, 4, 4)
    M_final[0, 0, 1, 2], M_final[1, 0, 3, 3] = 0.7, 0.2
    assert tf.anomaly_score(M_final).tolist() == pytest.approx([0.7, 0.2])


# ---------------------------------------------------------------- the network

def test_positional_encoding():
    pe = tf.positional_encoding(5, 7, "2d")
    assert pe.shape == (1, 16, 5, 7)
    for k in range(4):
        f = 10000 ** (-k / 4)
        for y, x in np.ndindex(5, 7):
            got = [float(pe[0, c + k, y, x]) for c in (0, 4, 8, 12)]
            assert got == pytest.approx([math.sin(f * y), math.cos(f * y), math.sin(f * x),
                                         math.cos(f * x)], abs=1e-5)
    row = tf.positional_encoding(5, 7, "row")
    assert row.shape == (1, 1, 5, 7) and float(row[0, 0, 3, 6]) == pytest.approx(math.sin(3))


def test_positional_encoding_of_a_smaller_image_is_that_of_the_places_it_shows(monkeypatch):
    """Pixel i of 4 shows the middle of the pixels 2 i and 2 i + 1 of 8."""
    whole, small = (tf.positional_encoding(n, n, "2d", side=8) for n in (8, 4))
    assert torch.equal(whole, tf.positional_encoding(8, 8, "2d"))
    for k in range(4):
        f = 10000 ** (-k / 4)
        got = [float(small[0, channel + k, 3, 1]) for channel in (0, 4, 8, 12)]
        assert got == pytest.approx([math.sin(6.5 * f), math.cos(6.5 * f), math.sin(2.5 * f),
                                     math.cos(2.5 * f)], abs=1e-5)
    used, encode = [], tf.positional_encoding
    monkeypatch.setattr(tf, "positional_encoding",
                        lambda *which: used.append(encode(*which)) or used[-1])
    with torch.no_grad():
        tiny(side=32).eval().net(torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16),
                                 torch.tensor([3]))
    assert len(used) == 1 and torch.equal(used[0], encode(16, 16, "2d", side=32))


def test_parameters_of_the_papers_network():
    count = sum(p.numel() for p in TransFusion(64, pe="row").parameters())
    assert round(count / 1e6, 1) == 54.6


@pytest.mark.parametrize("pe, guide, channels", [("2d", True, 20), ("none", True, 4),
                                                 ("row", False, 4), ("none", False, 3)])
def test_ablations_take_the_channel_out(pe, guide, channels):
    model = tiny(pe=pe, guide=guide).eval()
    assert model.net.image_proj.in_channels == channels
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([3])
    ones, zeros = (model.net(x, M_a, t)[1] for M_a in (torch.ones(1, 1, 16, 16),
                                                       torch.zeros(1, 1, 16, 16)))
    assert torch.equal(ones, zeros) != guide


@pytest.mark.parametrize("bf16", [False, True])
def test_heads_are_float32_and_batches_do_not_mix(bf16):
    model = tiny(bf16=bf16).eval()
    x, M_a, t = torch.randn(3, 3, 24, 16), torch.zeros(3, 1, 24, 16), torch.tensor([1, 9, 20])
    together = model.predict(x, M_a, t)
    assert all(head.dtype == torch.float32 for head in together)
    alone = model.predict(x[1:2], M_a[1:2], t[1:2])
    for a, b in zip(together, alone):
        assert torch.allclose(a[1:2], b, atol=0.05 if bf16 else 1e-4)


@pytest.mark.parametrize("after_norm, acts", [(False, False), (True, True)])
def test_a_norm_of_single_channels_cancels_the_time_embedding_that_comes_before(after_norm, acts):
    torch.manual_seed(0)
    block = TransFusion(16, time_after_norm=after_norm).net.down[0].res
    x, (time, other) = torch.randn(1, 16, 16, 16), torch.randn(2, 1, 64)
    assert torch.allclose(block(x, time), block(x, other), atol=1e-4) != acts


@pytest.mark.parametrize("preset, after", [("quick", True), ("cpu", True), ("paper", False),
                                           ("fast", False), ("authors", False)])
def test_the_presets_of_16_channels_add_t_behind_the_norm(preset, after):
    s, _ = parse(["--preset", preset])
    model = METHODS["transfusion"].build(dataclasses.replace(s, channels=8))
    blocks = [m for m in model.modules() if isinstance(m, tf.ResidualBlock)]
    assert len(blocks) == 22 and {block.time_after_norm for block in blocks} == {after}


def test_identity_initialisation_returns_the_input():
    model = tiny()
    model.net.start_from_identity()
    x, t = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([3, 20])
    _, n_t, logit = model.predict(x, torch.zeros(2, 1, 16, 16), t)
    assert torch.allclose(n_t, x, atol=1e-6) and 0 < logit.sigmoid().max() < 0.4


# ---------------------------------------------------------------- the other device

def test_one_code_path_for_cuda():
    """Forward, losses, restoration and anomalies with cuda as the device, without a GPU."""
    rng = np.random.default_rng(0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        textures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        foreground, opaque = torch.ones(4, 1, 32, 32), torch.zeros(4, dtype=torch.bool)
        for bf16, kw, count in ((False, {}, 20), (True, AUTHORS, 1)):   # 20: all ten operations
            model = TransFusion(8, bf16=bf16, **kw)
            for _ in range(count):
                images, foreground = perlin.rotate_batch(images, foreground, 90, rng, bool(kw))
                images = perlin.change_light(images, 0.1, rng)
                anomalies = perlin.synthesize(images, foreground, textures, opaque, rng)
            x, eps = data.scale(images), data.scale(anomalies.A) * anomalies.M
            t = torch.ones(4, dtype=torch.int64)
            losses = model.losses(x, eps, anomalies.M, anomalies.M_a, t)
            result = model.restore(x, 2)
            M_final = tf.final_mask(result.M_disc, result.M_recon)
            for tensor in (*losses.values(), *result, *anomalies, M_final,
                           tf.anomaly_score(M_final)):
                assert tensor.device.type == "cuda"


def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = TransFusion(8, recompute=recompute)
        generator = torch.Generator().manual_seed(1)
        x, eps = (torch.rand(2, 3, 16, 16, generator=generator) for _ in range(2))
        M = (torch.rand(2, 1, 16, 16, generator=generator) > 0.5).float()
        model.losses(x, eps * M, M, M, torch.tensor([3, 20]))["loss"].backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_attention_spelled_out_is_torchs():
    q, k, v = torch.randn(3, 2, 1, 20, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(tf.attend(q, k, v), want, atol=1e-6)
