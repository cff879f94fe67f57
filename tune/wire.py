"""A report on its way through Ray Tune: one line of text.

Of every number that Tune is told it keeps averages and a history, of each trial, until the study ends: 27 KB a trial.
"""

import json
from collections.abc import Mapping
from typing import Any

REPORT = "report"


def packed(values: Mapping[str, Any]) -> dict[str, str]:
    """A report, flat, as Tune takes it."""
    return {REPORT: json.dumps(values)}


def unpacked(result: Mapping[str, Any]) -> dict[str, Any]:
    """The report in Tune's result."""
    return json.loads(result[REPORT])
