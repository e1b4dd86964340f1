"""Builds a plan's kernel library with CMake and keeps it in a cache. The only module that starts other programs.

    $FIDDLER_CACHE, or ~/.cache/fiddlerc
      kernels/<sources>-<compiler>/lib<name>.so, build.json    one build; build.json records the library's sha256
      kernels/<sources>-<compiler>.lock, .log                  the lock of that build; the log if it failed

A build appears there complete, by one rename, or not at all.
Environment: FIDDLER_CACHE moves the cache, CXX chooses the compiler.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import FiddlerError
from .machine import usable_cores
from .progress import Progress

_LABEL = "building kernels"
_RECORD = "build.json"
_FORMAT = "1"  # part of every key: raised when this module builds differently
_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]")


@dataclass(frozen=True)
class Toolchain:
    """The programs of a build. identity is the compiler's own description, part of the cache's key."""

    cmake: Path
    compiler: Path
    generator: str
    generator_program: Path
    identity: str


def cache_dir() -> Path:
    """Where builds are kept. Raises FiddlerError where that is below a home that the system does not know."""
    chosen = os.environ.get("FIDDLER_CACHE") or "~/.cache/fiddlerc"
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise FiddlerError(
            "there is no place for kernel builds",
            found=f"{chosen}, and no such home folder",
            expected="a writable folder",
            hint="export FIDDLER_CACHE=/some/writable/folder",
        ) from None


def find_toolchain() -> Toolchain:
    """CMake, a C++ compiler and a generator. Raises FiddlerError naming the first that is missing and how to get it."""
    compiler = _find_compiler()
    cmake = _find_program("cmake")
    if cmake is None:
        raise FiddlerError("cannot build kernels: there is no CMake", hint="pip install cmake")
    for program, generator in (("ninja", "Ninja"), ("make", "Unix Makefiles")):
        path = _find_program(program)
        if path is not None:
            return Toolchain(cmake, compiler, generator, path, _identify(compiler))
    raise FiddlerError("cannot build kernels: there is neither Ninja nor make", hint="pip install ninja")


def build_kernels(source_dir: Path, *, progress: Progress | None = None) -> Path:
    """The shared library built from a plan's kernels/ folder, from the cache if the same sources were built before.

    source_dir  holds CMakeLists.txt and everything it needs
    Returns the library's path. A cached library is used only if it still has the sha256 that its build recorded.
    Raises FiddlerError if a tool is missing, the build fails or the cache cannot be written.
    """
    sources = _hash_sources(source_dir)
    root = cache_dir() / "kernels"
    try:
        toolchain = find_toolchain()
    except FiddlerError:
        # Without a compiler an earlier build of the same sources, by whatever compiler, is as good.
        for built in sorted(root.glob(f"{sources}-*/")):
            library = _verified(built)
            if library is not None:
                return library
        raise
    home = root / f"{sources}-{_digest(_FORMAT.encode(), toolchain.identity.encode())}"
    library = _verified(home)
    if library is not None:
        return library
    with _os_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(home.with_suffix(".lock")):
            library = _verified(home)  # another process may have built it while this one waited
            return library if library is not None else _build(source_dir, home, toolchain, progress)


def _build(source_dir: Path, home: Path, toolchain: Toolchain, progress: Progress | None) -> Path:
    """Builds in a temporary folder and publishes the result as `home`. The caller holds the lock."""
    prefix = f".{home.name}."
    for stale in home.parent.glob(prefix + "*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=home.parent) as scratch:
        work, result, log = Path(scratch) / "build", Path(scratch) / "result", Path(scratch) / "log"
        result.mkdir()
        if progress is not None:
            progress(_LABEL, 0, 1)
        configure = [
            str(toolchain.cmake), "-S", str(source_dir.resolve()), "-B", str(work), "-G", toolchain.generator,
            f"-DCMAKE_MAKE_PROGRAM={toolchain.generator_program}", f"-DCMAKE_CXX_COMPILER={toolchain.compiler}",
            # Flags from the environment would reach the code that must run on any x86-64 CPU.
            "-DCMAKE_CXX_FLAGS=", "-DCMAKE_SHARED_LINKER_FLAGS=", "-DCMAKE_BUILD_TYPE=",
        ]  # fmt: skip
        _run(configure, log, home, None)
        _run([str(toolchain.cmake), "--build", str(work), "--parallel", str(usable_cores())], log, home, progress)
        built = sorted(work.glob("lib*.so"))
        if len(built) != 1:
            raise FiddlerError(
                f"the kernel build in {source_dir} made no single library",
                found=", ".join(path.name for path in built) or "none",
                expected="one lib*.so",
            )
        data = built[0].read_bytes()
        _write(result / built[0].name, data)
        record = {"library": built[0].name, "sha256": hashlib.sha256(data).hexdigest(), "compiler": toolchain.identity}
        _write(result / _RECORD, json.dumps(record, indent=2, sort_keys=True).encode() + b"\n")
        if home.exists():  # it failed verification
            shutil.rmtree(home)
        os.rename(result, home)
    home.with_suffix(".log").unlink(missing_ok=True)
    if progress is not None:
        progress(_LABEL, 1, 1)
    return home / built[0].name


def _run(command: list[str], log: Path, home: Path, progress: Progress | None) -> None:
    """Runs one CMake command with its output appended to `log`; on failure keeps the log and raises FiddlerError."""
    tail: list[str] = []
    environment = {key: value for key, value in os.environ.items() if key not in ("CXXFLAGS", "LDFLAGS", "CPPFLAGS")}
    with (
        log.open("a", encoding="utf-8", errors="replace") as out,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                out.write(line)
                tail = [*tail, line.rstrip()][-200:]
                step = _STEP.match(line)
                if step and progress is not None:
                    progress(_LABEL, int(step[1]), int(step[2] or 100))
        except BaseException:
            _stop(process)
            raise
    if process.returncode != 0:
        text = "\n".join(tail)
        if "No space left on device" in text:
            raise _disk_full(home.parent)
        kept = home.with_suffix(".log")
        shutil.copyfile(log, kept)
        raise FiddlerError(
            "the kernels could not be built",
            found=_telling_lines(tail) or f"exit status {process.returncode}",
            hint=f"less {kept}   (the whole log; `fiddlerc doctor` checks the compiler, CXX=... chooses another)",
        )


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends a command and all that it started, which would write on into a folder that is about to go.

    Asked first: Ninja has every compiler in a process group of its own, and ends them when it is told to end.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(100):
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)


def _telling_lines(lines: list[str]) -> str:
    """The first lines that say what went wrong, else the last ones."""
    telling = [line.strip() for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return " | ".join((telling or [line.strip() for line in lines if line.strip()][-3:])[:3])[:600]


def _verified(home: Path) -> Path | None:
    """The library of a finished build, if it is the one that was recorded."""
    try:
        record = json.loads((home / _RECORD).read_bytes())
        library = home / os.path.basename(record["library"])
        return library if hashlib.sha256(library.read_bytes()).hexdigest() == record["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash_sources(source_dir: Path) -> str:
    """Identifies the contents of a source folder: names and bytes of its files."""
    if not (source_dir / "CMakeLists.txt").is_file():
        raise FiddlerError(
            f"no kernel sources in {source_dir}", found="no CMakeLists.txt", expected="a plan's kernels/"
        )
    parts: list[bytes] = []
    for path in sorted(path for path in source_dir.rglob("*") if path.is_file()):
        parts += [path.relative_to(source_dir).as_posix().encode(), path.read_bytes()]
    return _digest(*parts)


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:20]


def _find_compiler() -> Path:
    chosen = os.environ.get("CXX")
    if chosen:
        path = shutil.which(chosen.strip())
        if path is None:
            raise FiddlerError(
                "CXX names no C++ compiler", found=repr(chosen), expected="one program, e.g. CXX=g++", hint="unset CXX"
            )
        return Path(path)
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return Path(path)
    raise FiddlerError(
        "cannot build kernels: there is no C++ compiler",
        found="none of c++, g++, clang++ in PATH",
        hint="sudo apt-get install g++   (Fedora: sudo dnf install gcc-c++)",
    )


def _find_program(name: str) -> Path | None:
    """A program in PATH, or beside this Python: packages such as `cmake` and `ninja` install theirs there."""
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    return Path(path) if path else None


def _identify(compiler: Path) -> str:
    """The compiler's version and target in its own words."""
    words = []
    for option in ("--version", "-dumpmachine"):
        try:
            done = subprocess.run(
                [str(compiler), option], capture_output=True, text=True, errors="replace", check=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise FiddlerError(
                f"the C++ compiler {compiler} does not work",
                found=str(error),
                expected=f"an answer to {option}",
                hint="CXX=g++ fiddlerc doctor",
            ) from None
        words.append(done.stdout.splitlines()[0].strip() if done.stdout else "")
    return " ".join(words)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock; a process that dies lets go of it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _os_errors(root: Path) -> Iterator[None]:
    """What the file system refuses, in our words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(root) from None
        raise FiddlerError(
            f"cannot use the build cache {root}",
            found=error.strerror or str(error),
            expected="a writable folder",
            hint="export FIDDLER_CACHE=/some/writable/folder",
        ) from None


def _disk_full(root: Path) -> FiddlerError:
    return FiddlerError(
        f"no space left for the kernel build in {root}",
        hint="export FIDDLER_CACHE=/some/larger/folder   (or remove old builds there)",
    )
