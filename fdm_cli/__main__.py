"""Lets `python -m fdm_cli` (and torchrun's `-m fdm_cli`) be the `fdm` command."""

from fdm_cli.cli.main import main

if __name__ == "__main__":
    main()
