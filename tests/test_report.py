"""The report of a study: privacy first, no accuracy alone, nothing from outside, nothing that a store smuggles in."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

import tune.cli
from analysis import cli
from analysis.page import TEMPLATES, render, report
from analysis.runs import Runs, load_runs, rows_of
from analysis.sections import PUBLISHED
from analysis.selection import best, configurations, control_of
from analysis.verdict import RESULT, default_place
from dpsink.config import TrialConfig, load_config, read_yaml
from dpsink.console import metric_text
from dpsink.errors import InputError
from dpsink.privacy.plan import NON_PRIVATE
from tests.stores import Run, control_run, large_study, study_run, trial_run, write_runs
from tests.test_analysis import GOOD
from tests.test_tracking import STATEMENT, TARGET, Fake, make_study
from tune import schema
from tune.tracking import rebuild

VOID = {"meta", "img", "br", "hr", "link", "input", "path", "circle", "polyline"}
ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
QUALITY = re.compile(r"\b(FID|KID|accuracy|variety|recall|precision)\b")
BROWSER = shutil.which("chromium")
Written = Callable[..., Runs]


@dataclass
class Node:
    """An element and what is in it."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def all(self, *tags: str) -> Iterator[Node]:
        """Elements of these tags within, in order; any without tags."""
        for child in self.children:
            if isinstance(child, Node):
                if not tags or child.tag in tags:
                    yield child
                yield from child.all(*tags)

    @property
    def text(self) -> str:
        """All words within, but for styles and scripts."""
        if self.tag in ("style", "script"):
            return ""
        words = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join(" ".join(words).split())


class Reader(HTMLParser):
    """HTML to nodes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open = [Node("", {})]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in ("meta", "img"):
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: str) -> Node:
    """The page; every element is closed by its own end."""
    reader = Reader(page)
    assert [node.tag for node in reader.open] == [""]
    return reader.open[0]


def section(page: str, title: str) -> Node:
    return next(one for one in read(page).all("section") if next(one.all("h2")).text == title)


def cells(table: Node) -> list[list[str]]:
    """Rows of text, heads first."""
    return [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")]


def heads(table: Node) -> list[str]:
    return next(
        ([one.text for one in row.all("th", "td")] for row in table.all("tr") if "heads" in str(row.attributes)), []
    )


def images(page: str) -> list[bytes]:
    return [base64.b64decode(one.attributes["src"].partition("base64,")[2]) for one in read(page).all("img")]


@dataclass
class Control(Fake):
    """The class-mean control, with its files."""

    @property
    def config(self) -> TrialConfig:
        return load_config(None, ("generator.kind=class_mean", "privacy.noise_multiplier=null"))


CLEAN = [
    Control("class-mean", role="baseline", metrics={"fid": 90.0, "accuracy": 0.75, "variety": 0.01}),
    *GOOD,
    Fake("dull", metrics={"fid": 60.0, "accuracy": 0.65}),
]


def broken(folder: Path) -> dict[str, Run]:
    """A run for every reason to set it apart; each would be the best."""

    def run(name: str, metrics: dict[str, float] | None = None, **tags: str) -> Run:
        told = {getattr(schema, f"{key}_TAG"): value for key, value in tags.items()}
        told = {schema.FOLDER_TAG: str(folder)} | told
        return trial_run(
            "broken", name, {"accuracy": 0.99, "fid": 1.0} | (metrics or {}), config=f"c-{name}", tags=told
        )

    return {
        "failed": run("a-failed", STATUS="failed", ERROR="out of memory"),
        "diverged": run("b-diverged", {"accuracy": 0.0, "fid": 1e6}, STATUS="diverged"),
        "unfinished": run("c-unfinished", STATUS="running"),
        NON_PRIVATE: run("d-free", PRIVATE=NON_PRIVATE),
        "above the target epsilon": run("e-greedy", {schema.EPSILON: TARGET + 1e-6}),
        "on other data": run("f-elsewhere", FINGERPRINT="hmac:theirs"),
        "with another FID extractor": run("g-inception", EXTRACTOR="inception@5000"),
        "without its objective": run("h-blind", {"accuracy": math.nan}),
        "without epsilon": run("i-silent", {schema.EPSILON: math.nan}),
        "stopped early": run("j-stopped", STATUS="stopped_early"),
        "without its files": run("k-gone", FOLDER=f"{folder}/gone"),
        "beside another seed": run("l-second-seed", CONFIG_ID="c-a-failed"),
    }


BROKEN = broken(Path())  # reasons and names


@pytest.fixture(scope="module")
def place(empty_database: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database and one study of each kind; the tests only read it."""
    place = tmp_path_factory.mktemp("report")
    shutil.copyfile(empty_database[0], place / "mlflow.db")
    for name, fakes in (("clean", CLEAN), ("alone", GOOD[:1])):
        uri = f"sqlite:///{place}/mlflow.db"
        rebuild(make_study(place / name, list(fakes), uri, name=name, study_id=f"id-{name}"))
    sick = few(study_run("broken", tags={schema.FOLDER_TAG: str(place)}), "broken", place)
    hopeless = trial_run("hopeless", "sunk", {}, tags={schema.STATUS_TAG: "diverged"})
    others = [*broken(place).values(), study_run("empty"), study_run("hopeless"), hopeless]
    write_runs(place / "mlflow.db", [*sick, *others])
    return place


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory of one's own: verdicts are looked for there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def uri(place: Path) -> str:
    return f"sqlite:///{place}/mlflow.db"


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """The database in a copy that a test may spoil; the artifacts are still those of all."""
    return shutil.copyfile(place / "mlflow.db", tmp_path / "mlflow.db")


@pytest.fixture(scope="module")
def page(place: Path) -> str:
    """The report of the study with every kind of run."""
    return render(load_runs("broken", f"sqlite:///{place}/mlflow.db"))


@pytest.fixture(scope="module")
def clean(place: Path) -> str:
    return render(load_runs("clean", f"sqlite:///{place}/mlflow.db"))


@pytest.fixture
def written(empty_database: tuple[Path, str], tmp_path: Path) -> Written:
    """Loads the first study of runs that are written into a database of their own."""

    def write(*runs: Run) -> Runs:
        shutil.copyfile(empty_database[0], tmp_path / "written.db")
        write_runs(tmp_path / "written.db", runs)
        return load_runs(runs[0].tags[schema.STUDY_NAME_TAG], f"sqlite:///{tmp_path}/written.db")

    return write


def few(study: Run, name: str, folder: Path | None = None) -> list[Run]:
    """A study of two searched runs and the control, whose files are in a folder."""
    usual = {"fid": 20.0, "variety": 0.5, "recall": 0.4, "accuracy": 0.8}
    metrics = usual | {"accuracy_logreg": 0.81, "accuracy_mlp": 0.82, "accuracy_cnn": 0.83}
    control = control_run(name, {"fid": 90.0, "accuracy": 0.75, "variety": 0.01, "recall": 0.0})
    runs = [trial_run(name, "t1", metrics), trial_run(name, "t2", metrics | {"accuracy": 0.7}), control]
    return [study, *(run._replace(tags=run.tags | {schema.FOLDER_TAG: str(folder or "/gone")}) for run in runs)]


def run_command(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["dpsink-analysis", "report", *words])
        cli.main()
    return int(ended.value.code or 0)


# What comes first, and what may not stand alone.


def test_statement_comes_before_any_number_of_quality(clean: str) -> None:
    first, *_ = read(clean).all("section")
    whole = read(clean).text
    assert f"whole study ε ≤ {math.ceil(STATEMENT['study_epsilon'] * 1000) / 1000:g}" in first.text
    assert not QUALITY.search(first.text)
    assert whole.index("whole study ε ≤") < QUALITY.search(whole).start()  # pyright: ignore[reportOptionalMemberAccess]


def test_floor_of_fid_stands_with_the_best(clean: str) -> None:
    assert "real images against real ones have fid 0.1234" in section(clean, "The best runs").text.lower()


def test_statement_gives_target_delta_adjacency_accountant_and_conditions(clean: str) -> None:
    text = section(clean, "Privacy").text
    wanted = (
        "each trial ε ≤ 10 at δ = 1e-05",
        "compose_all",
        "adding or removing one record",
        "dp-accounting",
        "one two",
    )
    assert [words for words in wanted if words not in text] == []


def test_runs_without_privacy_are_an_alarm(page: str, clean: str) -> None:
    alarms = [
        [node.text for node in read(one).all("p") if node.attributes.get("class") == "alarm"] for one in (page, clean)
    ]
    assert [text.partition(":")[0] for text in alarms[0]] == [NON_PRIVATE]
    assert alarms[1] == []


def test_study_without_privacy_is_an_alarm(written: Written) -> None:
    statement = {schema.STATEMENT_TAG: json.dumps({"study_epsilon": "inf", "non_private": True})}
    text = section(render(written(*few(study_run("free", tags=statement), "free"))), "Privacy").text
    assert f"{NON_PRIVATE}: study free gives no privacy" in text
    assert f"whole study ε ≤ {NON_PRIVATE}" in text


def test_every_accuracy_has_variety_recall_and_the_control_beside_it(clean: str) -> None:
    tables = [one for one in read(clean).all("table") if {"accuracy", "CNN"} & set(heads(one))]
    assert len(tables) == 4  # best by FID, best by accuracy, on the front, with the control
    for table in tables:
        for beside in ("variety", "recall"):
            assert heads(table).count(beside) == max(1, heads(table).count("accuracy"))
        assert [row[0] for row in cells(table) if row[0].startswith("class-mean control")] != []


def test_every_picture_of_accuracy_has_one_of_variety_beside_it(clean: str) -> None:
    labels = [one.attributes.get("aria-label", "") for one in section(clean, "Quality over ε").all("svg")]
    assert [label.partition(" ")[0] for label in labels if label] == ["FID", "accuracy", "variety"]
    points = [one.text for one in section(clean, "What can be had together").all("title")]
    assert points and all("variety" in text for text in points if "accuracy" in text)


def test_what_selects_and_what_judges_stand_apart(clean: str) -> None:
    table = next(section(clean, "The best runs").all("table"))
    assert cells(table)[0] == ["", "validation: selects", "test: judges"]


def test_study_without_the_control_is_told_so(uri: str) -> None:
    text = section(render(load_runs("alone", uri)), "Beside the control and the published figures").text
    assert "has no class-mean control at this ε" in text


def test_ranking_is_that_of_best(clean: str, uri: str) -> None:
    runs = load_runs("clean", uri)
    for table, metric in zip(section(clean, "The best runs").all("table"), ("fid", "accuracy"), strict=False):
        shown = [row[0].split()[1] for row in cells(table)[2:] if row[0][0].isdigit()]
        assert shown == list(best(runs, metric)["trial"])
        column = heads(table).index({"fid": "FID"}.get(metric, metric))
        assert [row[column] for row in cells(table)[2:5]] == [metric_text(one) for one in best(runs, metric)[metric]]


def test_control_is_the_mean_of_its_seeds(written: Written) -> None:
    twice = [control_run("two", {"accuracy": value, "fid": 90.0}) for value in (0.7, 0.8)]
    second = twice[1]._replace(id="two-again", tags=twice[1].tags | {schema.TRIAL_ID_TAG: "baseline-class-mean-2"})
    runs = written(*few(study_run("two"), "two")[:3], twice[0], second)
    control = control_of(runs, rows_of(configurations(runs))[0])
    assert control is not None and control["accuracy"] == pytest.approx(0.75)


# Nothing from outside, and legible without a script.


def test_nothing_outside_the_file_is_referenced(clean: str) -> None:
    outside = re.compile(r"^(?!data:image/png;base64,)", re.S)
    named = ("src", "href", "srcset", "action", "poster", "data", "xlink:href", "background")
    found = [one.attributes[name] for one in read(clean).all() for name in named if name in one.attributes]
    assert found and [value for value in found if outside.search(value)] == []
    style = next(read(clean).all("style")).children
    assert not re.search(r"url\(|@import|https?:", str(style))
    assert not {one.tag for one in read(clean).all()} & {"link", "iframe", "object", "embed", "base", "form"}


def test_page_s_own_policy_allows_its_own_script_only(page: str) -> None:
    policy = next(one.attributes["content"] for one in read(page).all("meta") if "http-equiv" in one.attributes)
    (script,) = read(page).all("script")
    digest = base64.b64encode(hashlib.sha256(str(script.children[0]).encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert script.children[0] == (TEMPLATES / "report.js").read_text(encoding="utf-8")


def test_all_is_there_without_a_script(clean: str, uri: str) -> None:
    """The script holds no data, and nothing is hidden until it runs."""
    text, runs = read(clean).text, load_runs("clean", uri)
    assert [row["trial"] for row in rows_of(runs.table) if row["trial"] not in text] == []
    assert not re.search(r"hidden|display:\s*none", re.sub(r"aria-hidden", "", clean))


def test_page_can_be_read_by_ear(clean: str) -> None:
    page = read(clean)
    levels = [int(one.tag[1]) for one in page.all("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert next(page.all("html")).attributes["lang"] == "en"
    assert all(one.attributes["alt"] for one in page.all("img"))
    assert all("scope" in one.attributes for one in page.all("th"))
    assert all(next(one.all("caption")).text for one in page.all("table"))
    pictures = [one for one in page.all("svg") if "aria-hidden" not in one.attributes]
    assert pictures and all(one.attributes["aria-label"] and one.attributes["role"] == "img" for one in pictures)


def luminance(colour: str) -> float:
    """Of `#rgb` or `#rrggbb`, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * one for one in colour[1:])
    parts = [int(digits[index : index + 2], 16) / 255 for index in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_their_ground(scheme: int) -> None:
    """WCAG 2: 4.5 for text, 3 for what is drawn."""
    blocks = re.findall(r":root \{(.*?)\}", (TEMPLATES / "report.css").read_text(encoding="utf-8"), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", blocks[scheme]))
    pairs = [(text, ground, 4.5) for text in ("ink", "soft") for ground in ("paper", "wash")]
    pairs += [("on-alarm", "alarm", 4.5), *((line, "paper", 3) for line in ("accent", "middle", "worst", "alarm"))]
    for front, ground, least in pairs:
        bright, dark = sorted((luminance(colours[front]), luminance(colours[ground])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= least, (front, ground)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Debian's chromium")
def test_phone_shows_the_page_without_scrolling_sideways(page: str, tmp_path: Path) -> None:
    """360 px wide, as laid out by a browser; wide tables scroll in their own box."""
    told = "[d.documentElement.scrollWidth, d.querySelectorAll('button').length]"
    script = f"const d = f.contentDocument; document.title = {told}"
    frame = f'<iframe id="f" style="width:360px;border:0" srcdoc="{html.escape(page)}" onload="{html.escape(script)}">'
    (tmp_path / "phone.html").write_text(f"<!doctype html><title></title>{frame}</iframe>", encoding="utf-8")
    quiet = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile")  # fmt: skip
    command = [str(BROWSER), "--headless", "--no-sandbox", *quiet, "--dump-dom", f"file://{tmp_path}/phone.html"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    width, buttons = re.findall(r"<title>(\d+),(\d+)</title>", shown)[0]
    assert int(width) <= 360
    assert int(buttons) > 0  # the policy let the script run


# What a store may hold.


def test_untrusted_text_is_escaped(written: Written) -> None:
    name, params = "evil" + ATTACK, {"optimizer.lr": ATTACK, "sinkhorn.blur": 0.1}
    statement = {schema.STATEMENT_TAG: json.dumps({"policy": ATTACK, "adjacency": ATTACK, "accountants": [ATTACK]})}
    space = {schema.SPACE_TAG: json.dumps({"optimizer.lr": {"choice": [ATTACK, "b"]}})}
    failed = {schema.STATUS_TAG: "failed", schema.ERROR_TAG: ATTACK}
    page = render(
        written(
            study_run(name, tags=statement | space, data_name=ATTACK, searched="optimizer.lr,sinkhorn.blur"),
            trial_run(name, ATTACK, {"accuracy": 0.8, "fid": 2.0}, params=params),
            trial_run(name, "b", {"accuracy": 0.7, "fid": 1.0}, params={"optimizer.lr": "b", "sinkhorn.blur": 0.2}),
            trial_run(name, "c" + ATTACK, {}, tags=failed),
        )
    )
    tree = read(page)
    assert tree.text.count(ATTACK) > 10  # it is shown, as text
    assert len(list(tree.all("script"))) == 1 and not list(tree.all("img"))
    assert [name for one in tree.all() for name in one.attributes if name.startswith("on")] == []


@pytest.mark.parametrize("reason", BROKEN)
def test_rejected_run_stands_with_its_reason(page: str, reason: str) -> None:
    by_reason, by_name = section(page, "What was set apart, and why").all("table")
    assert [reason, "1"] in cells(by_reason)
    assert [reason] == [row[2] for row in cells(by_name) if row[0] == BROKEN[reason].tags[schema.TRIAL_ID_TAG]]


def test_no_number_is_shown_as_nan(page: str) -> None:
    assert not re.search(r"\b(nan|inf|None)\b", read(page).text.replace("training images", ""))


def test_samples_are_those_of_mlflow(clean: str, place: Path) -> None:
    """Pixel by pixel, of the best by the study's objective, the median, the worst and the control."""
    shown = [Image.open(io.BytesIO(one)).tobytes() for one in images(clean)]
    names = ("useful", "sharp", "dull", "class-mean")
    kept = [next((place / "clean" / "trials" / name).rglob("samples.png")) for name in names]
    assert shown == [Image.open(path).convert("RGB").tobytes() for path in kept]


def run_id_of(uri: str, study: str, trial: str) -> str:
    return next(row["run_id"] for row in rows_of(load_runs(study, uri).table) if row["trial"] == trial)


def artifacts_of(uri: str, run_id: str) -> Path:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
        (found,) = connection.execute("select artifact_uri from runs where run_uuid = ?", (run_id,)).fetchone()
    return Path(found.removeprefix("file://"))


def moved(database: Path, study: str, trial: str, target: Path | None) -> str:
    """Has a database say that a run's artifacts lie elsewhere; a copy of them by default. Answers with its URI."""
    uri = f"sqlite:///{database}"
    run_id = run_id_of(uri, study, trial)
    if target is None:
        target = database.parent / run_id / "artifacts"
        shutil.copytree(artifacts_of(uri, run_id), target)
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("update runs set artifact_uri = ? where run_uuid = ?", (target.as_uri(), run_id))
    return uri


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


OTHERS = {
    "text": b"root:x:0:0",
    "SVG": b"<svg onload='alert(1)'/>",
    "JPEG": picture("JPEG"),
    "cut": picture("PNG")[:50],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_artifact_that_is_no_png_is_not_embedded(copied: Path, kind: str) -> None:
    uri = moved(copied, "alone", "sharp", None)
    (artifacts_of(uri, run_id_of(uri, "alone", "sharp")) / schema.GRID_ARTIFACT).write_bytes(OTHERS[kind])
    page = render(load_runs("alone", uri))
    assert images(page) == []
    assert "samples.png of trial sharp is no PNG that can be read" in section(page, "Samples").text


def test_nothing_but_pixels_of_a_png_is_embedded(copied: Path) -> None:
    uri = moved(copied, "alone", "sharp", None)
    (artifacts_of(uri, run_id_of(uri, "alone", "sharp")) / schema.GRID_ARTIFACT).write_bytes(picture("PNG") + b"secret")
    (embedded,) = images(render(load_runs("alone", uri)))
    assert b"secret" not in embedded


def test_artifact_that_leads_out_of_the_run_is_not_read(copied: Path, tmp_path: Path) -> None:
    """By a link."""
    uri = moved(copied, "alone", "sharp", None)
    grid = artifacts_of(uri, run_id_of(uri, "alone", "sharp")) / schema.GRID_ARTIFACT
    (tmp_path / "holiday.png").write_bytes(picture("PNG"))
    grid.unlink()
    grid.symlink_to(tmp_path / "holiday.png")
    page = render(load_runs("alone", uri))
    assert images(page) == []
    assert "is not among the run's own artifacts" in section(page, "Samples").text


def test_artifacts_that_are_said_to_lie_elsewhere_are_not_read(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / schema.GRID_ARTIFACT).write_bytes(picture("PNG"))
    page = render(load_runs("alone", moved(copied, "alone", "sharp", tmp_path / "photos")))
    assert images(page) == []
    assert "is not among the run's own artifacts" in section(page, "Samples").text


def test_missing_artifacts_are_a_note_and_the_rest_stands(copied: Path) -> None:
    uri = moved(copied, "clean", "useful", None)
    (artifacts_of(uri, run_id_of(uri, "clean", "useful")) / schema.GRID_ARTIFACT).unlink()
    page = render(load_runs("clean", uri))
    assert "useful (best) has no samples in MLflow" in section(page, "Samples").text
    assert len(images(page)) == 3


def test_study_file_is_taken_from_the_study_s_own_folder_only(clean: str, written: Written, tmp_path: Path) -> None:
    assert "name: digits-study" in section(clean, "How to reproduce this").text  # as `make_study` writes it
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "study.yaml").write_text("password: hunter2")
    (tmp_path / "private" / "study.json").write_text('{"study_id": "another"}')
    tags = {schema.FOLDER_TAG: str(tmp_path / "private")}
    assert "hunter2" not in render(written(*few(study_run("few", tags=tags), "few", tmp_path)))


def test_sealed_study_s_report_shows_nothing_of_the_losers(written: Written) -> None:
    statement = {schema.STATEMENT_TAG: json.dumps({"policy": "release_best", "study_epsilon": 1.9, "spent": 7.654})}
    winner = trial_run("sealed", "winner", {"accuracy": 0.8, "fid": 20.0})
    losers = [trial_run("sealed", f"trial-{index}", {"accuracy": 0.61, "fid": 33.3}) for index in range(4)]
    failed = trial_run("sealed", "trial-9", {}, tags={schema.STATUS_TAG: "failed", schema.ERROR_TAG: "sunk"})
    page = render(written(study_run("sealed", tags=statement), winner, *losers, failed))
    assert "winner" in page
    assert not re.search(r"trial-\d|0\.61|33\.3|sunk|7\.65", page)
    assert "1 of 1 runs" in read(page).text


# The published figures, the verdict, the command.


PUBLISHED_ROWS = [  # data, method, ε, δ, FID, LogReg, MLP, CNN
    ("mnist", "DP-Sinkhorn, m = 1", "10", "1e-05", "61.2", "0.795", "0.802", "0.832"),
    ("mnist", "DP-Sinkhorn, as later papers quote it", "10", "1e-05", "48.4", "0.828", "0.827", "0.832"),
    ("mnist", "DP-Sinkhorn, independent rerun", "10", "1e-05", "78", "0.776", "0.77", "0.796"),
    ("mnist", "DP-Sinkhorn, independent rerun", "1", "1e-05", "100", "0.669", "0.615", "0.619"),
    ("fashion_mnist", "DP-Sinkhorn, m = 1", "10", "1e-05", "145.1", "0.73", "0.728", "0.693"),
    ("fashion_mnist", "DP-Sinkhorn, independent rerun", "1", "1e-05", "216.2", "0.626", "0.58", "0.563"),
    ("celeba", "DP-Sinkhorn", "10", "1e-06", "168.4", "–", "0.762", "0.758"),
    ("celeba", "real data", NON_PRIVATE, "–", "1.1", "–", "0.919", "0.95"),
    ("celeba", "DPDM", "10", "1e-06", "21.1", "–", "–", "–"),
]


@pytest.mark.parametrize("data", ["mnist", "fashion_mnist", "celeba"])
def test_published_figures_stand_beside_runs_of_the_same_data(written: Written, data: str) -> None:
    page = render(written(*few(study_run("paper", data_name=data), "paper")))
    part = section(page, "Beside the control and the published figures")
    shown = [row[:7] for row in cells(next(part.all("table")))]
    assert [row[1:] for row in PUBLISHED_ROWS if row[0] == data and list(row[1:]) not in shown] == []
    assert "arXiv 2111.01177" in part.text and ("label" in part.text) == (data == "celeba")


def test_every_published_figure_has_a_source_and_where_it_is_private_both_epsilon_and_delta() -> None:
    told = read_yaml(PUBLISHED)
    rows = [row for data in ("mnist", "fashion_mnist", "celeba") for row in told[data]]
    assert {row["source"] for row in rows} == set(told["sources"])
    assert [row for row in rows if (row["epsilon"] is None) != (row["delta"] is None)] == []
    assert all(0 < row[name] < 1 for row in rows for name in ("logreg", "mlp", "cnn") if row[name] is not None)


def test_published_figures_stay_away_from_other_data(clean: str) -> None:
    assert "DP-Sinkhorn" not in read(clean).text
    assert "No figures of digits are published" in read(clean).text


@pytest.mark.parametrize(("extractor", "shown"), [("classifier@180", "–"), ("inception@5000", "20")])
def test_fid_stands_beside_the_published_one_of_the_same_features_only(
    written: Written, extractor: str, shown: str
) -> None:
    study, *trials = few(study_run("paper", tags={schema.EXTRACTOR_TAG: extractor}, data_name="mnist"), "paper")
    trials = [run._replace(tags=run.tags | {schema.EXTRACTOR_TAG: extractor}) for run in trials]
    part = section(render(written(study, *trials)), "Beside the control and the published figures")
    assert cells(next(part.all("table")))[1][3] == shown


def write_verdict(runs: Runs, trial: str, **more: float) -> Path:
    (row,) = [one for one in rows_of(runs.accepted) if one["trial"] == trial]
    judged = {name: row[name] for name in ("study", "config_id", "trial", "epsilon")} | {
        "study_id": runs.study_of(row).study_id,
        "rank": 1, "selected": 0.8, "judged": 0.777, "judged_low": 0.75, "judged_high": 0.8, "probability_best": 1.0,
        "test_variety": 0.5, "test_recall": 0.4,
    } | more  # fmt: skip
    default_place(runs).mkdir(parents=True)
    path = default_place(runs) / RESULT
    path.write_text(json.dumps({"rows": [judged], "value": "accuracy", "words": ["It holds."], "skipped": []}))
    return path


def test_verdict_of_fresh_samples_is_told_with_the_control_beside_it(uri: str) -> None:
    runs = load_runs("clean", uri)
    write_verdict(runs, "useful")
    part = section(render(runs), "Is the best really the best?")
    assert "It holds." in part.text
    assert [row[0] for row in cells(next(part.all("table")))[1:]] == ["1. useful", "class-mean control: class-mean"]


def test_control_that_was_judged_beside_the_others_is_shown_as_it_was(uri: str) -> None:
    runs = load_runs("clean", uri)
    path = write_verdict(runs, "useful")
    found = json.loads(path.read_text())
    judged = {"trial": "class-mean", "epsilon": 9.5, "judged": 0.123, "judged_low": 0.1, "judged_high": 0.2}
    path.write_text(json.dumps(found | {"control": judged}))
    row = cells(next(section(render(runs), "Is the best really the best?").all("table")))[-1]
    assert (row[0], row[3], row[4]) == ("class-mean control: class-mean", "0.123", "[0.1, 0.2]")


@pytest.mark.parametrize(("trial", "told"), [("useful", False), ("dull", True)])
def test_verdict_on_a_selection_that_has_changed_since_is_noted(uri: str, trial: str, told: bool) -> None:
    runs = load_runs("clean", uri)
    path = write_verdict(runs, trial)
    asked = {"by": ["accuracy"], "weights": None, "epsilon": None, "where": []}
    rule = asked | {"top": 1, "seeds": 3, "samples": 5000}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rule": rule}))
    text = section(render(runs), "Is the best really the best?").text
    assert ("by accuracy useful comes first now; `dpsink-analysis evaluate-top clean" in text) == told


def test_what_new_trainings_gave_stands_beside_the_verdict(uri: str) -> None:
    runs = load_runs("clean", uri)
    write_verdict(runs, "useful", trainings=3, retrained=0.7, retrained_low=0.65, retrained_high=0.75)
    table = cells(next(section(render(runs), "Is the best really the best?").all("table")))
    assert table[0][-1].startswith("trained again")
    assert [row[-1] for row in table[1:]] == ["0.7 [0.65, 0.75], 3 times", "–"]


def test_verdict_on_other_runs_is_not_taken_for_these(uri: str) -> None:
    runs = load_runs("clean", uri)
    path = write_verdict(runs, "useful")
    path.write_text(path.read_text().replace('"config_id": "c-useful"', '"config_id": "c-older"'))
    text = section(render(runs), "Is the best really the best?").text
    assert "is about other runs than these" in text and "It holds." not in text


def test_verdict_on_a_study_of_the_same_name_is_not_taken_for_this_one(uri: str) -> None:
    """A study whose folder was removed and begun anew has the same names and paths, and another id."""
    runs = load_runs("clean", uri)
    path = write_verdict(runs, "useful")
    path.write_text(path.read_text().replace('"study_id": "id-clean"', '"study_id": "id-older"'))
    assert "is about other runs than these" in section(render(runs), "Is the best really the best?").text


def test_reader_is_told_what_has_not_been_judged_again(clean: str) -> None:
    assert "dpsink-analysis evaluate-top clean" in section(clean, "Is the best really the best?").text


def test_commands_that_reproduce_it_parse_and_tell_no_password(place: Path, clean: str) -> None:
    runs = load_runs("clean", f"sqlite:///{place}/mlflow.db")
    lines = "".join(map(str, next(section(clean, "How to reproduce this").all("pre")).children)).splitlines()
    apps = {"dpsink-tune": tune.cli.app, "dpsink-analysis": cli.app}
    for app, name, *words in map(shlex.split, lines):
        command = get_command(apps[app]).commands[name]  # pyright: ignore[reportAttributeAccessIssue]
        command.make_context(name, words)
    assert [shlex.split(line)[1] for line in lines] == ["sweep", "report"]
    secret = Runs(runs.studies, "http://me:hunter2@host:5000", runs.table)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("statement_of", "fetch_history"):
            patch.setattr(f"analysis.sections.{name}", lambda *_: {})
        patch.setattr("analysis.sections.grid_of", lambda *_: None)
        told = render(secret)
    assert "hunter2" not in told and "http://host:5000" in told


def test_study_that_repeats_another_is_reproduced_by_the_command_that_made_it(written: Written) -> None:
    again = study_run("again", tags={schema.REPEATS_TAG: "id-first"}, seeds=2)
    trials = [trial_run("again", f"t{index}", {"accuracy": 0.8}, config=f"c{index // 2}") for index in range(4)]
    runs = written(*few(study_run("first"), "first"), again, *trials)
    code = section(render(load_runs(["first", "again"], runs.tracking_uri)), "How to reproduce this")
    lines = next(code.all("pre")).text
    assert "dpsink-tune sweep first.yaml dpsink-tune repeat first --top 2 --seeds 2 --name again" in lines
    get_command(tune.cli.app).commands["repeat"].make_context(  # pyright: ignore[reportAttributeAccessIssue]
        "repeat", shlex.split("first --top 2 --seeds 2 --name again")
    )
    assert "dpsink-tune repeat first --top 2" in render(load_runs("again", runs.tracking_uri))


def test_promises_of_several_studies_are_summed(uri: str) -> None:
    text = section(render(load_runs(["clean", "alone"], uri)), "Privacy").text
    assert f"together, by basic composition: ε ≤ {math.ceil(2000 * STATEMENT['study_epsilon']) / 1000:g}" in text


# Writing.


def test_report_is_written_where_it_was_told(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("clean", "--tracking-uri", uri, "--out", "made/here.html") == 0
    assert "made/here.html" in capsys.readouterr().out
    assert (tmp_path / "made" / "here.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_command_s_json_names_the_file_and_the_rejected(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("broken", "--tracking-uri", uri, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"] == "report.html" and len(told["rejected"]) == len(BROKEN)


def test_report_refuses_to_overwrite_unless_told(uri: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(InputError, match="exists; choose another --out, or --force"):
        report(load_runs("alone", uri), Path("report.html"))
    assert (tmp_path / "report.html").read_text() == "mine"
    assert report(load_runs("alone", uri), Path("report.html"), force=True).read_text() != "mine"


def test_report_never_takes_a_folder_s_place(uri: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").touch()
    with pytest.raises(InputError, match="is a folder"):
        report(load_runs("alone", uri), tmp_path, force=True)
    assert (tmp_path / "card.json").exists()


def test_error_on_the_way_leaves_no_file(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("mine")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        report(load_runs("alone", uri), Path("report.html"), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("empty",), "no trial has started"),
        (("hopeless",), "all 1 runs are rejected: 1 diverged"),
        (("claen",), "did you mean 'clean'"),
        (("clean", "--verdict", "nowhere"), "nowhere/result.json: no such result"),
    ],
    ids=["empty", "all rejected", "unknown", "no such verdict"],
)
def test_what_cannot_be_reported_is_one_line_and_exit_code_2(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    code, printed = run_command(*words, "--tracking-uri", uri), capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert told in printed.err and printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_studies_of_mixed_data_are_not_put_together(written: Written) -> None:
    other = study_run("b", tags={schema.FINGERPRINT_TAG: "hmac:theirs"})
    runs = written(*few(study_run("a"), "a"), *few(other, "b"))
    with pytest.raises(InputError, match="are of different data"):
        load_runs(["a", "b"], runs.tracking_uri)


@pytest.mark.slow
def test_thousands_of_runs_make_a_page_that_a_phone_can_load(written: Written) -> None:
    page = render(written(*large_study("large", 2000)))
    assert len(page) < 500_000
    assert "2001 of 2001 runs" in read(page).text
    assert "search next" in section(page, "How the search could go on").text
