"""One HTML file about studies, which needs nothing but itself: a person reads it on a phone, and prints it.

Names, notes and settings come from MLflow, where anybody may have written them: the template escapes all of them, and
the page's own policy lets a browser load nothing and run nothing but the few lines that sort tables.
"""

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.runs import Runs
from analysis.sections import is_sealed, sections
from dpsink.disk import check_target, drafted
from dpsink.errors import InputError
from tune import schema

if TYPE_CHECKING:
    from PIL import Image

TEMPLATES = Path(__file__).with_name("templates")
REPORT = Path("report.html")


def report(runs: Runs, out: Path = REPORT, *, verdict: Path | None = None, force: bool = False) -> Path:
    """Writes what is known about studies as one HTML file, whole or not at all.

    Args:
        out: the file.
        verdict: folder of `evaluate_top`, if it was told one.
        force: replace an earlier file.

    Returns:
        `out`.

    Raises:
        InputError: `out` exists or cannot be written, or there is nothing to compare.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the report a file's name")
    check_target(out, force=force)
    page = render(runs, verdict)
    with drafted(out) as draft:
        draft.write_text(page, encoding="utf-8")
    return out


def render(runs: Runs, verdict: Path | None = None) -> str:
    """The report as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    runs = _published(runs)
    environment = Environment(
        autoescape=True, loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"slug": _slug, "data_uri": _data_uri}
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        runs=runs, sections=sections(runs, verdict), style=style, script=script, digest=digest
    )


def _published(runs: Runs) -> Runs:
    """Of a sealed study the winner alone, whatever a store holds."""
    sealed = [study.name for study in runs.studies if is_sealed(study)]
    hidden = runs.table["study"].isin(sealed) & (runs.table["trial"] != schema.WINNER)
    return replace(runs, table=pd.DataFrame(runs.table[~hidden]).reset_index(drop=True))


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _data_uri(picture: "Image.Image") -> str:
    from dpsink.synthesis import encode_png

    return f"data:image/png;base64,{base64.b64encode(encode_png(picture)).decode()}"
