"""What the README quotes from the program: help texts and the CI snippet.

    python -m tests.readme          rewrites the help texts in README.md

`tests/test_readme.py` fails when they drift.
"""

import re
from pathlib import Path

from tests.conftest import ROOT, fdm

README = ROOT / "README.md"
_HELP = re.compile(r"(<!-- help: fdm ?(?P<command>[\w -]*?) ?-->\n```text\n)(?P<text>.*?)(```\n)", re.DOTALL)


def with_current_help(text: str) -> str:
    """The README with every quoted help text as the program prints it today."""

    def current(match: re.Match[str]) -> str:
        printed = fdm(*match["command"].split(), "--help").stdout
        return f"{match[1]}{printed.rstrip()}\n{match[4]}"

    return _HELP.sub(current, text)


def snippet(heading: str, language: str = "bash") -> str:
    """The first code block of a language under a heading."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return section.split(f"```{language}\n", 1)[1].split("```", 1)[0]


if __name__ == "__main__":
    Path(README).write_text(with_current_help(README.read_text(encoding="utf-8")), encoding="utf-8")
