"""C++ compiled by the system's compiler on first use and loaded through ctypes.

A source has a plain C interface and no torch headers, so that a build takes seconds; tensors travel as `data_ptr()`.
What was built is kept in the user's cache folder under a hash of everything it depends on (sources, headers, flags,
compiler, processor), so it is never stale and never meant for another machine that shares the folder. Threads are
OpenMP's, on Linux the very pool that torch uses; Apple's compiler lacks OpenMP, there a native op runs on one thread.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HEADERS = Path(__file__).parent  # gemm.h: `#include "gemm.h"` works in every native source
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """No compiler, or one that refused; the message says which and what it said."""


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX where it is set, else the first of c++, g++, clang++ on the PATH."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, wanted) if path), None)


def available() -> bool:
    """Whether there is a compiler that native ops could be built with."""
    return os.name == "posix" and compiler() is not None


@cache
def usable(name: str, *sources: Path) -> bool:
    """Whether `library` can build and load this; if not, logs once why, what that costs and what helps."""
    try:
        library(name, sources)
    except BuildError as error:
        log.warning("native op %s is not usable, the slower torch backend runs instead: %s", name, error)
        return False
    return True


@cache
def _library(name: str, sources: tuple[Path, ...]) -> ctypes.CDLL:
    path = _built(name, sources)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load ({error}); delete it to have it built again") from error


def library(name: str, sources: Sequence[Path]) -> ctypes.CDLL:
    """Build (where that was not done before) and load one native library.

    Args:
        name: of the op, for the file's name and for messages.
        sources: C++ files; a header beside them or in kernels/native/ is found, and counts as part of them.

    Returns:
        The library; the caller sets `argtypes` of its functions.

    Raises:
        BuildError: no compiler, sources it refuses, a cache folder that cannot be written, a file that does not load.
    """
    return _library(name, tuple(sources))


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/seqzoo, by default ~/.cache/seqzoo."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "seqzoo"


def _built(name: str, sources: tuple[Path, ...]) -> Path:
    """The library's file, built unless it is there. Safe with many processes at once: what appears there is whole."""
    cxx = compiler()
    if os.name != "posix" or cxx is None:
        tried = os.environ.get("CXX") or "c++, g++, clang++"
        raise BuildError(f"no C++ compiler found (tried {tried}); install one (g++ or clang++) or point $CXX to it")
    target = cache_folder() / f"{name}-{_fingerprint(cxx, sources)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / target.name
            command = [cxx, *_flags(), f"-I{HEADERS}", *map(str, sources), "-o", str(fresh)]
            run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
            if run.returncode:
                raise BuildError(f"{' '.join(command)} failed:\n{run.stderr[-4000:]}")
            os.replace(fresh, target)
    except OSError as error:
        raise BuildError(
            f"cannot write {target.parent} ({error}); point $XDG_CACHE_HOME to a folder of yours"
        ) from error
    return target


def _flags() -> list[str]:
    if sys.platform == "darwin":
        return [*FLAGS, "-mcpu=native" if platform.machine() == "arm64" else "-march=native"]
    return [*FLAGS, "-march=native", "-fopenmp"]


def _fingerprint(cxx: str, sources: tuple[Path, ...]) -> str:
    headers = {h for folder in {HEADERS, *(s.parent for s in sources)} for h in folder.glob("*.h")}
    parts = [f.read_bytes() for f in (*sources, *sorted(headers))]
    parts += [x.encode() for x in (_version(cxx), _processor(), *_flags())]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())  # of the parts' hashes: no part can pass as the end of another
    return digest.hexdigest()[:20]


@cache
def _version(cxx: str) -> str:
    run = subprocess.run([cxx, "--version"], capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"{cxx} --version failed: {run.stderr.strip()}")
    return f"{cxx} {run.stdout}"


@cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = lines[: lines.index("")] if "" in lines else lines
    told = ("flags", "Features", "model", "cpu family", "CPU part")
    return "\n".join(line for line in first if line.partition(":")[0].strip() in told)
