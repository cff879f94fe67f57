"""Links into MLflow's own pages; checked against those of MLflow 3.17."""

import json
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from tune import schema

COMPARED = 25  # runs at most: more make the compare page slow


def where(tags: Mapping[str, str]) -> str:
    """MLflow's search for the runs that have these tags."""
    return " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())


def trials_of(study_id: str) -> str:
    """MLflow's search for the trials of a study."""
    return where({schema.KIND_TAG: schema.KIND_TRIAL, schema.STUDY_ID_TAG: study_id})


def order_of(metric: str) -> str:
    """MLflow's order by a metric, the best first."""
    return f"metrics.`{metric}` {'ASC' if schema.mode_of(metric) == 'min' else 'DESC'}"


def runs_link(server: str, experiment_id: str, study_id: str, metric: str, *, charts: bool = False) -> str:
    """The trials of a study as a table, the best first, or as charts.

    Args:
        server: address of MLflow's server.
        metric: what they are sorted by.
    """
    options = {
        "workflowType": "machine_learning",
        "searchFilter": trials_of(study_id),
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": str(schema.mode_of(metric) == "min").lower(),
    } | ({"compareRunsMode": "CHART"} if charts else {})
    return f"{server}/#/experiments/{experiment_id}/runs?{_query(options)}"


def compare_link(server: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Runs side by side: parallel coordinates, params, metrics."""
    options = {"runs": json.dumps(list(run_ids)[:COMPARED]), "experiments": json.dumps([experiment_id])}
    return f"{server}/#/compare-runs?{_query(options)}"


def _query(options: Mapping[str, str]) -> str:
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
