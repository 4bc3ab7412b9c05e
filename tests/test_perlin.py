"""Synthetic anomalies: the noise, the masks, the guides, the appearances, a whole batch."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import perlin
from data import scale


def perlin_loop(gradients, periods, angle, phase, H, W):
    """Perlin's noise pixel by pixel: corners' gradients dotted with the way from them, blended."""
    L, out = perlin.LATTICE, np.empty((H, W))
    for i, j in np.ndindex(H, W):
        y, x = (i + 0.5) / H - 0.5, (j + 0.5) / W - 0.5
        u = (math.cos(angle) * y - math.sin(angle) * x) * periods[0] + phase[0] + L / 2
        v = (math.sin(angle) * y + math.cos(angle) * x) * periods[1] + phase[1] + L / 2
        total = 0
        for a in (math.floor(u), math.floor(u) + 1):
            for b in (math.floor(v), math.floor(v) + 1):
                g, du, dv = gradients[a, b], u - a, v - b
                weight = math.prod(1 - abs(d) ** 3 * (6 * d * d - 15 * abs(d) + 10)
                                   for d in (du, dv))
                total += weight * (math.cos(g) * du + math.sin(g) * dv)
        out[i, j] = math.sqrt(2) * total
    return out


@pytest.mark.parametrize("H, W", [(8, 8), (13, 10)])
def test_noise_against_a_loop(H, W):
    rng = np.random.default_rng(0)
    gradients = rng.uniform(0, 2 * np.pi, (2, perlin.LATTICE, perlin.LATTICE))
    periods, angles = np.array([[1, 4], [32, 2]]), np.array([0.0, 1.1])
    phases = np.array([[0.0, 0.3], [0.9, 0.5]])
    got = perlin.perlin_noise(*(torch.tensor(v).float()
                                for v in (gradients, periods, angles, phases)), H, W)
    assert got.shape == (2, 1, H, W)
    for k in range(2):
        want = perlin_loop(gradients[k], periods[k], angles[k], phases[k], H, W)
        assert np.allclose(got[k, 0].numpy(), want, atol=1e-4)


def test_noise_has_the_scale_it_is_asked_for():
    rng = np.random.default_rng(0)
    gradients = torch.tensor(rng.uniform(0, 6.28, (1, perlin.LATTICE, perlin.LATTICE))).float()
    noise = [perlin.perlin_noise(gradients, torch.tensor([[p, p]]), torch.zeros(1),
                                 torch.zeros(1, 2), 128, 128) for p in (1, 32)]
    rough = [float(n.diff(dim=-1).abs().mean()) for n in noise]
    assert rough[1] > 8 * rough[0]
    many = perlin.random_perlin(rng, 200, 32, 48, "cpu")
    assert many.shape == (200, 1, 32, 48) and float(many.abs().max()) <= 1.0
    assert abs(float(many.mean())) < 0.03 and 0.05 < float((many.abs() > 0.5).float().mean()) < 0.2


def test_mask_lies_in_the_foreground_and_is_never_empty():
    rng = np.random.default_rng(0)
    noise = perlin.random_perlin(rng, 300, 32, 32, "cpu")
    foreground = torch.zeros(300, 1, 32, 32)
    foreground[:, :, 14:18, 10:20] = 1
    M, threshold = perlin.anomaly_mask(noise, foreground)
    assert set(M.unique().tolist()) == {0.0, 1.0} and not (M * (1 - foreground)).any()
    assert (M.sum((1, 2, 3)) > 0).all()
    assert float(threshold.max()) == 0.5 and float(threshold.min()) < 0.5
    usual = threshold.flatten() == 0.5
    assert torch.equal(M[usual], ((noise.abs() > 0.5) * foreground)[usual])
    assert not perlin.anomaly_mask(noise, 0 * foreground)[0].any()


def test_the_four_simulated_previous_masks():
    rng = np.random.default_rng(0)
    noise = perlin.random_perlin(rng, 1, 64, 64, "cpu").expand(4, 1, 64, 64)
    foreground = torch.ones(4, 1, 64, 64)
    M, threshold = perlin.anomaly_mask(noise, foreground)
    case, u = torch.arange(4.0).view(4, 1, 1, 1), torch.full((4, 1, 1, 1), 0.4)
    empty, smaller, exact, larger = perlin.simulated_previous_mask(noise, foreground, threshold,
                                                                   case, u)
    assert not empty.any() and torch.equal(exact, M[2])
    assert torch.equal(smaller, (noise[0].abs() > 0.7).float())
    assert torch.equal(larger, (noise[0].abs() > 0.3).float())
    assert 0 < smaller.sum() < exact.sum() < larger.sum()


def test_block_shuffle_is_a_permutation_of_blocks():
    image = torch.arange(3 * 16 * 24).view(3, 16, 24)
    assert torch.equal(perlin.shuffle_blocks(image, list(range(64))), image)
    shuffled = perlin.shuffle_blocks(image, [63] + list(range(63)))
    assert torch.equal(shuffled[:, :2, :3], image[:, 14:, 21:])
    assert torch.equal(shuffled[:, :2, 3:6], image[:, :2, :3])
    assert torch.equal(shuffled.flatten().sort().values, image.flatten())


@pytest.mark.parametrize("operation", perlin.OPERATIONS, ids=lambda f: f.__name__)
def test_operations_change_images_and_keep_their_kind(operation):
    image = torch.randint(30, 200, (3, 24, 32), generator=torch.Generator().manual_seed(0),
                          dtype=torch.uint8)
    rng = np.random.default_rng(0)
    results = [operation(image, rng) for _ in range(6)]
    assert all(r.shape == image.shape and r.dtype == torch.uint8 for r in results)
    assert any(not torch.equal(r, image) for r in results)


def test_there_are_ten_operations_and_three_different_ones_are_used(monkeypatch):
    used = []
    fakes = tuple(lambda image, rng, k=k: used.append(k) or image for k in range(10))
    assert len(perlin.OPERATIONS) == 10
    monkeypatch.setattr(perlin, "OPERATIONS", fakes)
    rng = np.random.default_rng(0)
    for _ in range(100):
        used.clear()
        perlin.three_operations(torch.zeros(1), rng)
        assert len(used) == len(set(used)) == 3


def make(seed=0, B=8, S=64, opaque=False, fill=200):
    images = torch.randint(0, 256, (B, 3, S, S), generator=torch.Generator().manual_seed(1),
                           dtype=torch.uint8)
    foreground = torch.zeros(B, 1, S, S)
    foreground[..., 8:56, 8:56] = 1
    textures = torch.full(((B + 1) // 2, 3, S, S), fill, dtype=torch.uint8)
    return images, perlin.synthesize(images, foreground, textures,
                                     torch.full((B,), opaque), np.random.default_rng(seed))


def eps_of(anomalies):
    """The eps of Eq. 2, as train.make_batch takes it."""
    return scale(anomalies.A) * anomalies.M


def test_a_batch_is_half_anomalous():
    _, anomalies = make()
    assert anomalies.M.shape == anomalies.M_a.shape == (8, 1, 64, 64)
    assert anomalies.A.shape == (8, 3, 64, 64)
    assert (anomalies.M[:4].sum((1, 2, 3)) > 0).all()
    assert not anomalies.M[4:].any() and not anomalies.M_a[4:].any() and not anomalies.A[4:].any()
    assert anomalies.A.dtype == torch.uint8 and (anomalies.A[:4] * (1 - anomalies.M[:4])).any()
    assert not anomalies.M[..., :8].any() and not anomalies.M_a[..., :8].any()


def test_the_guide_is_empty_at_the_last_step_and_in_a_quarter_of_the_others():
    assert not any(make(seed, opaque=True)[1].M_a.any() for seed in range(20))
    guides = torch.cat([make(seed)[1].M_a[:4] for seed in range(100)])
    masks = torch.cat([make(seed)[1].M[:4] for seed in range(100)])
    area, true_area = guides.sum((1, 2, 3)), masks.sum((1, 2, 3))
    exact = (guides == masks).all(-1).all(-1).all(-1)
    # smaller masks may be empty too, where the noise hardly exceeds the threshold
    assert 0.2 < float((area == 0).float().mean()) < 0.5
    assert 0.17 < float(exact.float().mean()) < 0.33
    assert float((area > true_area).float().mean()) == pytest.approx(0.25, abs=0.07)


def test_same_seed_same_batch():
    a, b, c = make(3)[1], make(3)[1], make(4)[1]
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert not torch.equal(a.M, c.M)


def test_half_of_the_anomalies_are_textural():
    """With flat textures a textural anomaly is flat, a structural one of a noise image is not."""
    flat = [float(part[:, m[0] > 0].std(1).max()) < 0.2
            for seed in range(60) for part, m in zip(eps_of(make(seed)[1])[:4], make(seed)[1].M[:4])]
    assert 0.38 < np.mean(flat) < 0.62


def test_rotation_augmentation():
    images, _ = make()
    foreground = torch.ones(8, 1, 64, 64)
    rng = np.random.default_rng(0)
    turned = np.mean([not torch.equal(a, b) for _ in range(40)
                      for a, b in zip(perlin.rotate_batch(images, foreground, 90, rng)[0], images)])
    assert 0.2 < turned < 0.4


@pytest.mark.parametrize("authors", [False, True])
def test_rotation_turns_image_and_foreground_alike_and_up_to_its_angle(authors):
    """The image is its own foreground: they must stay the same picture, at angles over the range."""
    bar = torch.zeros(200, 1, 64, 64)
    bar[..., 30:34, 8:56] = 1
    images = (255 * bar).to(torch.uint8).expand(-1, 3, -1, -1)
    out, fg = perlin.rotate_batch(images, bar, 90, np.random.default_rng(0), authors, p=1.0)
    assert out.dtype == torch.uint8
    differ = (out[:, :1] > 128) != (fg > 0)                     # half covered edges, interpolated
    assert not differ.any() if authors else float(differ.float().mean()) < 0.005
    upright = (fg.sum((1, 3)) > 0).sum(1) > (fg.sum((1, 2)) > 0).sum(1)      # turned by over 45
    assert 0.35 < float(upright.float().mean()) < 0.65


def test_rotation_is_linear_on_black_or_as_the_authors_nearest_on_grey():
    """A grey ramp, turned: its corners, and whether there are values between those of the image."""
    images = torch.full((50, 3, 64, 64), 100, dtype=torch.uint8)
    images[..., 32:] = 200
    for authors, corner in ((False, 0), (True, 128)):
        out, fg = perlin.rotate_batch(images, torch.ones(50, 1, 64, 64), 45,
                                      np.random.default_rng(0), authors, p=1.0)
        values = set(out.unique().tolist())
        assert corner in values and (values == {100, 128, 200}) == authors
        far = torch.nn.functional.max_pool2d(fg, 3, 1, 1) == 0       # well outside the turned image
        assert far.any() and (out[far.expand_as(out)] == corner).all()


def test_rotation_blends_a_border_pixel_with_black_by_the_share_that_the_image_covers():
    """A constant image of 200, turned: as bright as its coverage, within rounding.

    torchvision's `fill` blends a border pixel twice, which makes it up to 50 levels too dark.
    """
    images = torch.full((20, 3, 96, 96), 200, dtype=torch.uint8)
    out, _ = perlin.rotate_batch(images, torch.ones(20, 1, 96, 96), 90, np.random.default_rng(0),
                                 p=1.0)
    angles = np.random.default_rng(0)
    angles.random(20)
    for image, angle in zip(out, angles.uniform(-90, 90, 20)):
        white = Image.fromarray(np.full((96, 96), 1.0, np.float32), "F")
        canvas = Image.new("F", (112, 112))
        canvas.paste(white, (8, 8))
        coverage = np.asarray(canvas.rotate(angle, Image.BILINEAR))[8:-8, 8:-8]
        assert np.abs(image[0].numpy() - 200 * coverage).max() < 3


def test_light_augmentation_scales_each_image_by_a_factor_of_its_own():
    images = torch.full((400, 3, 2, 2), 100, dtype=torch.uint8)
    images[:, :, 0] = 200
    out = perlin.change_light(images, 0.2, np.random.default_rng(0))
    assert out.dtype == torch.uint8 and out.shape == images.shape
    factors = out[:, 0, 1, 0] / 100
    assert factors.min() < 0.83 and factors.max() > 1.17
    assert 0.79 <= factors.min() and factors.max() <= 1.2
    assert (out[:, :, 0] / 200 - factors[:, None, None]).abs().max() <= 0.01     # one for all pixels


def test_appearances(monkeypatch):
    """Textural: the texture after three operations. Structural: the image's blocks after three."""
    calls = []
    monkeypatch.setattr(perlin, "three_operations", lambda image, rng: calls.append(1) or image + 1)
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8).expand(3, 8, 8)
    texture = torch.full_like(image, 200)
    kinds = []
    for seed in range(40):
        appearance = perlin.anomaly_appearance(image, texture, np.random.default_rng(seed))
        kinds.append(bool((appearance == 201).all()))
        if not kinds[-1]:
            assert sorted(appearance[0].flatten().tolist()) == list(range(1, 65))
            assert not torch.equal(appearance, image + 1)
    assert len(calls) == 40 and 10 < sum(kinds) < 30


def test_appearance_is_scaled_as_images_are():
    """Flat black textures: a textural anomaly is dark, down to -1, in the scale of the images."""
    eps = torch.cat([eps_of(make(seed, fill=0)[1]) for seed in range(20)])
    assert float(eps.min()) == -1 and float(eps.max()) > 0.9


def test_masks_reach_every_place_of_the_image():
    """The centre too, which the rotation leaves where it is."""
    M, _ = perlin.anomaly_mask(perlin.random_perlin(np.random.default_rng(0), 4000, 16, 16, "cpu"),
                               torch.ones(4000, 1, 16, 16))
    covered = M.mean((0, 1))
    assert float(covered[7:9, 7:9].mean()) == pytest.approx(float(covered.mean()), rel=0.1)
    assert float(covered.min()) > 0.6 * float(covered.max())


def test_random_noise_covers_scales_and_angles(monkeypatch):
    seen = {}
    monkeypatch.setattr(perlin, "perlin_noise", lambda gradients, periods, angles, phases, H, W:
                        seen.update(periods=periods, angles=angles))
    perlin.random_perlin(np.random.default_rng(0), 400, 8, 8, torch.device("cpu"))
    assert set(seen["periods"].flatten().tolist()) == {1, 2, 4, 8, 16, 32}
    assert (seen["periods"][:, 0] != seen["periods"][:, 1]).any()
    assert float(seen["angles"].min()) < -1.4 and float(seen["angles"].max()) > 1.4
