// What this build's CUDA part is: for attent_kernels/native.py, which says why the kernels cannot run.

#include "binds.h"
#include "cuda/versions.h"

namespace py = pybind11;

namespace attent {

void bind_cuda_build(py::module_& module) {
#if defined(ATTENT_CUDA)
    module.attr("cuda_absent") = py::none();
    module.attr("cuda_archs") = ATTENT_CUDA_ARCHS;
    module.def(
        "cuda_versions",
        [] {
            int driver = 0, runtime = 0;
            raise_unless_ok(gpu::cuda_versions(&driver, &runtime));
            return py::make_tuple(driver, runtime);
        },
        "The CUDA version that the driver supports, 0 without a driver, and that of the runtime in here: 13000 is "
        "13.0.");
#else
    module.attr("cuda_absent") = ATTENT_CUDA_ABSENT;  // why
    module.attr("cuda_archs") = "";
#endif
}

}  // namespace attent
