"""What an optimiser step sees, and the learning rate that follows from it where that is asked for."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from callbacks.batch_size import LearningRateScaling, SayBatchSize
from fasthmr.lit.optim import OptimizerConfig


def job(processes: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A trainer with batches of 8, of which 2 are accumulated, and a module."""
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(batch_size=8), world_size=processes, accumulate_grad_batches=2, is_global_zero=True
    )
    return trainer, SimpleNamespace(optimizer_config=OptimizerConfig(lr=1e-3, warmup_steps=7))


@pytest.mark.parametrize(("rule", "lr"), [("linear", 4e-3), ("sqrt", 2e-3)])
def test_the_learning_rate_follows_the_samples_of_a_step(rule, lr):
    trainer, module = job(processes=4)
    LearningRateScaling(reference=16, rule=rule).setup(trainer, module, "fit")
    assert module.optimizer_config.lr == pytest.approx(lr) and module.optimizer_config.warmup_steps == 7


def test_the_batch_is_said_per_process_and_in_all(caplog):
    caplog.set_level(logging.INFO)
    SayBatchSize().on_train_start(*job(processes=4))
    assert "sees 64 samples: batches of 8, on 4 process(es), 2 accumulated; learning rate 0.001" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"), [({"reference": 0}, "reference"), ({"reference": 1, "rule": "x"}, "rule")]
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=f"{message} must be"):
        LearningRateScaling(**settings)
