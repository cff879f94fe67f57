"""Reads studies back from MLflow: selects, compares, judges, exports. What a notebook needs is here by name.

`store` → `runs` → `statements`, `rules` → `conditions` → `selection` → `fronts`, `effects`, `export`, `model` →
`registry`, `verdict` → `figures`, `charts` → `tables` → `drawings` → `sections` → `page` → `cli`; each imports only
what stands before it.
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
    from analysis.rules import parse_rule
    from analysis.runs import load_runs, rows_of
    from analysis.selection import baselines, best, configurations, control_of, named, run_of, select_best
    from analysis.tables import guarantee
    from analysis.verdict import evaluate_top

__all__ = [
    "baselines",
    "best",
    "comparison_figure",
    "configurations",
    "control_of",
    "evaluate_top",
    "export_run",
    "fetch_model",
    "guarantee",
    "importance",
    "importance_figure",
    "load_runs",
    "named",
    "pareto",
    "pareto_figure",
    "parse_rule",
    "register_run",
    "report",
    "rows_of",
    "run_of",
    "select_best",
    "verdict_figure",
]
_ROOMS = {
    "runs": ("load_runs", "rows_of"),
    "rules": ("parse_rule",),
    "selection": ("baselines", "best", "configurations", "control_of", "named", "run_of", "select_best"),
    "fronts": ("pareto",),
    "effects": ("importance",),
    "export": ("export_run",),
    "registry": ("fetch_model", "register_run"),
    "verdict": ("evaluate_top",),
    "figures": ("comparison_figure",),
    "tables": ("guarantee",),
    "page": ("report",),
    "charts": ("importance_figure", "pareto_figure", "verdict_figure"),
}


def __getattr__(name: str) -> Any:
    """Loads on first use: pandas takes a second, and the command line answers `--help` without it."""
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"analysis.{room}"), name)
    raise AttributeError(f"module 'analysis' has no attribute '{name}'")
