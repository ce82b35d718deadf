"""Who may import whom, where import-linter can't say it: single files, lazy imports, isolation."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "configs", "data", "predictor", "export", "evaluation", "scenes", "playground", "pipeline", "benchmarks", "train",
)  # fmt: skip
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Top-level packages that only some files may import: name -> patterns of those files.
RESTRICTED = {
    "mlflow": r"export/registry\.py|pipeline/.*|scr_runtime/places\.py",
    "pytorch_lightning": r"data/datamodule\.py|predictor/.*|pipeline/.*|benchmarks/(states_dtype|transfer)\.py",
    "pydantic": r"configs/.*|[a-z]+/settings\.py|scr_runtime/serve/(settings|request)\.py",
    "omegaconf": r"configs/.*",
    "configs": r"configs/.*|pipeline/.*|train\.py|benchmarks/(states_dtype|transfer|probe)\.py",
    "pipeline": r"pipeline/.*|train\.py|benchmarks/(states_dtype|kills|transfer|probe)\.py",
    "matplotlib": r"evaluation/.*|benchmarks/learning_curve\.py",
    "ray": r"data/cluster\.py",
    "starlette": r"playground/server\.py|scr_runtime/serve/app\.py",
    "uvicorn": r"pipeline/playground\.py|scr_runtime/serve/process\.py",
    "vllm": r"scr_runtime/vllm/(operator|scheduler|worker|[cg]pu_worker|plugin)\.py|benchmarks/vllm\.py",
    "prometheus_client": r"scr_runtime/(serve/(metrics|process)|vllm/metrics)\.py",
    "lightning": r"(?!)",  # one name for one thing: pytorch_lightning
    "train": r"benchmarks/kills\.py",
    "benchmarks": r"benchmarks/.*",
    "tests": r"benchmarks/(stress|requests)\.py",  # the tiny models and the reference of the tests, for long
}
MOST_LINES, LONGEST_BODY, MOST_PARAMETERS = 450, 60, 8


def sources() -> list[Path]:
    """Every Python file of the project but the tests."""
    files = [path for room in ("scr_runtime", *ROOMS) for path in sorted((ROOT / room).rglob("*.py"))]
    return [*files, *sorted(ROOT.glob("*.py"))]


def imports(path: Path, lazy: bool = True) -> Iterator[tuple[str, int]]:
    """Yield (top-level name, line) of each absolute import; with lazy=False only what runs at import time."""

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], node.lineno
        if not lazy:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                return
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                for statement in node.orelse:
                    yield from visit(statement)
                return
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def test_there_is_something_to_check():
    assert len(sources()) > 10


@pytest.mark.parametrize("package", RESTRICTED)
def test_package_is_imported_only_where_it_belongs(package: str):
    strays = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        for name, line in imports(path)
        if name == package and not re.fullmatch(RESTRICTED[package], path.relative_to(ROOT).as_posix())
    ]
    assert not strays, f"{package} is imported by {', '.join(strays)}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, methods and inner ones included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function behind its docstring."""
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters of a function, self and cls left out."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_files_functions_and_signatures_stay_small():
    large = [f"{path.relative_to(ROOT)}: {count} lines" for path in sources()
             if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES]  # fmt: skip
    for path in sources():
        for function in functions(path):
            place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
            if body_lines(function) > LONGEST_BODY:
                large.append(f"{place}: a body of {body_lines(function)} lines")
            if parameters(function) > MOST_PARAMETERS:
                large.append(f"{place}: {parameters(function)} parameters")
    assert not large, "\n".join(large)


def test_doors_name_the_pipeline_without_importing_it():
    commands = (ROOT / "pipeline/commands.py").read_text(encoding="utf-8")
    for door, command in (("data/harvest.py", "harvest"), ("export/__main__.py", "export"),
                          ("evaluation/__main__.py", "evaluation"),
                          ("playground/__main__.py", "playground")):  # fmt: skip
        assert f'import_module("pipeline.commands").{command}()' in (ROOT / door).read_text(encoding="utf-8"), door
        assert f"def {command}(" in commands
    for name in re.findall(r'import_module\("pipeline\.(\w+)"\)', commands):
        assert (ROOT / f"pipeline/{name}.py").is_file()


def core() -> list[Path]:
    """The runtime without the server and the plug-in for vLLM, which are extras."""
    return sorted((ROOT / "scr_runtime").glob("*.py"))


def test_runtime_imports_only_its_own_dependencies():
    own = {"torch", "safetensors", "transformers", "scr_runtime"} | sys.stdlib_module_names
    # huggingface_hub comes with transformers, mlflow is an extra, and vLLM imports its plug-in, and not the reverse
    only_if_asked = {"places.py": {"huggingface_hub", "mlflow"}, "vllm": {"vllm", "prometheus_client"}}
    strays = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in [*core(), *sorted((ROOT / "scr_runtime/vllm").glob("*.py"))]
        for name, line in imports(path)
        if name not in own | only_if_asked.get(path.name, set()) | only_if_asked.get(path.parent.name, set())
    ]
    assert not strays


def test_runtime_imports_what_is_large_lazily():
    strays = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in core()
        for name, line in imports(path, lazy=False)
        if name in ("transformers", "huggingface_hub", "mlflow")
    ]
    assert not strays


def test_wheel_holds_the_runtime_only():
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    assert packages == ["scr_runtime", "scr_runtime.serve", "scr_runtime.vllm"]
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["scr_runtime"]
    assert (ROOT / "scr_runtime" / "py.typed").is_file()
    folders = [path for path in (ROOT / "scr_runtime").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert {path.relative_to(ROOT).as_posix().replace("/", ".") for path in folders} == set(packages) - {"scr_runtime"}


def test_the_server_needs_its_extra_alone():
    extra = {
        "jinja2",
        "PIL",
        "prometheus_client",
        "pydantic",
        "starlette",
        "uvicorn",
        "anyio",
    }  # starlette needs the last
    own = {"torch", "transformers", "scr_runtime"} | extra | sys.stdlib_module_names
    files = sorted((ROOT / "scr_runtime/serve").glob("*.py"))
    found = {name for path in files for name, _ in imports(path)}
    assert extra < found <= own
    before_torch = ("__init__.py", "__main__.py", "settings.py")  # help and mistakes are quick
    assert not [
        path
        for path in files
        if path.name in before_torch and {"torch", "transformers"} & {n for n, _ in imports(path)}
    ]


def test_constraints_pin_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    pinned = {normal(pin.partition("==")[0]) for pin in pins}
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    assert {requirement_name(requirement) for requirement in wanted} - pinned <= {"vllm"}  # which pins its own torch


# Imports scr_runtime, with every public name, where only the named packages can be found; prints what was loaded.
ISOLATED = """
import importlib.abc, json, sys
blocked = set(json.loads(sys.argv[1]))

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in blocked:
            raise ImportError(f"{fullname} is no dependency of scr_runtime")

sys.meta_path.insert(0, Block())
import scr_runtime
for name in scr_runtime.__all__:
    getattr(scr_runtime, name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture(scope="module")
def loaded_by_runtime() -> set[str]:
    blocked = sorted(set(ROOMS) | foreign_packages())
    assert {"mlflow", "omegaconf", "pytorch_lightning", "matplotlib", "datasets"} <= set(blocked)
    run = subprocess.run(
        [sys.executable, "-c", ISOLATED, json.dumps(blocked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_runtime_imports_with_its_own_dependencies_alone(loaded_by_runtime: set[str]):
    assert "torch" in loaded_by_runtime


def test_importing_the_runtime_does_not_import_transformers(loaded_by_runtime: set[str]):
    assert not {"transformers", "vllm", "prometheus_client"} & loaded_by_runtime


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    return normal(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def foreign_packages() -> set[str]:
    """Importable names that are installed, yet don't come with scr_runtime's own dependencies."""
    own: set[str] = set()
    queue = [requirement_name(requirement) for requirement in PYPROJECT["project"]["dependencies"]]
    while queue:
        name = queue.pop()
        if name in own:
            continue
        own.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        queue += [requirement_name(r) for r in requirements if "extra ==" not in r.partition(";")[2]]
    own.add("scr-runtime")
    packages = importlib.metadata.packages_distributions()
    return {name for name, homes in packages.items() if not {normal(home) for home in homes} & own}
