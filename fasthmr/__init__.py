"""FastHMR: video of people in, 3D human motion out, fast."""

__version__ = "0.1.0"
