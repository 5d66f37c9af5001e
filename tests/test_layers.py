"""The direction of imports and the library's bans, checked on the syntax tree.

``MAY_IMPORT`` is the picture of the design as data: a unit is a module or a subpackage of ``diffsampler``, and it
may import the units named here and everything below them. Each rule is a function ``(name, source) -> problems``, so
that the negative controls at the end can hand every rule a source that breaks it.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffsampler"

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "space": (),
    "storage": (),
    "estimators": (),
    "particles": ("estimators",),
    "target": ("space",),
    "kernel": ("space",),
    "kernels": ("kernel", "estimators"),
    "schedule": ("target",),
    "reference": (),
    "networks": ("schedule",),
    "equivariant": ("networks",),
    "controls": ("networks",),
    "priors": ("space",),
    "process": ("networks",),
    "trajectory": ("process",),
    "objective": ("trajectory", "estimators"),
    "gradient": ("objective",),
    "pathwise": ("trajectory",),
    "sources": ("pathwise",),
    "replay": ("sources", "kernels"),
    "lessons": ("gradient", "sources", "rates"),
    "population": ("lessons", "replay", "particles"),
    "trust_region": ("lessons",),
    "rates": (),
    "training": ("lessons", "storage", "rates"),
    "sampler": ("training", "replay", "particles"),
    "tempering": ("kernel", "target"),
    "smc": ("tempering", "kernels", "sampler"),
    "annealing": ("tempering", "kernels"),
    "parallel_tempering": ("smc",),
    "wastefree": ("tempering", "kernels", "particles"),
    "evidence": ("smc", "annealing"),
    "pilot": ("smc",),
    "denoiser": (),
    "ensemble": ("target",),
    "methods": ("sampler", "population", "denoiser", "ensemble", "priors", "reference", "equivariant", "controls"),
    "refinement": ("methods", "pilot"),
    "plotting": ("estimators",),
    "metrics": (),
    "plotting_particles": ("plotting", "metrics"),
    "plotting_ramachandran": ("plotting",),
    "result": ("particles", "storage", "integrations", "plotting"),
    "compare": ("result",),
    "checks": ("target",),
    "recipes": ("refinement",),
    "progress": (),
    "budget": ("target", "progress"),
    "catalog": (),
    "options": ("budget", "catalog", "sampler"),
    "runs": ("recipes", "checks", "result", "budget"),
    "inference": ("runs", "options"),
    "integrations": ("inference", "baselines"),
    "targets": ("target",),
    "baselines": ("smc", "annealing", "parallel_tempering", "wastefree", "evidence", "methods", "integrations"),
    "testing": ("inference",),
    "__init__": ("inference", "compare", "evidence", "integrations", "testing"),
    "_report": ("__init__",),
    "_demo": ("_report", "targets", "baselines"),
    "__main__": ("_demo",),
}

# Where a third-party package may be imported, inside functions only; its types may be named anywhere.
LAZY_HOMES: dict[str, tuple[str, ...]] = {
    "matplotlib": ("plotting", "plotting_particles", "plotting_ramachandran"),
    "arviz": ("integrations",),
    "xarray": ("integrations",),
    "openmm": ("targets",),
    "sklearn": ("targets",),
    "ot": ("targets", "baselines", "testing"),
    "numpyro": ("baselines",),
    "jax": ("baselines",),
    "blackjax": ("baselines",),
    "tqdm": ("progress",),
    "zuko": ("methods",),
    "pytest": ("testing",),
}
FORBIDDEN_ROOTS = ("experiments", "tests", "targets", "baselines")
GLOBAL_STATE = (
    "manual_seed",
    "seed",
    "set_default_dtype",
    "set_default_device",
    "set_default_tensor_type",
    "set_num_threads",
    "set_rng_state",
    "set_rng_seed",
    "enable_validation",
    "use_deterministic_algorithms",
)
STATEFUL_MODULES = (
    "torch",
    "torch.random",
    "torch.cuda",
    "random",
    "np.random",
    "numpy.random",
    "pyro",
    "dist",
    "torch.distributions.Distribution",
)
# Functions of torch that draw from the global generator unless told otherwise.
RANDOM_FUNCTIONS = ("rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson")
RANDOM_METHODS = ("normal_", "uniform_", "exponential_", "random_", "bernoulli_", "cauchy_", "log_normal_")
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 400


class Import(NamedTuple):
    name: str
    line: int
    lazy: bool
    typing: bool


def modules() -> list[tuple[str, Path]]:
    """Dotted name (below the package) and path of every module, the linked folders included."""
    folders = [PACKAGE, *(p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__")]
    paths = sorted(path for folder in folders for path in folder.glob("*.py"))
    return [(".".join(p.relative_to(PACKAGE).with_suffix("").parts), p) for p in paths]


def imports_of(source: str) -> Iterator[Import]:
    """All imports of a source, with every ``from a import b`` given as ``a.b``."""

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                prefix = "." * child.level + (child.module or "")
                yield from (Import(f"{prefix}.{alias.name}", child.lineno, lazy, typing) for alias in child.names)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, lazy or guarded or inside, typing or guarded)

    return visit(ast.parse(source), False, False)


def unit_of(name: str) -> str:
    """``methods.pis`` belongs to ``methods``; the package itself is ``__init__``."""
    return name.split(".")[0] or "__init__"


def imported_unit(name: str) -> str | None:
    """Unit of the library that an absolute import refers to, None for other packages."""
    parts = name.split(".")
    if parts[0] != "diffsampler":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in known_units() else "__init__"


def known_units() -> set[str]:
    return {unit_of(name) for name, _ in modules()} | set(MAY_IMPORT)


def reachable(unit: str) -> set[str]:
    """Units that ``unit`` may import: those in the table and everything below them."""
    seen: set[str] = set()
    queue = [unit]
    while queue:
        for below in MAY_IMPORT[queue.pop()]:
            if below not in seen:
                seen.add(below)
                queue.append(below)
    return seen


def check_direction(name: str, source: str) -> list[str]:
    unit = unit_of(name)
    if unit not in MAY_IMPORT:
        return [f"{name}: not in the table of layers; give it a place in MAY_IMPORT"]
    allowed = reachable(unit) | {unit}
    problems = []
    for entry in imports_of(source):
        other = imported_unit(entry.name)
        # The package itself holds the version and the re-exports; a module that imports it top-level would be circular.
        version = entry.name == "diffsampler.__version__" and entry.lazy
        if other is not None and other not in allowed and not version:
            problems.append(f"{name}:{entry.line}: {unit} must not import {other}")
    return problems


def check_third_party(name: str, source: str) -> list[str]:
    problems = []
    for entry in imports_of(source):
        root = entry.name.split(".")[0]
        if entry.name.startswith("."):
            problems.append(f"{name}:{entry.line}: relative import; write diffsampler.{entry.name.lstrip('.')}")
        elif root in FORBIDDEN_ROOTS:
            problems.append(f"{name}:{entry.line}: must not import {root}")
        elif root in LAZY_HOMES and unit_of(name) not in LAZY_HOMES[root] and not entry.typing:
            problems.append(f"{name}:{entry.line}: {root} belongs into {' or '.join(LAZY_HOMES[root])}")
        elif root in LAZY_HOMES and not entry.lazy:
            problems.append(f"{name}:{entry.line}: import {root} inside the function that needs it")
    return problems


def check_pyro(name: str, source: str) -> list[str]:
    """``pyro.ops.stats`` is plain tensor functions; models, handlers and inference of Pyro have one home."""
    unit = unit_of(name)
    problems = []
    for entry in imports_of(source):
        if entry.name.split(".")[0] != "pyro" or unit == "integrations":
            continue
        if entry.name.startswith("pyro.ops.stats") and unit in ("estimators", "baselines"):
            continue
        # Pyro's NUTS as a peer: the sampler, never the modelling language.
        if entry.name.startswith("pyro.infer") and unit == "baselines" and entry.lazy:
            continue
        problems.append(f"{name}:{entry.line}: {entry.name} belongs into integrations")
    return problems


def forked_lines(tree: ast.AST) -> set[int]:
    """Lines inside ``with torch.random.fork_rng()``, where a foreign sampler may be seeded without a trace."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.With) and "fork_rng" in ast.unparse(n.items[0])]
    return {line for block in blocks for line in range(block.lineno, (block.end_lineno or block.lineno) + 1)}


def restored_lines(tree: ast.AST) -> set[int]:
    """Lines inside ``try: ... finally:`` where the last block sets what the first one set."""
    lines: set[int] = set()
    for block in (node for node in ast.walk(tree) if isinstance(node, ast.Try)):
        restores = any(function in ast.unparse(statement) for statement in block.finalbody for function in GLOBAL_STATE)
        if restores:
            lines |= set(range(block.lineno, (block.end_lineno or block.lineno) + 1))
    return lines


def check_global_state(name: str, source: str) -> list[str]:
    if unit_of(name) == "__main__":
        # The process of the command line is our own.
        return []
    problems = []
    tree = ast.parse(source)
    forked, restored = forked_lines(tree), restored_lines(tree) if unit_of(name) == "integrations" else set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or node.lineno in forked:
            continue
        called = ast.unparse(node.func)
        owner, _, function = called.rpartition(".")
        if owner in STATEFUL_MODULES and function in GLOBAL_STATE and node.lineno not in restored:
            problems.append(f"{name}:{node.lineno}: {called} changes global state")
        keywords = {keyword.arg for keyword in node.keywords}
        # Models of Pyro draw from the global generator whatever we do: integrations run them under fork_rng.
        drawn = (owner == "torch" and function in RANDOM_FUNCTIONS) or function in RANDOM_METHODS
        if drawn and unit_of(name) != "integrations" and not keywords & {"generator", None}:
            problems.append(f"{name}:{node.lineno}: {called} without an explicit generator")
    return problems


def check_print(name: str, source: str) -> list[str]:
    if unit_of(name) in ("__main__", "_demo"):
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"{name}:{n.lineno}: print in the library" for n in calls if ast.unparse(n.func) == "print"]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Length of a function without its docstring, which the rule on long functions must not discourage."""
    length = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        length -= (first.end_lineno or first.lineno) - first.lineno + 1
    return length


def check_size(name: str, source: str) -> list[str]:
    problems = []
    lines = source.count("\n")
    if lines > MAX_MODULE_LINES:
        problems.append(f"{name}: {lines} lines, at most {MAX_MODULE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = code_lines(node)
            if length > MAX_FUNCTION_LINES:
                problems.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return problems


Rule = Callable[[str, str], list[str]]
RULES: list[Rule] = [
    check_direction,
    check_third_party,
    check_pyro,
    check_global_state,
    check_print,
    check_size,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("check_"))
def test_library_keeps_rule(rule: Rule):
    problems = [problem for name, path in modules() for problem in rule(name, path.read_text())]
    assert not problems, "\n".join(problems)


def test_linked_folders_are_covered():
    names = {unit_of(name) for name, _ in modules()}
    assert {"targets", "baselines", "methods", "kernels", "integrations"} <= names


def test_layers_have_no_cycle_except_lazy_ones():
    # Fits export to ArviZ on call, and Pyro's NUTS is a baseline for those who ask; the rest is a strict order.
    lazy = {("result", "integrations"), ("baselines", "integrations")}
    table = {unit: [u for u in below if (unit, u) not in lazy] for unit, below in MAY_IMPORT.items()}
    assert list(graphlib.TopologicalSorter(table).static_order())


def module_of(name: str, names: set[str]) -> str | None:
    """Library module that an import refers to: ``diffsampler.space.Euclidean`` is ``space``."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        for candidate in (".".join(parts[:length]), ".".join([*parts[:length], "__init__"])):
            if candidate in names:
                return candidate
    return None


def eager_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which module imports which when it is loaded."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        eager = (e.name for e in imports_of(source) if not e.lazy and e.name.split(".")[0] == "diffsampler")
        graph[name] = {module for e in eager if (module := module_of(e, set(sources))) is not None} - {name}
    return graph


def test_modules_load_in_one_order():
    order = graphlib.TopologicalSorter(eager_graph({name: path.read_text() for name, path in modules()}))
    order.prepare()  # raises CycleError with the modules of the cycle


# Negative controls: each rule must report a source that breaks it, and only that.
VIOLATIONS = [
    (check_direction, "space", "from diffsampler.target import Target\n", "space must not import target"),
    (check_direction, "targets.rings", "from diffsampler import sample\n", "targets must not import __init__"),
    (check_direction, "targets.rings", "import diffsampler.process\n", "targets must not import process"),
    (check_direction, "methods.pis", "def f():\n    from diffsampler.inference import sample\n", "import inference"),
    (check_direction, "inference", "from diffsampler import targets\n", "inference must not import targets"),
    (check_direction, "unheard_of", "", "not in the table of layers"),
    (check_third_party, "sampler", "from experiments import bench\n", "must not import experiments"),
    (check_third_party, "sampler", "from tests.test_layers import modules\n", "must not import tests"),
    (check_third_party, "baselines.nuts", "import targets\n", "must not import targets"),
    (check_third_party, "methods.pis", "from ..space import Euclidean\n", "relative import"),
    (check_third_party, "plotting", "import matplotlib.pyplot as plt\n", "inside the function"),
    (check_third_party, "inference", "def f():\n    import matplotlib\n", "matplotlib belongs into plotting"),
    (check_third_party, "estimators", "def f():\n    import arviz\n", "arviz belongs into integrations"),
    (check_third_party, "targets.molecules", "import openmm\n", "inside the function"),
    (check_pyro, "target", "import pyro\n", "pyro belongs into integrations"),
    (check_pyro, "methods.pis", "from pyro.ops.stats import autocorrelation\n", "belongs into integrations"),
    (check_pyro, "baselines.nuts", "import pyro.poutine\n", "belongs into integrations"),
    (check_global_state, "sampler", "torch.manual_seed(0)\n", "changes global state"),
    (check_global_state, "networks", "torch.set_default_dtype(torch.float64)\n", "changes global state"),
    (check_global_state, "integrations.pyro", "torch.set_default_dtype(torch.float64)\n", "changes global state"),
    (check_global_state, "kernels.hmc", "x = torch.randn(3)\n", "without an explicit generator"),
    (check_global_state, "networks", "weight.normal_(0.0, 1.0)\n", "without an explicit generator"),
    (check_print, "sampler", "def f():\n    print('loss')\n", "print in the library"),
    (check_size, "sampler", "x = 1\n" * 401, "401 lines"),
    (check_size, "sampler", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
]


@pytest.mark.parametrize(("rule", "name", "source", "message"), VIOLATIONS)
def test_rule_reports_violation(rule: Rule, name: str, source: str, message: str):
    problems = rule(name, source)
    assert len(problems) == 1
    assert message in problems[0]


def test_load_order_reports_cycle():
    sources = {"a": "from diffsampler.b import f\n", "b": "from diffsampler import a\n"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(eager_graph(sources)).prepare()
    lazily = sources | {"b": "def f():\n    from diffsampler import a\n"}
    graphlib.TopologicalSorter(eager_graph(lazily)).prepare()


ALLOWED = [
    (check_direction, "methods.cmcd", "from diffsampler.process import Process\n"),
    (check_direction, "inference", "def f():\n    from diffsampler.integrations import arviz\n"),
    (check_direction, "inference", "def f():\n    from diffsampler import __version__\n"),
    (check_third_party, "plotting", "def f():\n    from matplotlib.figure import Figure\n"),
    (check_third_party, "plotting", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure\n"),
    (check_third_party, "result", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure\n"),
    (check_pyro, "estimators", "from pyro.ops.stats import fit_generalized_pareto\n"),
    (check_global_state, "sampler", "g = torch.Generator().manual_seed(0)\nx = torch.randn(3, generator=g)\n"),
    (check_global_state, "baselines.nuts", "with torch.random.fork_rng():\n    torch.manual_seed(0)\n"),
    (
        check_global_state,
        "integrations.pyro",
        "try:\n    torch.set_default_dtype(a)\nfinally:\n    torch.set_default_dtype(b)\n",
    ),
    (check_print, "__main__", "print('table')\n"),
]


@pytest.mark.parametrize(("rule", "name", "source"), ALLOWED)
def test_rule_passes_what_is_allowed(rule: Rule, name: str, source: str):
    assert rule(name, source) == []
