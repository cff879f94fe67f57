"""What holds the house up: arrows between packages point down only, noise has one source, nothing is unpickled."""

import ast
import inspect
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpsink.entropy import OsEntropy
from dpsink.training import train

ROOT = Path(__file__).parent.parent
PACKAGES = ("dpsink", "tune", "analysis")
INFRASTRUCTURE = {"ray", "mlflow", "optuna", "tune", "analysis", "experiments", "tests"}
FROZEN = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}  # modules whose load executes


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it: `from tune import schema` is tune.schema."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def foreign(*packages: str, roots: set[str]) -> set[str]:
    """`module → imported` for each import from one of the roots."""
    return {
        f"{module_name(path)} → {name}"
        for path in sources(*packages)
        for name in imported(path)
        if name.partition(".")[0] in roots
    }


def calls(*paths: Path) -> Iterator[tuple[str, str, ast.Call]]:
    """Every call: in which module, the last two names of what is called (`torch.load`, `print`), and its node."""
    for path in paths:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                yield module_name(path), ".".join(ast.unparse(node.func).split(".")[-2:]), node


def words(call: ast.Call) -> dict[str | None, str]:
    """Keyword arguments of a call, as source."""
    return {word.arg: ast.unparse(word.value) for word in call.keywords}


def loaded_by(*modules: str) -> set[str]:
    """All modules of a process that imports these."""
    program = f"import json, sys\nfor name in {modules}: __import__(name)\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


ALL_CALLS = list(calls(*sources(*PACKAGES)))

# Layers.


@pytest.mark.slow
def test_importing_the_whole_method_loads_no_infrastructure() -> None:
    modules = {module_name(path) for path in sources("dpsink") if path.name != "__main__.py"}
    loaded = loaded_by(*modules)
    assert modules <= loaded
    assert not {name.partition(".")[0] for name in loaded} & INFRASTRUCTURE


@pytest.mark.slow
def test_a_trial_starts_without_the_libraries_that_accounted_for_it() -> None:
    assert not {"dp_accounting", "opacus", "dpsink.privacy.bounds"} & loaded_by("tune.trainable")


@pytest.mark.slow
def test_a_study_starts_without_the_libraries_that_only_its_evaluation_needs() -> None:
    assert not {"torchvision", "torch._dynamo", "sklearn", "scipy.stats"} & loaded_by("tune.cluster", "tune.trainable")


def test_method_imports_no_infrastructure_even_inside_functions() -> None:
    assert foreign("dpsink", roots=INFRASTRUCTURE) == set()


def test_studies_import_neither_analysis_nor_tests() -> None:
    assert foreign("tune", roots={"analysis", "experiments", "tests"}) == set()


def test_analysis_imports_of_the_studies_their_schema_only() -> None:
    found = foreign("analysis", roots={"tune", "ray", "experiments", "tests"})
    assert found and {line for line in found if " → tune.schema" not in line} == set()


def test_schema_that_both_sides_import_is_light() -> None:
    """The contract between tune and analysis needs the standard library only."""
    assert {name.partition(".")[0] for name in imported(ROOT / "tune/schema.py")} <= sys.stdlib_module_names


# Nothing that is read can execute.


def test_no_module_imports_what_could_unpickle() -> None:
    # One place names pickle's exception.
    assert foreign(*PACKAGES, roots=FROZEN) == {"dpsink.evaluation.extractors → pickle"}


def test_pickle_is_imported_for_its_exception_only() -> None:
    nodes = ast.walk(tree(ROOT / "dpsink/evaluation/extractors.py"))
    named = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert {name for name in named if name.startswith("pickle.")} == {"pickle.UnpicklingError"}


def test_torch_load_is_called_in_one_place_with_weights_only() -> None:
    found = [(module, words(call)["weights_only"]) for module, name, call in ALL_CALLS if name == "torch.load"]
    assert found == [("dpsink.evaluation.extractors", "True")]


def test_yaml_is_read_by_the_safe_loader_only() -> None:
    readers = {(module, name) for module, name, _ in ALL_CALLS if name.startswith("yaml.") and "load" in name}
    assert readers and {name for _, name in readers} == {"yaml.safe_load"}


def test_no_text_is_evaluated() -> None:
    assert [(module, name) for module, name, _ in ALL_CALLS if name in ("eval", "exec", "compile")] == []


# Noise has one source.


def entropy_classes(path: Path) -> set[str]:
    """Classes that are called entropy, or could stand for one."""
    return {
        node.name
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
        and ("entropy" in node.name.lower() or any(getattr(item, "name", "") == "random_bytes" for item in node.body))
    }


def test_operating_system_s_entropy_is_the_only_one_outside_tests() -> None:
    found = {name: module_name(path) for path in sources(*PACKAGES) for name in entropy_classes(path)}
    assert found == {"Entropy": "dpsink.entropy", "OsEntropy": "dpsink.entropy"}


def test_replayed_entropy_lives_in_one_place_under_tests() -> None:
    found = [module_name(path) for path in sources("tests") if "ReplayedEntropy" in entropy_classes(path)]
    assert found == ["tests.conftest"]


def test_operating_system_s_entropy_takes_nothing_that_could_be_a_seed() -> None:
    assert not inspect.signature(OsEntropy).parameters
    assert not vars(OsEntropy())


def test_operating_system_s_entropy_hands_on_the_system_s_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: b"\x07" * count)
    assert OsEntropy().random_bytes(5) == b"\x07" * 5


def test_no_command_and_no_study_hands_entropy_to_training() -> None:
    outside = [*sources("tune", "analysis", "dpsink/commands"), ROOT / "dpsink/cli.py", ROOT / "dpsink/console.py"]
    assert [module for module, _, call in calls(*outside) if "entropy" in words(call)] == []
    assert [path for path in outside if any(name.startswith("dpsink.entropy") for name in imported(path))] == []


def test_training_is_handed_entropy_by_that_name() -> None:
    """Keeps the test above honest."""
    assert inspect.signature(train).parameters["entropy"].kind is inspect.Parameter.KEYWORD_ONLY


def test_mechanisms_know_no_generator_of_random_numbers_but_entropy() -> None:
    """No name of torch's or numpy's random numbers, and no seed, stands in the code of mechanisms and membership."""
    files = [ROOT / "dpsink/privacy" / name for name in ("mechanism.py", "sampling.py")]
    nodes = [node for file in files for node in ast.walk(tree(file))]
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.arg for node in nodes if isinstance(node, ast.arg)
    }
    assert "entropy" in names
    forbidden = ("rand", "normal", "bernoulli", "poisson", "multinomial", "seed", "default_rng", "dropout")
    assert not {name for name in names - {"random_bytes"} for word in forbidden if word in name.lower()}


def test_noise_is_seeded_with_nothing_but_entropy() -> None:
    """The one seed, of a GPU's generator, is bytes of the entropy that the call was given."""
    calls = [node for node in ast.walk(tree(ROOT / "dpsink/privacy/noise.py")) if isinstance(node, ast.Call)]
    seeds = [node for node in calls if isinstance(node.func, ast.Attribute) and "seed" in node.func.attr]
    assert ["entropy.random_bytes(8)" in ast.unparse(argument) for node in seeds for argument in node.args] == [True]


def test_environment_decides_on_places_only() -> None:
    """Of data, keys, caches and Inception's weights; no variable reaches the noise."""
    places = {"KEY_FILE_VARIABLE", "DATA_ROOT_VARIABLE", "WEIGHTS_VARIABLE", "'XDG_CONFIG_HOME'", "'XDG_CACHE_HOME'"}
    readers = ("environ.get", "os.getenv", "environ.setdefault", "environ.pop")
    read = {ast.unparse(call.args[0]) for _, name, call in calls(*sources("dpsink")) if name in readers}
    nodes = [node for path in sources("dpsink") for node in ast.walk(tree(path))]
    subscripts = [node for node in nodes if isinstance(node, ast.Subscript)]
    read |= {ast.unparse(node.slice) for node in subscripts if ast.unparse(node.value) == "os.environ"}
    assert read == places


# Style that a machine can hold.


def test_every_public_function_and_class_has_a_docstring() -> None:
    bare = [
        f"{module_name(path)}.{node.name}"
        for path in sources(*PACKAGES)
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


def test_every_module_says_what_it_is() -> None:
    """But for an empty __init__.py, which has nothing to say."""
    written = [path for path in sources(*PACKAGES) if path.read_text(encoding="utf-8").strip()]
    assert [module_name(path) for path in written if not ast.get_docstring(tree(path))] == []


def length(function: ast.FunctionDef) -> int:
    """Lines without the docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function):
        text = function.body[0]
        lines -= (text.end_lineno or text.lineno) - text.lineno + 1
    return lines


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package: str) -> None:
    """As measured in codebases that read well: median at most 10 lines, nine in ten at most 40."""
    nodes = [node for path in sources(package) for node in ast.walk(tree(path))]
    lengths = sorted(length(node) for node in nodes if isinstance(node, ast.FunctionDef))
    assert len(lengths) > 20
    assert statistics.median(lengths) <= 10
    assert lengths[len(lengths) * 9 // 10] <= 40
