"""Do the packages import each other only in the directions that the design allows?"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "policies": set(),
    "training": {"policies"},
    "actors": {"policies", "training"},
    "serve_app": {"policies"},
    "trimtab": {"policies", "training", "actors", "serve_app"},
}
WITHOUT_RAY = ("policies", "training")


def _imports(source: str) -> set[str]:
    """Return the first part of every imported module's name, also of imports inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add((node.module or "").split(".")[0])
    return names


def _forbidden(package: str, source: str) -> set[str]:
    forbidden = _imports(source) & (set(ALLOWED) - ALLOWED[package] - {package})
    return forbidden | (_imports(source) & {"ray"} if package in WITHOUT_RAY else set())


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_the_design_allows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): bad for file in files if (bad := _forbidden(package, file.read_text()))}
    assert not wrong


def test_a_forbidden_import_is_found_wherever_it_hides() -> None:
    assert _forbidden("serve_app", "def f():\n    from actors.monitor import Monitor") == {"actors"}
    assert _forbidden("policies", "import ray.serve") == {"ray"}
    assert _forbidden("training", "from policies.policy import Policy") == set()


@pytest.mark.parametrize("module", ["policies.bundle", "policies.registry", "training.rollout", "actors.rollout_worker"])
def test_these_modules_start_without_torch(module: str) -> None:
    """An actor that imports torch starts seconds later than one that does not; so does a replica."""
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_the_command_line_answers_help_without_ray_or_torch() -> None:
    code = "import trimtab.cli, sys; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
