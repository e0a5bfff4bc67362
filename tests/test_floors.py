"""The tree is built as ARCHITECTURE.md says: imports go down the floors only, and protocol files are pure.

The rules read source, so that one broken in a function that no test calls is seen too; each is also shown a source that
breaks it. What an import drags in behind our back is checked by importing, in a process of its own.
"""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"peer": 4, "optim": 3, "coordinator": 3, "dht": 2, "configs": 1, "monitoring": 1}
WITHOUT_TORCH = ("dht", "coordinator", "configs", "monitoring")
TORCH = {"torch", "bitsandbytes", "transformers"}
"""torch, and what imports it."""
IMPURE = {"asyncio", "time", "random", "socket", "os"}
PURE = {
    *(f"coordinator/{name}.py" for name in ("admission", "audit", "awaited", "committee", "follower", "ledger")),
    *(f"coordinator/{name}.py" for name in ("membership", "messages", "planning", "poll", "ranges", "roll", "rounds")),
    *(f"coordinator/{name}.py" for name in ("votes", "vouched")),
    *(f"dht/{name}.py" for name in ("decisions", "delegation", "endpoint", "meeting", "mux", "paths", "ticket")),
    *(f"dht/{name}.py" for name in ("budget", "chunks", "crdt", "gossip", "multiaddrs", "records", "relays", "wire")),
    *(f"optim/{name}.py" for name in ("plan", "reduce")),
    "peer/lifecycle.py",
}

Rule = Callable[[str, str], Iterator[str]]
"""From a file's path in the tree and its source to the faults in it."""


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports, wherever in it; a member's name is included."""
    package = ("dugnad", *PurePosixPath(path).parent.parts)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) + 1 - level] if level else ()
                start = ".".join((*base, *([module] if module else [])))
                yield from ((node.lineno, f"{start}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def goes_down_only(path: str, source: str) -> Iterator[str]:
    """Another folder may be imported from a higher floor only, so neighbours never and circles not at all."""
    floor = path.split("/")[0]
    for line, name in imports(path, source):
        project, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if project in FLOORS:
            yield f"{path}:{line} imports {name}: write dugnad.{name}"
        elif project == "dugnad" and other != floor and FLOORS.get(other, 99) >= FLOORS[floor]:
            yield f"{path}:{line} imports {name}: {floor} is not above {other}"


def keeps_torch_up(path: str, source: str) -> Iterator[str]:
    """torch belongs to peer/ and to optim/diloco.py."""
    if path.startswith("peer/") or path == "optim/diloco.py":
        return
    for line, name in imports(path, source):
        if name.split(".")[0] in TORCH or name.startswith("safetensors.torch"):
            yield f"{path}:{line} imports {name}, which is torch"


def keeps_hivemind_in_one_place(path: str, source: str) -> Iterator[str]:
    """hivemind belongs to the three files that run its daemon and its DHT."""
    if path in ("dht/control.py", "dht/daemon.py", "dht/directory.py"):
        return
    for line, name in imports(path, source):
        if name.split(".")[0] == "hivemind":
            yield f"{path}:{line} imports {name}"


def is_pure(path: str, source: str) -> Iterator[str]:
    """A protocol file gets time and chance as arguments and does nothing itself."""
    if path not in PURE:
        return
    for line, name in imports(path, source):
        if name.split(".")[0] in IMPURE:
            yield f"{path}:{line} imports {name}"


def module_of(path: str) -> str:
    """The dotted name under which a file of the tree is imported."""
    return "dugnad." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, the first found; empty if there is none."""
    modules = {module_of(path): path for path in sources}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [name for _, name in imports(path, sources[path])]
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (found & modules.keys()) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def tree() -> dict[str, str]:
    """Path to source of every Python file on the floors."""
    files = (file for floor in FLOORS for file in (ROOT / floor).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def setuptools_table() -> dict[str, Any]:
    """What pyproject.toml tells setuptools."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    return table


def dragged_in(modules: list[str], *, path: str = "") -> set[str]:
    """Which of torch and hivemind a fresh interpreter holds after importing `modules`; `path` is searched first."""
    code = f"import sys, {', '.join(modules)}; print(*({{'torch', 'hivemind'}} & sys.modules.keys()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("rule", [goes_down_only, keeps_torch_up, keeps_hivemind_in_one_place, is_pure])
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    assert [fault for path, source in tree().items() for fault in rule(path, source)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(tree()) == []


def test_every_protocol_file_is_where_the_rule_looks_for_it() -> None:
    assert PURE - tree().keys() == set()


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (goes_down_only, "dht/wire.py", "import dugnad.peer.cli"),
        (goes_down_only, "dht/wire.py", "from dugnad import coordinator"),
        (goes_down_only, "configs/recipe.py", "from dugnad.monitoring import metrics"),
        (goes_down_only, "optim/reduce.py", "from dugnad.coordinator.messages import Plan"),
        (goes_down_only, "coordinator/shell.py", "def later():\n    from dugnad.optim.outer import outer_step"),
        (goes_down_only, "coordinator/shell.py", "from ..optim import outer"),
        (goes_down_only, "coordinator/shell.py", "import importlib\nimportlib.import_module('dugnad.optim.outer')"),
        (goes_down_only, "peer/cli.py", "from dht.wire import Codec"),
        (goes_down_only, "peer/cli.py", "import dugnad.elsewhere"),
        (keeps_torch_up, "optim/outer.py", "import torch"),
        (keeps_torch_up, "dht/host.py", "def later():\n    from torch.nn import Module"),
        (keeps_torch_up, "coordinator/checkpoints.py", "from safetensors.torch import save_file"),
        (keeps_torch_up, "coordinator/checkpoints.py", "from safetensors import torch"),
        (keeps_torch_up, "optim/codec.py", "__import__('bitsandbytes')"),
        (keeps_hivemind_in_one_place, "dht/transport.py", "from hivemind.p2p import P2P"),
        (keeps_hivemind_in_one_place, "peer/session.py", "def later():\n    import hivemind"),
        (is_pure, "coordinator/rounds.py", "import time"),
        (is_pure, "coordinator/votes.py", "from os import path"),
        (is_pure, "optim/plan.py", "import asyncio.tasks as tasks"),
        (is_pure, "peer/lifecycle.py", "def later():\n    from random import choice"),
        (is_pure, "dht/wire.py", "import math, socket"),
    ],
)
def test_a_broken_rule_is_seen(rule: Rule, path: str, source: str) -> None:
    assert len(list(rule(path, source))) == 1


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (goes_down_only, "peer/session.py", "from dugnad.optim import outer\nfrom dugnad.coordinator import shell"),
        (goes_down_only, "optim/exchange.py", "from dugnad.dht import bulk\nfrom dugnad.optim.layout import Layout"),
        (goes_down_only, "dht/wire.py", "from . import identity\nfrom .identity import PeerId\nimport msgspec"),
        (keeps_torch_up, "peer/trainer.py", "import torch"),
        (keeps_torch_up, "optim/diloco.py", "import torch"),
        (keeps_torch_up, "coordinator/checkpoints.py", "from safetensors.numpy import save_file"),
        (keeps_hivemind_in_one_place, "dht/control.py", "def later():\n    import hivemind"),
        (is_pure, "coordinator/shell.py", "import asyncio, time"),
        (is_pure, "coordinator/rounds.py", "from dugnad.coordinator import ranges\nimport math"),
    ],
)
def test_a_rule_kept_is_no_fault(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, source)) == []


@pytest.mark.parametrize(
    ("sources", "size"),
    [
        ({"dht/a.py": "from dugnad.dht import b", "dht/b.py": "import dugnad.dht.a"}, 2),
        ({"dht/a.py": "from dugnad.dht.b import X", "dht/b.py": "def f():\n    from dugnad.optim.c import Y",
          "optim/c.py": "from dugnad.dht.a import Z"}, 3),
        ({"dht/a.py": "from dugnad.dht import b", "dht/b.py": "import a"}, 0),
    ],
)  # fmt: skip
def test_a_circle_is_found_where_there_is_one(sources: dict[str, str], size: int) -> None:
    assert len(set(circle(sources))) == size


def test_the_packages_listed_are_the_tree() -> None:
    table = setuptools_table()
    found = {file.parent.relative_to(ROOT).as_posix() for file in ROOT.glob("*/*.py")} - {"tests"}
    deeper = {PurePosixPath(path).parent.as_posix() for path in tree()}
    assert found == deeper == FLOORS.keys()
    assert sorted(table["packages"]) == sorted(f"dugnad.{floor}" for floor in FLOORS)
    assert table["package-dir"] == {f"dugnad.{floor}": floor for floor in FLOORS}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_package_is_typed_and_seen_by_type_checkers(floor: str) -> None:
    assert (ROOT / floor / "py.typed").is_file()
    assert (ROOT / floor / "__init__.py").is_file()
    assert (ROOT / ".typings" / "dugnad" / floor).readlink() == Path("..", "..", floor)


@pytest.mark.parametrize("floor", FLOORS)
def test_every_data_file_of_a_package_ships(floor: str) -> None:
    data = setuptools_table()["package-data"]
    patterns = [*data["*"], *data.get(f"dugnad.{floor}", [])]
    files = (file.relative_to(ROOT / floor) for file in (ROOT / floor).rglob("*") if file.is_file())
    others = [file.as_posix() for file in files if file.suffix != ".py" and "__pycache__" not in file.parts]
    assert [file for file in others if not any(fnmatch(file, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize("floor", WITHOUT_TORCH)
def test_a_floor_imports_without_torch_and_hivemind(floor: str) -> None:
    assert dragged_in([module_of(path) for path in tree() if path.startswith(f"{floor}/")]) == set()


def test_torch_dragged_in_by_another_module_is_seen(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "innocent.py").write_text("import torch")
    assert dragged_in(["innocent"], path=str(tmp_path)) == {"torch"}
