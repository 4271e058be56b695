"""How systems are evaluated: the options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.encoding import People
from fasthmr.metrics import PROTOCOLS
from fasthmr.precision import PrecisionChoice, require_precision

#: `boxes`, `intrinsics`: those that the clips were stored with
TRUTH = "truth"
#: `intrinsics`: of each image its diagonal
DIAGONAL = "diagonal"


@dataclass(frozen=True)
class EvaluationConfig:
    """How systems are evaluated.

    Args:
        protocol: which joints, root and frames count.
        frames_per_clip: so many consecutive frames from the middle of each clip; all if not given.
        max_clips: so many clips, spread evenly over the set; all if not given.
        body: the neutral body, which predictions are of: `free`, or a body file in SMPL's format.
        body_male: the male body, for clips whose labels are of it; the one that the set was converted with.
        body_female: the female body.
        regressor: .npy or .pkl file of the matrix that the protocol's joints are regressed with, if it has one; if not
            given, it is looked for beside the body file.
        boxes: where the network looks: `truth`, the boxes that clips were stored with, or an .npz file of detections
            (docs/evaluate.md).
        intrinsics: the focal length that CameraHMR is told: `truth`, that of the clips; `diagonal`, of the image; or an
            .npz file of those of all clips, such as HumanFoV's (docs/evaluate.md).
        trained_on: what the systems were trained on, in words, for the table: checkpoints do not say, and the errors on
            3DPW depend on whether its training split is among it.
        precision: of the encoders: bf16, 32, or auto (bf16 where the device has instructions for it); all else is
            computed in float32.
        mask_people: whose tokens are protected: of the `subject`, or of `all`.
        steps: denoising steps of decoders.
        bootstrap: draws of sequences that confidence intervals are made from.
        seed: of these draws.
        show: clip whose errors and jitter are drawn over time: its number among those evaluated, or its key.
        video: clip that is shown side by side in an mp4: its number among those evaluated, or its key.
        speed: measure frames/s.
        batch: frames at a time when speed is measured.
        rounds: measurements of each system.
        workers: processes that decode pictures.
        device: cpu or cuda; the best there is if not given.

    Raises:
        ValueError: a value that cannot be; names it.
    """

    protocol: str = "body-24"
    frames_per_clip: int | None = None
    max_clips: int | None = None
    body: str = "free"
    body_male: str | None = None
    body_female: str | None = None
    regressor: str | None = None
    boxes: str = TRUTH
    intrinsics: str = TRUTH
    trained_on: str | None = None
    precision: PrecisionChoice = "auto"
    mask_people: People = "subject"
    steps: int = 1
    bootstrap: int = 2000
    seed: int = 0
    show: int | str = 0
    video: int | str | None = None
    speed: bool = True
    batch: int = 8
    rounds: int = 5
    workers: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        require_precision(self.precision)
        for name, least in (
            ("frames_per_clip", 1), ("max_clips", 1), ("steps", 1), ("bootstrap", 1), ("batch", 1), ("rounds", 1),
            ("workers", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
