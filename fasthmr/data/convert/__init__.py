"""From the field's data sets, as downloaded, to our shards: one file a set says its format and reads it.

`track` holds what a reader hands over and turns it into a clip; `source` is the common loop; `reading` is how foreign
files are read. docs/convert.md is for users.
"""

from __future__ import annotations

from fasthmr.data.convert.bedlam import Bedlam, CameraHmr
from fasthmr.data.convert.emdb import Emdb
from fasthmr.data.convert.h36m import Human36M
from fasthmr.data.convert.hmr2_tars import Hmr2Tars
from fasthmr.data.convert.mpi_inf_3dhp import MpiInf3dhp
from fasthmr.data.convert.threedpw import ThreeDPW

#: what each name of the command reads
SETS: dict[str, type[ThreeDPW | Emdb | Bedlam | CameraHmr | Hmr2Tars | Human36M | MpiInf3dhp]] = {
    "threedpw": ThreeDPW,
    "emdb": Emdb,
    "bedlam": Bedlam,
    "camerahmr": CameraHmr,
    "4dhumans": Hmr2Tars,
    "h36m": Human36M,
    "mpi_inf_3dhp": MpiInf3dhp,
}
