"""What users install: the built wheel, used outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import diffsampler

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    # The two warnings-as-errors of the test run must not reach pip and setuptools.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that the checkout keeps no build folder; needs no network."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("diffsampler", "targets", "baselines"):
        # Links stay links: the wheel must hold the linked folders because setuptools follows them.
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    # A user's checkout holds these too, and they must stay out.
    for name in ("tests", "experiments", "results"):
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_library_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert roots == {"diffsampler", f"diffsampler-{diffsampler.__version__}.dist-info"}
    assert "diffsampler/py.typed" in names
    sources = (p for folder in ("diffsampler", "targets", "baselines") for p in (ROOT / folder).rglob("*.py"))
    expected = {f"diffsampler/{path.relative_to(ROOT).as_posix().removeprefix('diffsampler/')}" for path in sources}
    assert expected == {name for name in names if name.endswith(".py")}
    assert any(name.startswith("diffsampler/targets/") for name in expected)
    assert any(name.startswith("diffsampler/baselines/") for name in expected)


def test_wheel_states_licence_and_version(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    info = f"diffsampler-{diffsampler.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    elsewhere = tmp_path / "elsewhere"
    # A user's own folder of the same name must not be picked up, nor shadowed by ours.
    (elsewhere / "targets").mkdir(parents=True)
    (elsewhere / "targets" / "__init__.py").write_text("mine = True\n")
    code = (
        "import diffsampler, diffsampler.targets, diffsampler.baselines, targets\n"
        "assert targets.mine and not hasattr(diffsampler.targets, 'mine')\n"
        "print(diffsampler.__file__)\n"
    )
    printed = run(sys.executable, "-c", code, cwd=elsewhere, path=site)
    assert Path(printed.strip()).is_relative_to(site)


def test_licence_is_complete():
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text


def test_links_point_to_the_folders_at_the_root():
    for name in ("targets", "baselines"):
        link = ROOT / "diffsampler" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_installation_is_stated_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    constraints = (ROOT / "constraints.txt").read_text().split()
    assert any(line.startswith("torch==") for line in constraints)
