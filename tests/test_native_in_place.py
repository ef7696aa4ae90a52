"""gpu_suite --build and --wheel: which module comes into the checkout, and what is said without one, or a GPU."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import stat
import subprocess
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite, native_in_place
from tests.test_build import ROOT, fake_toolkit

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
# Without pybind11, which takes seconds to compile.
SOURCE = """
#include <Python.h>
#ifdef ATTENT_CUDA
int kernel();
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1};
PyMODINIT_FUNC PyInit__native() {
    PyObject* module = PyModule_Create(&definition);
#ifdef ATTENT_CUDA
    PyModule_AddStringConstant(module, "cuda_archs", kernel() == 7 ? ATTENT_CUDA_ARCHS : "");
    PyModule_AddObject(module, "cuda_absent", Py_NewRef(Py_None));
#else
    PyModule_AddStringConstant(module, "cuda_absent", ATTENT_CUDA_ABSENT);
#endif
    return module;
}
""".replace("Py_NewRef(Py_None)", "(Py_INCREF(Py_None), Py_None)")  # Python 3.10 has it, its oldest headers do not

needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not (ROOT / "setup.py").exists(), reason="there is no g++, or no checkout"
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small one, in the place of this one: the real setup.py, one C++ file, one kernel; an "nvcc" that is g++."""
    root = tmp_path / "checkout"
    (root / "csrc" / "cuda").mkdir(parents=True)
    (root / "csrc" / "module.cpp").write_text(SOURCE)
    (root / "csrc" / "cuda" / "kernel.cu").write_text("int kernel() { return 7; }")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/exports.map", "tools/cuda_build.py",
                 "attent_kernels/__init__.py", "python/attent/__init__.py"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    nvcc = fake_toolkit(tmp_path / "toolkit", files=("include/cuda_runtime.h",))
    (tmp_path / "toolkit" / "lib64").mkdir()
    (tmp_path / "toolkit" / "lib64" / "libcudart_static.a").write_bytes(b"!<arch>\n")  # an archive of nothing
    nvcc.write_text(
        nvcc.read_text()
        + 'case "$*" in *dryrun*|*version*) exit;; esac\n'
        + 'while [ $# -gt 0 ]; do case "$1" in -c) in="$2";; -o) out="$2";; -MF) dep="$2";; esac; shift; done\n'
        + 'test -z "$dep" || echo "$out: $in" > "$dep"\nexec g++ -x c++ -fPIC -c "$in" -o "$out"\n'
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("ATTENT_CUDA_ARCHS", "80;90a")
    monkeypatch.setenv("ATTENT_CUDA", "0")  # --build asks for them all the same
    monkeypatch.setattr(native_in_place, "ROOT", root)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return root


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = gpu_suite.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "attent-1-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@needs_a_compiler
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_build_compiles_the_kernels_and_then_says_that_there_is_no_gpu(
    ninja: bool, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if ninja and shutil.which("ninja") is None:
        pytest.skip("there is no ninja")
    if not ninja:
        monkeypatch.setenv("PATH", str(without("ninja", tmp_path / "programs")))
    assert run("--build", capsys=capsys) == (
        2, "in place: CUDA kernels for sm_80, sm_90a\n",
        "benchmarks.gpu_suite: there is no CUDA device; --dry runs it on a CPU, tiny\n",
    )  # fmt: skip
    assert [path.name for path in (checkout / "attent_kernels").glob("_native*")] == [f"_native{SUFFIX}"]
    assert len(list(checkout.glob("build/cuda/*/build.ninja"))) == ninja


def without(program: str, folder: Path) -> Path:
    """A folder in the place of PATH that lacks one program."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for path in Path(place).iterdir() if Path(place).is_dir() else ():
            if path.name != program:
                (folder / path.name).unlink(missing_ok=True)
                (folder / path.name).symlink_to(path)
    return folder


@needs_a_compiler
def test_a_build_that_fails_says_what_the_compiler_said(checkout: Path) -> None:
    (checkout / "csrc" / "cuda" / "kernel.cu").write_text("int kernel() { return seven; }")
    with pytest.raises(SystemExit, match=r"^--build: .*a compilation failed: .*error: .seven. was not declared"):
        gpu_suite.main(["--build"])


@needs_a_compiler
def test_a_wheels_module_takes_the_place_of_a_loaded_one_with_the_libraries_it_needs(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native_in_place.install()
    installed = checkout / "attent_kernels" / f"_native{SUFFIX}"
    made = wheel(tmp_path, {
        f"attent_kernels/_native{SUFFIX}": installed.read_bytes(),
        "attent.libs/libgomp-f9a9ad78.so.1.0.0": b"auditwheel's copy",
        "attent/__init__.py": b"of another commit",
    })  # fmt: skip
    installed.write_bytes(b"mapped")
    with installed.open("rb") as loaded:
        code, out, _ = run("--wheel", str(made), capsys=capsys)
        assert (code, out) == (2, "in place: CUDA kernels for sm_80, sm_90a\n")
        assert loaded.read() == b"mapped"
    assert [path.name for path in (checkout / "attent.libs").iterdir()] == ["libgomp-f9a9ad78.so.1.0.0"]
    assert (checkout / "python/attent/__init__.py").read_bytes() == (ROOT / "python/attent/__init__.py").read_bytes()


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["attent/__init__.py"], "which holds no compiled module; takes one built with it"),
        (["attent_kernels/_native.cpython-38-x86_64-linux-gnu.so"], "whose module is for another Python (.cpython-38"),
        ([f"attent_kernels/_native{SUFFIX}"], "the module is in place, but ImportError: "),
    ],
    ids=["none", "another Python", "broken"],
)
def test_a_wheel_that_brings_no_module_is_refused(names: Sequence[str], complaint: str, tmp_path: Path) -> None:
    made = wheel(tmp_path, dict.fromkeys(names, b"no library"))
    with pytest.raises(SystemExit) as refused:
        native_in_place.install(made, tmp_path)
    assert complaint in str(refused.value) and str(made) in str(refused.value)


@needs_a_compiler
def test_a_wheel_without_cuda_kernels_is_refused_with_the_reason(checkout: Path, tmp_path: Path) -> None:
    compiled = tmp_path / "module.so"
    flags = ['-DATTENT_CUDA_ABSENT="no nvcc was found"', f"-I{sysconfig.get_path('include')}", "-fPIC", "-shared"]
    subprocess.run(["g++", *flags, checkout / "csrc" / "module.cpp", "-o", compiled], check=True)
    made = wheel(tmp_path, {f"attent_kernels/_native{SUFFIX}": compiled.read_bytes()})
    with pytest.raises(SystemExit, match=r"^--wheel .*it holds no CUDA kernels: no nvcc was found$"):
        gpu_suite.main(["--wheel", str(made)])
