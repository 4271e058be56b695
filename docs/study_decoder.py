"""What makes the diffusion decoder work: latents, objective, representation, merging, steps, inverse kinematics.

    python docs/study_decoder.py ENCODER --features_data DATA --motion TRAIN --motion_val VAL --out OUT
    python docs/study_decoder.py ENCODER --features_data DATA --out OUT --quick      tiny nets, to see that all works

ENCODER is an encoder's checkpoint, DATA holds the sets `train` and `val` of clips, TRAIN and VAL are AMASS-format
folders or packs. Motion priors train as conf/prior_tiny.yaml does, decoders as conf/decoder_tiny.yaml, on features of
ENCODER with its token merging (192 -> 90 tokens if it has none), each run on one thread, `--jobs` at a time. Tables:

1. latents of the prior (FastHMR, Tab. 3)     5. with and without merging tokens (Tab. 8)
2. objective of the denoiser (Tab. 5)         6. denoising steps
3. what is diffused, and from which steps     7. naive or adaptive inverse kinematics
4. joints and twists or 6D (Tab. 7)           8. a Gaussian filter instead, and the detail that a prior loses

Tables 2 to 8 are of the first of `--sizes`. Objectives are compared with steps drawn evenly, as in the paper; all else
is as conf/decoder_tiny.yaml has it. Finished runs are not repeated and interrupted ones go on, if they are of the same
encoder, data and settings; otherwise it says what differs. Numbers are the modules' own validation: of the
prior's windows of VAL without pictures, and of all windows of DATA/val; those of several seeds are averaged. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from study_runs import LAST_CHECKPOINT, StudyError, digest, locked, print_table, train

from datamodules.features import FeatureDataModule
from fasthmr.body import decode_pose, encode_pose, load_body
from fasthmr.body.pose import Representation, pose_dim
from fasthmr.checkpoint import encoder_id, load_encoder, read_checkpoint, read_header, save_encoder
from fasthmr.data.store import ClipStore
from fasthmr.data.synth.motion import load_motion_source
from fasthmr.geometry.smoothing import smoothed
from fasthmr.lit.decoder import DenoiserSizes, DiffusionDecoderModule
from fasthmr.merging import TokenMerging
from fasthmr.metrics import PROTOCOLS, PoseErrors
from fasthmr.models.sampler import DiffusionConfig, LatentDiffusion, Objective
from fasthmr.recipe import content_sha256

PRIOR_CONFIG, DECODER_CONFIG = Path("conf/prior_tiny.yaml"), Path("conf/decoder_tiny.yaml")
SIZES = ("9x192", "9x96", "27x192", "3x192")
STEPS = (1, 2, 4, 10)
#: deviations of the filters that stand in for a decoder, frames
FILTERS = (1.0, 2.0, 3.0)
OBJECTIVES: dict[Objective, str] = {"noise": "noise", "v": "v", "both": "v and noise"}
#: `DiffusionConfig.last_step_share` of training as in the paper, and `.residual` of what is diffused
EVENLY = 0.0
DIFFUSED = {False: "poses", True: "corrections to the encoder's"}
REPRESENTATIONS: dict[Representation, str] = {"joints_twists": "joints and twists", "rotations_6d": "6D rotations"}
#: features of the encoder with its tokens merged, and with all of them
MERGED, ALL_TOKENS = "merged", "all"
DECODER_METRICS = ("pa_mpjpe_mm", "mpjpe_mm", "accel_m_s2")

Metrics = Mapping[str, float]


def _configured(config: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / config).read_text())
    return values


CONFIGURED = DiffusionConfig(**_configured(DECODER_CONFIG)["model"]["init_args"]["diffusion"])


@dataclass(frozen=True)
class PriorRun:
    """One training of a motion prior."""

    latents: int
    dim: int
    seed: int
    representation: Representation = "joints_twists"

    @property
    def name(self) -> str:
        return f"prior_{self.latents}x{self.dim}_{self.representation}_seed{self.seed}"


@dataclass(frozen=True)
class DecoderRun:
    """One training of a decoder of a prior's latents, on features of the encoder with some of its tokens or all."""

    prior: PriorRun
    objective: Objective = "both"
    last_step_share: float = CONFIGURED.last_step_share
    residual: bool = CONFIGURED.residual
    tokens: str = MERGED

    @property
    def name(self) -> str:
        what = f"{self.objective}_{'corrections' if self.residual else 'poses'}_last{self.last_step_share:g}"
        return f"decoder_{what}_{self.tokens}_of_{self.prior.name}"

    @property
    def diffusion(self) -> dict[str, Any]:
        return {
            "objective": self.objective, "last_step_share": self.last_step_share, "residual": self.residual,
            "detail": CONFIGURED.detail if self.residual else 0.0,
        }  # fmt: skip


@dataclass(frozen=True)
class Smaller:
    """What `--quick` makes smaller: settings that lie on top of those of the config files."""

    vae: dict[str, Any] = field(default_factory=dict)
    denoiser: dict[str, Any] = field(default_factory=dict)
    motions: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    sizes: Sequence[str] = SIZES


QUICK = Smaller(
    vae={"window": 12, "depth": 3, "heads": 2, "mlp_dim": 32},
    denoiser={"depth": 3, "heads": 2, "mlp_dim": 32},
    motions={"windows_per_epoch": 8, "val_windows": 4, "batch_size": 4, "workers": 0},
    features={"workers": 0},
    epochs=2,
    sizes=("3x32", "2x32"),
)


@dataclass(frozen=True)
class Study:
    """What all runs share.

    Args:
        encoder: its checkpoint.
        data: folder of the sets `train` and `val`.
        motion, motion_val: of the priors.
        procedural_share: of windows of the priors' training that are procedural motion.
        out: folder to write to.
        smaller: what is smaller than in the config files.
        prior_epochs, epochs: of a prior and of a decoder; None: the config files'.
    """

    encoder: Path
    data: Path
    motion: str
    motion_val: str
    procedural_share: float
    out: Path
    smaller: Smaller
    prior_epochs: int | None
    epochs: int | None

    # ---- what runs are made from ---------------------------------------------------------------------------------

    @cached_property
    def encoders(self) -> dict[str, Path]:
        """Files of the encoder that merges tokens and of the one that does not; written anew."""
        hmr, body = load_encoder(self.encoder), read_header(self.encoder).body
        files = {}
        for name, merging in ((MERGED, hmr.config.token_merging or TokenMerging()), (ALL_TOKENS, None)):
            hmr.set_token_merging(merging)
            files[name] = self.out / f"encoder_{name}.ckpt"
            save_encoder(files[name], hmr, body)
        return files

    @cached_property
    def data_digests(self) -> dict[str, str]:
        return {name: digest(ClipStore(self.data / name).manifest.shards) for name in ("train", "val")}

    @cached_property
    def motion_digests(self) -> dict[str, str]:
        named = {"motion": self.motion, "motion_val": self.motion_val}
        return {name: load_motion_source(source).fingerprint() for name, source in named.items()}

    def features(self, tokens: str) -> dict[str, Any]:
        """Settings of the decoders' data."""
        configured = _configured(DECODER_CONFIG)["data"]["init_args"]
        return {
            "train": str(self.data / "train"), "val": str(self.data / "val"), "make_train": None, "make_val": None,
            "encoder": str(self.encoders[tokens]), "folder": str(self.out / "features"), "workers": 1,
            "window": self._vae()["window"],
            "batch_size": min(configured["batch_size"], len(ClipStore(self.data / "train"))),
            **self.smaller.features,
        }  # fmt: skip

    def _vae(self) -> dict[str, Any]:
        return {**_configured(PRIOR_CONFIG)["model"]["init_args"]["vae"], **self.smaller.vae}

    # ---- runs ------------------------------------------------------------------------------------------------------

    def train_prior(self, run: PriorRun) -> Metrics:
        """Its last validation's metrics."""
        numbers = {"latents": run.latents, "dim": run.dim, "representation": run.representation}
        vae = {**self._vae(), **numbers, "pose_dim": pose_dim(run.representation)}
        if vae["dim"] % vae["heads"]:
            raise StudyError(f"the width of latents must be a multiple of {vae['heads']}, the heads, got {run.dim}")
        motions = {
            "window": vae["window"], "procedural_share": self.procedural_share, **self.smaller.motions,
        }  # fmt: skip
        epochs = self.prior_epochs or _configured(PRIOR_CONFIG)["trainer"]["max_epochs"]
        overlay = {
            "seed_everything": run.seed,
            "motion": self.motion,
            "motion_val": self.motion_val,
            "model": {"init_args": {"vae": vae}},
            "data": {"init_args": motions},
            "trainer": {"max_epochs": epochs, "check_val_every_n_epoch": epochs},
        }
        made_from = {"vae": vae, "motions": motions, "seed": run.seed, "epochs": epochs, **self.motion_digests}
        return train(PRIOR_CONFIG, overlay, self.out / run.name, made_from)

    def train_decoder(self, run: DecoderRun) -> Metrics:
        """Its last validation's metrics; its prior must be trained."""
        prior, encoder = self.out / run.prior.name / LAST_CHECKPOINT, self.encoders[run.tokens]
        configured = _configured(DECODER_CONFIG)
        epochs = self.epochs or configured["trainer"]["max_epochs"]
        settings = configured["model"]["init_args"]
        denoiser = {**settings["denoiser"], **self.smaller.denoiser}
        model = {
            "prior": str(prior), "encoder": str(encoder), "denoiser": denoiser, "diffusion": run.diffusion,
        }  # fmt: skip
        overlay = {
            "seed_everything": run.prior.seed,
            "model": {"init_args": model},
            "data": {"init_args": self.features(run.tokens)},
            "trainer": {"max_epochs": epochs, "check_val_every_n_epoch": epochs},
        }
        made_from = {
            "prior": content_sha256(prior), "encoder": encoder_id(load_encoder(encoder)), "denoiser": denoiser,
            "diffusion": run.diffusion, "batch_size": self.features(run.tokens)["batch_size"],
            "seed": run.prior.seed, "epochs": epochs, **self.data_digests,
        }  # fmt: skip
        return train(DECODER_CONFIG, overlay, self.out / run.name, made_from)

    def validate(
        self, run: DecoderRun, steps: int = 1, adaptive_ik: bool = False, detail: float | None = None
    ) -> Metrics:
        """Validate a trained decoder with other settings than those that it was validated with."""
        run_dir = self.out / run.name
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        settings = config["model"]["init_args"]
        module = DiffusionDecoderModule(
            settings["prior"],
            settings["encoder"],
            DenoiserSizes(**settings["denoiser"]),
            DiffusionConfig(**settings["diffusion"] | ({} if detail is None else {"detail": detail})),
            steps=steps,
            ema_decay=settings["ema_decay"],
            protocol=settings["protocol"],
            adaptive_ik=adaptive_ik,
        )
        module.load_state_dict(read_checkpoint(run_dir / LAST_CHECKPOINT)["state_dict"])
        trainer = L.Trainer(
            accelerator=config["trainer"]["accelerator"], devices=1, precision=config["trainer"]["precision"],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
        )  # fmt: skip
        return dict(
            trainer.validate(module, datamodule=FeatureDataModule(**self.features(run.tokens)), verbose=False)[0]
        )

    @torch.no_grad()
    def filtered(self, deviation: float) -> Metrics:
        """Errors of the encoder alone, whose poses go through a Gaussian filter of so many frames."""
        body, errors = load_body(), PoseErrors(PROTOCOLS["body-24"])
        data = FeatureDataModule(**self.features(MERGED))
        data.prepare_data()
        data.setup("validate")
        for batch in data.val_dataloader():
            betas = errors.protocol.clip_betas(batch.predicted_betas, batch.valid)
            poses = smoothed(encode_pose(batch.predicted_rotations, betas, body), deviation, batch.valid)
            shape, true_betas = betas.shape[:2], batch.betas[:, None].expand_as(betas)
            ours, true = (
                body(rotations.flatten(0, 1), shapes.flatten(0, 1)).joints.unflatten(0, shape)
                for rotations, shapes in ((decode_pose(poses, betas, body), betas), (batch.rotations, true_betas))
            )
            errors.update(ours, true, None, None, batch.valid, batch.fps)
        return {f"val/{name}": float(value) for name, value in errors.compute().items()}

    def compute_features(self) -> None:
        """Of both encoders, before runs that share them begin side by side."""
        for tokens in (MERGED, ALL_TOKENS):
            FeatureDataModule(**self.features(tokens)).prepare_data()


# ---- tables ---------------------------------------------------------------------------------------------------------


@dataclass
class Tables:
    """All runs, and the tables of their results.

    Args:
        study: what trains them.
        sizes: (latents, width) of the priors, the first of which is that of tables 2 to 6.
        seeds: of every run.
    """

    study: Study
    sizes: Sequence[tuple[int, int]]
    seeds: Sequence[int]
    priors: dict[PriorRun, Metrics] = field(default_factory=dict)
    decoders: dict[DecoderRun, Metrics] = field(default_factory=dict)

    def train(self, jobs: int) -> None:
        """Do all runs."""
        self.study.compute_features()
        decoders = dict.fromkeys(
            run
            for seed in self.seeds
            for run in (
                *(self._run(seed, size) for size in self.sizes),
                *(self._run(seed, objective=objective, last_step_share=EVENLY) for objective in OBJECTIVES),
                *(self._run(seed, **settings) for settings in self._diffused()),
                *(self._run(seed, representation=representation) for representation in REPRESENTATIONS),
                self._run(seed, tokens=ALL_TOKENS),
            )
        )
        priors = dict.fromkeys(run.prior for run in decoders)
        with ThreadPoolExecutor(jobs) as pool:
            self.priors = dict(zip(priors, pool.map(self.study.train_prior, priors), strict=True))
            self.decoders = dict(zip(decoders, pool.map(self.study.train_decoder, decoders), strict=True))

    def print(self) -> None:
        """All tables."""
        errors = ["PA-MPJPE, mm", "MPJPE, mm", "Accel, m/s²", "Accel / encoder's"]
        encoder = self._decoder(prefix="per_frame_")
        print_table(
            "Latents of the prior (FastHMR, Tab. 3)",
            ["latents", "prior's reconstruction: MPJPE, mm", "Accel, m/s²", *errors],
            [
                ["encoder alone, per frame", "", "", *encoder],
                *(
                    [f"{n} x {d}", *self._prior(size=(n, d)), *self._decoder(size=(n, d))] for n, d in self.sizes
                ),
            ],
        )  # fmt: skip
        print_table(
            "Objective (Tab. 5)",
            ["the network predicts", "sampled from step", *errors],
            [
                [
                    name,
                    LatentDiffusion(DiffusionConfig(objective=o)).timesteps(1)[0],
                    *self._decoder(objective=o, last_step_share=EVENLY),
                ]
                for o, name in OBJECTIVES.items()
            ],
        )
        print(
            f"\nSteps are 0 to {DiffusionConfig().steps - 1}. At the last one the input is nothing but noise, so that "
            "to predict it says nothing of the latents: noise is predicted one step earlier."
        )
        print_table(
            "What is diffused, and from which steps",
            ["diffused are", "trained at the last step", *errors],
            [
                [DIFFUSED[s["residual"]], _share(s["last_step_share"]), *self._decoder(**s)]
                for s in self._diffused()
            ],
        )  # fmt: skip
        print_table(
            "Representation (Tab. 7)",
            ["poses are", "numbers", "prior's reconstruction: MPJPE, mm", "Accel, m/s²", *errors],
            [
                [name, pose_dim(r), *self._prior(representation=r), *self._decoder(representation=r)]
                for r, name in REPRESENTATIONS.items()
            ],
        )
        print_table(
            "Merging tokens (Tab. 8)",
            ["features of the encoder with", "system", *errors],
            [
                [name, system, *self._decoder(tokens=tokens, prefix=prefix)]
                for tokens, name in ((ALL_TOKENS, "all tokens"), (MERGED, "merged tokens"))
                for system, prefix in (("encoder alone", "per_frame_"), ("encoder and decoder", ""))
            ],
        )
        print_table(
            "Denoising steps, of the same weights",
            ["steps", *errors],
            [[steps, *self._validated(steps=steps)] for steps in STEPS],
        )
        print_table(
            "Inverse kinematics, of the same weights",
            ["inverse kinematics", *errors],
            [[name, *self._validated(adaptive_ik=how)] for name, how in (("naive", False), ("adaptive", True))],
        )
        (per_frame,) = _means([*self.decoders.values()], ["per_frame_accel_m_s2"])
        filtered = {deviation: self.study.filtered(deviation) for deviation in FILTERS}
        print_table(
            "A Gaussian filter instead, and the detail that the prior loses",
            ["system", *errors],
            [
                ["encoder alone, no filter", *encoder],
                *(
                    [f"filtered, deviation of {d:g} frames", *_errors([{**m, "val/per_frame_accel_m_s2": per_frame}])]
                    for d, m in filtered.items()
                ),
                ["decoder, detail stays lost", *self._validated(detail=0.0)],
                [f"decoder, detail filtered by {CONFIGURED.detail:g} frames", *self._decoder()],
            ],
        )

    @staticmethod
    def _diffused() -> list[dict[str, Any]]:
        """Settings of the rows of table 3."""
        shares = dict.fromkeys((EVENLY, CONFIGURED.last_step_share))
        return [{"residual": residual, "last_step_share": share} for residual in DIFFUSED for share in shares]

    def _run(self, seed: int, size: tuple[int, int] | None = None, **settings: Any) -> DecoderRun:
        representation: Representation = settings.pop("representation", "joints_twists")
        return DecoderRun(PriorRun(*(size or self.sizes[0]), seed, representation), **settings)

    def _prior(self, **settings: Any) -> list[float]:
        results = [self.priors[self._run(seed, **settings).prior] for seed in self.seeds]
        return _means(results, ["mpjpe_mm", "accel_m_s2"])

    def _decoder(self, prefix: str = "", **settings: Any) -> list[object]:
        return _errors([self.decoders[self._run(seed, **settings)] for seed in self.seeds], prefix)

    def _validated(self, **settings: Any) -> list[object]:
        return _errors([self.study.validate(self._run(seed), **settings) for seed in self.seeds])


def _share(last_step_share: float) -> str:
    return f"{last_step_share:.0%} of windows" if last_step_share else "as any other"


def _errors(results: Sequence[Metrics], prefix: str = "") -> list[object]:
    """Cells of a row: errors, and the acceleration error over that of the encoder alone."""
    errors = _means(results, [prefix + name for name in DECODER_METRICS])
    (per_frame,) = _means(results, ["per_frame_accel_m_s2"])
    return [*errors, f"{errors[-1] / per_frame:.2f}"]


def _means(results: Sequence[Metrics], names: Sequence[str]) -> list[float]:
    return [sum(metrics[f"val/{name}"] for metrics in results) / len(results) for name in names]


# ---- the command ----------------------------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    latents, times, dim = text.partition("x")
    if not times or not latents.isdecimal() or not dim.isdecimal():
        raise StudyError(f"--sizes must be LATENTSxWIDTH, such as 9x192, got {text!r}")
    return int(latents), int(dim)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--features_data", type=Path, required=True, help="folder of the clip sets train and val")
    parser.add_argument("--motion", default="procedural", help="of priors: AMASS-format folder or pack, or procedural")
    parser.add_argument("--motion_val", default="procedural", help="the same for their validation")
    parser.add_argument("--procedural_share", type=float, default=0.0, help="of windows from MOTION's training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", help=f"of the latents; default: {' '.join(SIZES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prior_epochs", type=int, help=f"default: {PRIOR_CONFIG}'s")
    parser.add_argument("--epochs", type=int, help=f"of the decoders; default: {DECODER_CONFIG}'s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="tiny nets and few steps: numbers mean nothing")
    options = parser.parse_args(arguments)
    try:
        for name in ("prior_epochs", "epochs", "jobs"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise StudyError(f"--{name} must be 1 or more, got {getattr(options, name)}")
        smaller = QUICK if options.quick else Smaller()
        study = Study(
            options.encoder, options.features_data, options.motion, options.motion_val, options.procedural_share,
            options.out, smaller, options.prior_epochs or smaller.epochs, options.epochs or smaller.epochs,
        )  # fmt: skip
        tables = Tables(study, [_size(text) for text in options.sizes or smaller.sizes], options.seeds)
        torch.set_num_threads(1)
        with locked(options.out):
            tables.train(options.jobs)
            tables.print()
    except (StudyError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
