"""Nothing in the product runs or unpickles what data, models or stores hold: a scan of its code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}
CALLS = {
    *(("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("yaml", "load_all")),
    *(("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput")),
    *(("builtins", name) for name in BUILTINS),
}
SWITCHES = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False, "unsafe": True}
ALLOWED = {
    "vectorclm/evaluation/code_judge.py": {"exec", "compile"},  # the judge of programs, in a sandbox
    "vectorclm/runtime/workers.py": {"pickle"},  # what a process writes for its own workers, in a private folder
}


def executed(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of each call or import by which a text of Python may run or unpickle data."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, name) for name in modules if name.partition(".")[0] in PICKLES)
            if isinstance(node, ast.ImportFrom):
                found = ((node.module or "", alias.name) for alias in node.names)
                yield from ((node.lineno, ".".join(one)) for one in found if one in CALLS)
        elif isinstance(node, ast.Name) and node.id in BUILTINS and isinstance(node.ctx, ast.Load):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in CALLS:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in SWITCHES:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if value is not (not SWITCHES[node.arg]):
                yield node.value.lineno, node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("flow", "task"):
            given = {one.arg: one.value for one in node.keywords}
            persists = given.get("persist_result")  # Prefect pickles results that it keeps
            if "return_state" not in given and not (isinstance(persists, ast.Constant) and persists.value is False):
                yield node.lineno, f"{node.func.id} without persist_result=False"


def test_no_code_of_the_product_runs_data() -> None:
    found = []
    for path in sorted(path for folder in ("vectorclm", "flows", "docker") for path in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        lines = executed(path.read_text(encoding="utf-8"))
        found += [f"{name}:{line}: {what}" for line, what in lines if what not in ALLOWED.get(name, ())]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load(x)",
        "from torch import load",
        "import yaml\nyaml.load(x, Loader)",
        "eval(x)",
        "run = exec",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=given)",
        "subprocess.run(x, shell=True)",
        "numpy.load(x, allow_pickle=True)",
        "@flow(name='a')\ndef f(): ...",
        "task(f, persist_result=True)",
    ],
)
def test_what_would_run_data_is_found(text: str) -> None:
    assert list(executed(text))


@pytest.mark.parametrize(
    "text",
    [
        "re.compile(x)",
        "model.eval()",
        "yaml.safe_load(x)",
        "f(shell=False)",
        "@flow(persist_result=False)\ndef f(): ...",
    ],
)
def test_what_does_not_is_not(text: str) -> None:
    assert not list(executed(text))
