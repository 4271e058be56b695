"""Errors of pose and shape: pure functions, torchmetrics classes, evaluation protocols."""

from fasthmr.metrics.classes import BestConstantError, PoseErrors
from fasthmr.metrics.protocols import PROTOCOLS, Protocol

__all__ = ["PROTOCOLS", "BestConstantError", "PoseErrors", "Protocol"]
