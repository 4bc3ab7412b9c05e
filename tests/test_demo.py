"""The demo data: complete, deterministic, exact, and not solvable by a threshold on brightness."""
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import demo
from helpers import mean_std_model
from support.console import InputError
from support.layouts import find_category


@pytest.mark.parametrize("category", demo.PRODUCTS)
def test_the_same_number_gives_the_same_pixels(category):
    defect = demo.DEFECTS[category][0]
    (a, m), (b, n) = demo.draw(category, defect, 3), demo.draw(category, defect, 3)
    assert np.array_equal(a, b) and np.array_equal(m, n)
    assert a.shape == (256, 256, 3) and a.dtype == np.uint8 and m.dtype == bool
    assert not np.array_equal(a, demo.draw(category, defect, 4)[0])
    assert not demo.draw(category, None, 3)[1].any()


@pytest.mark.parametrize("category, defect", [(c, d) for c in demo.DEFECTS
                                              for d in demo.DEFECTS[c]])
def test_masks_show_where_the_defect_is(category, defect):
    """The same photo without the defect differs where the mask says, and near it by a shadow, a
    reflection or a frayed thread, but not farther away."""
    for number in range(3):
        image, mask = demo.draw(category, defect, number)
        normal, same = demo.draw(category, defect, number, healed=True)
        assert 25 <= mask.sum() < 0.12 * mask.size
        assert np.array_equal(mask, same) and normal.dtype == np.uint8
        change = np.abs(image.astype(int) - normal).mean(-1)
        assert change[mask].mean() > 10                                  # of 255
        assert change[ndimage.distance_transform_edt(~mask) > 20].max() <= 2


def test_the_data_set_on_disk_is_complete_and_exact(whole_demo):
    for category, defects in demo.DEFECTS.items():
        listing = find_category("demo", category, whole_demo)
        labels = [item.label for item in listing.test]
        assert len(listing.train) >= 60 and labels.count(0) >= 20 and labels.count(1) >= 40
        assert len(defects) >= 3 and {item.defect for item in listing.test} == {*defects, "good"}
        last = [item for item in listing.test if item.label][-1]
        number = int(last.path.stem)
        image, mask = demo.draw(category, last.defect, number)
        assert np.array_equal(np.asarray(Image.open(last.path)), image)
        assert np.array_equal(np.asarray(Image.open(last.mask)) > 0, mask)


def test_a_second_call_draws_nothing_and_two_at_once_draw_one_set(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN", 2)
    monkeypatch.setattr(demo, "TEST_GOOD", 1)
    monkeypatch.setattr(demo, "PER_DEFECT", 1)
    draw = demo.draw

    def and_another_process_does_so_meanwhile(*which):
        monkeypatch.setattr(demo, "draw", draw)
        demo.write(tmp_path, "gear")
        assert [p.name for p in tmp_path.iterdir() if p.suffix != ".part"] == ["gear"]
        return draw(*which)

    monkeypatch.setattr(demo, "draw", and_another_process_does_so_meanwhile)
    demo.write(tmp_path, "gear")
    demo.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(demo.PRODUCTS)
    monkeypatch.setattr(demo, "draw", None)
    demo.write(tmp_path)


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*which):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file.demo .*choose another --root"):
        demo.write(tmp_path / "file" / "demo")


def test_no_threshold_on_brightness_solves_the_demo(whole_demo):
    """A per-pixel mean and standard deviation of the train images, smoothed as Eq. 10 does."""
    for category in demo.PRODUCTS:
        _, scores = mean_std_model(whole_demo, category)
        assert scores["image_auroc"] < 0.85 and scores["aupro"] < 0.8, category
