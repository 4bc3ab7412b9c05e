"""Download, verify and unpack a published data set, or check any folder of images.

    python tools/download.py mvtec|visa|dtd|btad [--root DIR]
    python tools/download.py --check DIR

Imports no torch, so it starts at once.
"""
import argparse
import contextlib
import errno
import hashlib
import os
import shutil
import sys
import tarfile
import time
import urllib.request
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

from support import layouts
from support.console import InputError, exit_status, progress_bar, warning_kind
from support.files import file_lock
from support.images import doubts_about_mask, open_image, read_mask
from support.layouts import Category

ATTEMPTS = 5                    # requests in one call
PAUSE, TIMEOUT = 3.0, 60.0      # seconds between two requests, and of silence before one fails
# Errors of the local disk, after which another request is of no use.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)
LAYOUT = "CATEGORY/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}"


@dataclass(frozen=True)
class Source:
    """A published archive. layout: how it is unpacked under the root. limit: its bytes are fewer; a
    longer download is another file."""
    url: str
    sha256: str
    licence: str
    page: str
    layout: str
    limit: int


SOURCES = {
    "mvtec": Source(
        "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/"
        "420938113-1629960298/mvtec_anomaly_detection.tar.xz",
        "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        "MVTec AD: CC BY-NC-SA 4.0, for non-commercial use that names the authors, changed "
        "versions under the same licence", layouts.PAGES["mvtec"], f"mvtec/{LAYOUT}", 12 * 10**9),
    "visa": Source(
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        "VisA: CC BY 4.0, for any use that names the authors", layouts.PAGES["visa"],
        "visa/CATEGORY/Data/{Images,Masks} and visa/split_csv/1cls.csv", 6 * 10**9),
    "dtd": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
        "DTD: for research", "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        "dtd/images/CLASS/*.jpg", 3 * 10**9),
    "btad": Source(
        "https://avires.dimi.uniud.it/papers/btad/btad.zip",
        "461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        "BTAD: for research", "https://github.com/pankajmishra000/VT-ADL",
        "btad/{01,02,03}/{train/ok,test/ok,test/ko,ground_truth/ko}", 20 * 10**9),
}
# Images for training / good for the test / defective for the test
PUBLISHED = dict(entry.split() for entry in (
    "bottle 209/20/63, cable 224/58/92, capsule 219/23/109, carpet 280/28/89, grid 264/21/57, "
    "hazelnut 391/40/70, leather 245/32/92, metal_nut 220/22/93, pill 267/26/141, "
    "screw 320/41/119, tile 230/33/84, toothbrush 60/12/30, transistor 213/60/40, wood 247/19/60, "
    "zipper 240/32/119, candle 900/100/100, capsules 542/60/100, cashew 450/50/100, "
    "chewinggum 453/50/100, fryum 450/50/100, macaroni1 900/100/100, macaroni2 900/100/100, "
    "pcb1 904/100/100, pcb2 901/100/100, pcb3 905/101/100, pcb4 904/101/100, "
    "pipe_fryum 450/50/100").split(", "))
DTD = [120] * 47                # images of every class


# ---------------------------------------------------------------- downloading

def fetch(name: str, root: Path) -> None:
    """Put the data set `name` into root/name, unless it is complete already.

    Raises InputError where it cannot be downloaded, has another checksum or does not unpack, and
    OSError as the file system does. The part that was downloaded remains for the next call.
    """
    source, target, notes = SOURCES[name], root / name, root / f".{name}.notes"
    lock = root / f".{name}.lock"
    part = root / (source.url.rsplit("/", 1)[-1] + ".part")
    print(source.licence)
    if is_complete(name, root):         # before the lock, as the disk may be read-only
        return
    if ".tar" in source.url and not hasattr(tarfile, "data_filter"):
        raise InputError("this Python's tarfile has no data filter; take 3.10.12, 3.11.4 or later")
    root.mkdir(parents=True, exist_ok=True)
    with file_lock(lock, f"another process is fetching this data set ({lock}); wait for it"):
        if is_complete(name, root):     # another process may have completed it just now
            return
        if target.exists() and any(target.iterdir()):
            raise InputError(f"{target} is not complete ({shortfalls(name, target)[0]}); "
                             f"move it away and run this again")
        if not part.exists() or sha256(part) != source.sha256:
            download(source, part, notes)
            digest = sha256(part)
            if digest != source.sha256:
                part.unlink()
                raise InputError(f"{source.url}: wrong checksum, sha256 {source.sha256[:12]}... "
                                 f"expected, {digest[:12]}... found; removed. See {source.page}")
        install(name, part, root)
        part.unlink()
        notes.unlink(missing_ok=True)
        with contextlib.suppress(OSError):                  # Windows removes no open file
            lock.unlink()
    print(f"{name} is complete in {target}")


def is_complete(name: str, root: Path) -> bool:
    """Whether the data set lies under root, in any layout that can be read. Prints where."""
    folders = layouts.data_folders(name, root) if name in layouts.FOLDERS else [root / name]
    complete = [folder for folder in folders if not shortfalls(name, folder)]
    if complete:
        print(f"{name} is already complete in {complete[0]}; nothing to do")
    return bool(complete)


def sha256(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        for block in progress_bar(blocks, "sha256", unit="MiB", leave=False):
            digest.update(block)
    return digest.hexdigest()


def download(source: Source, part: Path, notes: Path) -> None:
    """Complete the file `part`, with a new request where a connection breaks. Raises InputError
    after the last of them."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return receive(source, part, notes)
        except (OSError, HTTPException) as error:
            status = getattr(error, "code", 0)              # of HTTP
            if getattr(error, "errno", 0) in DISK_ERRORS:
                raise
            if status == 416:           # part is as long as the file or longer, yet not the file
                part.unlink(missing_ok=True)
            if attempt == ATTEMPTS or 400 <= status < 500 and status not in (408, 416, 429):
                raise InputError(
                    f"{source.url}: {error}; run this again to go on from where it stopped, or get "
                    f"the data from {source.page} and unpack it so that {part.parent} holds "
                    f"{source.layout}")
        time.sleep(PAUSE)


def receive(source: Source, part: Path, notes: Path) -> None:
    """Request the rest of `part` once. A server without ranges sends the file from its start.

    notes: a file that keeps the validator and the length of the file whose beginning `part` is.
    Raises what urllib does, ConnectionError for an answer that is cut short or is of another file,
    and InputError above the limit.
    """
    start = part.stat().st_size if part.exists() else 0
    validator, _, length = (notes.read_text() if notes.exists() else "").partition("\n")
    headers = {"User-Agent": "transfusion-download"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": validator} if validator else {})
    request = urllib.request.Request(source.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status == 206:
            span, _, whole = response.headers.get("Content-Range", "").partition("/")
            if not span.startswith(f"bytes {start}-") or length not in ("", whole):
                part.unlink(missing_ok=True)
                raise ConnectionError("the file there is not the one that was begun")
        else:
            start, whole = 0, response.headers.get("Content-Length", "")
        validator = response.headers.get("ETag", "W/")
        if validator.startswith("W/"):                      # If-Range takes no weak one
            validator = response.headers.get("Last-Modified", "")
        notes.write_text(f"{validator}\n{whole}")
        total = int(whole) if whole.isdigit() else 0
        with open(part, "ab" if start else "wb") as file, \
                progress_bar(desc=part.stem, total=total or None, initial=start, leave=False,
                             unit="B", unit_scale=True, unit_divisor=1024) as bar:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
                if max(bar.n, total) > source.limit:
                    part.unlink()
                    raise InputError(f"{source.url}: over {source.limit} bytes, so not the "
                                     f"published archive; see {source.page}")
    if part.stat().st_size < total:
        raise ConnectionError(f"broken off after {part.stat().st_size} of {total} bytes")


# ---------------------------------------------------------------- unpacking

def install(name: str, archive: Path, root: Path) -> None:
    """Unpack into a folder next to root/name, check its listing, then rename it to root/name.

    Raises InputError, and OSError as the file system does; the unpacked files are removed then.
    """
    folder = root / f"{name}.part"
    shutil.rmtree(folder, ignore_errors=True)               # of a call that was killed
    try:
        folder.mkdir()
        unpack(archive, folder)
        expected = layouts.CATEGORIES.get(name, ["images"])
        top = next((path for path in (folder, *sorted(folder.iterdir()))
                    if any((path / entry).is_dir() for entry in expected)), folder)
        faults = shortfalls(name, top)
        if faults:
            raise InputError(f"{archive}: {faults[0]} (faults: {len(faults)})")
        os.replace(top, root / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive, whose checksum was right. Raises InputError for a damaged
    one."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for entry in unpacking_bar(file.infolist()):
                    file.extract(entry, folder)
        else:
            with tarfile.open(archive, "r|*") as file:      # a stream, decompressed only once
                for entry in unpacking_bar(file):
                    file.extract(entry, folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(f"{archive}: a damaged archive ({error}); nothing of it is kept")


def unpacking_bar(entries):
    return progress_bar(entries, "unpacking", unit="file", leave=False)


# ---------------------------------------------------------------- listing and checking

def shortfalls(name: str, folder: Path) -> list[str]:
    """How the listing of a data set's folder differs from the published one, a line each."""
    if name == "dtd":
        counts = [len(layouts.list_images(path)) for path in folder.glob("images/*")
                  if path.is_dir()]
        return [] if counts == DTD else [f"{folder}: {sum(counts)} images in {len(counts)} "
                                         f"classes, not {DTD[0]} in each of {len(DTD)}"]
    paths = [folder / category for category in layouts.CATEGORIES[name]]
    if name == "btad":
        return [f"{path}: missing" for path in paths if not layouts.is_category(path)]
    return [line for path in paths for line in listing(path).faults]


def listing(path: Path) -> Category:
    """A category as it is read for a training.

    Its faults also name masks without an image and counts other than the published ones.
    """
    try:
        category = layouts.read_category("", path.name, path, annotated=is_published(path))
        masks = {mask for folder in path.glob("Data/Masks/*")
                 for mask in layouts.list_images(folder)}
    except InputError as error:
        return Category("", path.name, path, [], faults=[str(error)])
    category.faults.extend(f"{mask}: a mask without its image"
                           for mask in sorted(masks - {item.mask for item in category.test}))
    counts = "/".join(map(str, counts_of(category)))
    if is_published(path) and counts != PUBLISHED[path.name]:
        category.faults.append(f"{path}: {counts} images for training / good / defective, "
                               f"published are {PUBLISHED[path.name]}")
    return category


def is_published(path: Path) -> bool:
    """Whether a folder is a published category, rather than an own part of the same name.

    It is one if the folder above has the name of a data set, or if more than half of the categories
    of its data set lie next to it.
    """
    data_sets = {Path(folder).name for folders in layouts.FOLDERS.values() for folder in folders}
    shares = [sum((path.parent / name).is_dir() for name in names) / len(names)
              for names in layouts.CATEGORIES.values() if path.name in names]
    return path.name in PUBLISHED and (path.parent.name in data_sets - {""} or max(shares) > 0.5)


def counts_of(category: Category) -> tuple[int, int, int]:
    """Its images for training, good for the test, defective for the test."""
    defective = sum(item.label for item in category.test)
    return len(category.train), len(category.test) - defective, defective


def check(folder: Path) -> int:
    """Print the content of a folder and all its faults. Returns 1 if there are any, else 0.

    Raises InputError for a folder that does not exist or holds no category.
    """
    paths = find_categories(folder, 4) if folder.is_dir() else []
    if not paths:
        raise InputError(f"--check {folder}: " + (f"no data in it; a data set is {LAYOUT}"
                                                  if folder.is_dir() else "no such folder"))
    names = [path.name if path == folder else str(path.relative_to(folder)) for path in paths]
    width, all_faults, notes = max(map(len, names)), [], []
    print(f"{'category':{width}}   train  test good  defective  masks  width x height")
    for name, path in zip(names, paths):
        category = listing(path)
        sizes, doubts = check_images(category, name)
        notes += doubts + category.notes
        # VisA's table belongs to all of its categories, and so do its faults
        all_faults += [fault for fault in category.faults if fault not in all_faults]
        spans = [f"{min(s)}-{max(s)}" if min(s) < max(s) else str(min(s)) for s in zip(*sizes)]
        train, good, defective = counts_of(category)
        masks = sum(item.mask is not None for item in category.test)
        print(f"{name:{width}}  {train:6}  {good:9}  {defective:9}  {masks:5}  "
              f"{' x '.join(spans)}")
    print("\n".join(["", *(f"note: {note}" for note in notes), *all_faults,
                     f"faults: {len(all_faults)}" if all_faults else
                     "no faults; read the notes" if notes else "nothing is wrong"]))
    return 1 if all_faults else 0


def check_images(category: Category, name: str) -> tuple[set[tuple[int, int]], list[str]]:
    """Decode every image and mask of a category, and add what is wrong with them to its faults.

    Returns the sizes of the images, (width, height), and notes: for each kind of warning of the
    decoder the first one and the number of the others, a line for each mask that is empty or
    probably wrong, and a line on training images that are test images, too.
    """
    sizes, notes, faults = set(), [], category.faults
    pairs = [(image, None) for image in category.train] + [(item.path, item.mask)
                                                           for item in category.test]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for image, mask in progress_bar(pairs, name, unit="image", leave=False):
            size = read_size(image, faults)
            mask_size = read_size(mask, faults, is_mask=True) if mask else None
            if mask_size and not read_mask(mask).any():
                notes.append(f"{mask}: empty, so what is defective in {image.name} is not scored")
            if mask_size:
                notes += doubts_about_mask(mask)
            if size:
                sizes.add(size)
            if size and mask_size and size != mask_size:
                faults.append(f"{mask}: {mask_size[0]} x {mask_size[1]} pixels, its image "
                              f"{size[0]} x {size[1]}")
    kinds: dict[str, list[str]] = {}
    for line in dict.fromkeys(str(warning.message) for warning in caught):
        kinds.setdefault(warning_kind(line), []).append(line)
    notes += [lines[0] + (f" ({len(lines) - 1} more like this)" if len(lines) > 1 else "")
              for lines in kinds.values()]
    with contextlib.suppress(OSError):                      # a file that is among the faults
        notes += layouts.describe_copies(category)
    return sizes, notes


def find_categories(folder: Path, depth: int) -> list[Path]:
    """The folder itself, or those folders below it, that are categories or look like one.

    A folder that cannot be listed is among them, so that it is named as a fault.
    """
    if layouts.is_category(folder) or os.path.isdir(folder / "test"):
        return [folder]
    try:
        folders = [path for path in layouts.visible(folder)
                   if path.is_dir() and path.suffix != ".part"]
    except (InputError, OSError):
        return [folder]
    return [category for path in folders for category in find_categories(path, depth - 1)] \
        if depth else []


def read_size(path: Path, faults: list[str], is_mask: bool = False) -> tuple[int, int] | None:
    """Width and height of an image, decoded whole. None, and a line in faults, if that fails."""
    try:
        return open_image(path, is_mask).size
    except InputError as error:
        faults.append(str(error))
        return None


# ---------------------------------------------------------------- the command

def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Download a published data set, or check a "
                                                 "folder.")
    parser.add_argument("data", nargs="?", choices=list(SOURCES), help="data set to download")
    parser.add_argument("--root", metavar="DIR", type=layouts.root_folder,
                        default=layouts.root_folder(),
                        help="folder to put it in (default: %(default)s)")
    parser.add_argument("--check", metavar="DIR", type=Path,
                        help="check this folder: data sets, one data set or one category")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 for faults, 2 for a mistake, 130 for Ctrl-C."""
    parser = command_line()
    flags = parser.parse_args(argv)
    if (flags.data is None) == (flags.check is None):
        parser.error("give either a data set or --check DIR")
    try:
        return check(flags.check.expanduser()) if flags.check else \
            fetch(flags.data, flags.root) or 0
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise InputError(f"{error}" + "; free some space and run this again" * full)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted" + "; run this again to go on" * (not flags.check))


if __name__ == "__main__":
    sys.exit(main())
