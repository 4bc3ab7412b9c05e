"""Files that are written whole or not at all, and folders that one process holds at a time."""
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
    """Call write(file) on a neighbour of `path`, then rename it: `path` is whole, old or new.

    A link is followed, so the file behind it changes. Raises InputError when the disk does not take
    the file; the neighbour is removed then.
    """
    path = Path(os.path.realpath(path))
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_FSYNC:
                    raise
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if type(error).__name__ == "OutOfMemoryError":               # torch's, of a model that drew
            raise
        cause = (isinstance(error, RuntimeError) and error.__context__) or error    # torch wraps it
        raise InputError(f"{path}: cannot be written ({cause}); make room and run it again, a "
                         f"training with --resume")


def save_json(path: Path, content: dict) -> None:
    """Write a dict as JSON. NaN becomes null, which JSON has. Raises InputError."""
    text = json.dumps({k: None if isinstance(v, float) and math.isnan(v) else v
                       for k, v in content.items()}, indent=2)
    save_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def save_csv(path: Path, rows: list[dict], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV, under `columns` or the first row's keys. Raises InputError."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns or rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    content = text.getvalue().encode(errors="backslashreplace")      # a name that is no UTF-8
    save_atomically(path, lambda file: file.write(content))


def read_json(path: Path) -> dict:
    """The content of a JSON file. Raises InputError where it is gone or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it or give --name")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error}); choose another --out")


@contextlib.contextmanager
def file_lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock on a file; it ends with the process, however that ends.

    Raises InputError(refusal) where another process holds it. A file system without locks holds
    nothing.
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
    """Make the folder and hold it. Raises InputError where another process has it."""
    make_folder(folder)
    with file_lock(folder / ".lock", f"{folder} is in use by another process; wait for it, or "
                                     f"choose another name"):
        yield


def float_array(shape: tuple[int, ...], memory_gb: float) -> np.ndarray:
    """An empty float32 array, in memory or, above `memory_gb`, in an unnamed file.

    Raises InputError where the disk has no room for that file.
    """
    size = 4 * math.prod(shape)
    if size <= memory_gb * 1e9:
        return np.empty(shape, np.float32)
    file = tempfile.TemporaryFile()
    try:
        if hasattr(os, "posix_fallocate"):             # a mapped file that finds no room later
            os.posix_fallocate(file.fileno(), 0, size)            # would end the process
    except OSError as error:
        raise InputError(f"no room for {size / 1e9:.1f} GB of maps in {tempfile.gettempdir()} "
                         f"({error}); set TMPDIR to another folder, or raise --memory-gb")
    return np.memmap(file, np.float32, "w+", shape=shape)
