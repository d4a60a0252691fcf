"""The `fdm` command; also as `python -m fdm_cli`, which is what torchrun starts."""

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line, see `cli.main`; an interruption while it is being loaded ends quietly, too."""
    signal.signal(signal.SIGINT, _leave)
    from fdm_cli.cli import main as command_line

    command_line.main()


def _leave(*_: object) -> NoReturn:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
