"""Evaluation: what several systems say about the same frames, compared with the truth, sequence by sequence.

A system is an encoder, maybe with a decoder. Every clip goes as a whole through every system: each encoder sees its
frames once, however many systems share it, and a decoder all of its features. Clips are dealt out to the processes of a
job, what was measured is gathered by clip, and everything else is computed from that, on each of them.
"""

from fasthmr.evaluation.config import EvaluationConfig
from fasthmr.evaluation.run import evaluate
from fasthmr.evaluation.systems import SystemConfig, parse_systems
from fasthmr.evaluation.writing import TABLE, VIDEO, describe

__all__ = ["TABLE", "VIDEO", "EvaluationConfig", "SystemConfig", "describe", "evaluate", "parse_systems"]
