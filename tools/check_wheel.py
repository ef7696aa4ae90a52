"""Whether an installed attent is what its wheel was meant to be: ``python check_wheel.py [--native] [--cuda]``.

Run it where the checkout is not in the module search path. ``--native``: the compiled module has to be there;
``--cuda``: with CUDA kernels; ``--no-native``, ``--no-cuda``: it has to say why it is not; ``--because TEXT``: in words
that hold this text. ``attent doctor``, in a process of its own, has to say the same. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import attent
from attent import doctor
from attent_kernels import native, row_statistics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--native", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--cuda", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--because", default="")
    asked = parser.parse_args()
    has_native = native.module is not None
    has_cuda = has_native and native.module.cuda_absent is None
    wrong = [
        f"{what} is {'there' if found else 'not there'}, it was meant to be {'there' if meant else 'left out'}"
        for what, meant, found in (("the module", asked.native, has_native), ("its CUDA part", asked.cuda, has_cuda))
        if meant is not None and meant != found
    ]
    if not all(Path(str(package.__file__)).is_relative_to(sys.prefix) for package in (attent, native)):
        wrong.append(f"what was imported is {attent.__file__}, not what is installed")
    if not has_native and not native.reason:
        wrong.append("the module is not there and there is no reason")
    told = json.loads(subprocess.run([Path(sys.prefix, "bin", "attent"), "doctor", "--json"], check=True,
                                     capture_output=True, text=True).stdout)  # fmt: skip
    if told["native_module"].startswith("available") != has_native:
        wrong.append(f"doctor says of the module: {told['native_module']}")
    if told["cuda_kernels"].startswith("none: ") == has_cuda:
        wrong.append(f"doctor says of the CUDA kernels: {told['cuda_kernels']}")
    if told["backends"]["cuda"] == "available" and not (has_cuda and torch.cuda.is_available()):
        wrong.append("doctor says that backend cuda is available")
    if asked.because not in told["native_module"] + told["cuda_kernels"]:
        wrong.append(f"doctor does not say {asked.because!r}")
    # It computes: the op that both parts help, and what it falls back to.
    scores = torch.tensor([0.5, 3.0, 1.0])
    if attent.select_top_k(scores, 2).index.tolist() != [1, 2]:
        wrong.append("select_top_k is wrong")
    if has_native:
        losses = row_statistics.row_statistics(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)).loss
        if not torch.allclose(losses, torch.tensor(4.0).log().expand(2)):
            wrong.append("row_statistics is wrong")
    print(f"attent {attent.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"  native module: {doctor.native_module()}")
    print(f"  CUDA kernels:  {doctor.cuda_kernels()}")
    print(f"  backend cuda:  {attent.backends()['cuda']}")
    for complaint in wrong:
        print(f"WRONG: {complaint}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
