"""The body: SMPL-format files, shape, pose, skinning. `generate.py` makes the free body that comes with the package."""

from fasthmr.body.files import BodyFileError
from fasthmr.body.pose import decode_pose, encode_pose
from fasthmr.body.smpl import BodyMismatchError, BodyModel, BodyOutput, load_body, require_same_body

__all__ = [
    "BodyFileError",
    "BodyMismatchError",
    "BodyModel",
    "BodyOutput",
    "decode_pose",
    "encode_pose",
    "load_body",
    "require_same_body",
]
