"""Files that are written whole or not at all, and what goes wrong on the way, in one voice."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fdm_cli.errors import BadInput, FdmError, RunFailed

MOST_NAME_BYTES = 180  # of a name in a hidden one
_PARTIAL = re.compile(r"\..+\.\d+\.part(\.\w+)?", re.DOTALL)  # see `partial_name`
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of shared folders of virtual machines, and some SMB; of folders that may be written but not listed.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)
# Errors of reading that another time may not have.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def expanded(path: str) -> Path:
    """A path that may begin with `~`. Raises BadInput where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BadInput(f"{path}: {error}") from None


def refuse_taken(path: Path, force: bool) -> None:
    """Raises BadInput where a file could not be written: it exists and `force` is not given, or has no folder."""
    refuse_parent(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder", "remove it, or choose another name")
    if os.path.lexists(path) and not force:
        raise BadInput(f"{path}: exists already", "--force replaces it")


def refuse_parent(path: Path) -> None:
    """Raises BadInput where nothing can be written beside a path: no folder, or one that is not writable."""
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no folder {path.parent}", "make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{path}: the folder {path.parent} is not writable", "choose another place")


def refuse_unencodable(path: Path) -> None:
    """Raises BadInput for a name that is no text: PyTorch and safetensors open nothing of that kind."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise BadInput(f"{path}: checkpoints need a path that is text in UTF-8", "rename it") from None


def hidden_name(name: str, ending: str) -> str:
    """`.name` with an ending; a long name is cut and told apart by a hash, since file systems allow 255 bytes."""
    whole = os.fsencode(name)
    if len(whole) > MOST_NAME_BYTES:
        cut = whole[:MOST_NAME_BYTES].decode(errors="ignore")
        name = f"{cut}-{hashlib.sha256(whole).hexdigest()[:8]}"
    return f".{name}{ending}"


def partial_name(name: str, ending: str = "") -> str:
    """What a file is called while this process writes it."""
    return hidden_name(name, f".{os.getpid()}.part{ending}")


def remove_partial(folder: Path) -> None:
    """Removes the files that killed processes were writing; none may be writing here now."""
    for file in folder.glob(".*.part*"):
        if _PARTIAL.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


def allow_open_files(count: int) -> None:
    """Lets this process have so many files open at once. Raises BadInput where the system does not."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise BadInput(f"so many videos at once need {count} open files, the system allows {hard}", "fewer, or --grid")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and vanishes when not.

    Raises:
        RunFailed: anything that went wrong while writing; an older file of that name is intact.
    """
    temporary = path.with_name(partial_name(path.name))
    try:
        with write_failures(path):
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_failures(path: str | Path) -> Iterator[None]:
    """Turns what an encoder or the system raises while `path` is written into RunFailed; a full disk is called that."""
    try:
        yield
    except (FdmError, MemoryError):
        raise
    except Exception as error:
        # torch reports a failed write as a RuntimeError of its own; the system's words are in its context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        if isinstance(cause, OSError) and cause.errno in _NO_SPACE:
            raise RunFailed(f"no space left to write {path}", "free some space, or write elsewhere") from error
        reason = getattr(cause, "strerror", None) or cause
        raise RunFailed(f"cannot write {path}: {' '.join(str(reason).split())}") from error


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Flushes a folder, so that a new name in it survives a loss of power; not all file systems can."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def finite(value: Any) -> Any:
    """The same with null for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
