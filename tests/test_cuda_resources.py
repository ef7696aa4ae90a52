"""The CUDA kernels' machine code, where ``make cuda`` has compiled it: nothing spills, what is meant is there."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import cuda_resources
from benchmarks.cuda_kernels import KERNELS, Kernel
from benchmarks.cuda_resources import BUILT, COUNTED, Function, problems

ROOT = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------------- the check itself


def function(**changes: Any) -> Function:
    counts = dict.fromkeys(COUNTED, 0) | {"HMMA": 4} | changes.pop("counts", {})
    return Function("attention", "float", "sm_90a", 128, 0, 0, counts)._replace(**changes)


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (function(), None),
        (function(stack=8), "a stack of 8 bytes"),
        (function(counts={"LDL, STL": 3}), "3 accesses: spills"),
        (function(counts={"HMMA": 0}), "is meant to have HMMA and has none"),
        (function(kernel="unknown"), "unknown<float> for sm_90a has no row"),
    ],
)
def test_the_check_names_what_is_wrong(kernel: Function, complaint: str | None) -> None:
    found = list(problems([kernel, function()], [Kernel("attention", every=("HMMA",))]))
    assert (found == []) if complaint is None else (len(found) == 1 and complaint in found[0])


def test_warps_that_take_registers_find_them() -> None:
    row = Kernel("attention", registers=168)
    assert list(problems([function(registers=168), function(arch="sm_80")], [row])) == []
    (found,) = problems([function(registers=160)], [row])
    assert "starts with 160 registers a thread; its setmaxnreg share 168" in found


def test_what_ptxas_calls_information_and_numbers_is_a_warning(tmp_path: Path) -> None:
    loss = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored"
    (tmp_path / "a.log").write_text(f"ptxas info    : Used 168 registers\n{loss}\n")
    assert cuda_resources.warnings(tmp_path) == [loss]


def test_a_row_asks_for_its_kernel_and_for_hoppers_own_instructions_on_hopper_alone() -> None:
    row = Kernel("attention", some=("16 bytes",), sm_90a=("HGMMA",))
    assert list(problems([], [row])) == ["attention has a row in benchmarks/cuda_kernels.py and is not in the module"]
    found = list(problems([function(), function(arch="sm_80")], [row]))
    assert len(found) == 2 and "for sm_90a is meant to have HGMMA" in found[0] and "no instance" in found[1]


def test_cuobjdumps_output_is_understood() -> None:
    usage = "arch = sm_90a\n\nResource usage:\n Common:\n  GLOBAL:0\n"
    usage += " Function _Z3k:\n  REG:96 STACK:0 SHARED:40976 LOCAL:0\n"
    assert cuda_resources._resources(usage) == {("sm_90a", "_Z3k"): (96, 0, 40976)}
    code = (
        "arch = sm_90a\n\t\tFunction : _Z3k\n"
        "        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000 */\n"
        "                                                                      /* 0x000f */\n"
        "        /*0010*/              @!P0 LDSM.16.MT88.4 R4, [R2] ;          /* 0x0000 */\n"
        "        /*0020*/                   STL.64 [R1], R4 ;                  /* 0x0000 */\n"
        "        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64] ;   /* 0x0000 */\n"
    )
    counts = {"LDSM": 1, "LDL, STL": 1, "LDGSTS": 1, "16 bytes": 2}
    assert cuda_resources._instructions(code) == {("sm_90a", "_Z3k"): dict.fromkeys(COUNTED, 0) | counts}


def test_kernels_are_named_with_and_without_a_demangler() -> None:
    shown = "void attent::gpu::(anonymous namespace)::count_kernel<(attent::gpu::Source)0, float>(attent::gpu::Args)"
    assert cuda_resources._short(shown) == ("count", "(Source)0, float")
    mangled = "_ZN6attent3gpu20_GLOBAL__N__1_count_cu19select_count_kernelILNS0_6SourceE0EfEEvNS0_8PassArgsE"
    assert cuda_resources._short(mangled)[0] == "select_count"


# ----------------------------------------------------------------------------------------------- the sources themselves


def cuda_sources(*suffixes: str) -> list[Path]:
    return [file for file in sorted((ROOT / "csrc" / "cuda").rglob("*")) if file.suffix in suffixes]


def test_every_kernel_has_a_row_and_every_row_a_kernel() -> None:
    """Found in the sources, so that it holds where there is no nvcc."""
    text = "\n".join(re.sub(r"//.*", "", file.read_text(encoding="utf-8")) for file in cuda_sources(".cu", ".cuh"))
    defined = set(re.findall(r"__global__[^;{]*?\b(\w+)_kernel\s*(?:<[^;{]*?>)?\(", text))
    assert defined == {kernel.name for kernel in KERNELS}


def test_no_kernel_reads_others_results_through_the_cache_that_may_be_stale() -> None:
    """``__ldg`` and ``const __restrict__`` let the compiler read through the non-coherent cache."""
    assert [
        file.name for file in cuda_sources(".cu", ".cuh", ".h") if re.search(r"__ldg\s*\(|__restrict__", code(file))
    ] == []


def test_every_cuda_call_is_checked_in_one_place() -> None:
    """A launch by ``<<<`` reports no error of its own."""
    assert [
        file.name for file in cuda_sources(".cu", ".cuh", ".h") if re.search(r"<<<|cudaLaunch\w*\s*\(", code(file))
    ] == ["check.h"]


def code(file: Path) -> str:
    return re.sub(r"//.*", "", file.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- what was built


@pytest.fixture(scope="module")
def built() -> Path:
    modules = sorted(BUILT.glob("_native*.so"))
    if not modules:
        pytest.skip("make cuda has built nothing" + ("" if shutil.which("nvcc") else ": there is no nvcc"))
    return modules[-1]


@functools.cache
def loaded(path: Path) -> ModuleType:
    """In this process, beside the installed one."""
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.aot
def test_nothing_spills_and_what_is_meant_is_there(built: Path) -> None:
    assert list(problems(cuda_resources.functions(built))) == []


@pytest.mark.aot
def test_nvcc_and_ptxas_warn_of_nothing(built: Path) -> None:
    folders = [folder for folder in (ROOT / "build" / "cuda").iterdir() if any(folder.glob("*.log"))]
    assert folders
    newest = max(folders, key=lambda folder: max(log.stat().st_mtime for log in folder.glob("*.log")))
    assert cuda_resources.warnings(newest) == []


@pytest.mark.aot
def test_the_module_loads_where_there_is_no_driver_and_says_what_it_was_built_for(built: Path) -> None:
    module: Any = loaded(built)
    assert module.cuda_absent is None and "80" in module.cuda_archs
    driver, runtime = module.cuda_versions()
    assert runtime >= 12000 and driver >= 0
    # In a process that has loaded nothing else, torch included.
    load = f"s = u.spec_from_file_location('_native', {str(built)!r}); s.loader.exec_module(u.module_from_spec(s))"
    assert subprocess.run([sys.executable, "-S", "-c", f"import importlib.util as u; {load}"]).returncode == 0


@pytest.mark.aot
def test_it_exports_its_entry_and_nothing_else(built: Path) -> None:
    """Its symbols, the CUDA runtime's included, cannot meet those of torch's libraries."""
    listed = subprocess.run(["nm", "-D", "--defined-only", str(built)], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["PyInit__native"]
    needed = subprocess.run(["ldd", str(built)], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed and "libcuda.so" not in needed


@pytest.mark.aot
def test_a_launch_that_fails_says_which_kernel_with_which_configuration(built: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine's launches succeed")
    module: Any = loaded(built)
    memory = torch.zeros(64, dtype=torch.int64).data_ptr()
    arguments = (memory, 0, 0, 5, 3, 0, 0.0, 0, True, *[memory] * 8, False)
    with pytest.raises(
        RuntimeError, match=r"select_top_k: .*\(cuda\w+\); launched with grid \(1, 1, 1\), block \(512, 1, 1\)"
    ):
        module.select_top_k(*arguments, 0)
