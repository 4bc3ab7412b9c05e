"""Files that are written completely or not at all, and folders locked by one process at a time."""
import contextlib
import csv
import errno
import io
import json
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from support.console import InputError

NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}          # file systems that cannot sync


def save_atomically(path: Path, write) -> None:
    """Call write(file) on a temporary file beside `path`, then rename it to `path`.

    So `path` always holds a complete file, the old or the new one. A symbolic link is followed.
    Raises InputError if the file cannot be written; the temporary file is removed then.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_FSYNC:
                    raise
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if type(error).__name__ == "OutOfMemoryError":           # torch's, if `write` runs a model
            raise
        cause = (isinstance(error, RuntimeError) and error.__context__) or error    # torch wraps it
        raise InputError(f"{path}: cannot be written ({cause}); {advice(cause)}") from cause


def advice(error: Exception) -> str:
    """What to do about a file that could not be written."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room on the disk and run the command again"
    if number == errno.ENAMETOOLONG:
        return "give the photo a shorter name"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY):
        return "close it in other programs, or allow writing there, and run the command again"
    return "see to the folder and run the command again"


def save_json(path: Path, content: dict) -> None:
    """Write a dict as JSON, NaN as null. Raises InputError (see `save_atomically`)."""
    text = json.dumps({k: None if isinstance(v, float) and math.isnan(v) else v
                       for k, v in content.items()}, indent=2)
    save_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def save_csv(path: Path, rows: list[dict], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV with `columns`, or with the keys of all rows. Raises InputError."""
    text = io.StringIO()
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    content = text.getvalue().encode(errors="backslashreplace")      # file names may not be UTF-8
    save_atomically(path, lambda file: file.write(content))


def rounded(row: dict) -> dict:
    """A row of a table with its floats rounded to four decimals."""
    return {k: round(float(v), 4) if isinstance(v, (float, np.floating)) else v
            for k, v in row.items()}


NAMED_TABLES: set[Path] = set()         # tables whose failure has been named


def save_csv_if_possible(path: Path, rows: list[dict]) -> None:
    """`save_csv` for a table that is written again later.

    A table that cannot be written now, for instance because a spreadsheet program has it open, ends
    nothing. It is named in one warning.
    """
    try:
        save_csv(path, rows)
    except InputError as error:
        if path not in NAMED_TABLES:
            NAMED_TABLES.add(path)
            warnings.warn(f"{error} (the work goes on, and the table is tried again later)")


class GrowingTable:
    """A CSV file to which rows are appended as they come. An earlier file is replaced.

    Rows are written as whole lines, so after a kill at most the last line is incomplete. Rows that
    cannot be written now wait for the next ones.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, columns
        self.started, self.error = False, None
        self.waiting = self.text_of([dict(zip(columns, columns))])
        self.write_waiting()

    def text_of(self, rows: list[dict]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode(errors="backslashreplace")     # a name that is no UTF-8

    def append(self, rows: list[dict]) -> None:
        """Write these rows, after those that are waiting, if that is possible now."""
        if rows:
            self.waiting += self.text_of(rows)
            self.write_waiting()

    def write_waiting(self) -> None:
        try:
            if self.started:
                with open(self.path, "ab", buffering=0) as file:
                    written = file.write(self.waiting)
                self.waiting = self.waiting[written:]     # a full disk takes a part
            else:
                self.replace_earlier_file()
                self.waiting, self.started = b"", True
        except (OSError, InputError) as error:
            self.error = error

    def replace_earlier_file(self) -> None:
        try:
            save_atomically(self.path, lambda file: file.write(self.waiting))
        except InputError:                                # where only the renaming is refused
            with open(self.path, "wb") as file:
                file.write(self.waiting)

    def close(self) -> str:
        """Try for the last time. Returns "", or a line on where the other rows are."""
        if self.waiting:
            self.write_waiting()
        if not self.waiting:
            return ""
        other = self.path.with_name(f"{self.path.stem}-not-written{self.path.suffix}")
        try:
            save_atomically(other, lambda file: file.write(self.waiting))
        except InputError as error:
            return f"{error}; its rows are lost"
        return f"{self.path} could not be written ({self.error}); its rows are in {other}"


def read_json(path: Path) -> dict:
    """The content of a JSON file. Raises InputError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it or give --name")


def folder_name(name: str) -> str:
    """The name itself. Raises InputError if it is not the name of a single folder."""
    if {*"/\\\0"} & {*name} or name in ("", ".", ".."):
        raise InputError(f"{name!r}: not the name of a folder; --name is a part of it, so it has "
                         f"no / or \\")
    return name


def make_folder(folder: Path) -> None:
    """Create a folder and its parent folders. Raises InputError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error}); choose another --out")


@contextlib.contextmanager
def file_lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on a file; it is released at the latest when the process ends, even by a crash.

    Raises InputError(refusal) if another process holds it. On a file system without locks, nothing
    is locked.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(refusal)
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create the folder and lock it. Raises InputError if another process has locked it."""
    make_folder(folder)
    with file_lock(folder / ".lock", f"{folder} is in use by another process; wait for it, or "
                                     f"choose another name"):
        yield


def float_array(shape: tuple[int, ...], memory_gb: float) -> np.ndarray:
    """An empty float32 array, in memory or, if larger than `memory_gb`, in a temporary file.

    Raises InputError if the disk has no room for that file.
    """
    size = 4 * math.prod(shape)
    if size <= memory_gb * 1e9:
        return np.empty(shape, np.float32)
    file = tempfile.TemporaryFile()
    try:
        if hasattr(os, "posix_fallocate"):             # reserve the space now: a full disk
            os.posix_fallocate(file.fileno(), 0, size)            # would kill the process later
    except OSError as error:
        raise InputError(f"no room for {size / 1e9:.1f} GB of maps in {tempfile.gettempdir()} "
                         f"({error}); set TMPDIR to another folder, or raise --memory-gb")
    return np.memmap(file, np.float32, "w+", shape=shape)


STRIP = 64                              # rows of a TIFF that are in memory at a time


def save_float_tiff(path: Path, width: int, height: int, rows) -> None:
    """Write a grey float32 TIFF, uncompressed, of any size in little memory. Raises InputError.

    rows: called with a range of rows, top and bottom; returns float32 [bottom - top, width].
    """
    bounds = [(top, min(top + STRIP, height)) for top in range(0, height, STRIP)]
    sizes = [4 * width * (bottom - top) for top, bottom in bounds]
    count, entries = len(bounds), 10
    lists = 8 + 2 + 12 * entries + 4                      # where the offsets and sizes stand
    offsets = np.cumsum([lists + 8 * count, *sizes[:-1]]).tolist()
    where = (lists, lists + 4 * count) if count > 1 else (offsets[0], sizes[0])
    tags = ((256, 1, width), (257, 1, height), (258, 1, 32), (259, 1, 1), (262, 1, 1),
            (273, count, where[0]), (277, 1, 1), (278, 1, STRIP), (279, count, where[1]),
            (339, 1, 3))                                  # number, values, value or place

    def write(file) -> None:
        file.write(struct.pack("<2sHIH", b"II", 42, 8, entries))
        for number, values, value in tags:
            file.write(struct.pack("<HHII", number, 4, values, value))
        file.write(struct.pack(f"<I{2 * count}I", 0, *offsets, *sizes))
        for top, bottom in bounds:
            file.write(np.ascontiguousarray(rows(top, bottom), "<f4").tobytes())

    save_atomically(path, write)
