"""Building C++ on first use: found again, never stale, safe in parallel, and clear when it cannot be done."""

import ctypes
import logging
import subprocess
import sys

import pytest
import torch

from seqzoo.kernels import native
from seqzoo.kernels.native import build

SOURCE = '#include "gemm.h"\nextern "C" int answer() { return %d; }\n'
PRODUCT = """
#include "gemm.h"
using namespace seqzoo;
// n: M, N, K, a_row, a_col, c_row, transposed, into
extern "C" void product(const long* n, float* A, float* B, float* C) {
  if (n[6]) gemm_nt(n[0], n[1], n[2], A, n[3], n[4], B, n[2], C, n[5], (Into)n[7]);
  else gemm(n[0], n[1], n[2], A, n[3], n[4], B, n[1], C, n[5], (Into)n[7]);
}
extern "C" void exponential(float* x, int n) {
  for (int i = 0; i < n; i += LANES) store(x + i, seqzoo::exp(load(x + i)));
}
extern "C" void round_trip(float* x, uint16_t* half, float* back, int n) {
  store_row(half, x, n), load_row(back, half, n);
}
"""
pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    source = tmp_path_factory.mktemp("products") / "product.cpp"
    source.write_text(PRODUCT)
    return native.library("test_products", [source])


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE % 42)
    return path


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize(
    "M, N, K", [(1, 1, 1), (5, 17, 3), (13, 64, 300), (64, 130, 65), (6, 48, 0), (3, 600, 20), (20, 515, 7)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("into, sign", [(0, 0), (1, 1), (2, -1)])
def test_products(products, M, N, K, transposed, into, sign):
    """Set, add and subtract; A and A^T; B and B^T; nothing beside the matrix is touched."""
    A, B, C = torch.randn(M, K), torch.randn(K, N), torch.randn(M, N + 3)
    truth = A.double() @ B.double()
    expected = C.double()
    expected[:, :N] = truth if into == 0 else expected[:, :N] + sign * truth
    for a, strides in ((A, (K, 1)), (A.mT.contiguous(), (1, M))):
        b, c = B.mT.contiguous() if transposed else B, C.clone()
        numbers = (ctypes.c_long * 8)(M, N, K, *strides, N + 3, transposed, into)
        products.product(numbers, *map(pointer, (a, b, c)))
        torch.testing.assert_close(c.double(), expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(c[:, N:], C[:, N:])


def test_exponential(products):
    x = torch.cat([torch.linspace(-86.9, 80, 1000), torch.tensor([0.0, -0.0, -87.1, -1e4, -torch.inf] * 4 + [0.0] * 4)])
    y = x.clone()
    products.exponential(pointer(y), x.numel())
    truth = torch.where(x < -87, 0.0, x.double().exp())
    assert ((y - truth).abs() <= 2e-7 * truth).all()


def test_bfloat16(products):
    """As torch rounds."""
    x = torch.cat(
        [torch.randn(1000) * 100, torch.tensor([0.0, -0.0, torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40])]
    )
    half, back = torch.empty(x.numel(), dtype=torch.bfloat16), torch.empty_like(x)
    products.round_trip(pointer(x), pointer(half), pointer(back), x.numel())
    assert torch.equal(half, x.bfloat16()) and torch.equal(back, half.float())


def test_built_once_and_found_again(source, monkeypatch):
    assert native.library("answer", [source]).answer() == 42
    (built,) = build.cache_folder().iterdir()
    build._library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # a second build would fail
    assert native.library("answer", [source]).answer() == 42
    assert [built] == list(build.cache_folder().iterdir())


def test_never_stale(source):
    assert native.library("answer", [source]).answer() == 42
    build._library.cache_clear()
    source.write_text(SOURCE % 43)
    assert native.library("answer", [source]).answer() == 43
    (source.parent / "more.h").write_text("// a header beside it counts\n")
    build._library.cache_clear()
    native.library("answer", [source])
    assert len(list(build.cache_folder().iterdir())) == 3


def test_many_processes_at_once(source):
    """All build at the same moment; each gets a whole library, one file is left."""
    code = (
        "import sys; from pathlib import Path; from seqzoo.kernels.native import library; "
        "assert library('answer', [Path(sys.argv[1])]).answer() == 42"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(source)]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list(build.cache_folder().iterdir())) == 1


def test_says_why_not(source, tmp_path, monkeypatch, caplog):
    """A source that does not compile, a folder that cannot be written, no compiler; `usable` logs it once."""
    source.write_text("not C++")
    with pytest.raises(native.BuildError, match=r"(?s)answer.*failed:.*error"):
        native.library("answer", [source])
    assert list(build.cache_folder().iterdir()) == []  # no half-built file
    with caplog.at_level(logging.WARNING, logger=build.log.name):
        assert not native.usable("answer", source) and not native.usable("answer", source)
    assert len(caplog.records) == 1 and "slower torch backend" in caplog.text
    source.write_text(SOURCE % 42)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(native.BuildError, match="cannot write .* point .XDG_CACHE_HOME"):
        native.library("answer", [source])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not native.available()
    with pytest.raises(native.BuildError, match="tried no-such-compiler.*install"):
        native.library("answer", [source])
