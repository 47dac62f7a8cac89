"""Settings of a search that are rarely changed: the fields of `nas-search --config FILE`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nas.steps import MOST_IMAGES, MOST_RATE, PRECISIONS
from nas.taylor import Method
from nas.trajectory import SamplerName, Score
from supernet.arch import MOST_SIDE
from supernet.errors import InputError, placed, unknown
from supernet.files import checked_fields, read_yaml
from supernet.metapath import Noise

Paths = Literal["single", "fair", "elastic"]

COUNTS = ("accumulate", "score_images", "recalibration_images", "finalist_epochs", "init_epochs", "optuna_trials")
UNBOUND = ("cache_gb", "optuna_storage")  # may be lowered where memory runs out; another address, with a password
FREE = (*UNBOUND, "optuna_sampler", "optuna_trials", "additivity_networks", "drop_pairs")
"""Of a search with another one's supernet."""
OBJECTIVES = ("latency", "mes", "throughput")
MES = ("mes_size_unit", "mes_latency_unit_ms", "mes_size_alpha", "mes_latency_alpha")
NOT_NEGATIVE = (
    "image_size",
    "weight_epochs",
    "mixture_epochs",
    "images_per_epoch",
    "recovery_steps",
    "distillation_steps",
    "drop_pairs",
    "max_params",
    "max_macs",
)
IMPORTANCES = ("auto", "logits", "drops")
MOST_EPOCHS = 100_000
RATES = ("learning_rate", "logit_learning_rate", "tau_start", "tau_end", "layer_scale", "clip_norm")


@dataclass(frozen=True)
class SupernetSettings:
    """How a supernet is trained and its sub-networks are scored: the fields of `nas-search --config FILE`.

    First the weights alone learn (`weight_epochs`), in the way that `paths` says; then weights and logits learn by the
    Gumbel-Softmax mixture (`mixture_epochs`), the temperature falling from `tau_start` to `tau_end`. Either may be left out:
    no `weight_epochs` is EfficientFormer's own way (with `noise: uniform`, and more `mixture_epochs`, as each has a quarter of
    the images), no `mixture_epochs` leaves the logits untrained.
    """

    image_size: int = 0
    """Pixels to train at; 0: the data's size, enlarged until the last stage's map is 4x4, at most the deployed size."""
    weight_epochs: int = 8
    mixture_epochs: int = 2
    mirror: bool = True
    """Whether training images are mirrored, left to right, half of the time: not where that makes another class of them, as of
    digits."""
    images_per_epoch: int = 0
    """Images that an epoch of the weights sees, an epoch of the mixture a quarter of them (at least 1,024); 0: all on a
    GPU, 6,000 at most on a CPU. How many networks each image goes through is up to `paths`."""
    batch_size: int = 64
    accumulate: int = 1
    """Parts in which a process's images of a step go through the supernet, one after the other, by the same path, where memory
    is short. Batch norm sees each part by itself. With --init, of the training of the whole network; of throughput, also of the
    finalists, where a part is whole groups. Distillation and recovery take a step's images at once."""
    learning_rate: float = 2e-3
    """Of the weights, by AdamW; warm-up over a twentieth of the steps, then cosine to a hundredth."""
    weight_decay: float = 0.025
    logit_learning_rate: float = 0.03
    """Of the logits, by Adam."""
    tau_start: float = 2.0
    tau_end: float = 0.5
    noise: Noise = "gumbel"
    """gumbel, or uniform as the EfficientFormer paper prints it."""
    layer_scale: float = 0.5
    """Initial layer scale; at the published 1e-5 a short training never wakes the blocks."""
    label_smoothing: float = 0.1
    clip_norm: float = 5.0
    score: Score = "loss"
    """What slimming charges an action for: loss (rise in cross-entropy) or accuracy."""
    score_images: int = 512
    recalibration_images: int = 256
    accelerator: str = "auto"
    """auto (CUDA where there is one, else the CPU), cpu, cuda or mps."""
    precision: str = "auto"
    """Of training: fp32, bf16 (matrix products in bfloat16), or auto: bf16 where the hardware multiplies it itself."""
    objective: str = "latency"
    """latency; mes, size and latency together (EfficientFormerV2); or throughput: images may share a pass in the ways that the
    space's `mux` has, and how is searched too."""
    finalist_epochs: int = 4
    """Of throughput: how long the networks found for each way, and their controls, are trained before one is chosen."""
    arrivals_per_second: float = 0.0
    """Of throughput: images that come in, for the time that one waits for its group; 0: as many as are worked off."""
    paths: Paths = "single"
    """How the weights learn in `weight_epochs`. single: each step runs one random path. fair: each step runs every candidate
    of every slot equally often, so an image goes through as many networks as the slot with the most candidates has. elastic:
    widths and expansions share weights (`ElasticSupernet`), and each step runs a largest, the smallest and two random
    networks, so an image goes through four; there are no logits, so `mixture_epochs` must be 0."""
    checkpoint_activations: bool = False
    """Compute the activations inside blocks again for the backward pass and do not keep them: less memory, more time,
    the same numbers."""
    compile: bool = False
    """Whether the supernet's layers and candidates are compiled, each by itself, for training (torch.compile): minutes before
    the first steps. On a CPU we saw no gain from it for a network; on GPUs it is untested. The same computation, rounded
    otherwise. Not with `paths: elastic`. With --init, of the training of the whole network; of throughput, also of the
    finalists."""
    importance: str = "auto"
    """Where slots' importance comes from: logits (the mixture's), drops (of single changes), or auto: the logits where a
    mixture was trained."""
    recovery_steps: int = 0
    """Steps of training that each network gets, on its own copy of the weights, before it is scored."""
    additivity_networks: int = 0
    """Random networks with several changes on which the sum of the drops is checked; 0: none, or 50 for the strategy exact."""
    drop_pairs: int = 0
    """Pairs of changes within a stage, those with the smallest drops first, that are measured and counted too; 0: none."""
    max_params: int = 0
    """Parameters that the network may have at most, beside its milliseconds; 0: any number."""
    max_macs: int = 0
    """Multiply-accumulates of an image; 0: any number."""
    mes_size_unit: float = 3e6
    """Of mes: parameters that count as one, in 100 (params / unit)^-alpha (ms / unit)^-alpha. The defaults are
    said to be the source's."""
    mes_latency_unit_ms: float = 1.0
    """Of mes: milliseconds that count as one."""
    mes_size_alpha: float = 0.5
    """Of mes: how much size weighs."""
    mes_latency_alpha: float = 1.0
    """Of mes: how much latency weighs."""
    channels: Literal["auto"] | Method = "auto"
    """Which channels a narrowed stage inherits: those that matter most, by gradient times weight (taylor) or by the norm of
    their weights (magnitude), or the first ones. auto: taylor; first for `paths: elastic`, whose first channels were trained to
    do without the others."""
    optuna_sampler: SamplerName = "tpe"
    """Of the strategy optuna: what proposes networks."""
    optuna_trials: int = 200
    """Of the strategy optuna: networks that the study evaluates, all its processes together."""
    optuna_storage: str = ""
    """Of the strategy optuna: the URL of a database that processes share, or a file; empty: study.journal, in the folder."""
    cache_gb: float = 0.0
    """GiB of activations that are kept while networks are scored, in each process; 0: half of what is free on a GPU, a fourth
    of the machine's memory elsewhere. It changes no number."""
    init_epochs: int = 4
    """Of --init: how long the network is trained as a whole before slimming, where its classifier is new to the data."""
    distillation_steps: int = 200
    """Of --init: steps of block-wise distillation of the blocks that may replace the network's own; 0: none."""

    def __post_init__(self) -> None:
        choices = (
            ("noise", get_args(Noise)),
            ("score", get_args(Score)),
            ("objective", OBJECTIVES),
            ("paths", get_args(Paths)),
            ("importance", IMPORTANCES),
            ("precision", PRECISIONS),
            ("channels", ("auto", *get_args(Method))),
            ("optuna_sampler", get_args(SamplerName)),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.accelerator not in ("auto", "cpu", "cuda", "mps"):
            raise unknown("accelerator", self.accelerator, ("auto", "cpu", "cuda", "mps"))
        # Batch norm cannot train on one value, which is what one image is at the end of a small network.
        for name, least in (("batch_size", 2), ("recalibration_images", 2), *((name, 1) for name in COUNTS)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, but is {getattr(self, name)}")
        for name in (*RATES, *MES):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive number, but is {getattr(self, name)}")
        for name in (*RATES, "weight_decay"):
            if getattr(self, name) > MOST_RATE:
                raise InputError(f"{name} must be at most {MOST_RATE:g}, but is {getattr(self, name)}")
        if self.image_size > MOST_SIDE:
            raise InputError(f"image_size must be at most {MOST_SIDE}, but is {self.image_size}")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.images_per_epoch == 1:
            raise InputError("images_per_epoch must be 0, for all, or at least 2, but is 1")
        if self.images_per_epoch > MOST_IMAGES:
            raise InputError(
                f"images_per_epoch must be at most {MOST_IMAGES}, but is {self.images_per_epoch}: give more epochs"
            )
        if self.paths == "elastic" and self.mixture_epochs:
            raise InputError(
                f"paths: elastic has no logits for mixtures to train, but mixture_epochs is {self.mixture_epochs}: give "
                "mixture_epochs: 0"
            )
        if self.paths == "elastic" and self.compile:
            raise InputError(
                "paths: elastic runs layers of very many widths, each of which would be compiled anew: give compile: false, or "
                "other paths"
            )
        if self.paths == "elastic" and self.channels not in ("auto", "first"):
            raise InputError(
                f"paths: elastic trains narrow networks on the first channels, but channels is {self.channels}: give first, or "
                "leave it out"
            )
        if self.weight_epochs + self.mixture_epochs > MOST_EPOCHS:
            raise InputError(f"weight_epochs and mixture_epochs must be {MOST_EPOCHS:,} at most together")
        if not self.weight_epochs + self.mixture_epochs:
            raise InputError("weight_epochs and mixture_epochs are both 0: give one of them at least 1")
        for name in ("weight_decay", "arrivals_per_second", "cache_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number of at least 0, but is {getattr(self, name)}")
        if self.importance == "logits" and not self.mixture_epochs:
            raise InputError("importance logits needs a mixture that trains them: give mixture_epochs, or the importance drops")
        if self.additivity_networks < 0 or self.additivity_networks == 1:
            raise InputError(f"additivity_networks must be 0 or at least 2, but is {self.additivity_networks}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must be at least 0 and below 1, but is {self.label_smoothing}")

    @property
    def cache_bytes(self) -> int | None:
        """What `cache_gb` comes to for an Evaluator."""
        return round(self.cache_gb * 2**30) or None

    def deciding(self) -> dict[str, Any]:
        """Return the settings that may change what a search finds: those that a run's folder is bound to."""
        return {name: value for name, value in asdict(self).items() if name not in UNBOUND}

    @classmethod
    def of_run(cls, decided: Mapping[str, Any], path: Path | None, free: Sequence[str] = FREE) -> SupernetSettings:
        """Return the settings of a finished search, from its request; the `free` ones may be other ones, which `path` gives.

        Raises:
            InputError: the file has a setting that the supernet or its scores depend on, or that the run's folder is bound to.
        """
        given = _given(path) if path is not None else {}
        if bound := [name for name in given if name not in free]:
            raise InputError(
                f"{path} gives {', '.join(bound)}, which the finished search has decided: give {', '.join(free)} alone, or "
                "search anew without --from"
            )
        with placed(f"the config file {path}" if path is not None else "the settings of the run"):
            return cls(**checked_fields(cls, {**decided, **given}, "the settings of the run"))

    @classmethod
    def load(cls, path: str | Path | None) -> SupernetSettings:
        """Read the settings that a YAML file gives; the others have their defaults."""
        if path is None:
            return cls()
        with placed(f"the config file {path}"):
            return cls(**_given(path))


def _given(path: str | Path) -> dict[str, Any]:
    """Return the settings that a YAML file gives."""
    content = read_yaml(path, "the config file", "give the path of a YAML file of settings, or leave --config out")
    return checked_fields(SupernetSettings, content, f"the config file {path}")
