"""What ships: the wheel, installed outside the checkout, compiles the demo model, and its runtime runs a plan."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "tiny-mixtral"

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it, which borrows this environment's other packages."""
    pytest.importorskip("scikit_build_core", reason="building the wheel needs scikit-build-core")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    call(*build, "--wheel-dir", folder, ROOT, cwd=folder)
    venv.create(folder / "env", with_pip=False)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    (wheel,) = folder.glob("fiddlerc-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    call(*install, cwd=folder)
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    # Plain lines: the editable installation's hook is a .pth file of that folder and is not run.
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "env" / "bin" / "python"


def test_the_installed_compiler_brings_its_templates_and_catalogue(python: Path, tmp_path: Path) -> None:
    where = call(python, "-c", "import fiddlerc, fiddler_runtime; print(fiddlerc.__file__)", cwd=tmp_path)
    assert str(ROOT) not in where
    call(python, "-m", "fiddlerc", "compile", DEMO, "--hw", "a100.json", "--no-build", "-o", "plan", cwd=tmp_path)
    assert (tmp_path / "plan" / "kernels" / "CMakeLists.txt").is_file()


def test_the_installed_runtime_runs_a_plan(python: Path, tmp_path: Path) -> None:
    call(python, "-m", "fiddlerc", "compile", DEMO, "--hw", "a100.json", "-o", "plan", cwd=tmp_path)
    command = ["run", "plan", "--model", DEMO, "--prompt", "The module", "--max-new-tokens", "4", "--device", "none"]
    assert call(python, "-m", "fiddlerc", *command, cwd=tmp_path).strip()
