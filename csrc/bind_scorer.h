// The scorer in a Python module: its plan, which needs no CUDA, and its launch, which does.
#pragma once

#include <pybind11/pybind11.h>

namespace attent {

void bind_scorer_plan(pybind11::module_& module);
void bind_scorer(pybind11::module_& module);

}  // namespace attent
