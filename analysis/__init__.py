"""Reads studies back from MLflow: selects, compares, judges, exports. What a notebook needs is here by name.

`store` → `runs` → `conditions`, `rules` → `selection` → `fronts`, `effects`, `export`, `model` → `registry`,
`verdict` → `figures`, `charts` → `tables` → `drawings` → `sections` → `page` → `cli`; each imports only what stands
before it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.charts import importance_figure, pareto_figure, verdict_figure
    from analysis.effects import importance
    from analysis.export import export_run
    from analysis.figures import comparison_figure
    from analysis.fronts import pareto
    from analysis.page import report
    from analysis.registry import fetch_model, register_run
    from analysis.runs import load_runs
    from analysis.selection import best, configurations, select_best
    from analysis.verdict import evaluate_top

__all__ = [
    "best",
    "comparison_figure",
    "configurations",
    "evaluate_top",
    "export_run",
    "fetch_model",
    "importance",
    "importance_figure",
    "load_runs",
    "pareto",
    "pareto_figure",
    "register_run",
    "report",
    "select_best",
    "verdict_figure",
]
_ROOMS = {
    "runs": ("load_runs",),
    "selection": ("best", "configurations", "select_best"),
    "fronts": ("pareto",),
    "effects": ("importance",),
    "export": ("export_run",),
    "registry": ("fetch_model", "register_run"),
    "verdict": ("evaluate_top",),
    "figures": ("comparison_figure",),
    "page": ("report",),
    "charts": ("importance_figure", "pareto_figure", "verdict_figure"),
}


def __getattr__(name: str) -> Any:
    """Loads on first use: pandas takes a second, and the command line answers `--help` without it."""
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"analysis.{room}"), name)
    raise AttributeError(f"module 'analysis' has no attribute '{name}'")
