"""What a study will run, cost and take, told before anything starts: `dpsink-tune sweep STUDY --dry-run`.

No private record is used: steps are timed on random images of the data's shape and number, in a temporary folder,
without privacy, and so is evaluation, unless the validation images are public.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpsink import console
from dpsink.config import ConvCondConfig, EvaluationConfig, Performance, TrialConfig
from dpsink.data import ImageData, LabelledImages
from dpsink.privacy.plan import PrivacyPlan
from dpsink.records import latest_checkpoint, read_state
from dpsink.training import train
from tune.preflight import StudyPlan, check_study
from tune.repeat import earlier_study
from tune.space import active
from tune.study import Study

TIMED_SECONDS = 2.0  # of steps, for each kind of trial
TIMED_AT = (0.25, 0.75)  # quantiles of the space
ENDLESS = 10**9  # steps

Range = tuple[float, float]  # least and most over a space


def forecast(study: Study, data_root: Path | None) -> dict[str, Any]:
    """The plan of a study as one JSON-able document; ranges are [least, most] over the corners of the space.

    Raises:
        InputError: what the preflight of a sweep finds.
    """
    plan = check_study(study, data_root)
    clock = _Clock(plan, study.resources.device)
    inside = [study.configure(_at(study, quantile)) for quantile in TIMED_AT]
    rows = [
        _row(name, study.seeds, [plan.baselines[name]], [study.baseline(name)], clock) for name in study.baselines
    ] + [_row("search", _searched(study) * study.seeds, plan.searched, inside, clock)]
    here = study.resources.fit_in(os.cpu_count() or 1, torch.cuda.device_count())
    concurrency = study.resources.concurrency or max(1, here)
    seconds = _total(rows, concurrency)
    price = study.resources.price_per_hour
    if price is not None:
        for row in rows:
            row["cost"] = [row["trials"] * second / concurrency / 3600 * price for second in row["seconds"]]
    return {
        "study": study.name,
        "data": plan.data.name,
        "records": len(plan.data.train),
        "trials": sum(row["trials"] for row in rows),
        "seeds_per_configuration": study.seeds,
        "rows": rows,
        "study_epsilon": plan.terms.worst_case(),
        "delta": plan.delta,
        "policy": study.ledger.policy,
        "repeats": earlier_study(study.repeats, study.name).model_dump() if study.repeats else None,
        "concurrency": concurrency,
        "seconds": seconds,
        "cost": None if price is None else [second / 3600 * price for second in seconds],
        "timed_on": clock.place,
        "may_stop_early": study.scheduler.kind != "none",
        "sealed": study.sealed,
    }


def print_forecast(document: dict[str, Any]) -> None:
    """The document for people."""
    out, rows = console.out, document["rows"]
    made = console.table("", "trials", "steps T", "σ", "q", "ε", "time each", title=f"study {document['study']}")
    for row in rows:
        ranges = (row["steps"], row["noise_multiplier"], row["sample_rate"], row["epsilon"])
        made.add_row(row["name"], f"{row['trials']:g}", *map(_range_text, ranges), _time_text(row["seconds"]))
    out.print(made)
    private = document["study_epsilon"]
    claim = "none claimed" if private is None else f"ε {console.metric_text(private)}, δ {document['delta']:g}"
    lines = [
        f"data:    {document['data']}, {document['records']:,} private records",
        f"privacy: the whole study at worst {claim}, policy {document['policy']}",
        f"time:    about {_time_text(document['seconds'])}, {document['concurrency']} at a time"
        + (", less what is stopped early" if document["may_stop_early"] else ""),
    ]
    if document["repeats"] is not None:
        lines.insert(2, _together(document))
    if document["cost"] is not None:
        parts = ", ".join(f"{row['name']} {_range_text(row['cost'])}" for row in rows)
        lines.append(f"cost:    about {_range_text(document['cost'])}, at resources.price_per_hour: {parts}")
    if document["seeds_per_configuration"] > 1:
        lines.append(f"seeds:   {document['seeds_per_configuration']} of each configuration and baseline")
    if document["sealed"]:
        lines.append("trials:  their number is drawn in secret; this is the mean")
    lines += [
        f"         timed on {document['timed_on']}, one trial alone: steps of each baseline and at",
        "         two points of the space, on random images, and one evaluation; without Ray's start and the last word",
        "         on the test split",
        "nothing was started or written",
    ]
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def _together(document: dict[str, Any]) -> str:
    """What it costs with the study that it repeats."""
    earlier, own = document["repeats"], document["study_epsilon"]
    epsilon = None if None in (own, earlier["epsilon"]) else own + earlier["epsilon"]
    claim = "none claimed" if epsilon is None else f"ε {console.metric_text(epsilon)}"
    delta = document["delta"] + earlier["delta"]
    return f"         with that of {earlier['name']}, which it repeats: {claim}, δ {delta:g}"


def _at(study: Study, quantile: float) -> dict[str, Any]:
    if study.algorithm.kind == "listed":
        listed = study.algorithm.configurations
        return dict(listed[int(quantile * len(listed))])
    return active(study.space, {path: dimension.at(quantile) for path, dimension in study.space.items()})


def _searched(study: Study) -> float:
    return study.ledger.selection.expected_trials if study.ledger.selection else study.configurations


def _row(
    name: str, trials: float, plans: Sequence[PrivacyPlan], timed: Sequence[TrialConfig], clock: "_Clock"
) -> dict[str, Any]:
    steps, report = _range([clock.step_seconds(config) for config in timed]), clock.report_seconds(timed[0])
    points = timed[0].evaluation.points
    each = [plan.steps * step + min(points, plan.steps) * report for plan in plans for step in steps]
    epsilons = {plan: plan.epsilon(plan.steps) for plan in set(plans)}
    return {
        "name": name,
        "trials": trials,
        "steps": _range([plan.steps for plan in plans]),
        "noise_multiplier": _range([plan.noise_multiplier for plan in plans]),
        "sample_rate": _range([plan.sample_rate for plan in plans]),
        "epsilon": _range(list(epsilons.values())),
        "seconds_per_step": steps,
        "seconds_per_report": report,
        "seconds": _range(each),
    }


def _total(rows: Sequence[dict[str, Any]], concurrency: int) -> Range:
    """All trials side by side: their sum over the slots, and no less than the longest."""

    def side_by_side(edge: int) -> float:
        total = sum(row["trials"] * row["seconds"][edge] for row in rows)
        return max(total / concurrency, *(row["seconds"][edge] for row in rows))

    return side_by_side(0), side_by_side(1)


class _Clock:
    """Times steps and evaluations of trials on stand-in data; each evaluation's settings once.

    Args:
        device: of the study's trials; where there is no GPU, a CPU takes its place, and `place` says so.
    """

    def __init__(self, plan: StudyPlan, device: str = "cpu") -> None:
        self.data = _random_stand_in(plan.data)
        here = device == "cpu" or torch.cuda.is_available()
        self.place = "this machine" if here else "a CPU, for want of a GPU here, which takes less"
        self._performance = Performance(device=device if here else "cpu", threads=1)  # as in a study
        self._reports: dict[EvaluationConfig, float] = {}

    def step_seconds(self, config: TrialConfig) -> float:
        """Of one step; of the control's single release none."""
        if config.generator.kind == "class_mean":
            return 0.0
        with tempfile.TemporaryDirectory() as place:
            for _ in self._train(config, Path(place), ENDLESS, _Alarm(TIMED_SECONDS)):
                raise AssertionError("a trial without end told its end")
            checkpoint = latest_checkpoint(Path(place))
            assert checkpoint is not None
            state = read_state(checkpoint)
        return state.seconds / state.step

    def report_seconds(self, config: TrialConfig) -> float:
        """Of one evaluation with its checkpoint, which costs a control as much as a network."""
        if config.generator.kind == "class_mean":
            config = config.model_copy(update={"generator": ConvCondConfig()})
        if config.evaluation not in self._reports:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as place:
                (report,) = self._train(config, Path(place), 1, _Alarm(math.inf))
            self._reports[config.evaluation] = time.monotonic() - started - report.step / report.steps_per_second
        return self._reports[config.evaluation]

    def _train(self, config: TrialConfig, place: Path, steps: int, should_stop: Callable[[], bool]) -> Any:
        """So many steps without privacy, which needs no accountant, on images that are nobody's."""
        privacy = config.privacy.model_copy(
            update={
                "target_epsilon": math.inf, "steps": steps, "step_limit": None, "noise_multiplier": 1.0,
                "score_noise": None,
            }
        )  # fmt: skip
        evaluation = config.evaluation.model_copy(update={"points": 1})
        timed = config.model_copy(update={"privacy": privacy, "evaluation": evaluation})
        return train(timed, self.data, place, performance=self._performance, should_stop=should_stop)


class _Alarm:
    """Goes off so many seconds after it was first asked: before the first step, whose preparations take their time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline: float | None = None

    def __call__(self) -> bool:
        if self.deadline is None:
            self.deadline = time.monotonic() + self.seconds
            return False
        return time.monotonic() > self.deadline


def _random_stand_in(data: ImageData) -> ImageData:
    """Random images in the place of all that are private."""
    if data.validation is None or data.validation_is_public:
        return replace(data, train=_noise(data.train), fingerprint="random images")
    return replace(data, train=_noise(data.train), validation=_noise(data.validation), fingerprint="random images")


def _noise(images: LabelledImages) -> LabelledImages:
    generator, rows = torch.Generator().manual_seed(0), len(images)
    pixels = torch.randint(0, 256, (rows, *images.shape), dtype=torch.uint8, generator=generator)
    return LabelledImages(pixels, torch.arange(rows) % images.num_classes, images.num_classes)


def _range(values: Sequence[float]) -> Range:
    return min(values), max(values)


def _range_text(values: Sequence[float]) -> str:
    low, high = (console.metric_text(value) for value in values)
    return low if low == high else f"{low}–{high}"


def _time_text(values: Sequence[float]) -> str:
    seconds = max(values)
    unit, name = next((one for one in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= 2 * one[0]), (1, "s"))
    return f"{_range_text([float(f'{value / unit:.2g}') for value in values])} {name}"
