import time

import pytest

from fdm_cli.errors import BadInput
from fdm_cli.yaml_file import MAX_BYTES, parse, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-3", 1e-3),
        ("a: 1e3", 1000.0),
        ("a: .5", 0.5),
        ("a: 0777", "0777"),
        ("a: 12:30", "12:30"),
        ("a: yes", "yes"),
        ("a: True", True),
        ("a: '1'", "1"),
        ("a:", None),
        ("a: 99999999999999999999", 99999999999999999999),
        ("a: 2024-01-01", "2024-01-01"),
        ("a: e", "e"),
        ("a: e1", "e1"),
        ("a: .e2", ".e2"),
        ("a: -e3", "-e3"),
        ("a: .5e2", 50.0),
        ("a: 5.", 5.0),
        ("a: .", "."),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    (node,) = parse(text, "f.yaml").mapping("f").values()
    assert node.value == value
    assert type(node.value) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3", 3, "duplicate key 'a'"),
        ("a: &x 1\nb: *x", 1, "anchors and aliases"),
        ("x: 1\n<<: {a: 1}", 2, "merge keys"),
        ("a: !!python/object:os.system x", 1, "tags"),
        ("a: !!str 1", 1, "tags"),
        ("a: .nan", 1, "finite"),
        ("a: 1e999", 1, "too large"),
        ("a: [1, 2", 1, "not valid YAML"),
        ("? [a]\n: 1", 1, "single word"),
        ("a: 1\n---\nb: 2", 2, "not valid YAML"),
        ("[" * 40 + "]" * 40, 1, "nested"),
    ],
)
def test_refuses_with_file_and_line(text, line, says):
    with pytest.raises(BadInput, match=says) as caught:
        parse(text, "f.yaml")
    assert caught.value.message.startswith(f"f.yaml:{line}:")


def test_alias_bomb_is_refused_at_once():
    bomb = "a: &a [x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    start = time.process_time()
    with pytest.raises(BadInput):
        parse(bomb, "bomb.yaml")
    assert time.process_time() - start < 0.5


def test_deep_nesting_is_an_error_not_a_crash():
    with pytest.raises(BadInput):
        parse("{a: " * 5000, "deep.yaml")


def test_an_escape_beyond_unicode():
    with pytest.raises(BadInput, match="not valid YAML"):
        parse('a: "\\UFFFFFFFF"', "f.yaml")


def test_unusable_files(tmp_path):
    (tmp_path / "big.yaml").write_bytes(b"a" * (MAX_BYTES + 1))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.yaml").write_bytes(b"# nothing\n")
    for name in ("big.yaml", "binary.yaml", "empty.yaml", "missing.yaml", "."):
        with pytest.raises(BadInput, match=r".+"):
            read(tmp_path / name)


def test_unknown_key_names_the_nearest():
    node = parse("lenght: 3", "f.yaml")
    with pytest.raises(BadInput, match=r"f.yaml:1: unknown key 'lenght'") as caught:
        node.refuse_unknown(["length", "window"], "the scheme")
    assert caught.value.hint == "did you mean 'length'?"
