"""What a command shows: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Output:
    """Where a command's words go.

    Attributes:
        as_json: the result is one JSON object on stdout; nothing else goes there.
        quiet: no remarks and no progress on stderr.
    """

    as_json: bool = False
    quiet: bool = False

    def note(self, text: str) -> None:
        """A remark for a person, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Something the user should know even when remarks are off."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """The command's result: `data` as JSON, or `text` for a person."""
        print(json.dumps(data) if self.as_json else text, flush=True)
