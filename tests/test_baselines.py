"""The other methods: their equations against plain loops, and all of them through one loop."""
import dataclasses
import math
import random

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

import import_authors
import predict
import runs
import settings
import train
from baselines import METHODS, anoddpm, common, d3ad, draem
from evaluate import final_maps, image_scores
from helpers import argv_for, refused, rows_of
from support.console import InputError
from support.files import read_json
from transfusion import TransFusion

OTHERS = [name for name, entry in METHODS.items() if entry.presets is not None]
TINY = ["--preset", "quick", "--category", "fabric", "--crop", "32", "--resize", "32", "--channels",
        "16", "--batch", "4", "--precision", "float32", "--device", "cpu"]


def tiny(method: str, *argv: str):
    """A small model of a method, in eval mode, and its settings."""
    s, _ = settings.parse([*TINY, "--method", method, *argv])
    return runs.build_model(s).eval(), s


# ---------------------------------------------------------------- what baselines promises

def test_a_run_of_another_method_has_a_folder_of_its_own():
    s = settings.Settings(category="fabric")
    other = dataclasses.replace(s, method="draem")
    assert [runs.run_folder(one).as_posix() for one in (
        s, other, dataclasses.replace(s, name="a"), dataclasses.replace(other, name="a"))] == [
        f"runs/demo/fabric{end}" for end in ("", "-draem", "-a", "-draem-a")]


def test_stages_share_the_steps():
    assert train.find_stage((1.0,), 7, 10) == (0, 7, 10)
    places = [train.find_stage((0.4, 0.8, 1.0), step, 10) for step in range(10)]
    assert [stage for stage, _, _ in places] == [0] * 4 + [1] * 4 + [2] * 2
    assert [step_in_stage for _, step_in_stage, _ in places] == [0, 1, 2, 3] * 2 + [0, 1]
    assert [stage_steps for _, _, stage_steps in places] == [4] * 8 + [2] * 2


def test_a_checkpoint_without_a_method_is_transfusions(tmp_path):
    s = settings.Settings(channels=8, device="cpu")
    runs.new_run(tmp_path, s, None, runs.build_model(s)).save()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["settings"]["method"]
    torch.save(state, tmp_path / "last.pt")
    model, s, _ = runs.load_model(tmp_path / "last.pt", torch.device("cpu"))
    assert s.method == "transfusion" and isinstance(model, TransFusion)
    with pytest.raises(InputError, match="^method later: not known here"):
        runs.build_model(dataclasses.replace(s, method="later"))


@pytest.mark.parametrize("argv, message", [
    (["--method", "draem", "--drop-loss", "n"], "--drop-loss: means nothing to --method draem"),
    (["--method", "anoddpm", "--T", "10"], "--T: means nothing to --method anoddpm"),
    (["--method", "draem", "--infer-steps", "3"], "--infer-steps: means nothing"),
    (["--method", "d3ad", "--variant", "c"], "--variant: means nothing to --method d3ad"),
    (["--omega", "1"], "--omega: means nothing to --method transfusion"),
    (["--method", "draem", "--preset", "authors"], "--preset authors: --method draem has paper"),
])
def test_flags_that_mean_nothing_to_a_method_are_refused(argv, message):
    with pytest.raises(InputError, match=message):
        settings.parse(argv)


def test_weights_of_the_authors_are_refused_for_another_method(capsys, tmp_path):
    folder = tmp_path / "demo" / "fabric-draem-theirs"
    refused(capsys, ["a.pt", str(folder), "--method", "draem", *TINY],
            "--method draem: the authors' weights are TransFusion's", command=import_authors.main)
    assert not folder.exists()


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("preset", ["paper", "cpu", "quick"])
def test_every_preset_can_be_built(method, preset):
    s, _ = settings.parse(["--data", "mvtec", "--method", method, "--preset", preset,
                           "--device", "cpu"])
    with torch.device("meta"):
        model = METHODS[method].build(s)
    assert model.path(s.infer_steps)[-1] == 0
    if (method, preset) == ("draem", "paper"):                    # as counted in the authors' code
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 97.4


# ---------------------------------------------------------------- common.py

def test_noise_schedules_are_the_papers():
    simplex, roots, even = (common.noise_schedule(*args) for args in (
        (1e-4, 0.02), (0.0015, 0.02, "sqrt"), (0.0015, 0.0195)))
    for abar, t, value in ((simplex, 250, 0.524), (roots, 401, 0.230), (roots, 501, 0.111),
                           (roots, 802, 0.0037), (roots, 902, 0.0007), (even, 21, 0.9653),
                           (even, 41, 0.9265), (even, 81, 0.8352)):
        assert abar[t].item() == pytest.approx(value, abs=6e-4 if value > 0.01 else 6e-5)
    product, step = 1.0, (0.02 ** 0.5 - 0.0015 ** 0.5) / 999
    for t in range(3):
        assert roots[t].item() == pytest.approx(product)
        product *= 1 - (0.0015 ** 0.5 + t * step) ** 2


def test_ddim_keeps_the_noise_and_lowers_its_level():
    x, eps = torch.randn(2, 2, 3, 4, 4)
    abar = common.noise_schedule(1e-4, 0.02)
    x_t = common.noised(x, eps, abar[500])
    torch.testing.assert_close(x_t, abar[500] ** 0.5 * x + (1 - abar[500]) ** 0.5 * eps)
    torch.testing.assert_close(common.clean_estimate(x_t, eps, abar[500]), x, atol=1e-5, rtol=1e-4)
    x_prev = common.ddim_step(x_t, x, abar[500], abar[300])
    torch.testing.assert_close(x_prev, common.noised(x, eps, abar[300]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(common.ddim_step(x_t, x, abar[500], abar[0]), x)


def test_the_u_net_predicts_nothing_at_first_and_sees_t():
    torch.manual_seed(0)
    net = common.UNet(3, 3, 8, (1, 2, 2), 1, (1, 2))
    x = torch.randn(1, 3, 24, 16)
    assert (net(x, torch.tensor([3])) == net.end[2].bias[:, None, None]).all()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    early, late = net(x, torch.tensor([3])), net(x, torch.tensor([900]))
    assert early.shape == x.shape and (early - late).abs().max() > 1e-3


def test_latents_are_taken_to_mean_0_and_variance_1_and_back():
    torch.manual_seed(0)
    method, vae, x = common.Baseline(False), common.VAE(8, (1, 2, 2)), torch.rand(4, 3, 32, 32)
    for _ in range(200):
        vae.loss(method, x)
    z = vae.encode(method, x)
    assert z.shape == (4, 4, 8, 8) and z.mean((0, 2, 3)).abs().max() < 0.01
    assert (z.square().mean((0, 2, 3)).sqrt() - 1).abs().max() < 0.02
    torch.testing.assert_close(vae.decode(method, z), vae.decoder(vae.encoder(x)[-1][:, :4]))


def test_the_loss_of_the_autoencoder():
    """Against a plain sum, with a decoder that ignores the latent and an encoder of one value."""
    method, vae = common.Baseline(False), common.VAE(8, (1, 2))
    for parameter in [*vae.encoder.end.parameters(), *vae.decoder[-1].parameters()]:
        torch.nn.init.zeros_(parameter)
    vae.encoder.end.bias.data = torch.tensor([2.0, 0, 0, 0, math.log(4), 0, 0, 0])
    loss = vae.loss(method, torch.zeros(2, 3, 16, 16))                # decoded: 0, so L1 = SSIM = 0
    kl = 8 * 8 * ((2 ** 2 - 0) / 2 + (4 - 1 - math.log(4)) / 2)
    assert loss.item() == pytest.approx(1e-6 * kl, rel=1e-2)


# ---------------------------------------------------------------- DRAEM

def test_draem_eq_1_2_reconstruction_loss():
    """SSIM of images in [0, 1], range 1, Gaussian window 11, sigma 1.5; and l2, by plain loops."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 13, 12))
    window = np.exp(-(np.arange(11) - 5.0) ** 2 / (2 * 1.5 ** 2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for c in range(3):
        for i in range(3):
            for j in range(2):
                p, q = a[c, i:i + 11, j:j + 11], b[c, i:i + 11, j:j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                              / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    expected = 1 - np.mean(values) + ((a - b) ** 2).mean()
    x, x_r = (torch.tensor(2 * image - 1)[None] for image in (a, b))
    assert draem.reconstruction_loss(x, x_r).item() == pytest.approx(expected, rel=1e-6)


def test_draem_eq_3_focal_loss():
    torch.manual_seed(0)
    logits, M = torch.randn(2, 2, 3, 3), (torch.rand(2, 1, 3, 3) > 0.5).float()
    total = 0.0
    for b in range(2):
        for i in range(3):
            for j in range(3):
                good, bad = logits[b, :, i, j].exp().tolist()
                p = (bad if M[b, 0, i, j] else good) / (good + bad)
                total += -(1 - p) ** 2 * math.log(p)
    assert draem.focal_loss(logits, M).item() == pytest.approx(total / 18, rel=1e-5)
    assert draem.focal_loss(torch.full((1, 2, 1, 1), 1e4), torch.ones(1, 1, 1, 1)).isfinite()


def test_draem_eq_4_the_damaged_image():
    opacity = draem.opacity(torch.tensor([1, 500, 1000]), 1000).flatten()
    torch.testing.assert_close(opacity, torch.tensor([0.1, 0.1 + 0.9 * 499 / 999, 1.0]))
    x, A = torch.rand(2, 1, 3, 2, 2)
    M = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    damaged = draem.damaged_image(x, A, M, torch.tensor(0.3))
    for i in range(2):
        for j in range(2):
            expected = 0.7 * x[..., i, j] + 0.3 * A[..., i, j] if i != j else x[..., i, j]
            torch.testing.assert_close(damaged[..., i, j], expected)


def test_draem_the_segmenters_loss_reaches_the_reconstruction():
    model, _ = tiny("draem")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    terms = model.losses(x, 0 * x, torch.zeros(2, 1, 32, 32), None, torch.tensor([5, 900]))
    torch.testing.assert_close(terms["loss"], terms["rec"] + terms["seg"])
    terms["seg"].backward()
    assert model.reconstruct.end.weight.grad.abs().max() > 0


def test_draem_eq_5_score():
    s = settings.Settings(lam=1.0, kernel=3)
    M_o = torch.rand(1, 1, 6, 6)
    padded = torch.nn.functional.pad(M_o, (1, 1, 1, 1))[0, 0]
    expected = max(padded[i:i + 3, j:j + 3].sum().item() / 9 for i in range(6) for j in range(6))
    maps = {name: M_o[:, 0].numpy() for name in ("M_disc", "M_last")}
    maps["M_recon"] = 0 * maps["M_disc"]
    assert image_scores(final_maps(maps, s)).tolist() == pytest.approx([expected])


# ---------------------------------------------------------------- AnoDDPM

def test_anoddpm_simplex_noise_against_a_plain_loop():
    """The three corners by sorting the offsets in the skewed cell, point by point."""
    torch.manual_seed(0)
    angles = torch.rand(1, 8, 8) * 2 * math.pi
    points = torch.rand(200, 2) * 20 - 10
    noise = anoddpm.simplex_noise(points[None, :, 0], points[None, :, 1], angles)[0]
    F, G = (math.sqrt(3) - 1) / 2, (3 - math.sqrt(3)) / 6
    for (u, v), value in zip(points.tolist(), noise.tolist()):
        a, b = u + (u + v) * F, v + (u + v) * F                    # skewed
        i, j = math.floor(a), math.floor(b)
        second = (i + 1, j) if a - i > b - j else (i, j + 1)
        total = 0.0
        for p, q in ((i, j), second, (i + 1, j + 1)):
            dx, dy = u - (p - (p + q) * G), v - (q - (p + q) * G)
            angle = angles[0, p % 8, q % 8].item()
            near = max(0.0, 0.5 - dx * dx - dy * dy)
            total += near ** 4 * (math.cos(angle) * dx + math.sin(angle) * dy)
        assert value == pytest.approx(anoddpm.SCALE * total, abs=1e-4)


def test_anoddpm_eq_b_octaves():
    """Two octaves: the first and 0.8 of a finer one; standard deviations as the authors'."""
    def noise(octaves, **kwargs):
        return anoddpm.octave_noise((20, 3, 64, 64), octaves, **kwargs,
                                    generator=torch.Generator().manual_seed(0))

    one, two = noise(1), noise(2)
    assert 0.30 < one.std() < 0.32 and 0.45 < noise(4).std() < 0.51
    torch.testing.assert_close(noise(2, persistence=0.4) - one, (two - one) / 2)

    def roughness(n):                     # squared slope over variance: (1 / wavelength)^2
        return ((n[..., 1:] - n[..., :-1]) ** 2).mean() / n.var()

    assert 3.2 < roughness(two - one) / roughness(one) < 4.2
    assert 0.79 < (two - one).std() / one.std() < 0.81
    assert (one[0, 0] - one[0, 1]).abs().max() > 0.3              # a map for every channel


def test_anoddpm_eq_d_e_is_the_posterior_of_two_gaussians():
    """q(x_{t-1} | x_t, x_0) from q(x_{t-1} | x_0) and q(x_t | x_{t-1}), precisions added."""
    abar = common.noise_schedule(1e-4, 0.02).double()
    x_t, eps, n = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64)
    for t, t_prev in ((200, 199), (200, 150), (1, 0)):
        a, b = abar[t], abar[t_prev]
        x_0 = (x_t / a.sqrt() - (1 / a - 1).sqrt() * eps).clamp(-1, 1)
        beta = 1 - a / b
        x_prev = anoddpm.reverse_step(x_t, eps, a, b, n)
        if t_prev == 0:
            torch.testing.assert_close(x_prev, x_0)
            continue
        precision = 1 / (1 - b) + (1 - beta) / beta
        mean = (b.sqrt() * x_0 / (1 - b) + (1 - beta).sqrt() * x_t / beta) / precision
        torch.testing.assert_close(x_prev, mean + beta.sqrt() * n)


def test_anoddpm_eq_c_and_f(monkeypatch):
    """With the true noise predicted the loss is 0, and the restoration is the image itself."""
    model, _ = tiny("anoddpm")
    x = torch.rand(2, 3, 32, 32) * 1.8 - 0.9
    drawn = []
    octave_noise = anoddpm.octave_noise
    monkeypatch.setattr(anoddpm, "octave_noise",
                        lambda *a, **k: drawn.append(octave_noise(*a, **k)) or drawn[-1])
    monkeypatch.setattr(model, "run", lambda net, x_t, t: drawn[-1])
    assert model.losses(x, None, None, None, torch.tensor([1, 250]))["loss"] == 0
    monkeypatch.setattr(model, "run", lambda net, x_t, t: (
        x_t - model.abar[t[0]].sqrt() * x) / (1 - model.abar[t[0]]).sqrt())
    restored = model.restore(x, 5)
    torch.testing.assert_close(restored.x_0, x, atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(model, "run", lambda net, x_t, t: (
        x_t - model.abar[t[0]].sqrt() * (x + 0.1)) / (1 - model.abar[t[0]]).sqrt())
    error = model.restore(x, 5).M_recon
    torch.testing.assert_close(error, torch.full_like(error, 0.01 / 4), atol=1e-5, rtol=1e-2)
    assert model.path(250) == list(range(250, -1, -1)) and model.path(2) == [250, 125, 0]


# ---------------------------------------------------------------- DiffAD

def latents(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 8, 8)), generator=torch.Generator().manual_seed(1))


def test_diffad_eq_5_the_noisy_condition():
    c, eps, t_c = latents(), latents().flip(0), torch.tensor([1, 700])
    model, _ = tiny("diffad")
    noisy = model.noisy_condition(c, eps, t_c)
    for k, t in enumerate(t_c):
        torch.testing.assert_close(noisy[k], model.abar[t] ** 0.5 * c[k]
                                   + (1 - model.abar[t]) ** 0.5 * eps[k])
    assert torch.equal(tiny("diffad", "--variant", "c")[0].noisy_condition(c, eps, t_c), c)


def test_diffad_eq_6_loss(monkeypatch):
    """Against the two noisings by hand, with the net replaced by one that adds up what it sees."""
    model, _ = tiny("diffad")
    z, c, seen = latents(), latents().flip(1), []
    monkeypatch.setattr(model, "run", lambda net, x, t: seen.append((x, t)) or x[:, :4] + x[:, 4:])
    torch.manual_seed(5)
    loss = model.diffusion_loss(z, c)
    torch.manual_seed(5)
    t, t_c = torch.randint(1, 1001, (2, 2))
    eps, eps_c = torch.randn_like(z), torch.randn_like(z)
    total = 0.0
    for k in range(2):
        z_t = model.abar[t[k]] ** 0.5 * z[k] + (1 - model.abar[t[k]]) ** 0.5 * eps[k]
        noisy = model.abar[t_c[k]] ** 0.5 * c[k] + (1 - model.abar[t_c[k]]) ** 0.5 * eps_c[k]
        eps_theta = model.abar[t[k]] ** 0.5 * (z_t + noisy) + (1 - model.abar[t[k]]) ** 0.5 * z_t
        total += (eps_theta - eps[k]).square().mean().item() / 2
    assert loss.item() == pytest.approx(total, rel=1e-5) and torch.equal(seen[0][1], t)


def test_diffad_generates_what_is_predicted(monkeypatch):
    model, _ = tiny("diffad")
    z, c, t_seen = latents(), latents().flip(0), []

    def perfect(net, x, t):
        t_seen.append(t[0].item())
        assert torch.equal(x[:, 4:], c)                             # the condition is clean
        abar = model.abar[t[0]]
        return (abar.sqrt() * x[:, :4] - z) / (1 - abar).sqrt()     # v: z = sqrt(abar) z_t - ...

    monkeypatch.setattr(model, "run", perfect)
    generated = model.generate(c, latents(1, 4, 8, 8), model.path())
    torch.testing.assert_close(generated, z, atol=1e-4, rtol=1e-4)
    assert t_seen == [801, 601, 401, 201, 1] and model.path(4) == [751, 501, 251, 1, 0]
    assert model.path(1000) == list(range(1000, -1, -1))
    with pytest.raises(ValueError, match="1001 inference steps"):
        model.path(1001)


@pytest.mark.parametrize("variant, channels, steered, third", [
    ("diffad", 9, 8, 0.5), ("x_a_inter", 9, 8, 1.0), ("no_inter", 6, 8, None), ("c", 6, 8, None),
    ("f_and_r", 6, 4, None)])
def test_diffad_eq_7_and_the_variants(variant, channels, steered, third, monkeypatch):
    model, _ = tiny("diffad", "--variant", variant)
    assert model.segment.down[0][0].in_channels == channels
    assert model.net.start.in_channels == steered
    assert model.path()[0] == (800 if variant == "f_and_r" else 801)
    x, z_r = torch.rand(2, 3, 32, 32) * 2 - 1, latents()
    monkeypatch.setattr(model, "generate", lambda c, x_T, path: z_r)
    x_r, *inter, x_a = model.images(x, model.x_T, model.path())
    c = model.vae.encode(model, x)
    torch.testing.assert_close(x_r, model.vae.decode(model, z_r))
    assert torch.equal(x_a, x) and len(inter) == (third is not None)
    if third is not None:
        torch.testing.assert_close(inter[0], model.vae.decode(model, third * c + (1 - third) * z_r))


@pytest.mark.parametrize("stage, term, trained", [(0, "vae", "vae"), (1, "diffusion", "net"),
                                                  (2, "segment", "segment")])
def test_diffad_trains_a_part_in_each_stage(stage, term, trained):
    model, _ = tiny("diffad")
    model.train().stage = stage
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    M = torch.zeros(4, 1, 32, 32)
    M[:2, :, 8:20, 8:20] = 1
    terms = model.losses(x, -x * M, M, M, torch.tensor([1, 500, 700, 1000]))
    assert {k for k, v in terms.items() if v != 0} == {"loss", term}
    terms["loss"].backward()
    parts = {name for name, p in model.named_parameters() if p.grad is not None
             and p.grad.abs().max() > 0}
    assert {name.split(".")[0] for name in parts} == {trained}


# ---------------------------------------------------------------- D3AD

def test_d3ad_eq_8_guidance_pulls_the_clean_estimate_to_the_input():
    z_t, eps, z_0 = latents(3, 1, 4, 8, 8).double()
    abar = common.noise_schedule(0.0015, 0.0195).double()[60]
    g = 4 * (1 - abar)
    guided = common.clean_estimate(z_t, d3ad.guided(eps, z_t, z_0, abar, 4.0), abar)
    torch.testing.assert_close(guided, (1 - g) * common.clean_estimate(z_t, eps, abar) + g * z_0)


def test_d3ad_algorithm_2_levels():
    """Bins 0..10 of even width over the training distances, and what lies beyond."""
    expected = [20, 20, 20, 20, 30, 40, 50, 60, 60, 70, 80, 80]
    inside = [5.0, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5, 11.5, 12.5, 13.5, 14.5, 99.0]    # low 5, high 15
    levels = d3ad.level(torch.tensor(inside), torch.tensor(5.0), torch.tensor(15.0))
    assert levels.tolist() == expected
    assert d3ad.level(torch.tensor([1.0]), torch.tensor(5.0), torch.tensor(15.0)).item() == 20


def test_d3ad_algorithm_2_distances():
    model, _ = tiny("d3ad")
    random.seed(0)
    bank = torch.tensor([[random.random() for _ in range(model.bank.shape[1])] for _ in range(9)])
    model.bank[:9] = bank
    model.count.fill_(9)                                              # K = 9 // 4 = 2
    new = torch.rand(1, model.bank.shape[1])
    near = sorted((new[0] - row).abs().sum().item() for row in bank)[:2]
    assert model.distance(new).item() == pytest.approx(sum(near) / 2, rel=1e-4)
    others = sorted((bank[3] - bank[k]).abs().sum().item() for k in range(9) if k != 3)[:2]
    assert model.distance(bank, 1)[3].item() == pytest.approx(sum(others) / 2, rel=1e-4)


def test_d3ad_algorithm_1_and_eq_12(monkeypatch):
    """With eps_theta = 0 and no guidance a latent keeps its start: sqrt(abar_T'), undone; omega
    adds noise to it. Each image goes from its own T'."""
    z_0, T = latents(), torch.tensor([20, 80])
    seen = []
    for omega in ("0", "0.5"):
        model, _ = tiny("d3ad", "--guidance", "0", "--omega", omega)
        monkeypatch.setattr(model, "run", lambda net, z, t: seen.append(t.tolist()) or 0 * z)
        reconstructed = model.reconstruct(z_0, T)
        for k in range(2):
            start = z_0[k] + float(omega) * ((1 - model.abar[T[k]]) / model.abar[T[k]]).sqrt() \
                * model.noise[0]
            torch.testing.assert_close(reconstructed[k], start, atol=1e-5, rtol=1e-4)
    assert seen[:10] == [[20 - 2 * k, 80 - 8 * k] for k in range(10)]
    held, _ = tiny("d3ad", "--omega", "1", "--guidance", "4")
    monkeypatch.setattr(held, "run", lambda net, z, t: 0 * z)
    free = (reconstructed * 2 - z_0 * 2).abs().mean()
    assert (held.reconstruct(z_0, T) - z_0).abs().mean() < 0.9 * free


def test_d3ad_eq_9_and_10(monkeypatch):
    model, _ = tiny("d3ad")
    x, x_0 = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    total, maps = 0.0, []
    for a, b in zip(model.phi(x)[:3], model.phi(x_0)[:3]):
        cos = (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())
        total += (1 - cos).mean().item()
        maps.append(1 - cos[:, None])
    assert model.adaptation_loss(x, x_0).item() == pytest.approx(total, rel=1e-4)
    z, z_0 = latents(), model.vae.encode(model, x)
    monkeypatch.setattr(model, "reconstruct", lambda *args: z)
    monkeypatch.setattr(model.vae, "decode", lambda *args: x_0)
    _, L, Fs = model.compare(x, torch.tensor([20, 20]), 10)
    large = [torch.nn.functional.interpolate(part, (32, 32), mode="bilinear")
             for part in ((z - z_0).abs().mean(1, keepdim=True), *maps[1:])]
    torch.testing.assert_close(L, large[0])
    torch.testing.assert_close(Fs, large[1] + large[2], atol=1e-5, rtol=1e-4)


def test_d3ad_ranges_and_neighbours_come_from_training_images():
    torch.manual_seed(0)
    model, _ = tiny("d3ad")
    torch.nn.init.normal_(model.net.end[2].weight, 0, 0.1)
    images = torch.rand(12, 3, 32, 32) * 2 - 1
    model.after_training(images)
    assert model.count == 12 and len(model.bank) == d3ad.BANK_SIZE == 256
    pooled = model.pooled(model.features(images))
    distances = model.distance(pooled, 1)
    assert torch.equal(model.distances, torch.stack([distances.min(), distances.max()]))
    parts = [model.compare(x[None], d3ad.level(d[None], *model.distances), 10)[1:]
             for x, d in zip(images, distances)]
    for limits, part in zip(model.ranges, zip(*parts)):
        expected = torch.stack([torch.cat(part).min(), torch.cat(part).max()])
        torch.testing.assert_close(limits, expected, atol=1e-5, rtol=1e-3)
    restored = model.restore(images[:1])
    T = d3ad.level(model.distance(pooled[:1]), *model.distances)
    L, Fs = model.compare(images[:1], T, 10)[1:]
    for part, map_, (low, high) in zip((L, Fs), (restored.M_disc, restored.M_recon), model.ranges):
        torch.testing.assert_close(map_, (part - low) / (high - low))
    other = torch.cat([images[:1], torch.rand(1, 3, 32, 32)])
    torch.testing.assert_close(model.restore(other).M_disc[0], model.restore(images[:1]).M_disc[0])


def test_d3ad_features_of_a_resnet(tmp_path):
    """Those of torchvision's own forward, in train.py from a file, later from the checkpoint."""
    file = tmp_path / "resnet34.pth"
    missing = ["--method", "d3ad", "--resnet34", str(file)]
    with pytest.raises(InputError, match="no such file"):
        settings.parse(missing)
    torch.manual_seed(1)
    net = torchvision.models.resnet34().eval()
    torch.save(net.state_dict(), file)
    model, s = tiny("d3ad", "--resnet34", str(file))
    x, seen = torch.rand(12, 3, 32, 32) * 2 - 1, []
    for layer in (net.layer1, net.layer2, net.layer3):
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225)))
    net((x / 2 + 0.5 - mean) / std)
    for features, expected in zip(model.features(x), seen, strict=True):
        torch.testing.assert_close(features, expected)

    first = net.state_dict()["conv1.weight"]
    model.after_training(x)
    adapted = model.phi.state_dict()["conv1.weight"].clone()
    assert not torch.equal(adapted, first)
    model.after_training(x)                                       # from the file again, not further
    torch.testing.assert_close(model.phi.state_dict()["conv1.weight"], adapted)
    file.unlink()
    other = runs.build_model(s).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.restore(x[:2]).M_recon, model.restore(x[:2]).M_recon)
    with pytest.raises(ValueError, match="resnet34.pth: gone since"):
        model.after_training(x)
    torch.save({"conv1.weight": first}, file)
    with pytest.raises(InputError, match="not the weights of torchvision's resnet34"):
        runs.build_model(s)


def test_d3ad_with_one_training_image():
    (model, _), x = tiny("d3ad"), torch.rand(2, 3, 32, 32) * 2 - 1
    model.after_training(x[:1])
    assert all(part.isfinite().all() for part in model.restore(x[1:]))


# ---------------------------------------------------------------- all, through the loop

def test_the_usual_losses_of_a_stage_are_no_measure_for_another_one(parts, monkeypatch):
    """A finished training of three stages is lengthened, and continues in its second one."""
    argv = argv_for(parts, "--method", "diffad", "--channels", "16", "--steps")
    seen = []
    monkeypatch.setattr(train, "finish", lambda run: {"category": "bolt"})
    assert train.main([*argv, "12"]) == 0

    def stop(run, losses):
        seen.append(run.running_mean)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "record", stop)
    assert train.main([*argv, "24", "--resume"]) == 130
    assert seen == [{"stage": 1, "side": 32}]


@pytest.mark.picture
@pytest.mark.parametrize("method, muon", [*((name, "--no-muon") for name in OTHERS
                                            if METHODS[name].trains), ("diffad", "--muon")])
def test_every_method_trains_resumes_and_inspects(method, muon, parts, tmp_path):
    argv = argv_for(parts, "--method", method, "--channels", "16", "--steps", "4", "--warmup", "0",
                    "--checkpoint-every", "2", "--ema", "0.5", muon)
    if method == "draem":                                 # it has one pass
        index = argv.index("--infer-steps")
        del argv[index:index + 2]
    s, _ = settings.parse(argv)
    assert train.main([*argv, "--name", "whole"]) == 0
    folder = tmp_path / "runs" / "parts"
    whole, resumed = (folder / f"bolt-{method}-{name}" for name in ("whole", "resumed"))
    save = runs.Run.save

    def stop_at_2(run):
        save(run)
        if run.step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "save", stop_at_2)
        assert train.main([*argv, "--name", "resumed"]) == 130
    assert train.main([*argv, "--name", "resumed", "--resume"]) == 0
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (whole, resumed))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    if runs.build_model(s).IMAGES_AFTER_TRAINING:
        assert a["ema"]["count"] > 0                      # what `after_training` saw was kept
    metrics = read_json(whole / "metrics.json")
    assert metrics["method"] == method and 0 <= metrics["image_auroc"] <= 1
    assert (whole / "qualitative.png").stat().st_size > 10_000
    assert all(math.isfinite(float(row["loss"])) for row in rows_of(whole / "log.csv"))
    images = sorted((parts / "bolt" / "test" / "good").glob("*.png"))
    assert predict.main([str(whole), *map(str, images), "--out", str(tmp_path / "found")]) == 0
    scores = {row["file"]: float(row["score"]) for row in rows_of(whole / "scores.csv")}
    for row in rows_of(tmp_path / "found" / "scores.csv"):
        expected = scores[f"test/good/{row['file']}"]
        assert float(row["score"]) == pytest.approx(expected, rel=1e-3)


# A method's image AUROC after its quick preset on the demo's fabric; measured with seed 0:
# 1.0, 0.984, 1.0, 0.845.
FLOOR = {"draem": 0.95, "d3ad": 0.93, "diffad": 0.95, "anoddpm": 0.75}


@pytest.mark.slow
@pytest.mark.parametrize("method", FLOOR)
def test_a_method_learns_something_real(method, demo_root, tmp_path):
    assert train.main(["--method", method, "--category", "fabric", "--preset", "quick", "--root",
                       str(demo_root), "--out", str(tmp_path), "--device", "cpu"]) == 0
    metrics = read_json(tmp_path / "demo" / f"fabric-{method}" / "metrics.json")
    assert metrics["image_auroc"] > FLOOR[method], metrics
