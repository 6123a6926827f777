"""The code hash follows imports: it changes with what a script uses, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbdiffusion.runtime import provenance

REPO = Path(__file__).resolve().parents[3]

FILES = {
    "dbdiffusion/__init__.py": "",
    "dbdiffusion/low/__init__.py": "",
    "dbdiffusion/low/base.py": "def base():\n    return 1\n",
    "dbdiffusion/low/lazy.py": "LAZY = 1\n",
    "dbdiffusion/low/middle.py": (
        "from dbdiffusion.low.base import base\n\ndef middle():\n    from dbdiffusion.low import lazy\n    return base() + lazy.LAZY\n"
    ),
    "dbdiffusion/low/other.py": "def other():\n    return 1\n",
    "script.py": "import numpy\nfrom dbdiffusion.low.middle import middle\n\nprint(middle())\n",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library: script -> middle -> base, and lazy inside a function; other is not used."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "dbdiffusion")
    return tmp_path


def code_hash(library: Path) -> str:
    provenance._parsed.cache_clear()
    return provenance.code_hash(library / "script.py")


def test_library_files_are_those_that_are_imported(library):
    names = {str(p.relative_to(library)) for p in provenance.library_files(library / "script.py")}
    assert {"dbdiffusion/low/middle.py", "dbdiffusion/low/base.py", "dbdiffusion/low/lazy.py"} <= names
    assert "dbdiffusion/low/other.py" not in names
    assert "script.py" not in names


@pytest.mark.parametrize("name", ["script.py", "dbdiffusion/low/middle.py", "dbdiffusion/low/base.py", "dbdiffusion/low/lazy.py"])
def test_changes_with_what_the_script_uses(library, name):
    before = code_hash(library)
    path = library / name
    path.write_text(path.read_text() + "\nNEW = 2\n")
    assert code_hash(library) != before


def test_changes_with_a_constant(library):
    before = code_hash(library)
    (library / "dbdiffusion/low/base.py").write_text("def base():\n    return 2\n")
    assert code_hash(library) != before


@pytest.mark.parametrize("name", ["script.py", "dbdiffusion/low/base.py"])
def test_comments_and_blank_lines_do_not_count(library, name):
    before = code_hash(library)
    path = library / name
    path.write_text("# a comment\n\n\n" + path.read_text() + "# another\n")
    assert code_hash(library) == before


def test_unrelated_modules_do_not_count(library):
    before = code_hash(library)
    (library / "dbdiffusion/low/other.py").write_text("def other():\n    return 3\n")
    (library / "dbdiffusion/low/new.py").write_text("NEW = 1\n")
    assert code_hash(library) == before


def test_the_place_of_the_library_does_not_count(library, monkeypatch):
    before = code_hash(library)
    moved = library.with_name(library.name + "-moved")
    library.rename(moved)
    monkeypatch.setattr(provenance, "PACKAGE", moved / "dbdiffusion")
    assert code_hash(moved) == before


def test_swapping_two_modules_counts(library):
    """Not only the texts but also where they stand."""
    before = code_hash(library)
    base, lazy = library / "dbdiffusion/low/base.py", library / "dbdiffusion/low/lazy.py"
    base_text, lazy_text = base.read_text(), lazy.read_text()
    base.write_text(lazy_text)
    lazy.write_text(base_text)
    assert code_hash(library) != before


def test_the_real_library_is_followed():
    files = provenance.library_files(REPO / "workflow_scripts/dbdiffusion/config/load.py")
    names = {str(p.relative_to(provenance.PACKAGE)) for p in files}
    assert {"config/root.py", "config/base.py", "runtime/errors.py"} <= names
    assert not any(name.startswith(("generative/", "data/")) for name in names)


def test_versions():
    found = provenance.versions("numpy", "no-such-package-anywhere")
    assert found["numpy"][0].isdigit()
    assert found["no-such-package-anywhere"] == "absent"
    assert found["python"].startswith("3.")
