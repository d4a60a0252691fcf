"""Flexible Diffusion Modeling of Long Videos (arXiv 2205.11495) on the command line."""

__version__ = "0.1.0"
