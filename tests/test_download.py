"""Downloads from a local server that breaks off and lies, archives, and the check of folders."""
import csv
import dataclasses
import errno
import hashlib
import io
import re
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

import download
from data import Textures, load_mask
from support import console, layouts
from support.files import file_lock
from support.layouts import find_category, list_categories


class Handler(BaseHTTPRequestHandler):
    """Serves server.body, with ranges or not; each of server.cuts ends an answer after so much."""

    def do_GET(self):
        server, start = self.server, 0
        server.asked.append((self.headers["Range"], self.headers["If-Range"]))
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        same = self.headers["If-Range"] in (None, server.etag)
        if self.headers["Range"] and server.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(server.body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            end = len(server.body)
            self.send_header("Content-Range", f"bytes {start + server.shift}-{end - 1}/{end}")
        if server.etag:
            self.send_header("ETag", server.etag)
        rest = server.body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[:server.cuts.pop(0)] if server.cuts else rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "TIMEOUT", 5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(layouts.CATEGORIES, "visa", ["candle"])
    monkeypatch.setitem(download.PUBLISHED, "candle", "2/1/1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.statuses, server.cuts = [], [], []
    server.ranges, server.etag, server.shift = True, '"one"', 0

    def offer(name, body, **changes):
        server.body = body
        url = f"http://127.0.0.1:{server.server_port}/{changes.pop('file', name + '.tar')}"
        digest = hashlib.sha256(body).hexdigest()
        monkeypatch.setitem(download.SOURCES, name, dataclasses.replace(
            download.SOURCES[name], **{"url": url, "sha256": digest, **changes}))

    server.offer = offer
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


def image_bytes(size=(32, 24), kind="PNG", seed=None):
    array = np.full((*size[::-1], 3), 90) if seed is None else \
        np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3))
    file = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(file, kind)
    return file.getvalue()


def mask_bytes(defect=255, ground=0):
    """A mask with a defect of 16 x 8 pixels, in an image of 32 x 24."""
    mask, file = np.full((24, 32), ground, np.uint8), io.BytesIO()
    mask[8:16, 8:24] = defect
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def tar_of(files, mode="w", extra=()):
    """A tar archive of {name: content}, then of TarInfos."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for entry in extra:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    return out.getvalue()


def zip_of(files):
    """A zip archive of {name: content}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return out.getvalue()


def visa_files(name="candle", prefix=""):
    """VisA as published: one category, two images for training and two for the test."""
    at, table = f"{name}/Data/", io.StringIO()
    rows = [[name, "train", "normal", f"{at}Images/Normal/0.JPG", ""],
            [name, "train", "normal", f"{at}Images/Normal/1.JPG", ""],
            [name, "test", "normal", f"{at}Images/Normal/2.JPG", ""],
            [name, "test", "anomaly", f"{at}Images/Anomaly/0.JPG", f"{at}Masks/Anomaly/0.png"]]
    csv.writer(table).writerows([["object", "split", "label", "image", "mask"], *rows])
    files = {row[3]: image_bytes(kind="JPEG", seed=k) for k, row in enumerate(rows)}
    files |= {rows[3][4]: mask_bytes(), "split_csv/1cls.csv": table.getvalue().encode()}
    return {prefix + name: content for name, content in files.items()}


def run(*argv, capsys=None):
    """The exit status, standard output, and the lines a terminal shows of standard error at last:
    a progress bar is written over, not ended with a line of its own."""
    status = download.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    shown = [line.split("\r")[-1] for line in err.split("\n")]
    return status, out, [line for line in shown if line]


def refused(root, capsys, match, name="visa"):
    """Fetching ends in status 2 and one line that matches, and leaves no data set."""
    status, out, lines = run(name, "--root", root, capsys=capsys)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert re.search(match, lines[0]), lines[0]
    assert not (root / name).exists() and not (root / f"{name}.part").exists()
    return lines[0]


def left(root):
    return sorted(p.name for p in root.iterdir())


# ---------------------------------------------------------------- a download that goes well

@pytest.mark.parametrize("prefix", ["", "./", "VisA_20220922/"])
def test_visa_is_fetched_and_readable_at_once(tmp_path, capsys, server, prefix):
    server.offer("visa", tar_of(visa_files(prefix=prefix)))
    status, out, lines = run("visa", "--root", tmp_path / "data", capsys=capsys)
    assert status == 0 and not lines and out.startswith("VisA: CC BY 4.0")
    assert left(tmp_path / "data") == ["visa"]
    assert list_categories("visa", tmp_path / "data") == ["candle"]
    category = find_category("visa", "candle", tmp_path / "data")
    assert len(category.train) == 2 and [item.label for item in category.test] == [0, 1]
    assert load_mask(category.test[1], 16, 16).sum() == 8 * 6


def test_complete_data_is_left_alone(tmp_path, capsys, server, monkeypatch):
    server.offer("visa", tar_of(visa_files()))
    monkeypatch.setenv("TRANSFUSION_DATA", str(tmp_path))
    assert run("visa", capsys=capsys)[0] == 0 and len(server.asked) == 1
    (tmp_path / "visa").rename(tmp_path / "VisA_20220922")          # another folder that is read
    tmp_path.chmod(0o555)
    status, out, _ = run("visa", capsys=capsys)
    tmp_path.chmod(0o755)
    assert status == 0 and "already complete in" in out and "VisA_20220922" in out
    assert len(server.asked) == 1 and left(tmp_path) == ["VisA_20220922"]


def test_mvtec_is_unpacked_from_its_tar_xz(tmp_path, capsys, server, monkeypatch):
    files = dict.fromkeys(("cable/train/good/000.png", "cable/test/good/000.png",
                           "cable/test/cut/000.png", "cable/ground_truth/cut/000_mask.png",
                           "license.txt"), image_bytes())
    monkeypatch.setitem(layouts.CATEGORIES, "mvtec", ["cable"])
    monkeypatch.setitem(download.PUBLISHED, "cable", "1/1/1")
    server.offer("mvtec", tar_of(files, "w:xz"), file="mvtec_anomaly_detection.tar.xz")
    status, out, _ = run("mvtec", "--root", tmp_path, capsys=capsys)
    assert status == 0 and "CC BY-NC-SA 4.0" in out.splitlines()[0]
    assert len(find_category("mvtec", "cable", tmp_path).test) == 2
    assert (tmp_path / "mvtec" / "license.txt").is_file()


def test_btad_is_unpacked_from_its_zip(tmp_path, capsys, server):
    files = {f"BTech_Dataset_transformed/{name}/{place}/0.png": image_bytes()
             for name in ("01", "02", "03")
             for place in ("train/ok", "test/ok", "test/ko", "ground_truth/ko")}
    server.offer("btad", zip_of(files), file="btad.zip")
    assert run("btad", "--root", tmp_path, capsys=capsys)[0] == 0
    assert list_categories("btad", tmp_path) == ["01", "02", "03"]
    assert left(tmp_path) == ["btad"] and left(tmp_path / "btad") == ["01", "02", "03"]
    (tmp_path / "btad" / "03").rename(tmp_path / "btad" / "3")
    gone = tmp_path / "btad" / "03"
    assert download.shortfalls("btad", tmp_path / "btad") == [f"{gone}: missing"]


def test_dtd_is_unpacked_and_its_classes_are_counted(tmp_path, capsys, server, monkeypatch):
    assert download.DTD == [120] * 47
    monkeypatch.setattr(download, "DTD", [5] * 12)
    files = {f"dtd/images/c{k:02}/{n:03}.jpg": b"" for k in range(12) for n in range(5)}
    server.offer("dtd", tar_of(files | {"dtd/labels/train1.txt": b""}))
    assert run("dtd", "--root", tmp_path, capsys=capsys)[0] == 0
    assert Textures(tmp_path, 8).count == 60
    (tmp_path / "dtd" / "images" / "c11" / "001.jpg").unlink()
    assert "59 images in 12 classes" in download.shortfalls("dtd", tmp_path / "dtd")[0]


def test_published_counts_are_those_of_the_data_sets():
    for name, totals in (("mvtec", [3629, 467, 1258]), ("visa", [8659, 962, 1200])):
        counts = [download.PUBLISHED[c].split("/") for c in layouts.CATEGORIES[name]]
        assert np.array(counts, int).sum(0).tolist() == totals
    assert len(download.PUBLISHED) == 27


# ---------------------------------------------------------------- connections that do not hold

def test_a_broken_connection_is_resumed_with_the_rest_only(tmp_path, capsys, server):
    server.offer("visa", tar_of(visa_files()))
    server.cuts = [3000, 2000]
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0
    assert server.asked == [(None, None), ("bytes=3000-", '"one"'), ("bytes=5000-", '"one"')]
    assert left(tmp_path) == ["visa"]


def test_the_next_call_continues_a_broken_download(tmp_path, capsys, server, monkeypatch):
    server.offer("visa", tar_of(visa_files()))
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.cuts = [3000, 500]
    line = refused(tmp_path, capsys, "broken off after 3500 of .*run this again")
    assert layouts.PAGES["visa"] in line and "split_csv/1cls.csv" in line
    assert (tmp_path / "visa.tar.part").read_bytes() == server.body[:3500]
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0
    assert server.asked[2:] == [("bytes=3500-", '"one"')]


def test_a_server_without_ranges_starts_again(tmp_path, capsys, server):
    server.offer("visa", tar_of(visa_files()))
    server.ranges, server.cuts = False, [3000]
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0
    assert server.asked == [(None, None), ("bytes=3000-", '"one"')]


@pytest.mark.parametrize("etag", ['"one"', "", 'W/"weak"'])
def test_a_file_that_changed_in_between_starts_again(tmp_path, capsys, server, monkeypatch, etag):
    old, new = tar_of(visa_files() | {"more.txt": b"m" * 20_000}), tar_of(visa_files())
    server.offer("visa", old)
    server.cuts, server.etag = [3000], etag
    with monkeypatch.context() as once:
        once.setattr(download, "ATTEMPTS", 1)
        refused(tmp_path, capsys, "broken off")
    server.offer("visa", new)
    server.etag = '"two"' if etag == '"one"' else etag
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0
    # If-Range makes it one request; without a strong validator the other length gives it away.
    assert server.asked[1:] == ([("bytes=3000-", '"one"')] if etag == '"one"' else
                                [("bytes=3000-", None), (None, None)])


def test_a_range_that_was_not_asked_for_and_a_part_too_long(tmp_path, capsys, server):
    server.offer("visa", tar_of(visa_files()))
    server.cuts, server.shift = [3000], 1
    assert run("visa", "--root", tmp_path / "a", capsys=capsys)[0] == 0
    assert [ask[0] for ask in server.asked] == [None, "bytes=3000-", None]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "visa.tar.part").write_bytes(server.body + b"more")
    assert run("visa", "--root", tmp_path / "b", capsys=capsys)[0] == 0


def test_a_part_that_is_whole_needs_no_server(tmp_path, capsys, server):
    server.offer("visa", tar_of(visa_files()))
    (tmp_path / "visa.tar.part").write_bytes(server.body)
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0
    assert not server.asked and left(tmp_path) == ["visa"]


def test_an_address_that_fails_is_asked_again_only_where_that_helps(tmp_path, capsys, server):
    server.offer("visa", tar_of(visa_files()))
    server.statuses = [404]
    line = refused(tmp_path, capsys, "HTTP Error 404")
    assert len(server.asked) == 1                                   # no use to ask again
    assert layouts.PAGES["visa"] in line and "visa/CATEGORY/Data" in line
    server.statuses = [503] * download.ATTEMPTS
    refused(tmp_path, capsys, "HTTP Error 503")
    assert len(server.asked) == 1 + download.ATTEMPTS
    server.statuses = [503, 429]
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0


def test_a_server_that_does_not_answer_is_named_with_its_page(tmp_path, capsys, server,
                                                              monkeypatch):
    server.offer("visa", b"", url="http://127.0.0.1:1/visa.tar")
    refused(tmp_path, capsys, "refused.*spot-diff")
    server.offer("visa", b"", url="http://nowhere.invalid/visa.tar")
    refused(tmp_path, capsys, "nowhere.invalid.*spot-diff")
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    monkeypatch.setattr(Handler, "do_GET", lambda self: threading.Event().wait(0.5))
    server.offer("visa", b"")
    refused(tmp_path, capsys, "timed out.*spot-diff")


def test_a_file_with_a_wrong_checksum_is_removed(tmp_path, capsys, server):
    body = tar_of(visa_files())
    server.offer("visa", body, sha256="0" * 64)
    digest = hashlib.sha256(body).hexdigest()[:12]
    refused(tmp_path, capsys, f"wrong checksum, sha256 000000000000... expected, {digest}... found")
    assert left(tmp_path) == [".visa.lock", ".visa.notes"]


def test_a_file_longer_than_the_limit_is_removed(tmp_path, capsys, server):
    server.offer("visa", tar_of(visa_files()), limit=5000)
    refused(tmp_path, capsys, "over 5000 bytes")
    assert left(tmp_path) == [".visa.lock", ".visa.notes"]


# ---------------------------------------------------------------- interrupted, full, locked

@pytest.mark.parametrize("phase", ["visa.tar", "unpacking"])
@pytest.mark.parametrize("problem, status, line", [
    (KeyboardInterrupt(), 130, "interrupted; run this again to go on"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: .*No space left.*free some")])
def test_ctrl_c_and_a_full_disk_keep_the_part(tmp_path, capsys, server, monkeypatch, phase, problem,
                                              status, line):
    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            self.phase = kwargs.get("desc") or args[1]              # a bar not shown keeps none
            super().__init__(*args, **kwargs)

        def __iter__(self):
            for k, entry in enumerate(self.iterable):
                if self.phase == phase and k == 3:
                    raise problem
                yield entry

        def update(self, n=1):
            if self.phase == phase:
                raise problem

    server.offer("visa", tar_of(visa_files()))
    with monkeypatch.context() as once:
        once.setattr(console, "tqdm", Bar)
        returned, _, lines = run("visa", "--root", tmp_path, capsys=capsys)
    assert returned == status and len(lines) == 1 and re.match(line, lines[0])
    assert left(tmp_path) == [".visa.lock", ".visa.notes", "visa.tar.part"]
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0
    assert left(tmp_path) == ["visa"]


def test_the_second_process_is_refused_and_a_dead_one_blocks_nobody(tmp_path, capsys, server):
    server.offer("visa", tar_of(visa_files()))
    with file_lock(tmp_path / ".visa.lock", "held"):
        refused(tmp_path, capsys, "another process is fetching")
        assert not server.asked
    (tmp_path / "visa.part" / "candle" / "train").mkdir(parents=True)       # of a killed process
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0
    assert left(tmp_path / "visa") == ["candle", "split_csv"]


def test_what_is_there_but_incomplete_is_not_touched(tmp_path, capsys, server):
    server.offer("visa", tar_of(visa_files()))
    (tmp_path / "visa" / "candle").mkdir(parents=True)
    status, _, lines = run("visa", "--root", tmp_path, capsys=capsys)
    assert status == 2 and "is not complete" in lines[0] and "move it away" in lines[0]
    assert not server.asked and (tmp_path / "visa" / "candle").is_dir()


def test_an_early_python_310_is_refused(tmp_path, capsys, server, monkeypatch):
    server.offer("visa", tar_of(visa_files()))
    monkeypatch.delattr(tarfile, "data_filter")
    refused(tmp_path, capsys, "tarfile has no data filter")
    assert not server.asked


# ---------------------------------------------------------------- archives

def tar_entry(name, kind=tarfile.REGTYPE, link="", size=0):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, size
    return entry


@pytest.mark.parametrize("entry", [
    tar_entry("../evil", size=3), tar_entry("candle/../../evil", size=3),
    tar_entry("evil", tarfile.SYMTYPE, "../x"), tar_entry("evil", tarfile.CHRTYPE)],
    ids=["parent", "deep parent", "link out of the folder", "device"])
def test_a_tar_with_an_entry_that_leads_out_or_a_device_is_refused(tmp_path, capsys, server, entry):
    server.offer("visa", tar_of(visa_files(), "w:gz", [entry]))
    refused(tmp_path / "root", capsys, "a damaged archive .*evil'")
    assert left(tmp_path / "root") == [".visa.lock", ".visa.notes", "visa.tar.part"]
    assert left(tmp_path) == ["root"]


def test_no_rights_are_taken_from_an_archive(tmp_path, capsys, server):
    entry = tar_entry("tool", size=3)
    entry.mode = 0o6777
    server.offer("visa", tar_of(visa_files(), extra=[entry]))
    assert run("visa", "--root", tmp_path, capsys=capsys)[0] == 0
    assert (tmp_path / "visa" / "tool").stat().st_mode & 0o6022 == 0


@pytest.mark.parametrize("name", ["../evil", "candle/../../evil", "/evil"])
def test_a_zip_writes_nothing_outside_of_its_folder(tmp_path, capsys, server, name):
    server.offer("visa", zip_of(visa_files() | {name: b"xxx"}))
    assert run("visa", "--root", tmp_path / "root", capsys=capsys)[0] == 0
    assert left(tmp_path) == ["root"] and left(tmp_path / "root") == ["visa"]
    assert [p.name for p in (tmp_path / "root/visa").rglob("evil")] == ["evil"]


def test_a_zip_that_declares_too_little_is_refused(tmp_path, capsys, server):
    body = zip_of(visa_files() | {"evil": b"x" * 10**6})
    declared = (10**6).to_bytes(4, "little")
    assert body.count(declared) == 2                                # beside the file, in the index
    server.offer("visa", body.replace(declared, (10).to_bytes(4, "little")))
    refused(tmp_path, capsys, "a damaged archive")


@pytest.mark.parametrize("body", [tar_of(visa_files())[:8000], tar_of(visa_files(), "w:gz")[:1000],
                                  b"<html>moved</html>", b""])
def test_damaged_archives_are_refused(tmp_path, capsys, server, body):
    server.offer("visa", body)
    refused(tmp_path, capsys, "a damaged archive|no training images")


def test_a_zip_with_a_damaged_entry_is_refused(tmp_path, capsys, server):
    body = bytearray(zip_of({"evil": bytes(10**5)}))
    body[34:44] = b"\xff" * 10                                      # where its deflated bytes begin
    server.offer("visa", bytes(body))
    refused(tmp_path, capsys, "a damaged archive")


def test_counts_are_verified_before_the_folder_gets_its_name(tmp_path, capsys, server):
    files = visa_files()
    files.pop("candle/Data/Images/Normal/1.JPG")
    files.pop("candle/Data/Masks/Anomaly/0.png")
    server.offer("visa", tar_of(files))
    refused(tmp_path, capsys, r"1.JPG: in VisA's table, but not there \(faults: 3\)")


# ---------------------------------------------------------------- checking a folder

def save(path, size=(32, 24), value=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size[::-1], value, np.uint8)).save(path)


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def bolt(path):
    for k, place in enumerate(("train/good/000", "train/good/001", "test/good/000", "test/cut/000",
                               "test/cut/001")):
        save(path / f"{place}.png", value=9 + k)
    write(path / "ground_truth/cut", {f"{name}_mask.png": mask_bytes() for name in ("000", "001")})
    return path


def test_check_of_good_data_at_every_level_of_folders(tmp_path, capsys, monkeypatch):
    root = tmp_path / "root"
    save(bolt(root / "mvtec" / "bolt") / "ground_truth" / "good" / "000_mask.png", value=0)
    empty(bolt(root / "visa.part" / "bolt"))                        # of a download under way
    write(root / "visa", visa_files())
    monkeypatch.setitem(download.PUBLISHED, "candle", "2/1/1")
    save(root / "VisA_pytorch" / "1cls" / "odd" / "train" / "good" / "0.JPG", (20, 24))
    save(root / "VisA_pytorch" / "1cls" / "odd" / "test" / "good" / "0.JPG", (32, 24))
    rows = {"mvtec/bolt": "2 1 2 2 32 x 24", "visa/candle": "2 1 1 1 32 x 24",
            "VisA_pytorch/1cls/odd": "1 1 0 0 20-32 x 24"}
    for folder, names in ((root, rows), (root / "mvtec", ["mvtec/bolt"]),
                          (root / "mvtec" / "bolt", ["mvtec/bolt"])):
        status, out, lines = run("--check", folder, capsys=capsys)
        assert status == 0 and not lines and out.endswith("\nnothing is wrong\n")
        printed = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:-2]}
        assert printed == {str((root / name).relative_to(folder)) if root / name != folder else
                           "bolt": rows[name].split() for name in names}


def unmask(path):
    (path / "ground_truth" / "cut" / "001_mask.png").unlink()


def truncate(place):
    def fault(path):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32), np.uint8)).save(
            path / place)
        content = (path / place).read_bytes()
        (path / place).write_bytes(content[:len(content) // 2])
    return fault


def save_resized(path, size):
    Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)


def empty(path):
    for image in (path / "train" / "good").iterdir():
        image.unlink()


FAULTS = {
    r"001.png: no mask for it": unmask,
    r"cut.007_mask.png: a mask without its image":
        lambda path: save(path / "ground_truth" / "cut" / "007_mask.png"),
    r"dent.000_mask.png: a mask without its image":
        lambda path: save(path / "ground_truth" / "dent" / "000_mask.png"),
    r"000_mask.png: 30 x 24 pixels, its image 32 x 24":
        lambda path: save_resized(path / "ground_truth" / "cut" / "000_mask.png", (30, 24)),
    r"train.good.000.png: cannot be read": truncate("train/good/000.png"),
    r"test.cut.000.png: cannot be read": truncate("test/cut/000.png"),
    r"001_mask.png: cannot be read": truncate("ground_truth/cut/001_mask.png"),
    r"test.good.000.png: cannot be read":
        lambda path: (path / "test" / "good" / "000.png").write_text("no image"),
    r"bolt: no training images": empty,
    r"bolt: no training images.*": lambda path: shutil.rmtree(path / "train"),
}


@pytest.mark.parametrize("match", FAULTS)
def test_check_names_each_fault(tmp_path, capsys, match):
    FAULTS[match](bolt(tmp_path / "bolt"))
    status, out, _ = run("--check", tmp_path, capsys=capsys)
    faults = out.partition("\n\n")[2].splitlines()
    assert status == 1 and len(faults) == 2 and faults[1] == "faults: 1", out
    assert re.search(match, faults[0])


def test_check_names_all_faults_at_once(tmp_path, capsys):
    path = bolt(tmp_path / "bolt")
    unmask(path)
    for place in ("train/good/000.png", "test/cut/000.png", "ground_truth/cut/000_mask.png"):
        truncate(place)(path)
    empty(bolt(tmp_path / "nut"))
    status, out, _ = run("--check", tmp_path, capsys=capsys)
    assert status == 1 and out.endswith("\nfaults: 5\n")
    assert sum("cannot be read" in line for line in out.splitlines()) == 3


def test_check_names_photos_that_are_probably_wrong_by_category(tmp_path, capsys):
    for name in ("bolt", "nut"):
        bolt(tmp_path / name)
        for k in range(6):
            grey = np.random.default_rng(k).integers(51200, 52000, (24, 32)).astype(np.uint16)
            Image.fromarray(grey).save(tmp_path / name / f"train/good/{k:03}.png")
    save(tmp_path / "nut/test/good/9.png", value=0)
    status, out, lines = run("--check", tmp_path, capsys=capsys)
    assert status == 0 and not lines and out.endswith("\nno faults; read the notes\n")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    for name, line in zip(("bolt", "nut"), notes):
        assert line.startswith(f"note: {tmp_path / name / 'train/good/000.png'}: only the upper 8")
        assert line.endswith("(5 more like this)")
    assert len(notes) == 3 and f"{tmp_path / 'nut/test/good/9.png'}: at most two grey" in notes[2]


def test_check_knows_the_published_counts(tmp_path, capsys):
    path = bolt(tmp_path / "mvtec" / "bottle")
    status, out, _ = run("--check", path, capsys=capsys)
    assert status == 1 and "2/1/2 images" in out and "published are 209/20/63" in out
    for mask in path.glob("ground_truth/cut/*"):
        mask.unlink()
    (path / "ground_truth" / "cut").rmdir()
    (path / "ground_truth").rmdir()
    assert run("--check", path, capsys=capsys)[1].count("no mask for it") == 2
    path = path.rename(tmp_path / "bottle")              # an own part, whose masks are optional
    assert run("--check", path, capsys=capsys)[0] == 0


def test_check_names_the_faults_of_visa(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(download.PUBLISHED, "candle", "1/1/1")
    write(tmp_path, visa_files())
    images = tmp_path / "candle" / "Data" / "Images"
    (images / "Normal" / "1.JPG").unlink()
    (images / "Anomaly" / "0.JPG").write_bytes(b"")
    save(tmp_path / "candle" / "Data" / "Masks" / "Anomaly" / "5.png")
    status, out, _ = run("--check", tmp_path, capsys=capsys)
    assert status == 1 and out.endswith("\nfaults: 3\n")
    for line in ("1.JPG: in VisA's table, but not there", "5.png: a mask without its image",
                 "0.JPG: cannot be read"):
        assert line in out
    write(tmp_path, visa_files("pcb1") | {"split_csv/1cls.csv": b"a,b\n1,2\n"})
    out = run("--check", tmp_path, capsys=capsys)[1]                # once, though both need it
    assert "1cls.csv: not VisA's table" in out and out.endswith("\nfaults: 1\n")


def test_a_check_without_data_and_a_wrong_command_line_are_refused(tmp_path, capsys):
    for folder, line in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no data in it")):
        status, _, lines = run("--check", folder, capsys=capsys)
        assert status == 2 and len(lines) == 1 and line in lines[0]
    for argv in ([], ["visa", "--check", "."], ["imagenet"]):
        with pytest.raises(SystemExit) as stop:
            download.main(argv)
        assert stop.value.code == 2
