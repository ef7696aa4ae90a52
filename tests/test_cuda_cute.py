"""What the Hopper kernels and their emulator believe of the hardware, beside CuTe, which knows it from elsewhere.

On a CPU those kernels run in an emulator that holds our own beliefs about operand descriptors, swizzles, accumulators
and tensor maps: were one wrong, both would agree and only the hardware would not. csrc/emulated/cute_layouts.cpp and
cute_tensor_maps.cpp ask NVIDIA's own headers, on the host. They come with ``pip install --no-deps nvidia-cutlass`` and
include the CUDA toolkit's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_build import load

pytestmark = pytest.mark.aot

ROOT = Path(__file__).resolve().parent.parent

LAYOUTS = [
    "boxes [128, 64]", "boxes [256, 64]", "boxes [128, 128]", "boxes [128, 64] by columns",
    "boxes [128, 128] by columns", "descriptors m64n256k16", "products m64n256k16", "descriptors m64n128k16, 64 wide",
    "products m64n128k16, 64 wide", "descriptors m64n128k16, 128 wide", "products m64n128k16, 128 wide",
    "descriptors m64n64k16 of rows", "products m64n64k16 of rows", "descriptors m64n128k16 of rows",
    "products m64n128k16 of rows", "products m16n8k16", "ldmatrix", "ldmatrix transposed",
]  # fmt: skip
TENSOR_MAPS = [
    "hidden", "weight", "weight in float16", "queries", "keys, heads side by side", "values",
    "values, heads side by side",
]  # fmt: skip


class Built:
    """The programs, and what they find: of each comparison how many things were compared and how many differ."""

    def __init__(self, folder: Path, includes: list[Path]) -> None:
        self.folder = folder
        self.cute = ["-Wno-unknown-pragmas", *(f"-isystem{include}" for include in includes)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            names = ("cute_layouts", "cute_tensor_maps", "layouts")
            self.objects = dict(
                zip(names, pool.map(lambda name: self.compile(name, ROOT / "csrc"), names), strict=True)
            )
        self.layouts = self.run(self.objects["cute_layouts"], self.objects["layouts"])
        self.tensor_maps = self.run(self.objects["cute_tensor_maps"])

    def compile(self, name: str, sources: Path) -> Path:
        target = self.folder / f"{name}-{len(list(self.folder.glob(f'{name}-*')))}.o"
        own = ["-DATTENT_EMULATE", "-O1", "-Wno-unknown-pragmas"] if name == "layouts" else ["-O0", *self.cute]
        source = sources / "emulated" / f"{name}.cpp"
        _call(
            "g++", "-std=c++17", "-g0", "-Wall", "-Wextra", "-Werror", f"-I{sources}", *own, "-c", source, "-o", target
        )
        return target

    def run(self, *objects: Path, names: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
        program = objects[-1].with_suffix("")
        _call("g++", *objects, "-o", program)
        lines = [line.split(" ", 2) for line in _call(program, *names).splitlines()]
        return {name: (int(compared), int(differ)) for compared, differ, name in lines}


def _call(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        pytest.skip("there are no CuTe headers (pip install --no-deps nvidia-cutlass)")
    cuda_build = load("cuda_build", ROOT / "tools" / "cuda_build.py")
    try:
        cuda = cuda_build.find_toolkit().include
    except cuda_build.NoCuda as reason:
        pytest.skip(f"CuTe's headers include the CUDA toolkit's: {reason}")
    return Built(tmp_path_factory.mktemp("cute"), [Path(package.origin).parent / "source/include", cuda, cuda / "cccl"])


def test_every_comparison_is_named_here(built: Built) -> None:
    assert list(built.layouts) == LAYOUTS and list(built.tensor_maps) == TENSOR_MAPS


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_emulator_and_the_kernels_operands_agree_with_cute(name: str, built: Built) -> None:
    compared, differ = built.layouts[name]
    assert compared > 0 and differ == 0


@pytest.mark.parametrize("name", TENSOR_MAPS)
def test_the_driver_is_asked_for_the_tensor_maps_that_cute_asks_for(name: str, built: Built) -> None:
    compared, differ = built.tensor_maps[name]
    assert compared > 0 and differ == 0


# ------------------------------------------------------------------------------------------- that a comparison can fail

HOPPER, PRODUCTS, EMULATOR, MMA, TILE = (
    f"cuda/{name}" for name in ("hopper.cuh", "hopper_products.cuh", "emulate_hopper.h", "mma.cuh", "tile.cuh")
)
DESCRIPTORS_OF_ROWS = ["descriptors m64n64k16 of rows", "descriptors m64n128k16 of rows"]
BOXES = [name for name in LAYOUTS if name.startswith("boxes")]

#: A wrong belief, by name: the file, what stands there, what stands there instead, some comparisons that show it.
WRONG_BELIEFS: dict[str, tuple[str, str, str, list[str]]] = {
    "swizzle mode": (HOPPER, "SWIZZLE_128 = uint64_t{1} << 62", "SWIZZLE_128 = uint64_t{1} << 63",
                     ["descriptors m64n256k16", "descriptors m64n128k16, 64 wide"]),
    "stride offset": (HOPPER, "ATOM_ROWS * ROW_BYTES / 16", "ROW_BYTES / 16",
                      ["descriptors m64n256k16", "products m64n256k16"]),
    "leading offset": (HOPPER, "UNUSED = uint64_t{1} << 16", "UNUSED = 0", ["descriptors m64n128k16, 128 wide"]),
    "step along k": (HOPPER, "step * 32", "step * 64", ["descriptors m64n256k16", "products m64n256k16"]),
    "stride offset of rows": (PRODUCTS, "ATOM_ROWS * ROW_BYTES / 16", "ROW_BYTES / 16", DESCRIPTORS_OF_ROWS),
    "leading offset of rows": (PRODUCTS, "leading / 16", "leading / 32", ["descriptors m64n128k16 of rows"]),
    "both offsets of rows changed about": (
        PRODUCTS, "SWIZZLE_128 | ATOM | static_cast<uint64_t>(leading / 16) << 16",
        "SWIZZLE_128 | ATOM >> 16 | static_cast<uint64_t>(leading / 16) << 32", DESCRIPTORS_OF_ROWS),
    "swizzle of a copy": (EMULATOR, "r % 8 * 16", "r % 4 * 16", BOXES),
    "swizzle of a product": (EMULATOR, "at >> 7 & 7", "at >> 7 & 3",
                             ["products m64n256k16", "products m64n64k16 of rows"]),
    "accumulators' columns": (EMULATOR, "i / 2 * 8 + emulate::here().lane % 4 * 2 + i % 2",
                              "i / 2 * 8 + emulate::here().lane % 4 + i % 2 * 4", ["products m64n256k16"]),
    "left operand in registers": (EMULATOR, "k / 8 * 2 + half", "k / 8 + 2 * half", ["products m64n128k16 of rows"]),
    "left operand of a warp": (MMA, "k / 8 * 4 + k % 2", "k / 8 * 2 + k % 2", ["products m16n8k16"]),
    "ldmatrix transposed": (TILE, "transposed ? number(2 * t, g)", "transposed ? number(g, 2 * t)",
                            ["ldmatrix transposed"]),
}  # fmt: skip


#: The same of what the driver is asked for: what stands in cuda/tensor_map.h, and what stands there instead.
WRONG_MAPS = {
    "swizzle": ("CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_64B"),
    "box": ("box[N + 1] = {ROW_BYTES / 2,", "box[N + 1] = {ROW_BYTES,"),
    "strides": ("static_cast<cuuint64_t>(outer[i].stride) * 2", "static_cast<cuuint64_t>(outer[i].stride)"),
}


def changed(path: str, own: str, wrong: str, folder: Path) -> Path:
    """A copy of csrc in which ``wrong`` stands instead of ``own``."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    text = (ROOT / "csrc" / path).read_text(encoding="utf-8")
    assert text.count(own) == 1
    (folder / "csrc" / path).write_text(text.replace(own, wrong), encoding="utf-8")
    return folder / "csrc"


@pytest.mark.parametrize("name", WRONG_BELIEFS)
def test_a_wrong_belief_is_noticed(name: str, built: Built, tmp_path: Path) -> None:
    path, own, wrong, shown_by = WRONG_BELIEFS[name]
    layouts = built.compile("layouts", changed(path, own, wrong, tmp_path))
    found = built.run(built.objects["cute_layouts"], layouts, names=shown_by)
    assert [shows for shows in shown_by if found[shows][1] == 0] == []


@pytest.mark.parametrize("name", WRONG_MAPS)
def test_a_wrong_tensor_map_is_noticed(name: str, built: Built, tmp_path: Path) -> None:
    sources = changed("cuda/tensor_map.h", *WRONG_MAPS[name], tmp_path)
    found = built.run(built.compile("cute_tensor_maps", sources))
    assert all(differ > 0 for _, differ in found.values())
