import errno
import os
import stat

import numpy as np
import pytest

from fdm_cli import data_files, files, video
from fdm_cli.clip_cache import ClipCache
from fdm_cli.errors import RunFailed
from fdm_cli.files import partial_name, remove_partial, replacing
from fdm_cli.video_writer import open_writer


def test_only_files_that_this_program_was_writing_are_removed(tmp_path):
    for name in ("loss.png", "音" * 90):
        (tmp_path / partial_name(name)).touch()
        (tmp_path / partial_name(name, ".gif")).touch()
    others = [".movie.rar.part1", ".x.partial", ".x.17.part.gif.bak", "x.17.part"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".x.17.parts").mkdir()
    remove_partial(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*others, ".x.17.parts"])


def test_a_file_system_that_cannot_sync_folders_is_written_to_all_the_same(tmp_path, monkeypatch):
    def fsync(handle, real=os.fsync):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    for code in (errno.EINVAL, errno.EACCES):
        with replacing(tmp_path / f"{code}.txt") as temporary:
            temporary.write_text("written")
        assert (tmp_path / f"{code}.txt").read_text() == "written"
    code = errno.EIO
    with pytest.raises(RunFailed, match="Input/output error"), replacing(tmp_path / "b.txt") as temporary:
        temporary.write_text("written")


def test_such_a_file_system_takes_folders_of_frames_and_the_cache_too(tmp_path, monkeypatch):
    def fsync(handle, real=os.fsync):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with open_writer(tmp_path / "frames", 10) as writer:
        for _ in range(2):
            writer.write(np.zeros((8, 8, 1), np.uint8))
    assert video.read(tmp_path / "frames").info.frames == 2
    cache = ClipCache(data_files.find(tmp_path / "frames"), 8, 1)
    list(cache.fill())
    assert (cache.folder / "videos.json").exists()
