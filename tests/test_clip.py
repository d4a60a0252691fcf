import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdm_cli.clip import Clip
from fdm_cli.errors import BadInput, RunFailed
from fdm_cli.video import to_model

FOLDER = Path(tempfile.gettempdir())  # hypothesis has no use for a folder of one test


def levels(*values):
    return [np.full((4, 4, 1), value, np.uint8) for value in values]


@given(st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(1, 9)), min_size=1, max_size=3))
def test_the_last_frames_of_each_video_in_their_order(videos):
    expected = []
    with Clip(4, 1, FOLDER) as clip:
        for count, last in videos:
            values = list(range(len(expected), len(expected) + count))
            kept = clip.add(iter(levels(*values)), last=last)
            expected += values[-last:] if last else values
            assert kept == min(count, last or count)
        assert len(clip) == len(expected)
        for index, value in enumerate(expected):
            assert torch.equal(clip[index], to_model(levels(value)[0][None])[0])
        with pytest.raises(IndexError):
            clip[len(expected)]


def test_the_file_never_holds_more_than_the_last_frames(tmp_path):
    with Clip(4, 1, tmp_path) as clip:
        clip.add(levels(*range(200)), last=3)
        assert clip._file.seek(0, 2) == 3 * 16
        assert torch.equal(torch.stack([clip[i] for i in range(3)]), to_model(np.stack(levels(197, 198, 199))))


def test_frames_are_fitted_and_placed(tmp_path):
    with Clip(2, 3, tmp_path) as clip:
        clip.add([np.full((8, 12, 1), value, np.uint8) for value in (0, 255)])
        placed = clip.placed([5, 9])
        with Clip(2, 3, tmp_path) as other:
            other.add([np.full((5, 5, 3), value, np.uint8) for value in (7, 0, 255)], last=2)
            assert other.sha256() == clip.sha256()
            other.add(levels(0))
            assert other.sha256() != clip.sha256()
        assert dict(placed).keys() == {5, 9}
        assert torch.equal(placed[9], torch.ones(3, 2, 2))
        assert 9 in placed
        assert 0 not in placed
        with pytest.raises(ValueError, match="3 places for 2 frames"):
            clip.placed([1, 2, 3])


def test_too_many_frames_are_refused_as_soon_as_they_come(tmp_path):
    def endless():
        while True:
            yield from levels(1)

    with Clip(4, 1, tmp_path) as clip:
        clip.add(levels(1, 2))
        with pytest.raises(BadInput, match="more than 5 given frames") as caught:
            clip.add(endless(), most=5)
        assert "--use-last" in caught.value.hint
        with pytest.raises(BadInput, match="more than 0 given frames, the whole video is to have 1") as caught:
            clip.add(levels(1), most=0)
        assert "--use-last" not in caught.value.hint
    with Clip(4, 1, tmp_path) as clip:
        assert clip.add(levels(*range(20)), last=5, most=5) == 5
        with pytest.raises(BadInput, match="more than 5 given frames"):
            clip.add(endless(), last=3, most=5)


def test_a_full_disk_is_called_that(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Clip(64, 1, tmp_path) as clip:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            with pytest.raises(RunFailed, match="no space left to write the temporary file of the clip"):
                clip.add([np.zeros((64, 64, 1), np.uint8)] * 4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
