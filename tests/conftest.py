"""What all tests share: golden files, and a kernel build cache inside the checkout."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from golden_type import Golden

# A busy machine is not a failure, and tests judge no times.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Where there is no GPU, Triton's kernels run in its interpreter. Before anything imports Triton, which looks then.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write what tests generate to tests/golden instead of comparing",
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """golden("kernels/x.cpp", text) compares with that file in tests/golden; with --update-golden it writes it."""
    update = bool(request.config.getoption("--update-golden"))

    def compare(name: str, content: str | bytes) -> None:
        path = GOLDEN / name
        data = content.encode() if isinstance(content, str) else content
        if update:
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            return
        if not path.exists():
            pytest.fail(f"no golden file {name}; `pytest --update-golden` writes it", pytrace=False)
        expected = path.read_bytes()
        if data != expected:
            lines = difflib.unified_diff(
                expected.decode(errors="replace").splitlines(),
                data.decode(errors="replace").splitlines(),
                f"tests/golden/{name}",
                "generated now",
                lineterm="",
            )
            pytest.fail("\n".join(["golden file differs (--update-golden accepts)", *lines]), pytrace=False)

    return compare


@pytest.fixture(scope="session", autouse=True)
def kernel_cache() -> Iterator[Path]:
    """Tests build kernels in build/test-cache: the user's cache is left alone, and a second run builds nothing."""
    before = os.environ.get("FIDDLER_CACHE")
    cache = ROOT / "build" / "test-cache"
    os.environ["FIDDLER_CACHE"] = str(cache)
    yield cache
    if before is None:
        del os.environ["FIDDLER_CACHE"]
    else:
        os.environ["FIDDLER_CACHE"] = before
