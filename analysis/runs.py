"""Studies as MLflow shows them: the runs that may be compared, and why the others may not."""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.store import StoredRun, find_runs
from dpsink.config import nearest, read_yaml
from dpsink.errors import InputError
from dpsink.privacy.plan import NON_PRIVATE
from dpsink.records import read_json
from tune import schema

DATABASE = "mlflow.db"
STORAGE = "studies"
ALL_QUALITY = (*schema.QUALITY, *(schema.TEST_PREFIX + name for name in schema.QUALITY))
SAMPLES = "evaluation.samples"  # param: synthetic images by which a trial was judged
NUMBERS = (schema.EPSILON, schema.BUDGET_FRACTION, schema.SPEED, *ALL_QUALITY)
Row = dict[str, Any]  # one run: column to value, NaN or None where it has none
TAGS = {  # column to tag
    "trial": schema.TRIAL_ID_TAG,
    "role": schema.ROLE_TAG,
    "state": schema.STATUS_TAG,
    "config_id": schema.CONFIG_ID_TAG,
    "config_sha256": schema.CONFIG_SHA_TAG,
    "data_fingerprint": schema.FINGERPRINT_TAG,
    "fid_extractor": schema.EXTRACTOR_TAG,
    "private": schema.PRIVATE_TAG,
    "accountant": schema.ACCOUNTANT_TAG,
    "error": schema.ERROR_TAG,
    "folder": schema.FOLDER_TAG,
}
TEXTS = ("study", "trial", "role", "state", "reason", "detail", "run_id", *list(TAGS)[3:])


@dataclass(frozen=True)
class StudyFacts:
    """What the study's own run says.

    Attributes:
        run_id: of the study's run in MLflow.
        seeds: trials of each configuration, baselines included.
        searched: paths of the search space.
        space: path to its distribution, as the study file writes it; empty if the study does not tell.
        statement: single values of the ledger's last statement; empty before the first.
        folder: of the study, where it ran.
        repeats: id of the study whose best configurations this one trained again; None for a study of its own.
    """

    name: str
    study_id: str
    run_id: str
    experiment_id: str
    target_epsilon: float
    delta: float
    seeds: int
    data_name: str
    data_fingerprint: str
    extractor: str
    objectives: tuple[str, ...]
    searched: tuple[str, ...]
    space: dict[str, Any]
    statement: dict[str, Any]
    floor: dict[str, Any]  # FID and KID of real images against real ones; empty before a run was judged
    folder: str | None
    repeats: str | None


@dataclass(frozen=True)
class Runs:
    """The runs of one study or of several.

    Attributes:
        studies: in the order in which they were asked for; what is compared is compared by the first one's rules.
        table: one row per run, by study and name. Text: `TEXTS`; `reason` is missing for a run that may be compared,
            and one of few for one that may not. float64: `NUMBERS`, NaN where a run has none; metrics on validation
            have bare names, on test the prefix `test_`. All else are params by their paths: numbers where every
            value is one, text otherwise, missing where a run has none.
    """

    studies: tuple[StudyFacts, ...]
    tracking_uri: str
    table: pd.DataFrame

    @property
    def study(self) -> StudyFacts:
        """The first study."""
        return self.studies[0]

    @property
    def name(self) -> str:
        """Of all studies."""
        return "+".join(study.name for study in self.studies)

    def study_of(self, run: Row) -> StudyFacts:
        """The study that a run belongs to."""
        return next(study for study in self.studies if study.name == run["study"])

    @cached_property
    def accepted(self) -> pd.DataFrame:
        """The runs that may be compared."""
        return pd.DataFrame(self.table[self.table["reason"].isna()]).reset_index(drop=True)

    @cached_property
    def rejected(self) -> pd.DataFrame:
        """The runs that are set apart, and why."""
        return pd.DataFrame(self.table[self.table["reason"].notna()]).reset_index(drop=True)

    @property
    def rejected_counts(self) -> str:
        """`2 diverged, 1 unfinished`."""
        counts = Counter(str(reason) for reason in self.rejected["reason"])
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def load_runs(studies: str | Sequence[str], tracking_uri: str | None = None) -> Runs:
    """The runs of one study or of several, those that may be compared apart from the others.

    Args:
        studies: each the name of a study (the newest of that name), the path of its YAML file, or its folder.
        tracking_uri: by default the one that the first study names, $MLFLOW_TRACKING_URI, or sqlite in `studies`.

    Raises:
        InputError: MLflow does not answer, a study is not known or half written, or the studies are of different data
            or δ, so that nothing about them can be compared.
    """
    asked = [_resolve(study) for study in ([studies] if isinstance(studies, str) else studies)]
    if not asked:
        raise InputError("name a study: its name, its YAML file, or its folder")
    uri = tracking_uri or next((named for *_, named in asked if named), None) or default_uri(Path(STORAGE))
    parents = find_runs(uri, schema.KIND_TAG, [schema.KIND_STUDY])
    facts = {found.study_id: found for found in (_facts(_pick(parents, *one[:2], uri)) for one in asked)}
    _check_alike(list(facts.values()))
    stored = find_runs(uri, schema.STUDY_ID_TAG, list(facts))
    rows = [
        _row(run, facts[run.tags[schema.STUDY_ID_TAG]])
        for run in stored
        if run.tags.get(schema.KIND_TAG) == schema.KIND_TRIAL
    ]
    return Runs(tuple(facts.values()), uri, _sort_out(rows, facts))


def default_uri(storage: Path) -> str:
    """$MLFLOW_TRACKING_URI, or the database that studies keep in their storage."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(storage / DATABASE).resolve()}"


def rows_of(table: pd.DataFrame) -> list[Row]:
    """A table's rows, in its order."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def file_of(study: StudyFacts, name: str) -> Path | None:
    """A file of a study's folder, where that is at hand; of no other folder, since a store may name any."""
    folder = Path(study.folder or "")
    record, file = folder / "study.json", folder / name
    if not study.folder or not record.is_file() or not file.is_file():
        return None
    ours = read_json(record).get("study_id") == study.study_id and file.resolve().is_relative_to(folder.resolve())
    return file if ours else None


def metrics_of(run: Row) -> dict[str, float]:
    """The quality metrics that a run has, validation before test."""
    return {name: run[name] for name in ALL_QUALITY if not math.isnan(run.get(name, math.nan))}


def _resolve(study: str) -> tuple[str, str, str | None]:
    """The tag and its value by which a study is found, and the tracking URI that the place names."""
    path = Path(study)
    if (path / "study.json").exists():
        record = read_json(path / "study.json")
        return schema.STUDY_ID_TAG, record["study_id"], record["tracking_uri"]
    if path.suffix not in (".yaml", ".yml"):
        return schema.STUDY_NAME_TAG, study, None
    tree = read_yaml(path)
    if not isinstance(tree.get("name"), str):
        raise InputError(f"{path}: has no name: of a study; give a study file")
    uri = (tree.get("tracking") or {}).get("uri") or default_uri(Path(tree.get("storage") or STORAGE))
    return schema.STUDY_NAME_TAG, tree["name"], uri


def _pick(parents: list[StoredRun], tag: str, value: str, uri: str) -> StoredRun:
    """The newest study run with that tag."""
    for run in reversed(parents):
        if run.tags.get(tag) == value:
            return run
    names = {run.tags.get(schema.STUDY_NAME_TAG, "") for run in parents}
    hint = nearest(value, names) if names else "; it holds no study"
    raise InputError(f"study '{value}' is not in {schema.shown_uri(uri)}{hint}")


def _facts(run: StoredRun) -> StudyFacts:
    """What the study's run says; one that is half written, while its study starts or after a kill, says too little."""
    try:
        return _read_facts(run)
    except (KeyError, ValueError) as error:
        name = run.tags.get(schema.STUDY_NAME_TAG, run.run_id)
        raise InputError(
            f"study '{name}': its run in MLflow is not whole ({' '.join(str(error).split())}); try again when it has "
            "started, or write it anew: dpsink-tune track STUDY"
        ) from None


def _read_facts(run: StoredRun) -> StudyFacts:
    params, tags = run.params, run.tags

    def names(field: str) -> tuple[str, ...]:
        return tuple(name for name in params[f"{schema.STUDY_PARAM}{field}"].split(",") if name)

    return StudyFacts(
        name=tags[schema.STUDY_NAME_TAG],
        study_id=tags[schema.STUDY_ID_TAG],
        run_id=run.run_id,
        experiment_id=run.experiment_id,
        target_epsilon=float(params[f"{schema.STUDY_PARAM}target_epsilon"]),
        delta=float(params[f"{schema.STUDY_PARAM}delta"]),
        seeds=int(params.get(f"{schema.STUDY_PARAM}seeds", 1)),
        data_name=params[f"{schema.STUDY_PARAM}data_name"],
        data_fingerprint=tags[schema.FINGERPRINT_TAG],
        extractor=tags[schema.EXTRACTOR_TAG],
        objectives=names("objectives"),
        searched=names("searched"),
        space=_object(tags.get(schema.SPACE_TAG, "{}")),
        statement=_object(tags.get(schema.STATEMENT_TAG, "{}")),
        floor=_object(tags.get(schema.FLOOR_TAG, "{}")),
        folder=tags.get(schema.FOLDER_TAG),
        repeats=tags.get(schema.REPEATS_TAG),
    )


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{text[:40]} is no JSON object")
    return found


def _check_alike(studies: Sequence[StudyFacts]) -> None:
    """Studies of other data share no scale, and an ε at another δ is another promise."""
    first = studies[0]
    for study in studies[1:]:
        if study.name == first.name:
            raise InputError(f"two studies are called '{study.name}': compare them one by one, by their folders")
        if study.data_fingerprint != first.data_fingerprint:
            mine, other = (f"'{one.name}' ({one.data_name}, {one.data_fingerprint[:16]})" for one in (first, study))
            raise InputError(f"studies {mine} and {other} are of different data: compare them one by one")
        if study.delta != first.delta:
            told = f"'{first.name}' (δ {first.delta:g}) and '{study.name}' (δ {study.delta:g})"
            raise InputError(f"studies {told} promise at different δ: their ε cannot be compared")


def _row(run: StoredRun, study: StudyFacts) -> Row:
    tags = {column: run.tags.get(tag) for column, tag in TAGS.items()}
    return {"study": study.name, "run_id": run.run_id, **tags, "study_id": study.study_id, **run.metrics, **run.params}


def _sort_out(rows: list[Row], facts: dict[str, StudyFacts]) -> pd.DataFrame:
    extractor, samples = next(iter(facts.values())).extractor, _samples(rows, next(iter(facts)))
    here = {study_id for study_id, study in facts.items() if study.folder and Path(study.folder).is_dir()}
    for row in rows:
        study = facts[row["study_id"]]
        row["reason"], row["detail"] = _problem(row, study, extractor, samples, row["study_id"] in here) or (None, None)
    _reject_incomplete(rows, facts)
    order = {study_id: position for position, study_id in enumerate(facts)}
    rows.sort(key=lambda row: (order[row.pop("study_id")], str(row["trial"])))
    return _typed(rows)


def _samples(rows: Sequence[Row], study_id: str) -> str | None:
    """By how many synthetic images most runs of a study were judged; None where none tells."""
    told = Counter(str(row[SAMPLES]) for row in rows if row["study_id"] == study_id and row.get(SAMPLES) is not None)
    return told.most_common(1)[0][0] if told else None


def _problem(row: Row, study: StudyFacts, extractor: str, samples: str | None, here: bool) -> tuple[str, str] | None:
    """The first reason why a run may not be compared with the others, and its detail."""
    epsilon = row.get(schema.EPSILON, math.nan)
    judged_by = row.get(SAMPLES) or samples  # one that does not tell is not suspected
    missing = [name for name in study.objectives if math.isnan(row.get(name, math.nan))]
    rules = (
        (row["state"] in ("failed", "diverged"), str(row["state"]), row["error"]),
        (row["state"] not in schema.ENDED, "unfinished", row["state"]),
        (row["private"] != "true", NON_PRIVATE, None),
        (row["state"] == "stopped_early", "stopped early", f"{row.get(schema.BUDGET_FRACTION, 0):.0%} of its budget"),
        (math.isnan(epsilon), "without epsilon", None),
        (epsilon > study.target_epsilon, "above the target epsilon", f"{epsilon:g} > {study.target_epsilon:g}"),
        (row["data_fingerprint"] != study.data_fingerprint, "on other data", row["data_fingerprint"]),
        (row["fid_extractor"] != extractor, "with another FID extractor", row["fid_extractor"]),
        (judged_by != samples, "judged by another number of samples", f"{judged_by}, not {samples}"),
        (bool(missing), "without its objective", ", ".join(missing)),
        # Where the study's storage is not at hand, nothing can be said about files.
        (here and not os.path.isdir(row["folder"] or ""), "without its files", row["folder"]),
    )
    return next(((reason, detail or "") for holds, reason, detail in rules if holds), None)


def _reject_incomplete(rows: Sequence[Row], facts: dict[str, StudyFacts]) -> None:
    """The mean of the seeds that went well would flatter a configuration: it counts if all have, or not at all."""
    configurations: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        configurations.setdefault((row["study_id"], row["role"], row["config_id"]), []).append(row)
    for mine in configurations.values():
        planned = facts[mine[0]["study_id"]].seeds
        bad = next((row for row in mine if row["reason"]), None)
        for row in mine:
            if bad and not row["reason"]:
                row["reason"], row["detail"] = "beside another seed", f"{bad['trial']}: {bad['reason']}"
            elif not bad and len(mine) < planned:
                row["reason"], row["detail"] = "without all its seeds", f"{len(mine)} of {planned}"


def _typed(rows: list[Row]) -> pd.DataFrame:
    """MLflow keeps params as text: columns that hold numbers only become numbers."""
    table = pd.DataFrame(rows, columns=None if rows else [*TEXTS, *NUMBERS])
    params = sorted(table.columns.difference([*TEXTS, *NUMBERS]))
    columns = {name: table[name] if name in table else pd.Series(math.nan, table.index) for name in (*TEXTS, *NUMBERS)}
    columns |= {name: columns[name].astype("float64") for name in NUMBERS}
    columns |= {name: _numbers(pd.Series(table[name])) for name in params}
    return pd.DataFrame(columns)


def _numbers(values: pd.Series) -> pd.Series:
    values = values.where(values != "None")
    try:
        return pd.Series(pd.to_numeric(values))
    except (ValueError, TypeError):
        return values
