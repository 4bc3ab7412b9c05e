"""Files that are written completely or not at all, and folders locked by one process at a time."""
import contextlib
import csv
import errno
import io
import json
import math
import os
import tempfile
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
        temporary.unlink(missing_ok=True)
        if type(error).__name__ == "OutOfMemoryError":           # torch's, if `write` runs a model
            raise
        cause = (isinstance(error, RuntimeError) and error.__context__) or error    # torch wraps it
        raise InputError(f"{path}: cannot be written ({cause}); make room and run it again, a "
                         f"training with --resume")


def save_json(path: Path, content: dict) -> None:
    """Write a dict as JSON, NaN as null. Raises InputError (see `save_atomically`)."""
    text = json.dumps({k: None if isinstance(v, float) and math.isnan(v) else v
                       for k, v in content.items()}, indent=2)
    save_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def save_csv(path: Path, rows: list[dict], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV with `columns`, or with the keys of the first row. Raises InputError."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns or rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    content = text.getvalue().encode(errors="backslashreplace")      # file names may not be UTF-8
    save_atomically(path, lambda file: file.write(content))


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
