"""Published data sets, fetched, verified and unpacked; or the check of any folder of images.

    python tools/download.py mvtec|visa|dtd|btad [--root DIR]
    python tools/download.py --check DIR
"""
import argparse
import contextlib
import errno
import hashlib
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

import data
from settings import InputError, exit_status, progress_bar

ATTEMPTS = 5                    # requests in one call
PAUSE, TIMEOUT = 3.0, 60.0      # seconds between requests, and without a byte
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)    # no use to retry
LAYOUT = "CATEGORY/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}"


@dataclass(frozen=True)
class Source:
    """A published archive; limit and members are the most bytes and entries it may unpack to."""
    url: str
    sha256: str
    licence: str
    page: str
    layout: str
    limit: int
    members: int = 40_000


SOURCES = {
    "mvtec": Source(
        "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/"
        "420938113-1629960298/mvtec_anomaly_detection.tar.xz",
        "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        "MVTec AD: CC BY-NC-SA 4.0, for non-commercial use that names the authors, changed "
        "versions under the same licence", data.PAGES["mvtec"], f"mvtec/{LAYOUT}", 12 * 10**9),
    "visa": Source(
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        "VisA: CC BY 4.0, for any use that names the authors", data.PAGES["visa"],
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


# ---------------------------------------------------------------- fetching

def fetch(name: str, root: Path) -> None:
    """Put the data set `name` into root/name, or say where it already lies complete.

    Raises InputError where it cannot be had, is not the published one or does not unpack, and
    OSError as the file system does; what was downloaded stays for the next call.
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
    with locked(lock):
        if is_complete(name, root):     # by now, through whoever held the lock a moment ago
            return
        if target.exists() and any(target.iterdir()):
            raise InputError(f"{target} is not complete ({shortfalls(name, target)[0]}); "
                             "move it away and run this again")
        if not part.exists() or sha256(part) != source.sha256:
            download(source, part, notes)
            found = sha256(part)
            if found != source.sha256:
                part.unlink()
                raise InputError(f"{source.url}: wrong checksum, sha256 {source.sha256[:12]}... "
                                 f"expected, {found[:12]}... found; removed. See {source.page}")
        install(name, part, root)
        part.unlink()
        notes.unlink(missing_ok=True)
        with contextlib.suppress(OSError):                  # Windows removes no open file
            lock.unlink()
    print(f"{name} is complete in {target}")


def is_complete(name: str, root: Path) -> bool:
    """Whether the data set lies under root, in any layout that data.py finds; says where."""
    folders = data.data_folders(name, root) if name in data.FOLDERS else [root / name]
    found = [folder for folder in folders if not shortfalls(name, folder)]
    if found:
        print(f"{name} is already complete in {found[0]}; nothing to do")
    return bool(found)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file, which ends with the process however that ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process is fetching this data set ({path}); wait for it")
    try:
        yield
    finally:
        lock.release()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, progress_bar(iter(lambda: file.read(1 << 20), b""), "sha256",
                                        unit="MiB", leave=False) as bar:
        for block in bar:
            digest.update(block)
    return digest.hexdigest()


def download(source: Source, part: Path, notes: Path) -> None:
    """Complete `part`, going on where connections break. Raises InputError when that fails."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return receive(source, part, notes)
        except (OSError, HTTPException) as error:
            code = getattr(error, "code", 0)                # an HTTP status
            if getattr(error, "errno", 0) in LOCAL:
                raise
            if code == 416:             # part is not shorter than the file, yet not the file
                part.unlink(missing_ok=True)
            if attempt == ATTEMPTS or 400 <= code < 500 and code not in (408, 416, 429):
                raise InputError(
                    f"{source.url}: {error}; run this again to go on from where it stopped, or get "
                    f"the data from {source.page} and unpack it so that {part.parent} holds "
                    f"{source.layout}")
        time.sleep(PAUSE)


def receive(source: Source, part: Path, notes: Path) -> None:
    """One request for the rest of `part`; a server without ranges sends it from the start.

    notes holds validator and length of the file that `part` begins. Raises what urllib does,
    ConnectionError for an answer cut short or of another file, InputError above the limit.
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
        tag = response.headers.get("ETag", "W/")            # If-Range takes no weak ones
        tag = response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag
        notes.write_text(f"{tag}\n{whole}")
        total = int(whole) if whole.isdigit() else 0
        with open(part, "ab" if start else "wb") as file, \
                progress_bar(desc=part.stem, total=total or None, initial=start, unit="B", leave=False,
                     unit_scale=True, unit_divisor=1024) as bar:
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
    """Unpack beside root/name, verify the listing, and only then give the folder its name.

    Raises InputError, and OSError as the file system does; nothing unpacked stays behind then.
    """
    folder = root / f"{name}.part"
    shutil.rmtree(folder, ignore_errors=True)               # of a call that was killed
    try:
        folder.mkdir()
        unpack(archive, folder, SOURCES[name])
        inside = data.CATEGORIES.get(name, ["images"])
        home = next((path for path in (folder, *sorted(folder.iterdir()))
                     if any((path / entry).is_dir() for entry in inside)), folder)
        lacks = shortfalls(name, home)
        if lacks:
            raise InputError(f"{archive}: {lacks[0]} (faults: {len(lacks)})")
        os.replace(home, root / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack(archive: Path, folder: Path, source: Source) -> None:
    """Write an archive's files. Raises InputError at the first entry that leads outside, is a link
    or a device, or goes beyond the limits, and for a damaged archive."""
    total = count = 0
    try:
        with progress_bar(entries(archive, folder), "unpacking", unit="file", leave=False) as bar:
            for name, size, plain, write in bar:
                total, count, path = total + size, count + 1, Path(name)
                fault = ("leads out of the folder" if path.is_absolute() or ".." in path.parts else
                         "is a link or a device" if not plain else
                         f"exceeds {source.limit} bytes or {source.members} entries in all"
                         if total > source.limit or count > source.members else "")
                if fault:
                    raise InputError(f"{archive}: {name!r} {fault}; nothing of it is kept")
                write()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError,
            RuntimeError) as error:
        raise InputError(f"{archive}: a damaged archive ({error}); nothing of it is kept")


def entries(archive: Path, folder: Path) -> Iterator[tuple[str, int, bool, Callable]]:
    """Of every entry: its name, its bytes, whether it is a file or folder, and what writes it."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:              # reads no more than the declared size
            for entry in file.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)
                yield (entry.filename, entry.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR),
                       lambda: file.extract(entry, folder))
        return
    with tarfile.open(archive, "r|*") as file:              # a stream, decompressed only once
        for entry in file:
            yield (entry.name, entry.size, entry.isfile() or entry.isdir(),
                   lambda: file.extract(entry, folder, filter="data"))


# ---------------------------------------------------------------- listing and checking

def shortfalls(name: str, folder: Path) -> list[str]:
    """What sets a data set's folder apart from the published one, by its listing: a line each."""
    if name == "dtd":
        counts = [len(data.list_images(p)) for p in folder.glob("images/*") if p.is_dir()]
        return [] if counts == DTD else [f"{folder}: {sum(counts)} images in {len(counts)} "
                                         f"classes, not {DTD[0]} in each of {len(DTD)}"]
    paths = [folder / category for category in data.CATEGORIES[name]]
    if name == "btad":
        return [f"{path}: missing" for path in paths if not data.is_category(path)]
    return [line for path in paths for line in listing(path).faults]


def listing(path: Path) -> data.Category:
    """A category as data.py reads it, whose faults are also masks alone and other counts than those
    published."""
    try:
        found = data.read_category("", path.name, path, annotated=published(path))
    except InputError as error:
        return data.Category("", path.name, path, [], faults=[str(error)])
    masks = {mask for folder in path.glob("Data/Masks/*") for mask in data.list_images(folder)}
    found.faults.extend(f"{mask}: a mask without its image"
                        for mask in sorted(masks - {item.mask for item in found.test}))
    counts = "/".join(map(str, counts_of(found)))
    if published(path) and counts != PUBLISHED[path.name]:
        found.faults.append(f"{path}: {counts} images for training / good / defective, published "
                            f"are {PUBLISHED[path.name]}")
    return found


def published(path: Path) -> bool:
    """Whether a folder is a published category, and not an own part of the same name: by the name
    of the folder it lies in, or by more than half of its data set beside it."""
    homes = {Path(folder).name for folders in data.FOLDERS.values() for folder in folders}
    beside = [sum((path.parent / name).is_dir() for name in names) / len(names)
              for names in data.CATEGORIES.values() if path.name in names]
    return path.name in PUBLISHED and (path.parent.name in homes - {""} or max(beside) > 0.5)


def counts_of(category: data.Category) -> tuple[int, int, int]:
    """Its images for training, good for the test, defective for the test."""
    defective = sum(item.label for item in category.test)
    return len(category.train), len(category.test) - defective, defective


def check(folder: Path) -> int:
    """Print what lies in a folder and all that is wrong with it. Returns 1 if anything is, else 0.

    Raises InputError for a folder that is not there or holds no category.
    """
    paths = categories(folder, 4) if folder.is_dir() else []
    if not paths:
        raise InputError(f"--check {folder}: " + (f"no data in it; a data set is {LAYOUT}"
                                                  if folder.is_dir() else "no such folder"))
    names = [path.name if path == folder else str(path.relative_to(folder)) for path in paths]
    width, wrong, notes = max(map(len, names)), [], []
    print(f"{'category':{width}}   train  test good  defective  masks  width x height")
    for name, path in zip(names, paths):
        found = listing(path)
        faults, sizes, masks = found.faults, set(), [item.mask for item in found.test if item.mask]
        pairs = [(image, None) for image in found.train] + [(item.path, item.mask)
                                                            for item in found.test]
        with progress_bar(pairs, name, unit="image", leave=False) as bar:
            for image, mask in bar:
                size, other = read_size(image, faults), read_size(mask, faults, is_mask=True)
                if other and not data.read_mask(mask).any():
                    notes.append(f"{mask}: empty, so what is defective in {image.name} is not "
                                 f"scored")
                sizes |= {size} - {None}
                if size and other and size != other:
                    faults.append(f"{mask}: {other[0]} x {other[1]} pixels, its image "
                                  f"{size[0]} x {size[1]}")
        spans = [f"{min(s)}-{max(s)}" if min(s) < max(s) else str(min(s)) for s in zip(*sizes)]
        train, good, defective = counts_of(found)
        print(f"{name:{width}}  {train:6}  {good:9}  {defective:9}  {len(masks):5}  "
              f"{' x '.join(spans)}")
        notes += found.notes
        wrong += [fault for fault in faults if fault not in wrong]      # a table is of them all
    print("\n".join(["", *(f"note: {note}" for note in notes), *wrong,
                     f"faults: {len(wrong)}" if wrong else "nothing is wrong"]))
    return 1 if wrong else 0


def categories(folder: Path, depth: int) -> list[Path]:
    """The folder itself or those below it that are, or were meant to be, categories."""
    if data.is_category(folder) or (folder / "test").is_dir():
        return [folder]
    inside = [p for p in data.visible(folder) if p.is_dir() and p.suffix != ".part"]
    return [found for p in inside for found in categories(p, depth - 1)] if depth else []


def read_size(path: Path | None, faults: list[str],
              is_mask: bool = False) -> tuple[int, int] | None:
    """Width and height of an image, decoded whole; None, and a line in faults, if that fails."""
    try:
        return data.open_image(path, is_mask).size if path else None
    except InputError as error:
        faults.append(str(error))
        return None


# ---------------------------------------------------------------- the command line

@exit_status
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 for faults, 2 for a mistake, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Fetch a published data set, or check a folder.")
    parser.add_argument("data", nargs="?", choices=list(SOURCES), help="data set to fetch")
    parser.add_argument("--root", metavar="DIR", type=data.root_folder, default=data.root_folder(),
                        help="folder to put it in (default: %(default)s)")
    parser.add_argument("--check", metavar="DIR", type=Path,
                        help="verify this folder: data sets, one data set or one category")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.check is None):
        parser.error("give either a data set or --check DIR")
    try:
        return check(args.check.expanduser()) if args.check else fetch(args.data, args.root) or 0
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise InputError(f"{error}" + "; free some space and run this again" * full)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted" + "; run this again to go on" * (not args.check))


if __name__ == "__main__":
    sys.exit(main())
