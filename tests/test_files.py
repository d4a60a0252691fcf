from fdm_cli.files import partial_name, remove_partial


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
