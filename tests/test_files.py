"""Files that are written whole or not at all, and folders that one process holds at a time."""
import errno
import os

import pytest
import torch

from support.console import InputError
from support.files import folder_name, locked_folder, save_atomically, save_csv


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", "..", ".", "", "a\0b"])
def test_only_the_name_of_a_single_folder_is_taken(name):
    with pytest.raises(InputError, match="not the name of a folder; --name is a part of it"):
        folder_name(name)
    assert folder_name("bolt-try 2..x") == "bolt-try 2..x"


def test_a_link_is_followed_and_the_file_behind_it_changes(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    file, link = tmp_path / "disk/last.pt", tmp_path / "run/last.pt"
    file.write_bytes(b"old")
    link.symlink_to(file)
    save_atomically(link, lambda part: part.write(b"new"))
    assert link.is_symlink() and link.readlink() == file
    assert file.read_bytes() == link.read_bytes() == b"new"
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["last.pt"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["last.pt"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_no_failed_write(tmp_path, monkeypatch, number):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    save_atomically(tmp_path / "metrics.json", lambda file: file.write(b"{}"))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_bytes() == b"{}"


def test_a_sync_that_fails_otherwise_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "metrics.json").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="metrics.json: cannot be written .*Input/output error"):
        save_atomically(tmp_path / "metrics.json", lambda file: file.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_bytes() == b"old"


def test_a_full_gpu_while_a_file_is_drawn_is_not_taken_for_a_full_disk(tmp_path):
    def draw(file):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        save_atomically(tmp_path / "picture.png", draw)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with locked_folder(tmp_path / "run"):
        with pytest.raises(InputError, match="run is in use by another process"):
            with locked_folder(tmp_path / "run"):
                pass
    with locked_folder(tmp_path / "run"):                             # it was given back
        pass


def test_a_table_has_the_columns_of_all_its_rows(tmp_path):
    """A run that is resumed by a later version may have logged other losses before."""
    save_csv(tmp_path / "log.csv", [{"step": 1, "n": 2}, {"step": 2, "m": 3}])
    assert (tmp_path / "log.csv").read_text() == "step,n,m\n1,2,\n2,,3\n"
