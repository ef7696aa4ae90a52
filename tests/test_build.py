"""How the native module is built: with which nvcc, for which GPUs; and what a build without one leaves behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cuda_build() -> ModuleType:
    if not (ROOT / "tools" / "cuda_build.py").exists():
        pytest.skip("tools/ is not there: an installed attent, not a checkout")
    return load("cuda_build", ROOT / "tools" / "cuda_build.py")


# -------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("asked", "archs"),
    [("", ["80", "90a"]), ("90a;80", ["80", "90a"]), ("120,100, 80", ["80", "100", "120"]), ("90a 90a", ["90a"])],
)
def test_architectures_are_a_list_in_any_order(
    asked: str, archs: list[str], cuda_build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTENT_CUDA_ARCHS", asked)
    assert cuda_build.archs() == archs


@pytest.mark.parametrize("asked", ["sm_90", "75", "9.0", "native"])
def test_an_architecture_that_is_none_is_refused(
    asked: str, cuda_build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTENT_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=r"^ATTENT_CUDA_ARCHS: got .*; takes numbers from 80 on"):
        cuda_build.archs()


def test_later_gpus_get_ptx_that_they_can_run(cuda_build: ModuleType) -> None:
    """compute_90a's would run on nothing but an sm_90."""
    assert cuda_build.code_flags(["80", "90a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert cuda_build.code_flags(["80", "120"])[-1] == "-gencode=arch=compute_120,code=compute_120"


@pytest.mark.parametrize("value", ["yes", "2"])
def test_a_choice_that_is_none_is_refused(value: str, cuda_build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENT_CUDA", value)
    with pytest.raises(SystemExit, match=r"^ATTENT_CUDA: got .*; takes auto .*, 1 .* or 0"):
        cuda_build.wanted()


# ----------------------------------------------------------------------------------------------------------- which nvcc


def fake_toolkit(folder: Path, *, files: tuple[str, ...]) -> Path:
    """An nvcc that says where it is and which it is, and no more; beside it empty files."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f'#!/bin/sh\necho "#$ TOP={folder}" >&2\necho "Cuda compilation tools, release 13.1, V13.1.0"\n')
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return nvcc


COMPLETE = ("include/cuda_runtime.h", "lib64/libcudart_static.a")


def test_cuda_home_comes_first_and_decides(
    cuda_build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_toolkit(tmp_path / "home", files=COMPLETE)
    in_path = fake_toolkit(tmp_path / "path", files=COMPLETE)
    monkeypatch.setenv("PATH", str(in_path.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    found = cuda_build.find_toolkit()
    assert (found.nvcc, found.version) == (nvcc, "13.1")
    assert found.library == tmp_path / "home" / "lib64" and found.include == tmp_path / "home" / "include"
    monkeypatch.delenv("CUDA_HOME")
    assert cuda_build.find_toolkit().nvcc == in_path


def test_pypis_package_is_found(cuda_build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else is: its folder, and that of the runtime's package, is nvidia/cu13 in site-packages."""
    nvcc = fake_toolkit(tmp_path / "nvidia" / "cu13", files=("include/cuda_runtime.h", "lib/libcudart_static.a"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(cuda_build, "USUAL", tmp_path / "nowhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert cuda_build.find_toolkit().nvcc == nvcc


def test_a_cuda_home_without_nvcc_means_that_there_is_none(
    cuda_build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is installed: who names a toolkit is not given another one."""
    for place in (tmp_path / "path", tmp_path / "usual", tmp_path / "nvidia" / "cu13"):
        fake_toolkit(place, files=COMPLETE)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(cuda_build, "USUAL", tmp_path / "usual")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(cuda_build.NoCuda, match=r"^no nvcc was found in CUDA_HOME \(/nowhere\)$"):
        cuda_build.find_toolkit()


def test_an_incomplete_toolkit_is_told(cuda_build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for files, missing in (((), "cuda_runtime.h"), (COMPLETE[:1], "libcudart_static.a")):
        fake_toolkit(tmp_path, files=files)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(cuda_build.NoCuda, match=f"{missing} is not in {tmp_path}"):
            cuda_build.find_toolkit()


@pytest.mark.skipif(shutil.which("ninja") is None, reason="there is no ninja")
def test_a_rebuild_compiles_what_has_changed_and_nothing_else(
    cuda_build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an "nvcc" that notes what it is called with and copies; a header's dependents follow it."""
    nvcc = fake_toolkit(tmp_path / "home", files=COMPLETE)
    nvcc.write_text(
        nvcc.read_text()
        + 'case "$*" in *dryrun*|*version*) exit;; esac\n'
        + 'while [ $# -gt 0 ]; do case "$1" in -c) in="$2";; -o) out="$2";; -MF) dep="$2";; esac; shift; done\n'
        + f'echo "$in" >> {tmp_path}/called\ncp "$in" "$out"\necho "$out: $in {tmp_path}/csrc/cuda/common.h" > "$dep"\n'
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    sources = [tmp_path / "csrc" / "cuda" / name for name in ("one.cu", "two.cu", "hopper_sm90.cu", "common.h")]
    for source in sources:
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("a")

    def compiled(archs: str = "80;90a") -> set[str]:
        (tmp_path / "called").write_text("")
        monkeypatch.setenv("ATTENT_CUDA_ARCHS", archs)
        built = cuda_build.build(tmp_path, tmp_path / "build")
        assert all(Path(path).exists() for path in built.objects)
        return {Path(line).name for line in (tmp_path / "called").read_text().splitlines()}

    def change(source: Path) -> None:
        source.write_text("b")

    assert compiled() == {"one.cu", "two.cu", "hopper_sm90.cu"}
    assert compiled() == set()
    change(sources[0])
    assert compiled() == {"one.cu"}
    change(sources[3])
    assert compiled() == {"one.cu", "two.cu", "hopper_sm90.cu"}
    assert compiled("80") == {"one.cu", "two.cu"}  # Hopper's own instructions are left out; kept apart from the others
    assert compiled() == set()


# --------------------------------------------------------------------------------------------------------- whole builds


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What a build takes, in a folder of its own."""
    copy = tmp_path / "sources"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_native_failure.txt")
    for name in ("csrc", "tools", "python", "attent_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    return copy


def setup(sources: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_without_nvcc_the_module_is_the_cpu_part_and_says_why(sources: Path) -> None:
    nowhere = {"CUDA_HOME": str(sources / "nowhere"), "CUDA_PATH": "", "PYTHONPATH": ""}
    demanded = setup(sources, "build_ext", ATTENT_CUDA="1", **nowhere)
    assert demanded.returncode != 0 and "no nvcc was found" in demanded.stderr

    made = setup(sources, "bdist_wheel", ATTENT_NATIVE="1", ATTENT_CUDA="auto", ATTENT_LOCAL_VERSION="cpu", **nowhere)
    assert made.returncode == 0, made.stderr
    assert "the CUDA kernels were NOT built: no nvcc was found" in made.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert "+cpu-" in wheel.name and "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (module,) = (name for name in archive.namelist() if name.startswith("attent_kernels/_native."))
        archive.extract(module, sources / "out")
    code = "import _native as n; print(n.cuda_absent); print(n.cuda_archs == '', hasattr(n, 'select_top_k'))"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=sources / "out" / "attent_kernels", capture_output=True, text=True
    )
    why = f"no nvcc was found in CUDA_HOME ({sources / 'nowhere'})"
    assert shown.stdout.splitlines() == [why, "True False"], shown.stderr


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_and_holds_the_reason(sources: Path) -> None:
    made = setup(sources, "bdist_wheel", CC="/bin/false", CXX="/bin/false", ATTENT_NATIVE="", ATTENT_CUDA="0")
    assert made.returncode == 0 and "the native CPU module was NOT built" in made.stderr, made.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert b"/bin/false" in archive.read("attent_kernels/_native_failure.txt")
        assert "attent/__init__.py" in archive.namelist()
        (tags,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/WHEEL"))
    assert "Root-Is-Purelib: true" in tags


def test_another_pythons_headers_have_to_be_there(sources: Path) -> None:
    for asked in ("3.12:/nowhere", "3.12", "312:/usr/include"):
        refused = setup(sources, "--version", ATTENT_FOR_PYTHON=asked)
        assert refused.returncode != 0 and "ATTENT_FOR_PYTHON: got" in refused.stderr


def test_another_machine_is_known_and_its_pythons_headers_are_there(sources: Path) -> None:
    headers = f"3.12:{sysconfig.get_path('include')}"
    for asked, python in (("arm64", headers), ("aarch64-linux-gnu", "")):
        refused = setup(sources, "--version", ATTENT_FOR_MACHINE=asked, ATTENT_FOR_PYTHON=python)
        assert refused.returncode != 0 and f"ATTENT_FOR_MACHINE: got {asked}; takes" in refused.stderr


def fake_compiler(sources: Path, name: str) -> Path:
    """It adds what it is called with to the file "called", and writes an empty file."""
    compiler = sources / "bin" / name
    compiler.parent.mkdir()
    compiler.write_text(
        f'#!/bin/sh\necho "$*" >> {sources}/called\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return compiler


def test_a_build_that_is_asked_for_something_else_starts_anew(sources: Path) -> None:
    """One without CUDA kernels in the folder of one with them, say; the same again compiles nothing."""
    compiler = str(fake_compiler(sources, "g++"))
    environment = {"CC": compiler, "CXX": compiler, "LDCXXSHARED": f"{compiler} -shared", "ATTENT_NATIVE": "1"}
    counts = []
    for asked in ({"ATTENT_CUDA": "0"}, {"ATTENT_CUDA": "0"}, {"ATTENT_CUDA": "auto", "CUDA_HOME": "/nowhere"}):
        made = setup(sources, "build_ext", CUDA_PATH="", **environment, **asked)
        assert made.returncode == 0, made.stderr
        called = (sources / "called").read_text()
        counts.append(called.count(" -c "))
    files = len(list((sources / "csrc").glob("*.cpp")))
    assert counts == [files, files, 2 * files] and "/nowhere" in called


def test_a_wheel_for_another_machine_is_named_after_it(sources: Path) -> None:
    """With compilers in PATH that are not what they are called."""
    compiler = fake_compiler(sources, "aarch64-linux-gnu-g++")
    (compiler.parent / "aarch64-linux-gnu-gcc").symlink_to(compiler.name)
    asked = {
        "ATTENT_FOR_PYTHON": f"3.12:{sysconfig.get_path('include')}",
        "ATTENT_FOR_MACHINE": "aarch64-linux-gnu",
        "ATTENT_NATIVE": "1",
        "PATH": f"{compiler.parent}{os.pathsep}{os.environ['PATH']}",
    }
    made = setup(sources, "bdist_wheel", ATTENT_CUDA="auto", **asked)
    assert made.returncode == 0, made.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-cp312-cp312-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "attent_kernels/_native.cpython-312-aarch64-linux-gnu.so" in archive.namelist()
    *compiled, linked = (sources / "called").read_text().splitlines()
    assert len(compiled) == len(list((sources / "csrc").glob("*.cpp"))) and all(" -c " in line for line in compiled)
    assert all("ATTENT_CUDA_ABSENT" in line and "aarch64-linux-gnu" in line for line in compiled)
    assert " -shared " in linked and "-rpath" not in linked  # which would name this Python's folder

    demanded = setup(sources, "build_ext", ATTENT_CUDA="1", **asked)
    assert demanded.returncode != 0 and "nvcc's part is not built for another machine" in demanded.stderr
