"""Source distribution and wheel: what they hold, their version, and that the wheel alone runs."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatch_vcs")
pytest.importorskip("hatch_fancy_pypi_readme")
ROOT = Path(__file__).parent.parent
PARTS = (
    "nsa_compile", "tests", "docs", "notebooks", "profiles", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
    "pyproject.toml", ".gitignore",
)  # fmt: skip
TAG = "0.7.0"
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="versions come from git")


def run(*command, cwd, **environment) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run([str(x) for x in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def git(folder: Path, *arguments) -> None:
    run("git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments, cwd=folder)


def version_of(folder: Path) -> str:
    return run(sys.executable, "-m", "hatchling", "version", cwd=folder).strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of these files as they stand, with one commit and no tag."""
    folder = tmp_path_factory.mktemp("clone") / "nsa"
    folder.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "clean", "-qXfd")  # what .gitignore names
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "Begin")
    return folder


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    """The source distribution of a tagged clone and the wheel made from it."""
    out = tmp_path_factory.mktemp("dist")
    git(clone, "tag", f"v{TAG}")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=clone)
    git(clone, "tag", "-d", f"v{TAG}")
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_version_comes_from_the_tag(clone, tmp_path):
    assert re.fullmatch(r"0\.1\.dev1\+g[0-9a-f]+", version_of(clone))  # before the first tag
    git(clone, "tag", "profiles-3")
    assert re.fullmatch(r"0\.1\.dev1\+g[0-9a-f]+", version_of(clone))  # a tag that is no version
    git(clone, "tag", "v0.3.0")
    assert version_of(clone) == "0.3.0"
    (tmp_path / "shallow").mkdir()
    run("git", "clone", "-q", "--depth", 1, f"file://{clone}", "nsa", cwd=tmp_path / "shallow")
    git(tmp_path / "shallow" / "nsa", "tag", "-d", "v0.3.0")
    assert re.fullmatch(r"0\.1\.dev1\+g[0-9a-f]+", version_of(tmp_path / "shallow" / "nsa"))
    git(clone, "commit", "-q", "--allow-empty", "-m", "Go on")
    assert re.fullmatch(r"0\.3\.1\.dev1\+g[0-9a-f]+", version_of(clone))
    git(clone, "reset", "-q", "--hard", "v0.3.0")
    git(clone, "tag", "-d", "v0.3.0", "profiles-3")
    shutil.copytree(clone, tmp_path / "files", ignore=shutil.ignore_patterns(".git"))
    assert version_of(tmp_path / "files") == "0.0"


def test_source_distribution_has_all_files_and_knows_its_version(built, clone, tmp_path):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"nsa_compile-{TAG}" and version_of(folder) == TAG
    here = {p.relative_to(clone).as_posix() for p in clone.rglob("*") if p.is_file()}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {name for name in here if not name.startswith(".git/")} == there - {"PKG-INFO"}


def test_wheel_has_the_package_alone(built, clone):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"nsa_compile-{TAG}.dist-info"
    assert {"nsa_compile/py.typed", "nsa_compile/custom_ops/thresholds.json", f"{info}/licenses/LICENSE"} <= names
    package = {p.relative_to(clone).as_posix() for p in (clone / "nsa_compile").rglob("*") if p.is_file()}
    assert {name for name in names if not name.startswith(info)} == package


def test_the_description_has_no_relative_links(built, clone):
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=clone)
    with zipfile.ZipFile(built[1]) as archive:
        text = message_from_bytes(archive.read(f"nsa_compile-{TAG}.dist-info/METADATA")).get_payload()
    readme = (clone / "README.md").read_text()
    links = r"\]\((?!https?:|#)[^)\s]+\.\w+\)"
    assert re.search(links, readme) and not re.search(links, text)
    assert re.findall(r"```.*?```", text, flags=re.S) == re.findall(r"```.*?```", readme, flags=re.S)
    assert set(re.findall(r"\]\((https?:[^)]+)\)", readme)) == set(re.findall(r"\]\((https?:[^)]+)\)", text))


def test_the_wheel_alone_runs(built, tmp_path):
    """In an environment of its own that sees this one's other packages, but not the package installed here."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        built[1],
        cwd=tmp_path,
    )
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text("\n".join(p for p in sys.path if Path(p).name == "site-packages"))
    script = "import nsa_compile as n; print(n.__version__, n.__file__, n.NSAConfig().l)"
    version, path, l = run(python, "-c", script, cwd=tmp_path).split()
    assert (version, Path(path).parent.parent, l) == (TAG, packages, "32")
    command = tmp_path / "venv" / "bin" / "nsa-compile"
    assert f"nsa-compile {TAG}," in run(command, "info", "--device", "cpu", cwd=tmp_path)
    (tmp_path / "a.txt").write_text("".join(f"{i} is {i}\n" for i in range(8000)))
    arguments = ("demo", "--text", "a.txt", "--out", "demo", "--steps", 1, "--no-compile")
    assert "within 1e-09" in " ".join(run(command, *arguments, cwd=tmp_path).split())
