"""Data sets on disk: every layout that is read, masks that pair with images, and folders as people
and systems fill them."""
import csv
import dataclasses
import errno
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import data
import demo
import download
import predict
import runs
from helpers import mvtec_tree, picture, png, settings_for
from settings import parse
from support.console import InputError
from support.files import save_json
from support.layouts import (Category, find_category, list_categories, list_images, read_category,
                             root_folder)

APPLE = bytes.fromhex("00051607000200004d6163204f5320582020202020202020") + bytes(80)


def read(bolt: Path) -> Category:
    return find_category(str(bolt.parent), bolt.name, bolt.parent)


def check(folder: Path, capsys) -> tuple[int, str]:
    """The exit status of tools/download.py --check, and what it prints."""
    capsys.readouterr()
    return download.main(["--check", str(folder)]), capsys.readouterr().out


# ---------------------------------------------------------------- layouts

@pytest.mark.parametrize("folder", ["mvtec", "mvtec_anomaly_detection", "."])
def test_mvtec_is_found_wherever_it_lies_under_the_root(tmp_path, folder):
    mvtec_tree(tmp_path / folder / "cable")
    assert list_categories("mvtec", tmp_path) == ["cable"]
    category = find_category("mvtec", "cable", tmp_path)
    assert len(category.train) == 4 and category.annotated
    assert [(i.label, i.defect) for i in category.test] == [(1, "cut"), (1, "cut"), (0, "good")]
    assert category.test[0].mask.name == "000_mask.png" and category.test[2].mask is None


def test_categories_come_in_the_data_sets_order(tmp_path):
    for name in ("zipper", "bottle", "something_else"):
        mvtec_tree(tmp_path / "mvtec" / name)
    assert list_categories("mvtec", tmp_path) == ["bottle", "zipper"]


def test_any_folder_of_categories_is_read_by_its_path(tmp_path, monkeypatch):
    mvtec_tree(tmp_path / "parts" / "bolt")
    monkeypatch.chdir(tmp_path)
    for path in ("parts", str(tmp_path / "parts")):
        category = find_category(path, "bolt", tmp_path / "elsewhere")
        assert category.data == "parts" and len(category.test) == 3


def test_btad_is_read(tmp_path):
    root = tmp_path / "BTech_Dataset_transformed" / "01"
    for place in ("train/ok", "test/ok", "test/ko"):
        png(root / place / "0000.bmp", picture())
    png(root / "ground_truth" / "ko" / "0000.png", np.ones((32, 32)))
    category = find_category("btad", "01", tmp_path)
    assert len(category.train) == 1 and sorted(item.label for item in category.test) == [0, 1]


@pytest.mark.parametrize("folder", ["VisA_pytorch/1cls", "visa_pytorch", "visa/visa_pytorch"])
def test_visa_is_read_as_others_have_converted_it(tmp_path, folder):
    root = tmp_path / folder / "candle"
    for place in ("train/good/0.JPG", "test/good/1.JPG", "test/bad/2.JPG"):
        png(root / place, picture())
    png(root / "ground_truth" / "bad" / "2.png", np.ones((32, 32)))
    category = find_category("visa", "candle", tmp_path)
    assert [(item.label, item.mask is not None) for item in category.test] == [(1, True),
                                                                               (0, False)]


def visa_tree(root: Path, rows: list[list[str]]) -> None:
    (root / "split_csv").mkdir(parents=True)
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    for _, _, _, image, mask in rows:
        png(root / image, picture())
        if mask:
            png(root / mask, np.full((32, 32), 3))


def visa_rows(name: str = "candle") -> list[list[str]]:
    at = f"{name}/Data/"
    return [[name, "train", "normal", f"{at}Images/Normal/0.JPG", ""],
            [name, "train", "normal", f"{at}Images/Normal/1.JPG", ""],
            [name, "test", "normal", f"{at}Images/Normal/2.JPG", ""],
            [name, "test", "anomaly", f"{at}Images/Anomaly/0.JPG", f"{at}Masks/Anomaly/0.png"]]


def test_visa_as_published_follows_its_table(tmp_path):
    visa_tree(tmp_path / "visa", visa_rows() + visa_rows("pcb1"))
    png(tmp_path / "visa" / "candle" / "Data" / "Images" / "Normal" / "9.JPG", picture())
    assert list_categories("visa", tmp_path) == ["candle", "pcb1"]
    category = find_category("visa", "candle", tmp_path)
    assert [p.name for p in category.train] == ["0.JPG", "1.JPG"]      # 9.JPG is not in the table
    assert [(i.label, i.defect, bool(i.mask)) for i in category.test] == [(0, "good", False),
                                                                          (1, "bad", True)]
    assert data.load_mask(category.test[1], 16, 16).all()             # a class id of 3 is anomalous


def test_visa_without_its_table_or_with_a_wrong_one_is_refused(tmp_path):
    visa_tree(tmp_path, visa_rows())
    (tmp_path / "candle" / "Data" / "Images" / "Normal" / "1.JPG").unlink()
    with pytest.raises(InputError, match="1.JPG: in VisA's table, but not there"):
        find_category("visa", "candle", tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not VisA's table"):
        find_category("visa", "candle", tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").unlink()
    with pytest.raises(InputError, match="1cls.csv is missing"):
        find_category("visa", "candle", tmp_path)


def test_a_table_that_excel_has_saved_is_read(tmp_path):
    """Excel begins a file in UTF-8 with a byte order mark."""
    visa_tree(tmp_path, visa_rows())
    table = tmp_path / "split_csv" / "1cls.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    assert len(find_category("visa", "candle", tmp_path).train) == 2


def test_visa_without_a_mask_keeps_the_image_and_names_the_fault(tmp_path):
    visa_tree(tmp_path, visa_rows())
    mask = tmp_path / "candle" / "Data" / "Masks" / "Anomaly" / "0.png"
    mask.unlink()
    category = read_category("visa", "candle", tmp_path / "candle")
    assert category.faults == [f"{mask}: in VisA's table, but not there"]
    assert [(item.label, item.mask) for item in category.test] == [(0, None), (1, None)]


def test_no_ground_truth_folder_and_no_test_folder_are_fine(tmp_path):
    root = mvtec_tree(tmp_path / "a", masks=False)
    category = find_category(str(tmp_path), "a", tmp_path)
    assert not category.annotated and len(category.test) == 3
    for path in root.glob("test/*/*"):
        path.unlink()
    assert find_category(str(tmp_path), "a", tmp_path).test == []


# ---------------------------------------------------------------- what is refused

def test_missing_roots_say_how_to_get_the_data(tmp_path):
    with pytest.raises(InputError, match="no mvtec data under .*mvtec-ad.*--root"):
        find_category("mvtec", "cable", tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither a data set"):
        find_category("nonsense", "cable", tmp_path)


def test_an_unknown_category_is_refused_with_the_nearest(tmp_path):
    mvtec_tree(tmp_path / "mvtec" / "cable")
    with pytest.raises(InputError, match="did you mean cable"):
        find_category("mvtec", "cabel", tmp_path)
    with pytest.raises(InputError, match="'wood' in mvtec is not there; there are: cable"):
        find_category("mvtec", "wood", tmp_path)


@pytest.mark.parametrize("published", [True, False])
def test_an_own_part_among_the_folders_of_a_data_set_is_named_with_its_flags(tmp_path, monkeypatch,
                                                                            published):
    mvtec_tree(tmp_path / "data/mvtec/bolt")
    if published:
        mvtec_tree(tmp_path / "data/mvtec/bottle")
    monkeypatch.chdir(tmp_path)
    for root, flag in (("data", Path("data/mvtec")), (".", "./data"), ("data/mvtec", None),
                       (tmp_path / "data", tmp_path / "data/mvtec")):
        flag = flag or Path("data/mvtec")
        if root == ".":                                     # in a folder called like the data set
            monkeypatch.chdir(tmp_path / "data")
            flag = "./mvtec"
        with pytest.raises(InputError, match="bolt is not a category of mvtec") as refusal:
            find_category("mvtec", "bolt", Path(root))
        assert f"--data {flag} --category bolt" in str(refusal.value)
        assert len(find_category(str(flag), "bolt", Path(root)).train) == 4
        monkeypatch.chdir(tmp_path)
    if not published:
        with pytest.raises(InputError, match="data/mvtec holds bolt: --data data/mvtec trains on"):
            list_categories("mvtec", Path("data"))


def test_a_category_without_training_images_is_refused(tmp_path):
    root = mvtec_tree(tmp_path / "mvtec" / "cable")
    for path in (root / "train" / "good").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="cable: no training images"):
        find_category("mvtec", "cable", tmp_path)


# ---------------------------------------------------------------- masks and images that pair

def test_masks_and_images_must_pair(tmp_path):
    root = mvtec_tree(tmp_path / "mvtec" / "cable")
    mask = root / "ground_truth" / "cut" / "001_mask.png"
    other = mask.with_name("007_mask.png")
    mask.rename(other)
    with pytest.raises(InputError, match="001.png: no mask for it"):
        find_category("mvtec", "cable", tmp_path)
    other.rename(mask)
    png(other, np.ones((32, 32)))
    with pytest.raises(InputError, match="007_mask.png: a mask without its image"):
        find_category("mvtec", "cable", tmp_path)


@pytest.mark.parametrize("name", ["{}_gt.png", "mask_{}.png", "{}_MASK.PNG", "{}_label.bmp"])
def test_masks_under_other_names_are_refused_with_the_names_that_are_read(bolt, name):
    for mask in (bolt / "ground_truth/cut").iterdir():
        mask.rename(mask.with_name(name.format(mask.stem.removesuffix("_mask"))))
    with pytest.raises(InputError, match=r"000.png: no mask for it; looked for .*cut.000_mask.\* "
                                         r"and 000.\*.*faults: 4"):
        read(bolt)


@pytest.mark.parametrize("second", ["000.png", "000_mask.bmp"])
def test_two_masks_of_an_image_are_refused(bolt, second):
    png(bolt / "ground_truth/cut" / second, np.ones((32, 32)))
    with pytest.raises(InputError, match="000(_mask)?....: a second mask for 000, beside 000"):
        read(bolt)


def test_two_images_of_a_mask_are_refused(bolt):
    Image.open(bolt / "test/cut/000.png").save(bolt / "test/cut/000.jpg")
    with pytest.raises(InputError, match="000_mask.png is for one image, but 2 are called 000"):
        read(bolt)
    shutil.rmtree(bolt / "ground_truth")
    assert len(read(bolt).test) == 4


@pytest.mark.parametrize("name", ["001_mask.png", "001.jpg"])
def test_empty_masks_are_named_by_the_training_and_by_the_check(bolt, capsys, name):
    folder = bolt / "ground_truth/cut"
    (folder / "001_mask.png").unlink()
    Image.new("L", (32, 32)).save(folder / name)
    notes = [note for note in data.load_run_data(settings_for(bolt)).notes if "are empty" in note]
    assert len(notes) == 1 and "1 masks" in notes[0] and str(folder / name) in notes[0]
    status, out = check(bolt, capsys)
    assert status == 0 and f"note: {folder / name}: empty" in out and "000_mask" not in out


def test_images_of_the_training_in_the_test_set_are_named(bolt, capsys):
    """By their bytes, whatever their names; 000 and 001 are as large, but others."""
    shutil.copy(bolt / "train/good/002.png", bolt / "test/good/009.png")
    shutil.copy(bolt / "train/good/003.png", bolt / "test/good/010.png")
    png(bolt / "test/good/011.png", picture(7))
    line = (f"2 test images are training images, too, so the scores are too good: "
            f"{bolt / 'test/good/009.png'} is {bolt / 'train/good/002.png'} ...")
    assert f"warning: {line}" in data.load_run_data(settings_for(bolt)).notes
    assert f"note: {line}" in check(bolt, capsys)[1]


@pytest.mark.parametrize("doubt, ground, defect", [
    ("covers 98.4% of its image and touches all four edges; is it inverted?", 255, 0),
    ("covers 98.4% of its image", 1, 0), ("covers 100.0% of its image", 255, 255),
    ("holds the values 1, 255 besides black; those above 25.5 count as defect", 0, 1)])
def test_masks_that_are_probably_wrong_are_named(bolt, capsys, doubt, ground, defect):
    mask = np.full((32, 32), ground)
    mask[4:8, 4:8] = defect
    if defect == 1:
        mask[3, 4:8] = 255                                          # void beside a class
    for name in ("000_mask.png", "001_mask.png"):
        png(bolt / "ground_truth/cut" / name, mask)
    notes = data.load_run_data(settings_for(bolt)).notes
    for text in ("\n".join(notes), check(bolt, capsys)[1]):
        for name in ("000_mask.png", "001_mask.png"):
            assert f"{bolt / 'ground_truth/cut' / name}: {doubt}" in text


def test_of_many_doubtful_masks_the_training_names_three(bolt, capsys):
    for k in range(6):
        png(bolt / f"test/cut/{k:03}.png", picture(20 + k))
        png(bolt / f"ground_truth/cut/{k:03}_mask.png", np.full((32, 32), 255))
    notes = [n for n in data.load_run_data(settings_for(bolt)).notes if n.startswith("warning")]
    assert len(notes) == 4 and "3 more doubts about masks; tools/download.py --check" in notes[3]
    assert check(bolt, capsys)[1].count("is it inverted") == 6


@pytest.mark.parametrize("name", ["{}_GT.png", "{}_mask.png", "{}-label.bmp", "{}_seg.png",
                                  "{}_masks.png", "mask_{}.png", "GT-{}.png"])
@pytest.mark.parametrize("place", ["train/good", "test/good", "test/cut"])
def test_labels_among_the_images_are_left_out_by_name(bolt, capsys, place, name):
    image = sorted((bolt / place).iterdir())[0]
    label = bolt / place / name.format(image.stem)
    png(label, np.zeros((32, 32)))
    left_out_and_named(bolt, capsys, label)


def test_a_part_with_the_name_of_a_label_is_an_image(bolt):
    for name in ("black_mask.png", "mask_7.png", "_mask.png", "gt-.png"):    # no image beside it
        png(bolt / "train/good" / name, picture())
    assert len(read(bolt).train) == 8


# ---------------------------------------------------------------- what is a photo

def left_out_and_named(bolt: Path, capsys, label: Path) -> None:
    """train.py, --check and predict.py leave out the same file, and name it."""
    category = read(bolt)
    photos, photo_notes = predict.find_photos([str(bolt / "train"), str(bolt / "test")],
                                              bolt.parent / "out")
    assert {*category.train, *(item.path for item in category.test)} == {*photos}
    assert label not in photos
    run_notes = data.load_run_data(settings_for(bolt)).notes
    status, out = check(bolt, capsys)
    assert status == 0 and "no faults; read the notes" in out
    for text in ("\n".join(run_notes), out, "\n".join(photo_notes)):
        line = next(line for line in text.splitlines() if "not read: 1 " in line)
        assert "masks or labels" in line and label.name in line


def part_photo(seed: int) -> np.ndarray:
    """A grey part before black: most of its pixels are nearly black, as in a dark field."""
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 12, (96, 96))
    photo[10:30, 10:30] = rng.integers(60, 250, (20, 20))
    return np.stack([photo] * 3, -1).astype(np.uint8)


def soft_mask() -> np.ndarray:
    """A mask with grey edges."""
    mask = np.zeros((96, 96))
    mask[10:40, 10:40] = 255
    return ndimage.gaussian_filter(mask, 0.5).astype(np.uint8)


@pytest.mark.parametrize("place", ["train/good", "test/good", "test/cut", "test/cut/camera2"])
@pytest.mark.parametrize("photo, mask", [("7.jpg", "7.png"), ("7.png", "7.jpg"), ("7.JPG", "7.bmp"),
                                         ("7.tif", "7.webp"), ("7.bmp", "7.PNG")])
def test_of_two_files_of_one_name_the_mask_is_left_out(bolt, capsys, place, photo, mask):
    shutil.rmtree(bolt / "ground_truth")
    png(bolt / place / photo, part_photo(7))
    png(bolt / place / mask, soft_mask())
    left_out_and_named(bolt, capsys, bolt / place / mask)
    assert bolt / place / photo in predict.find_photos([str(bolt)], bolt / "out")[0]


@pytest.mark.parametrize("mask", [np.zeros((96, 96)), np.full((96, 96), 255), soft_mask() // 200,
                                  (soft_mask() > 99) * 255 + 1 * (soft_mask() > 20)])
def test_masks_of_any_values_are_told_from_the_photo_of_the_same_name(bolt, capsys, mask):
    """Empty, full, of zeros and ones, or with a void label around the defect."""
    png(bolt / "train/good/7.bmp", part_photo(7))
    png(bolt / "train/good/7.png", mask)
    left_out_and_named(bolt, capsys, bolt / "train/good/7.png")


def test_the_same_photo_in_two_formats_is_no_mask(bolt):
    for suffix in (".png", ".jpg", ".bmp"):
        png(bolt / f"train/good/7{suffix}", part_photo(7))
        png(bolt / f"train/good/8{suffix}", picture(90))
    assert len(read(bolt).train) == 4 + 6 and not read(bolt).notes
    (bolt / "train/good/8.jpg").write_bytes(b"no image")             # refused when it is read
    assert bolt / "train/good/8.jpg" in read(bolt).train


@pytest.mark.parametrize("folder", ["gt", "GT", "mask", "Masks", "label", "labels", "ground_truth",
                                    "GroundTruth", "ground truth"])
@pytest.mark.parametrize("place", ["train/good/{}", "train/good/camera2/{}", "test/cut/{}/x",
                                   "test/good/{}", "test/{}/cut"])
def test_folders_of_labels_hold_no_photos(bolt, capsys, folder, place):
    label = bolt / place.format(folder) / "000.png"
    png(label, np.zeros((32, 32)))
    left_out_and_named(bolt, capsys, label)


def test_a_kind_of_defect_with_masks_of_its_own_may_be_called_label(bolt):
    for folder in ("test/cut", "ground_truth/cut"):
        (bolt / folder).rename(bolt / folder.replace("cut", "label"))
    assert [item.defect for item in read(bolt).test] == ["good", "label", "label"]


def test_a_product_may_be_called_mask_and_a_folder_of_labels_may_be_inspected(tmp_path):
    mvtec_tree(tmp_path / "parts/mask")
    assert len(find_category(str(tmp_path / "parts"), "mask", tmp_path).train) == 4
    labels = tmp_path / "parts/mask/ground_truth"
    photos, notes = predict.find_photos([str(labels)], tmp_path / "out")
    assert [p.name for p in photos] == ["000_mask.png", "001_mask.png"] and not notes


def test_a_whole_category_is_inspected_without_its_masks(bolt):
    photos, notes = predict.find_photos([str(bolt)], bolt / "out")
    assert len(photos) == 7 and notes == [
        f"{bolt}: not read: 2 in folders of masks or labels "
        f"({Path('ground_truth/cut/000_mask.png')} ...)"]


def test_results_among_the_photos_are_no_photos(bolt, capsys):
    """Of predict.py, and of a training whose run folder is there."""
    found = bolt / "test/cut/found"
    png(found / "heatmaps/000.png.png", picture())
    (found / "regions.csv").touch()
    png(bolt / "train/good/runs/bolt/qualitative.png", picture())
    (bolt / "train/good/runs/bolt/last.pt").touch()
    category = read(bolt)
    assert len(category.train) == 4 and len(category.test) == 3
    status, out = check(bolt, capsys)
    for text in ("\n".join(category.notes), out):
        assert f"1 results of this program ({Path('runs/bolt/qualitative.png')}" in text.replace(
            "good/", "") and "000.png.png" in text
    photos, notes = predict.find_photos([str(bolt)], bolt.parent / "out")
    assert len(photos) == 7 and "qualitative.png" in notes[0]


@pytest.fixture
def closed(monkeypatch):
    """Folders called `closed` cannot be listed, not even by root."""
    iterdir = Path.iterdir

    def refuse(folder):
        if folder.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)


@pytest.mark.parametrize("place", ["test", "train/good", "test/cut", "ground_truth/cut", "train"])
def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_goes_on(bolt, capsys, closed, place):
    (bolt / place / "closed").mkdir()
    with pytest.raises(InputError, match="closed: cannot be listed .Permission denied.; permit it"):
        read(bolt)
    status, out = check(bolt.parent, capsys)
    assert status == 1 and out.splitlines()[1].split()[:5] == ["bolt", "4", "1", "2", "2"]
    assert f"{bolt / place / 'closed'}: cannot be listed" in out and out.endswith("faults: 1\n")
    photos, notes = predict.find_photos([str(bolt)], bolt / "out")
    assert len(photos) == 7
    assert f"1 folders that cannot be listed ({Path(place) / 'closed'})" in notes[0]


def test_a_folder_or_category_that_cannot_be_listed_is_one_line(bolt, capsys, closed):
    (bolt.parent / "closed").mkdir()
    with pytest.raises(InputError, match="closed: cannot be listed"):
        predict.find_photos([str(bolt.parent / "closed")], bolt / "out")
    assert list_categories(str(bolt.parent), bolt) == ["bolt"]
    status, out = check(bolt.parent, capsys)
    assert status == 1 and out.endswith("faults: 1\n") and "closed: cannot be listed" in out
    (bolt / "closed").mkdir()                                       # not a folder that is read
    assert len(read(bolt).train) == 4 and "not read: closed" in read(bolt).notes[0]


def test_a_folder_whose_names_only_can_be_listed_is_named(bolt, monkeypatch):
    is_dir = Path.is_dir

    def refuse(path):
        if path.parent.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_dir(path)

    png(bolt / "test/cut/closed/9.png", picture())
    monkeypatch.setattr(Path, "is_dir", refuse)
    photos, notes = predict.find_photos([str(bolt / "test")], bolt / "out")
    assert len(photos) == 3 and f"({Path('cut/closed')})" in notes[0]


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path):
    for name in ("photos [1]/a.png", "photos [1]/[x]/b.png", "photos 1/c.png"):
        png(tmp_path / name, picture())
    for pattern, names in (("photos [1]/*.png", "a"), ("photos [1]/**/*.png", "ab"),
                           ("photos [1]/[[]x]/?.png", "b"), ("photos [0-9]/*.png", "c"),
                           ("*/a.png", "a")):
        photos, _ = predict.find_photos([str(tmp_path / pattern)], tmp_path / "out")
        assert sorted(p.stem for p in photos) == list(names), pattern


# ---------------------------------------------------------------- folders as people fill them

@pytest.mark.parametrize("place", [
    "train/good/._000.png", "test/good/._000.png", "test/cut/._000.png", "._000.png",
    "ground_truth/cut/._000_mask.png", "test/.ipynb_checkpoints/000-checkpoint.png",
    "train/.ipynb_checkpoints/000.png", "test/cut/@eaDir/000.png/SMALL.jpg",
    "train/good/@eaDir/000.png", "test/__MACOSX/000.png", "test/cut/.DS_Store",
    "train/good/Thumbs.db", "../.Trash/bolt/train/good/000.png"])
def test_files_that_systems_leave_in_folders_are_not_read(bolt, capsys, place):
    before, alone = read(bolt), check(bolt.parent, capsys)
    assert alone[0] == 0 and alone[1].endswith("\n\nnothing is wrong\n")
    (bolt / place).parent.mkdir(parents=True, exist_ok=True)
    (bolt / place).write_bytes(APPLE)
    assert read(bolt) == before and check(bolt.parent, capsys) == alone
    assert list_categories(str(bolt.parent), bolt) == ["bolt"]
    photos, notes = predict.find_photos([str(bolt)], bolt / "out")
    assert len(photos) == 7 and len(notes) == 1 and "not read: 2 in folders of masks" in notes[0]


@pytest.mark.parametrize("name", ["Good", "good ", "GOOD", "OK", "normal", "Normal"])
def test_the_folder_good_may_be_spelled_otherwise(bolt, capsys, name):
    png(bolt / "test" / name / "005.png", picture())
    png(bolt / "train" / name / "005.png", picture())
    png(bolt / "ground_truth" / name / "005_mask.png", np.zeros((32, 32)))
    category = read(bolt)
    labels = {item.path.parent.name: item.label for item in category.test}
    assert labels == {"cut": 1, "good": 0, name: 0}
    assert len(category.train) == 5
    assert check(bolt, capsys)[1].splitlines()[1].split()[1:5] == ["5", "2", "2", "2"]


def test_files_that_are_not_read_are_counted_by_suffix(bolt, tmp_path, capsys):
    for name in ("a.gif", "b.GIF", "c.heic", "d.xml", "README"):
        for place in ("train/good/", "train/", "test/cut/", "test/"):
            (bolt / (place + name)).write_bytes(b"")
    png(bolt / "test/loose.png", picture())
    notes = read(bolt).notes
    assert [note.split(": not read: ")[1] for note in notes] == [
        "4 .gif, 2 .heic, 2 .xml, 2 no suffix", "4 .gif, 2 .heic, 1 .png, 2 .xml, 2 no suffix"]
    status, out = check(bolt, capsys)
    assert status == 0 and all(f"note: {note}" in out for note in notes)
    run_notes = data.load_run_data(settings_for(bolt)).notes
    assert all(f"note: {note}" in run_notes for note in notes)
    photos, photo_notes = predict.find_photos([str(bolt / "train")], tmp_path / "out")
    assert len(photos) == 4 and photo_notes == [notes[0]]


def test_folders_in_folders_and_behind_links_are_read(bolt, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    png(elsewhere / "camera3/010.png", picture())
    (elsewhere / "camera3/011.heic").touch()
    (elsewhere / "camera3/back").symlink_to(bolt / "train/good")    # round and round
    png(bolt / "train/good/camera2/009.png", picture())
    (bolt / "train/good/linked").symlink_to(elsewhere)
    category = read(bolt)
    names = [p.name for p in category.train]
    assert names == [f"00{k}.png" for k in (0, 1, 2, 3, 9)] + ["010.png"]
    assert category.notes == [f"{bolt / 'train'}: not read: 1 .heic"]
    photos, notes = predict.find_photos([str(bolt / "train")], tmp_path / "out")
    assert len(photos) == 6 and notes == [f"{bolt / 'train'}: not read: 1 .heic"]


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jfif", "a.bmp", "a.tiff", "a.webp", "a.ppm",
                                  "a.pgm"])
def test_a_folder_is_searched_for_images_of_each_format(tmp_path, name):
    kind = {"jpg": "JPEG", "jfif": "JPEG", "pgm": "PPM"}.get(name[2:].lower())
    Image.new("L", (8, 8), 90).save(tmp_path / name, kind)
    photos, notes = predict.find_photos([str(tmp_path)], tmp_path / "out")
    assert photos == [tmp_path / name] and not notes
    assert np.abs(data.load_image(photos[0], 16, 16).astype(int) - 90).max() <= 1


def other_layout(root: Path, name: str) -> Path:
    """Folders of two newer data sets: validation images, and a folder of masks for each image."""
    test = "test_public" if name == "can" else "test"
    for k in range(2):
        for place in ("train/good", "validation/good", f"{test}/good", f"{test}/bad"):
            png(root / name / place / f"{k:03}.png", picture())
        png(root / name / ("test_public/ground_truth/bad/00{}_mask.png" if name == "can" else
                           "ground_truth/bad/00{}/000.png").format(k), np.ones((32, 32)))
    return root / name


def test_folders_of_another_layout_are_named(tmp_path, capsys):
    can = other_layout(tmp_path, "can")
    note = f"{can}: not read: test_public, validation; images are taken from train/good and test"
    assert len(read(can).notes) == 1 and note in read(can).notes[0]
    status, out = check(can, capsys)
    assert status == 0 and note in out


def test_several_masks_of_an_image_are_named_and_nothing_is_to_be_removed(tmp_path, capsys):
    bag = other_layout(tmp_path, "bag")
    with pytest.raises(InputError) as refusal:
        read(bag)
    status, out = check(bag, capsys)
    for text in (str(refusal.value), out):
        assert "ground_truth/bad/000: a folder of several masks for an image" in text
        assert not re.search("move[^.;]*ground_truth", text)
    assert status == 1 and "not read: validation" in out


@pytest.mark.parametrize("name", ["tile", "screw", "candle", "01"])
@pytest.mark.parametrize("masks", [True, False])
def test_a_part_of_ones_own_may_have_the_name_of_a_published_category(tmp_path, capsys, name,
                                                                      masks):
    mvtec_tree(tmp_path / "parts" / name, masks)
    mvtec_tree(tmp_path / "parts" / "bolt", masks)
    status, out = check(tmp_path / "parts", capsys)
    assert status == 0 and "nothing is wrong" in out and "published" not in out


@pytest.mark.parametrize("path", ["./demo", "demo/", "./demo/", "{}/demo", "../here/demo"])
def test_a_folder_of_ones_own_may_have_the_name_of_a_data_set(tmp_path, monkeypatch, path):
    here = tmp_path / "here"
    for name in ("fabric", "nut"):
        mvtec_tree(here / "demo" / name)
    monkeypatch.chdir(here)
    monkeypatch.setattr(demo, "write", lambda *_: pytest.fail("the demo was drawn"))
    argv = ["--data", path.format(here), "--category", "all", "--preset", "cpu"]
    s, names = data.find_categories(parse(argv)[0])
    assert names == ["fabric", "nut"]
    assert len(find_category(s.data, "fabric", root_folder(s.root)).train) == 4
    assert not (here / "data").exists()
    embedded = parse(["--category", "fabric"])[0]                   # its run is another run
    folder = runs.run_folder(embedded)
    folder.mkdir(parents=True)
    save_json(folder / "config.json", dataclasses.asdict(embedded))
    with pytest.raises(InputError, match="holds a run with other settings.*--name"):
        runs.refuse_other_settings(folder, dataclasses.replace(embedded, data=s.data),
                                   {"precision"})


def test_the_images_of_a_folder_itself_are_listed(bolt):
    png(bolt / "train/good/deeper/009.png", picture())
    (bolt / "train/good/notes.txt").touch()
    assert [p.name for p in list_images(bolt / "train/good")] == [f"00{k}.png" for k in range(4)]
