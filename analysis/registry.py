"""MLflow's model registry: exports as versions of a model, and a version fetched back as the folder that it was.

    MLmodel             names `analysis.model`, which MLflow loads the folder by; no code and no pickle
    data/generator/     the folder of an export (`analysis.export`)

What comes back from a registry was written by anybody. Only files of known names and sizes are fetched, nothing in them
is run, and the folder is taken only if it is whole, an export, and what was registered. (`mlflow.pyfunc.load_model`
does what a version's MLmodel says: use it on registries that you trust.)
"""

import hashlib
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from analysis.export import FILES, PACKAGES, REQUIREMENTS, as_file_name, check_picture
from analysis.model import IMAGE, LABEL, SEED
from analysis.runs import Row, Runs
from analysis.store import all_pages, asking
from dpsink.checkpoint import load_generator
from dpsink.config import config_sha256, load_config, nearest, read_yaml
from dpsink.disk import CARD, check_target, drafted
from dpsink.errors import InputError
from dpsink.judging import privacy_line
from dpsink.privacy.plan import NON_PRIVATE
from dpsink.records import STATEMENT, read_json, read_state
from dpsink.writing import is_conditional
from tune import schema

if TYPE_CHECKING:  # its import takes seconds
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

LOADER = "analysis.model"
DATA = "data/generator"
MLMODEL = "MLmodel"
CONTENT_TAG = "dpsink.export_sha256"
KIB, MIB, GIB = 1024, 1024**2, 1024**3
LARGEST = {  # bytes; a file of an export that is larger is none
    MLMODEL: 256 * KIB,
    "model.safetensors": 4 * GIB,
    "state.json": 16 * MIB,
    schema.GRID_ARTIFACT: 4 * MIB,
    schema.CONFIG_ARTIFACT: MIB,
    CARD: 16 * MIB,
    REQUIREMENTS: 64 * KIB,
    STATEMENT: 16 * MIB,
}
_PLACE = re.compile(r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")
Found = TypeVar("Found")
_REQUIREMENT = re.compile(rf"({'|'.join(PACKAGES)})==[\w.]+")


def is_model(place: str) -> bool:
    """Whether it names a model of a registry."""
    return place.startswith("models:")


def default_place(place: str) -> Path:
    """exports/NAME/ALIAS, where an export of the same lies too."""
    named = _parsed(place)
    return Path("exports") / as_file_name(named["name"]) / (named["alias"] or named["version"])


def check_place(runs: Runs, run: Row, *, name: str, alias: str, force: bool = False) -> None:
    """Refuses a name that no place can hold, and to take an alias away from another run, unless it is told to.

    Raises:
        InputError: so it is, or the registry cannot be read.
    """
    if not _PLACE.fullmatch(f"models:/{name}/1"):
        raise InputError(f"a model cannot be registered as '{name}': no '/', ':' or '@'; choose another --name")
    if not alias:
        return
    with asking(runs.tracking_uri, f"models:/{name} cannot be registered") as client:
        held = _aliased(client, name, alias)
    if held and held.run_id != run["run_id"] and not force:
        holder = f"trial {held.tags.get(schema.TRIAL_ID_TAG)} of {held.tags.get(schema.STUDY_NAME_TAG)}"
        raise InputError(
            f"models:/{name}@{alias}: is {holder}; choose another --name, or --force to point it elsewhere"
        )


def register_run(runs: Runs, run: Row, folder: Path, *, name: str = "", alias: str = "", force: bool = False) -> str:
    """Makes an export a version of a registered model; the same export is one version, however often it is registered.

    Args:
        run: the row that was exported.
        folder: its export.
        name: of the model; by default the study's.
        alias: to point at the version, `best-fid` for example.
        force: take the alias away from another run.

    Returns:
        `models:/NAME@ALIAS`; without an alias `models:/NAME/VERSION`.

    Raises:
        InputError: the alias is another run's, or the registry cannot be written.
    """
    name = name or run["study"]
    check_place(runs, run, name=name, alias=alias, force=force)
    with asking(runs.tracking_uri, f"models:/{name} cannot be registered") as client:
        version = _registered(client, name, run, digest(folder)) or _add(client, name, run, folder)
        if alias:
            client.set_registered_model_alias(name, alias, version.version)
    return f"models:/{name}@{alias}" if alias else f"models:/{name}/{version.version}"


def fetch_model(place: str, out: Path, *, tracking_uri: str, force: bool = False) -> Path:
    """Copies the export behind a registered version to a folder, whole or not at all.

    Args:
        place: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        out: the folder to make.
        tracking_uri: of MLflow.

    Raises:
        InputError: no such version, `out` exists, or what is registered is no unchanged export.
    """
    check_target(out, force=force)
    with asking(tracking_uri, f"{place} cannot be fetched") as client, tempfile.TemporaryDirectory() as scratch:
        version = _find(client, place)
        source = client.get_model_version_download_uri(version.name, version.version)
        _fetch(source, (MLMODEL,), Path(scratch), tracking_uri)
        _check_mlmodel(Path(scratch) / MLMODEL, place)
        with drafted(out) as draft:
            draft.mkdir()
            _fetch(f"{source}/{DATA}", FILES, draft, tracking_uri, optional=(STATEMENT,))
            _check_export(draft, place)
            if digest(draft) != version.tags.get(CONTENT_TAG):
                raise InputError(f"{place}: its files are not those that were registered; export the run again")
    return out


def digest(folder: Path) -> str:
    """SHA-256 of an export's files with their names."""
    names = [name for name in (*FILES, STATEMENT) if (folder / name).exists()]
    each = "".join(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names)
    return hashlib.sha256(each.encode()).hexdigest()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


# Writing.


def _registered(client: "MlflowClient", name: str, run: Row, content: str) -> "ModelVersion | None":
    """The version that holds these files already."""
    versions = client.search_model_versions(f"run_id='{run['run_id']}'")
    return next((one for one in versions if (one.name, one.tags.get(CONTENT_TAG)) == (name, content)), None)


def _add(client: "MlflowClient", name: str, run: Row, folder: Path) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    content, card = digest(folder), read_json(folder / CARD)
    place = f"exports/{content[:16]}"  # of its own: no version's files are written over
    with tempfile.TemporaryDirectory() as scratch:
        _save(folder, Path(scratch))
        client.log_artifacts(run["run_id"], f"{scratch}/model", place)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        schema.PRIVATE_TAG: "true" if card["private"] else NON_PRIVATE,
        schema.STUDY_NAME_TAG: run["study"],
        schema.TRIAL_ID_TAG: run["trial"],
        schema.CONFIG_SHA_TAG: run["config_sha256"],
        CONTENT_TAG: content,
    }
    source = f"{client.get_run(run['run_id']).info.artifact_uri}/{place}"
    told = f"{privacy_line(card)}. Selected by {card['selected_by']} in study {run['study']}."
    return client.create_model_version(name, source, run["run_id"], tags=tags, description=told)


def _save(folder: Path, scratch: Path) -> None:
    """The folder of a model of MLflow, scratch/model."""
    import mlflow.pyfunc

    shutil.copytree(folder, scratch / Path(DATA).name)
    with warnings.catch_warnings(action="ignore"):  # MLflow would like an example of the input
        mlflow.pyfunc.save_model(
            str(scratch / "model"), loader_module=LOADER, data_path=str(scratch / Path(DATA).name),
            signature=_signature(folder), pip_requirements=_lines(folder / REQUIREMENTS),
        )  # fmt: skip


def _signature(folder: Path) -> "ModelSignature":
    """What `analysis.model` takes and gives, in MLflow's words."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    label, image = ColSpec(DataType.long, LABEL), ColSpec(DataType.binary, IMAGE)
    given = Schema([label, image] if is_conditional(read_state(folder)) else [image])
    return ModelSignature(Schema([label]), given, ParamSchema([ParamSpec(SEED, DataType.long, 0)]))


# Reading.


def _parsed(place: str) -> re.Match[str]:
    named = _PLACE.fullmatch(place)
    if named is None:
        raise InputError(f"{place}: must be models:/NAME@ALIAS or models:/NAME/VERSION; correct it")
    return named


def _find(client: "MlflowClient", place: str) -> "ModelVersion":
    named = _parsed(place)
    name, alias, number = named["name"], named["alias"], named["version"]
    model = _or_none(lambda: client.get_registered_model(name))
    if model is None:
        names = _names(client)
        hint = nearest(name, names) if names else "; it holds no model"
        raise InputError(f"model '{name}' is not registered in {schema.shown_uri(client.tracking_uri)}{hint}")
    found = _aliased(client, name, alias) if alias else _version(client, name, number)
    if found is None:
        aliases = ", ".join(sorted(model.aliases)) or "none"
        raise InputError(f"{place}: no such version; the aliases of '{name}' are: {aliases}")
    return found


def _names(client: "MlflowClient") -> list[str]:
    """Of all registered models."""
    return [model.name for model in all_pages(lambda token: client.search_registered_models(page_token=token))]


def _aliased(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    return _or_none(lambda: client.get_model_version_by_alias(name, alias))


def _version(client: "MlflowClient", name: str, number: str) -> "ModelVersion | None":
    return _or_none(lambda: client.get_model_version(name, number))


def _or_none(ask: Callable[[], Found]) -> Found | None:
    """None where MLflow answers that there is none; a registry that does not answer is an error."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _fetch(source: str, names: Sequence[str], folder: Path, uri: str, optional: Sequence[str] = ()) -> None:
    """Copies plain files of known names, if each is where it should be and of a size that it may have."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    listed = {PurePosixPath(one.path).name: one for one in list_artifacts(artifact_uri=source, tracking_uri=uri)}
    for name in (*names, *(name for name in optional if name in listed)):
        found = listed.get(name)
        if found is None or found.is_dir or _leads_away(source, name):
            raise InputError(f"{source}: is no export of dpsink (it has no file {name}); nothing is fetched")
        if (found.file_size or 0) > LARGEST[name]:
            raise InputError(f"{source}/{name}: is above {LARGEST[name]:,} bytes; nothing is fetched")
        download_artifacts(artifact_uri=f"{source}/{name}", dst_path=str(folder), tracking_uri=uri)
        if (folder / name).is_symlink() or (folder / name).stat().st_size > LARGEST[name]:
            raise InputError(f"{source}/{name}: is not what was listed; nothing is fetched")


def _leads_away(source: str, name: str) -> bool:
    """Whether a file on this machine is a link to another place."""
    url = urlsplit(source)
    path = Path(unquote(url.path)) if url.scheme in ("", "file") else None
    return path is not None and (path / name).resolve() != path.resolve() / name


def _check_mlmodel(path: Path, place: str) -> None:
    """One flavor, loaded by our module from our folder, with no code of its own."""
    flavors = read_yaml(path).get("flavors") or {}
    flavor = flavors.get("python_function") if isinstance(flavors, dict) else None
    if not isinstance(flavor, dict) or list(flavors) != ["python_function"] or flavor.get("code"):
        raise InputError(f"{place}: is no model of dpsink (another flavor, or code of its own); nothing is fetched")
    for key, ours in (("loader_module", LOADER), ("data", DATA)):
        if flavor.get(key) != ours:
            told = str(flavor.get(key))[:80]
            raise InputError(f"{place}: is no model of dpsink ({key} '{told}', not '{ours}'); nothing is fetched")


def _check_export(folder: Path, place: str) -> None:
    """Makes sure that a folder is what `export_run` writes: each file of its format, and all of one trial."""
    try:
        _, description = load_generator(folder)
        config, card = load_config(folder / schema.CONFIG_ARTIFACT), read_json(folder / CARD)
        check_picture(folder / schema.GRID_ARTIFACT)
        if (folder / STATEMENT).exists():
            read_json(folder / STATEMENT)
    except InputError as error:
        raise InputError(f"{place}: {error}".replace(f"{folder}/", "")) from None
    if config_sha256(config) != config_sha256(description.config):
        raise InputError(f"{place}: its settings are of another trial than its weights; export the run again")
    if card.get("private") != math.isfinite(description.config.privacy.target_epsilon):
        raise InputError(f"{place}: its card does not say of its privacy what its weights do; export the run again")
    wrong = [line for line in _lines(folder / REQUIREMENTS) if not _REQUIREMENT.fullmatch(line)]
    if wrong:
        raise InputError(
            f"{place}: '{wrong[0][:80]}' of its requirements must be PACKAGE==VERSION; do not install them"
        )
