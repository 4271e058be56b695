"""How fast and how large: what `python -m fasthmr.benchmark` measures, a file for each of its tables."""
