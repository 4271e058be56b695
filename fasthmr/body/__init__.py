"""The body: SMPL-format files, shape, pose, skinning."""

from fasthmr.body.smpl import BodyMismatchError, BodyModel, BodyOutput, load_body, require_same_body

__all__ = ["BodyMismatchError", "BodyModel", "BodyOutput", "load_body", "require_same_body"]
