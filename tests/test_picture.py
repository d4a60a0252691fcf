import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fdm_cli.errors import BadInput
from fdm_cli.picture import GAP, LABEL_HEIGHT, LATENT, OBSERVED, PAPER, contact_sheet, spread, write_png

FRAMES = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6, 1)


def test_frames_stand_in_rows_enlarged_without_blur():
    sheet = contact_sheet(FRAMES, columns=2)  # of 4 x 6 pixels: 11 times larger
    assert sheet.shape == (3 * (44 + 2 * GAP), 2 * (66 + 2 * GAP), 3)
    for index, frame in enumerate(FRAMES):
        row, column = divmod(index, 2)
        top, left = row * (44 + 2 * GAP) + GAP, column * (66 + 2 * GAP) + GAP
        tile = sheet[top : top + 44, left : left + 66]
        assert np.array_equal(tile[5::11, 5::11], frame.repeat(3, -1))
        assert np.array_equal(tile, frame.repeat(11, 0).repeat(11, 1).repeat(3, -1))
    assert (sheet[2 * (44 + 2 * GAP) :, 66 + 2 * GAP :] == PAPER).all()


@pytest.mark.parametrize(("side", "tile"), [(1, 64), (8, 64), (32, 64), (48, 96), (64, 64), (200, 200), (1000, 250)])
def test_frames_are_scaled_to_be_seen(side, tile):
    sheet = contact_sheet(np.zeros((1, side, side, 3), np.uint8))
    assert sheet.shape == (tile + 2 * GAP, tile + 2 * GAP, 3)


def test_markers_differ_in_colour_and_in_pattern():
    one = FRAMES[:1]
    borders = [(contact_sheet(one, markers=[marker]) == marker.colour).all(-1) for marker in (OBSERVED, LATENT)]
    solid, dashed = (int(border.sum()) for border in borders)
    assert 0.3 * solid < dashed < 0.7 * solid
    plain = contact_sheet(one, markers=[None])
    height, width = plain.shape[:2]
    for border in borders:
        assert not border[GAP : height - GAP, GAP : width - GAP].any()
    assert np.array_equal(plain, contact_sheet(one))


def test_labels_take_their_room_and_stay_in_it():
    plain = contact_sheet(FRAMES, columns=5)
    labelled = contact_sheet(FRAMES, columns=5, labels=["0", "1", "", "a label that is far too long for it", ""])
    assert labelled.shape[0] == plain.shape[0] + LABEL_HEIGHT
    assert np.array_equal(labelled[LABEL_HEIGHT + GAP :], plain[GAP:])
    strips = np.split(labelled[: LABEL_HEIGHT + GAP - 1], 5, axis=1)
    assert [bool((strip != 255).any()) for strip in strips] == [True, True, False, True, False]


def test_wrong_numbers_are_errors():
    for options in ({"labels": ["0"]}, {"markers": [None]}):
        with pytest.raises(ValueError, match="5 frames"):
            contact_sheet(FRAMES, **options)
    with pytest.raises(ValueError, match="0 frames"):
        contact_sheet([])


@pytest.mark.parametrize(("frames", "most"), [(1, 160), (160, 160), (161, 160), (100_000, 160), (10, 1), (10, 2)])
def test_spread_goes_from_the_first_to_the_last(frames, most):
    chosen = spread(frames, most)
    assert len(chosen) == len(set(chosen)) == min(frames, most)
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] == (frames - 1 if most > 1 else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels(tmp_path, channels):
    array = FRAMES[0].repeat(channels, -1)
    write_png(tmp_path / "a.png", array)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image).reshape(array.shape), array)
    with pytest.raises(BadInput, match="exists already"):
        write_png(tmp_path / "a.png", array)
    write_png(tmp_path / "a.png", 255 - array, force=True)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image).reshape(array.shape), 255 - array)
    with pytest.raises(BadInput, match="no folder"):
        write_png(tmp_path / "none" / "a.png", array)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_full_disk_leaves_no_picture(tmp_path):
    code = (
        "import resource, sys, numpy; from fdm_cli.picture import write_png;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "write_png(sys.argv[1], numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), numpy.uint8))"
    )
    command = [sys.executable, "-c", code, f"{tmp_path}/a.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"RunFailed: no space left to write {tmp_path}/a.png" in done.stderr
    assert list(tmp_path.iterdir()) == []
