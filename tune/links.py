"""Links into MLflow's own pages; checked against those of MLflow 3.17."""

import json
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from tune import schema

COMPARED = 25  # runs at most: more make the compare page slow
COLUMNS = (schema.EPSILON, "fid", "accuracy", "variety", "recall")  # beside the objectives
CHART_HEIGHT = 400  # pixels
DIMENSIONS = 20  # of a search space that are shown: a tag holds 5,000 characters


def where(tags: Mapping[str, str]) -> str:
    """MLflow's search for the runs that have these tags."""
    return " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())


def trials_of(study_id: str) -> str:
    """MLflow's search for the trials of a study."""
    return where({schema.KIND_TAG: schema.KIND_TRIAL, schema.STUDY_ID_TAG: study_id})


def ranked_of(study_id: str) -> str:
    """MLflow's search for the trials of a study that may be best: its search proposed them, and they are completed.

    The last metrics of others are those of a part of their budget, or of a training that diverged.
    """
    return f"{trials_of(study_id)} and {where({schema.ROLE_TAG: schema.ROLE_SEARCH, schema.STATUS_TAG: 'completed'})}"


def order_of(metric: str) -> str:
    """MLflow's order by a metric, the best first."""
    return f"metrics.`{metric}` {'ASC' if schema.mode_of(metric) == 'min' else 'DESC'}"


def view_tag(study_id: str) -> str:
    """The experiment's tag under which MLflow finds the view of a study."""
    return f"mlflow.sharedViewState.{study_id}"


def view_of(study_id: str, objectives: Sequence[str], searched: Sequence[str]) -> str:
    """What MLflow shows of a study's trials, as its button "Share" keeps it: which, in what order, columns, charts.

    Without it a table of runs has neither metrics nor params until a person picks them, and no chart has the settings.

    Args:
        objectives: metrics, the main one first.
        searched: paths of the search space.
    """
    metrics = list(dict.fromkeys((*objectives, *COLUMNS)))
    params = list(searched)[:DIMENSIONS]
    columns = {"tags": [schema.STATUS_TAG], "metrics": metrics, "params": params}
    kept = {"display": True, "deleted": False, "isGenerated": False, "isReordered": False}
    section = {"uuid": "search", "name": "Search", "columns": 1, "cardHeight": CHART_HEIGHT} | kept
    chart = {"uuid": "settings", "metricSectionId": "search", "type": "PARALLEL", "showAllRuns": True} | kept
    axes = {"selectedParams": params, "selectedMetrics": list(objectives)}
    view = {
        "searchFilter": trials_of(study_id),
        "orderByKey": f"metrics.`{objectives[0]}`",
        "orderByAsc": schema.mode_of(objectives[0]) == "min",
        "selectedColumns": [f"{kind}.`{name}`" for kind, names in columns.items() for name in names],
        "compareRunSections": [section],
        "compareRunCharts": [chart | axes],
    }
    return json.dumps(view)


def runs_link(server: str, experiment_id: str, study_id: str, *, charts: bool = False) -> str:
    """The trials of a study in its own view, as a table or as charts.

    Args:
        server: address of MLflow's server.
    """
    options = {"workflowType": "machine_learning", "viewStateShareKey": study_id}
    mode = {"compareRunsMode": "CHART"} if charts else {}
    return f"{server}/#/experiments/{experiment_id}/runs?{_query(options | mode)}"


def compare_link(server: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Runs side by side: parallel coordinates, params, metrics."""
    options = {"runs": json.dumps(list(run_ids)[:COMPARED]), "experiments": json.dumps([experiment_id])}
    return f"{server}/#/compare-runs?{_query(options)}"


def _query(options: Mapping[str, str]) -> str:
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
