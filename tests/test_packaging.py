"""A package that is missing from the explicit list is missing only from the wheel: compare the list with the disk."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("server", "clients", "privacy", "strategies", "simulations")


def _declared() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def _on_disk() -> set[str]:
    found = set()
    for folder, prefix in ((ROOT / "src" / "confide", "confide"), *((ROOT / m, f"confide.{m}") for m in MAPPED)):
        for init in folder.rglob("__init__.py"):  # rglob does not follow the committed symlinks
            parts = init.parent.relative_to(folder).parts
            if not parts or parts[0] not in MAPPED or folder.name != "confide":
                found.add(".".join((prefix, *parts)))
    return found


def test_every_package_on_disk_is_declared_and_the_other_way_round() -> None:
    assert _declared() == _on_disk()


def test_every_mapped_folder_has_its_symlink_for_the_type_checkers() -> None:
    for name in MAPPED:
        link = ROOT / "src" / "confide" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_every_module_is_inside_a_declared_package() -> None:
    declared = _declared()
    for name in MAPPED:
        for module in (ROOT / name).rglob("*.py"):
            package = ".".join(("confide", name, *module.parent.relative_to(ROOT / name).parts))
            assert package in declared, f"{module} would be missing from the wheel"
