"""A comparison: chosen studies of an experiment, with changed settings, and the runs that they need."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from fasthyper.experiments.experiment import Experiment, Run, Study, Tuning
from fasthyper.experiments.methods import METHODS
from fasthyper.experiments.rates import Rate, is_tuned
from fasthyper.experiments.results import Results
from fasthyper.experiments.setting import is_integer

PRESETS = ("quick", "standard", "paper")


@dataclass(frozen=True)
class Comparison:
    """Studies of an experiment on one data set. `Comparison.of` makes one.

    Attributes:
        experiment: the experiment.
        preset: the preset that the studies come from.
        data: the name of the data set.
        studies: the studies, as chosen and changed.
        device: `"cpu"` or `"cuda"`.
        changed: the differences from the preset, in words.
        rates: the learning rates of the studies that have a grid, as `fasthyper.experiments.tuning.tuned` chooses them.
    """

    experiment: Experiment
    preset: str
    data: str
    studies: tuple[Study, ...]
    device: str
    changed: tuple[str, ...] = ()
    rates: tuple[Rate, ...] = ()

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        data: str | None = None,
        *,
        preset: str = "quick",
        studies: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        depths: str | Sequence[int] | None = None,
        seeds: int | None = None,
        device: str = "auto",
        **settings: Any,
    ) -> Comparison:
        """Choose studies of an experiment and change their settings; None keeps the value of the preset.

        Args:
            experiment: the experiment.
            data: one of `experiment.data`; the first by default.
            preset: `"quick"`: minutes on two cores, not all experiments have it; `"standard"`: all experiments, an hour
                or two; `"paper"`: the full protocol.
            studies: names of studies; all by default.
            methods: names of methods; all by default.
            depths: the values of the studies over depth, as `"2-4,8"` or a sequence. Other studies are left out.
            seeds: runs of each method at each value.
            device: `"auto"`, `"cpu"` or `"cuda"`.
            **settings: fields of the studies' settings, such as `epochs`, `lr`, `width`. With `lr`, all runs have this
                learning rate, and none is chosen on the validation split.

        Raises:
            ValueError: an unknown name, a number out of range, a setting that no study has, or a claim about a method
                or value that its study lacks.

        Example:
            >>> from fasthyper.experiments import ROTATION
            >>> comparison = Comparison.of(ROTATION, depths="2-3", seeds=1, device="cpu", epochs=1)
            >>> [study.name for study in comparison.studies], comparison.studies[0].values
            (['depth'], (2, 3))
        """
        data = experiment.data[0] if data is None else data
        _known("preset", preset, PRESETS, "")
        _known("data", data, experiment.data, f"a data set of {experiment.name}")
        chosen = experiment.studies(preset, data)
        if not chosen:
            others = " and ".join(other for other in PRESETS if experiment.studies(other, data)) or "none"
            raise ValueError(f"preset: {experiment.name} has no studies in the preset {preset}, only in {others}")
        for study in chosen:
            for claim in study.claims:
                if not claim.concerns(Results(study, {})):
                    raise ValueError(f"claims: {claim.text!r} is about a method or value that {study.name!r} lacks")
        if depths is not None:
            values = parse_depths(depths) if isinstance(depths, str) else tuple(depths)
            chosen = tuple(replace(s, values=values) for s in chosen if s.axis.field == "depth")
            if not chosen:
                raise ValueError(f"depths: {experiment.name} has no study over depth")
        if studies is not None:
            for name in studies:
                _known("studies", name, [s.name for s in chosen], f"a study of {experiment.name}")
            chosen = tuple(s for s in chosen if s.name in studies)
        if methods is not None:
            if not methods:
                raise ValueError("methods: expected at least one")
            for name in methods:
                _known("methods", name, sorted({m for s in chosen for m in s.methods}), "a method compared here")
            chosen = tuple(s for s in (s.only(methods) for s in chosen) if s.methods)
        if seeds is not None:
            chosen = tuple(replace(s, seeds=seeds) for s in chosen)
        settings = {name: value for name, value in settings.items() if value is not None}
        for name in settings:
            if any(name in s.setting.DEFINING for s in chosen):
                raise ValueError(f"{name}: titles and claims of a study refer to it, so it cannot be changed")
        chosen = tuple(_with(s, settings) for s in chosen)
        if "lr" in settings:
            # One rate for two optimizers compares nothing.
            chosen = tuple(s for s in chosen if s.axis.field != "optimizer" or s.tuning is None)
            # A title may say that rates are tuned, or the paper's.
            note = f" (changed: learning rate {settings['lr']:g})"
            chosen = tuple(s if s.axis.field == "lr" else replace(s, tuning=None, title=s.title + note) for s in chosen)
        for name in settings:
            if not any(hasattr(s.setting, name) and s.axis.field != name for s in chosen):
                raise ValueError(f"{name}: no study here has such a setting to change")
        words = {"depths": depths, "studies": studies, "methods": methods, "seeds": seeds, **settings}
        changed = tuple(f"{name} {_text(value)}" for name, value in words.items() if value is not None)
        return cls(experiment, preset, data, chosen, resolve_device(device), changed)

    def __post_init__(self) -> None:
        """Check the studies."""
        if not self.studies:
            raise ValueError("studies: expected at least one")
        names = [study.name for study in self.studies]
        if len(set(names)) < len(names):
            raise ValueError(f"studies: expected a name of its own for each, got {', '.join(names)}")
        for study in self.studies:
            if not is_integer(study.seeds) or study.seeds < 1:
                raise ValueError(f"seeds: expected an integer of at least 1, got {study.seeds!r}")
            if not study.values or len(set(study.values)) < len(study.values):
                raise ValueError(f"{study.axis.field}: expected values, each named once, got {study.values!r}")
            field = study.axis.field
            if not hasattr(study.setting, field):
                raise ValueError(f"axis: the setting of study {study.name!r} has no field {field!r}")
            if study.structure and field != "size":
                raise ValueError(f"structure: a frontier has the axis 'size', but {study.name!r} has {field!r}")
            value_type = type(getattr(study.setting, field))
            for value in study.values:
                if type(value) is not value_type:
                    raise ValueError(f"{field}: expected values of type {value_type.__name__}, got {value!r}")
                _check_grid(study, study.setting_at(value).optimizer)

    def tuning_runs(self) -> list[Run]:
        """Return the runs that choose learning rates, each once, ordered by seed."""
        runs = (
            run
            for study in self.studies
            if is_tuned(study)
            for value in study.values
            for method in study.methods
            for run in self.tuning_runs_of(study, value, method)
        )
        return sorted(dict.fromkeys(runs), key=lambda run: run.seed)

    def tuning_runs_of(self, study: Study, value: Any, method: str) -> list[Run]:
        """Return the runs that choose the learning rate of a method at one value, the seeds of each rate in turn."""
        assert study.tuning is not None
        return [
            replace(run, split="validation", setting=replace(run.setting, lr=lr))
            for lr in study.tuning.rates[study.setting_at(value).optimizer]
            for seed in range(study.tuning.seeds)
            for run in [self._run(study, value, method, Tuning.FIRST_TUNING_SEED + seed)]
        ]

    def runs(self) -> list[Run]:
        """Return all runs of results, each once, ordered by seed: stopped early, they still cover every value.

        Before `rates` are chosen, they have the learning rates of the settings.
        """
        seeds = range(max(study.seeds for study in self.studies))
        runs = (
            self.run(study, value, method, seed)
            for seed in seeds
            for study in self.studies
            if seed < study.seeds
            for value in study.values
            for method in study.methods
        )
        return list(dict.fromkeys(runs))

    def run(self, study: Study, value: Any, method: str, seed: int) -> Run:
        """Return one run of a study. Over E, a method without an embedding has the same run at all values."""
        run = self._run(study, value, method, seed)
        lr = self._lr.get((study.name, method, value), run.setting.lr)
        return replace(run, setting=replace(run.setting, lr=lr))

    def measures_of(self, run: Run) -> set[str]:
        """Return the measures and levels that the studies of a run need."""
        return {
            name
            for study in self.studies
            if run.method in study.methods
            if any(
                replace(self._run(study, value, run.method, 0).setting, lr=run.setting.lr) == run.setting
                for value in study.values
            )
            for name in study.measures()
        }

    @cached_property
    def _lr(self) -> Mapping[tuple[str, str, Any], float]:
        return {(rate.study, rate.method, rate.value): rate.lr for rate in self.rates}

    def _run(self, study: Study, value: Any, method: str, seed: int) -> Run:
        """Return one run with the learning rate of its setting."""
        experiment = self.experiment
        same_for_all_values = study.axis.field == "embedding" and not METHODS[method].embeds
        setting = study.setting if same_for_all_values else study.setting_at(value)
        return Run(experiment.name, experiment.protocol, self.data, method, seed, self.device, setting)


def parse_depths(text: str) -> tuple[int, ...]:
    """Parse depths: numbers and ranges, separated by commas.

    Raises:
        ValueError: other text, a descending range, or a depth below 2.

    Example:
        >>> parse_depths("2-4,8")
        (2, 3, 4, 8)
    """
    depths: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", item)
        if match is None:
            raise ValueError(f"depths: expected numbers or ranges such as 2-9 or 2,4,8, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"depths: the range {item.strip()!r} is descending")
        if first < 2:
            raise ValueError(f"depths: expected depths of at least 2, got {text!r}")
        depths.extend(range(first, last + 1))
    return tuple(depths)


def resolve_device(device: str) -> str:
    """Return `"cpu"` or `"cuda"`; `"auto"` is the GPU if torch finds one.

    Raises:
        ValueError: another name, or `"cuda"` if torch finds no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was requested, but torch finds no CUDA device")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _with(study: Study, settings: Mapping[str, Any]) -> Study:
    """Return the study with changed settings, as far as it has them; the field of its axis stays unchanged."""
    types = {f.name: type(getattr(study.setting, f.name)) for f in fields(study.setting)}
    changes = {}
    for name, value in settings.items():
        if name not in types or name == study.axis.field:
            continue
        if types[name] is float and is_integer(value):
            value = float(value)
        if type(value) is not types[name]:
            raise ValueError(f"{name}: expected {types[name].__name__}, got {value!r}")
        changes[name] = value
    return replace(study, setting=replace(study.setting, **changes))


def _check_grid(study: Study, optimizer: str) -> None:
    """Check that a study which is tuned has learning rates for an optimizer."""
    if study.tuning is None or not is_tuned(study):
        return
    rates = study.tuning.rates.get(optimizer, ())
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"tuning: expected rates for {optimizer}, each named once, got {rates!r}")
    for rate in rates:
        if type(rate) is not float:
            raise ValueError(f"tuning: expected rates of type float, got {rate!r}")
        replace(study.setting, lr=rate)
    if not is_integer(study.tuning.seeds) or study.tuning.seeds < 1:
        raise ValueError(f"tuning: expected seeds of at least 1, got {study.tuning.seeds!r}")


def _known(argument: str, name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise ValueError(f"{argument}: {name!r} is not {what or 'known'}; known are {', '.join(known)}")
