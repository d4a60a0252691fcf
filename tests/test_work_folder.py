import contextlib
import json
import resource

import pytest
import torch

from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.frame_store import FrameStore
from fdm_cli.work_folder import Journal, WorkFolder

FACTS = {"scheme": "autoregressive", "length": 160, "given": [[0, 8]]}


@pytest.fixture
def folder(tmp_path):
    return WorkFolder(tmp_path / "video.gif")


def interrupt(folder, facts=FACTS, rounds=1, resume=False):
    """Leaves a folder with so many more rounds."""
    with (
        contextlib.suppress(KeyboardInterrupt),
        folder.opened(facts, resume, "a.pt"),
        FrameStore((1, 2, 2), 1, {}) as store,
    ):
        for number in range(rounds):
            folder.journal.append({"round": number}, store)
        raise KeyboardInterrupt


def test_it_is_hidden_beside_the_output_and_gone_when_all_is_done(folder, tmp_path):
    with folder.opened(FACTS, False, "a.pt"):
        assert [path.name for path in tmp_path.iterdir()] == [".video.gif.work"]
        assert folder.facts() == {**FACTS, "checkpoint": "a.pt"}
    assert list(tmp_path.iterdir()) == []
    assert folder.facts() is None


def test_it_stays_when_something_was_finished_and_only_then(folder, tmp_path):
    interrupt(folder, rounds=0)
    assert list(tmp_path.iterdir()) == []
    interrupt(folder, rounds=2)
    assert folder.facts() == {**FACTS, "checkpoint": "a.pt"}
    with folder.opened(FACTS, True, "a.pt"):
        assert [folder.journal.next() for _ in range(3)] == [{"round": 0}, {"round": 1}, None]


def test_a_disk_that_is_full_at_the_start_leaves_nothing(folder, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(RunFailed, match="no space left"), folder.opened(FACTS, False, "a.pt"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_not_resumed(folder):
    interrupt(folder)
    other = {**FACTS, "length": 80}
    with (
        pytest.raises(BadInput, match=r"was begun with length 160, this is 80") as caught,
        folder.opened(other, True, "a.pt"),
    ):
        pass
    assert "--force starts over" in caught.value.hint
    assert folder.facts() == {**FACTS, "checkpoint": "a.pt"}


def test_starting_over_forgets_everything(folder):
    interrupt(folder)
    (folder.path / ".video.gif.17.part.gif").write_bytes(b"half a video of a killed process")
    folder.let_replace(["video.gif"])
    with folder.opened(FACTS, False, "a.pt"):
        assert folder.journal.next() is None
        assert not folder.replaceable
        assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "journal.jsonl", "run.json"]


def test_frames_of_which_nobody_says_what_they_are_are_thrown_away(folder):
    """A run that was killed while it was thrown away."""
    interrupt(folder)
    folder.let_replace(["video.gif"])
    (folder.path / "run.json").unlink()
    with folder.opened(FACTS, True, "a.pt"):
        assert folder.journal.next() is None
        assert not folder.replaceable


def test_going_on_removes_half_written_videos_only(folder):
    interrupt(folder)
    (folder.path / ".frames.17.part").mkdir()
    (folder.path / ".frames.17.part" / "frame-000000.png").touch()
    folder.let_replace(["video.gif"])
    with folder.opened(FACTS, True, "a.pt"):
        assert folder.journal.next() == {"round": 0}
        assert folder.replaceable == {"video.gif"}
        assert not (folder.path / ".frames.17.part").exists()


def test_one_process_at_a_time(folder):
    with (
        folder.opened(FACTS, False, "a.pt"),
        pytest.raises(BadInput, match="another process"),
        WorkFolder(folder.path.with_name("video.gif")).opened(FACTS, False, "a.pt"),
    ):
        pass
    assert not folder.path.exists()


def test_an_unreadable_folder_is_said_so(folder):
    interrupt(folder)
    (folder.path / "run.json").write_text("{")
    with pytest.raises(BadInput, match="not readable"):
        folder.facts()


@pytest.mark.parametrize(
    "wrong", [{"seed": "q"}, {"seed": -1}, {"threads": 99_999}, {"threads": True}, {"max_batch": 1.0}, []]
)
def test_what_is_taken_over_is_checked(folder, wrong):
    interrupt(folder)
    (folder.path / "run.json").write_text(json.dumps(wrong))
    with pytest.raises(BadInput, match="not what this program writes"):
        folder.facts()


@pytest.mark.parametrize("torn", [b'{"round": 2, "cr', b"\0\0\0\0\0\n", b"17\n", b'{"round": 2}'])
def test_a_torn_line_does_not_count(tmp_path, torn):
    lines = b'{"round": 0}\n{"round": 1}\n'
    (tmp_path / "journal").write_bytes(lines + torn)
    journal = Journal(tmp_path / "journal")
    assert [journal.next() for _ in range(3)] == [{"round": 0}, {"round": 1}, None]
    with FrameStore((1, 2, 2), 1, {}) as store:
        journal.append({"round": 2, "crc": 5}, store)
    journal.close()
    assert (tmp_path / "journal").read_bytes() == lines + json.dumps(
        {"round": 2, "crc": 5}, separators=(",", ":")
    ).encode() + b"\n"


def test_a_rejected_round_takes_those_after_it_along(tmp_path):
    (tmp_path / "journal").write_bytes(b'{"round": 0}\n{"round": 1}\n{"round": 2}\n')
    journal = Journal(tmp_path / "journal")
    journal.next(), journal.next()
    journal.reject()
    assert journal.next() is None
    journal.close()
    assert (tmp_path / "journal").read_bytes() == b'{"round": 0}\n'


def test_frames_come_back_as_they_were_and_given_ones_are_shared(tmp_path):
    frames = torch.randn(5, 2, 3, 4, 4)
    given = {1: torch.full((3, 4, 4), 0.5)}
    with FrameStore((3, 4, 4), 2, given, tmp_path / "frames") as store:
        for index in (4, 0, 2):
            for sample in (1, 0):
                store.put(index, sample, frames[index, sample])
        assert torch.equal(store.get_all(4), frames[4])
    with FrameStore((3, 4, 4), 2, given, tmp_path / "frames") as store:
        assert torch.equal(store.get(2, 1), frames[2, 1])
        assert torch.equal(store.get_all(0), frames[0])
        assert torch.equal(store.get_all(1), given[1].expand(2, 3, 4, 4))


def test_given_frames_may_differ_from_sample_to_sample():
    own = torch.randn(2, 3, 4, 4)
    with FrameStore((3, 4, 4), 2, {1: own}) as store:
        assert torch.equal(store.get(1, 0), own[0])
        assert torch.equal(store.get(1, 1), own[1])
        assert torch.equal(store.get_all(1), own)
