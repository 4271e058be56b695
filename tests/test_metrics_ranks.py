"""Metrics over two processes equal those of one, for any split of the sequences, an empty share included."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fasthmr.metrics import PROTOCOLS, BestConstantError, PoseErrors

CLIPS = 11


def _clip(index: int) -> dict[str, torch.Tensor]:
    """Clips of different lengths, so that a mean of the ranks' means would be wrong."""
    generator = torch.Generator().manual_seed(index)
    frames = 6 + index
    pred_joints, target_joints = torch.randn(2, 1, frames, 24, 3, generator=generator) * (1 + index)
    pred_vertices, target_vertices = torch.randn(2, 1, frames, 30, 3, generator=generator)
    return {
        "pred_joints": pred_joints,
        "target_joints": target_joints,
        "pred_vertices": pred_vertices,
        "target_vertices": target_vertices,
        "valid": torch.rand(1, frames, generator=generator) > 0.1,
        "fps": torch.tensor([30.0]),
    }


def _evaluate(indices: range) -> dict[str, torch.Tensor]:
    errors, constant = PoseErrors(PROTOCOLS["body-24"]), BestConstantError(PROTOCOLS["body-24"])
    for index in indices:
        clip = _clip(index)
        errors.update(**clip)
        constant.update(clip["target_joints"], clip["valid"])
    return errors.compute() | {"best_constant_mm": constant.compute()}


def _rank(rank: int, shares: list[tuple[range, range]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = [_evaluate(share[rank]) for share in shares]
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_two_ranks_equal_one(tmp_path):
    # 7/4, 5/0, 0/5 and 0/0 clips; one pair of processes serves all, since starting them is what takes the time.
    shares = [(range(7), range(7, 11)), (range(5), range(0)), (range(0), range(5)), (range(0), range(0))]
    mp.spawn(_rank, args=(shares, str(tmp_path)), nprocs=2)

    for number, (first, second) in enumerate(shares):
        alone = _evaluate(range(len(first) + len(second)))
        for rank in range(2):
            together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[number]
            assert together.keys() == alone.keys()
            for name, value in alone.items():
                rtol = 1e-5 if name == "best_constant_mm" else 1e-14
                torch.testing.assert_close(together[name], value, rtol=rtol, atol=0, equal_nan=True)
