"""What made a file: code, versions, settings."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def _imports(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == PACKAGE.name or name.startswith(PACKAGE.name + ".")}


def _module_file(name: str) -> Path | None:
    base = PACKAGE.parent.joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _parsed(path: Path) -> tuple[str, frozenset[str]]:
    source = path.read_text()
    # The syntax tree without positions: comments and blank lines do not change a result.
    return hashlib.sha256(ast.dump(ast.parse(source)).encode()).hexdigest(), frozenset(_imports(source))


def library_files(script: str | Path) -> list[Path]:
    """The library modules that a script imports, directly or through others (not the script itself)."""
    todo, seen = [Path(script)], set()
    while todo:
        for name in _parsed(todo.pop())[1]:
            path = _module_file(name)
            if path is not None and path not in seen:
                seen.add(path)
                todo.append(path)
    return sorted(seen)


def code_hash(script: str | Path) -> str:
    """A digest of a script and of every library module it uses, so that editing one re-runs what uses it."""
    files = [Path(script), *library_files(script)]
    text = "".join(f"{path.name}:{_parsed(path)[0]}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the named packages, for a file's provenance record."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
