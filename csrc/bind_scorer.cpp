// The scorer in the module: its plan, and its launcher. Who keeps alive what is in binds.h.
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "binds.h"
#include "cuda/scorer.h"

namespace py = pybind11;

namespace attent {

namespace {

using namespace gpu::scorer;

template <size_t N>
using Integers = std::array<int64_t, N>;

Vector vector(const Integers<3>& given) {
    return {pointer<const void>(given[0]), given[1], static_cast<Number>(given[2])};
}

int32_t narrow(int64_t value) {
    return static_cast<int32_t>(value);
}

/// The arguments by group, each as the launcher lists it.
ScorerArgs scorer_args(const Integers<5>& hidden, const Integers<3>& weight, const Integers<4>& target, int64_t bias,
                       const Integers<3>& class_weight, const Integers<3>& example_weight,
                       const Integers<2>& cu_seqlens, const Integers<5>& sizes, int64_t ignore_index,
                       double label_smoothing, double softcap, const Integers<3>& how, const Integers<5>& outputs,
                       const Integers<7>& choice, double temperature, bool delayed, const Integers<6>& cut) {
    ScorerArgs args{};
    args.hidden = pointer<const void>(hidden[0]);
    args.hidden_example = hidden[1], args.hidden_token = hidden[2], args.hidden_column = hidden[3];
    args.number = static_cast<Number>(hidden[4]);
    args.weight = pointer<const void>(weight[0]);
    args.weight_row = weight[1], args.weight_column = weight[2];
    args.target = pointer<const void>(target[0]);
    args.target_example = target[1], args.target_token = target[2];
    args.target_number = static_cast<Number>(target[3]);
    args.bias = pointer<const void>(bias), args.class_weight = vector(class_weight),
    args.example_weight = vector(example_weight);
    args.cu_seqlens = pointer<const int32_t>(cu_seqlens[0]), args.cu_seqlens_stride = cu_seqlens[1];
    args.tokens = narrow(sizes[0]), args.tokens_each = narrow(sizes[1]), args.batch = narrow(sizes[2]);
    args.width = narrow(sizes[3]), args.classes = narrow(sizes[4]);
    args.ignore_index = ignore_index;
    args.label_smoothing = static_cast<float>(label_smoothing), args.softcap = static_cast<float>(softcap);
    args.shift = narrow(how[0]);
    args.reduction = static_cast<Reduction>(how[1]), args.per_example = static_cast<gpu::PerExample>(how[2]);

    args.loss = pointer<float>(outputs[0]), args.counts = pointer<float>(outputs[1]);
    args.mean_loss = pointer<float>(outputs[2]), args.logit = pointer<float>(outputs[3]);
    args.head = pointer<float>(outputs[4]);
    args.choice = {pointer<const float>(choice[0]),
                   narrow(choice[1]),
                   narrow(choice[2]),
                   static_cast<float>(temperature),
                   pointer<const int64_t>(choice[3]),
                   pointer<int64_t>(choice[4]),
                   pointer<float>(choice[5]),
                   pointer<float>(choice[6])};

    args.delayed = delayed;
    args.row_tiles = narrow(cut[0]), args.groups = narrow(cut[1]), args.group_tiles = narrow(cut[2]);
    args.sweep = narrow(cut[3]), args.blocks = narrow(cut[4]), args.block_examples = narrow(cut[5]);
    return args;
}

/// Who asks for "hopper" has seen that its arguments are not refused.
ScorerKernel kernel_of(const std::string& name) {
    if (name == "portable") return ScorerKernel::portable;
    if (name == "hopper") return ScorerKernel::hopper;
    throw py::value_error("kernel: got '" + name + "'; takes 'portable' or 'hopper'");
}

/// Launches that differ in addresses alone: all else is said once. `first`: the first one's arguments.
class ScorerLaunch {
  public:
    ScorerLaunch(const std::string& kernel, const ScorerArgs& first, int processors)
        : args_(first), kernel_(kernel_of(kernel)), processors_(processors) {
        // Scores [S, B] are adjacent: where each lies from the first.
        const float* start = nullptr;
        for (auto score : SCORES) {
            if (start == nullptr || (args_.*score != nullptr && args_.*score < start)) start = args_.*score;
        }
        for (size_t i = 0; i < SCORES.size(); ++i) {
            offsets_[i] = args_.*SCORES[i] == nullptr ? -1 : args_.*SCORES[i] - start;
        }
        scratch_bytes_ = lay_out_scorer(kernel_, args_, 0);
        tickets_ = plan_scorer(kernel_, args_, processors_).tickets;
    }

    const ScorerArgs& at(uintptr_t hidden, uintptr_t weight, uintptr_t target, uintptr_t bias, uintptr_t class_weight,
                         uintptr_t example_weight, uintptr_t cu_seqlens, uintptr_t seed, uintptr_t loss,
                         uintptr_t counts, uintptr_t scores, uintptr_t index, uintptr_t chosen_score,
                         uintptr_t inclusion, uintptr_t scratch, uintptr_t tickets) {
        args_.hidden = pointer<const void>(hidden), args_.weight = pointer<const void>(weight);
        args_.target = pointer<const void>(target), args_.bias = pointer<const void>(bias);
        args_.class_weight.data = pointer<const void>(class_weight);
        args_.example_weight.data = pointer<const void>(example_weight);
        args_.cu_seqlens = pointer<const int32_t>(cu_seqlens);
        args_.loss = pointer<float>(loss), args_.counts = pointer<float>(counts);
        float* of_scores = pointer<float>(scores);
        for (size_t i = 0; i < SCORES.size(); ++i) {
            args_.*SCORES[i] = offsets_[i] < 0 ? nullptr : of_scores + offsets_[i];
        }
        if (args_.choice.score != nullptr) {
            args_.choice.score = of_scores, args_.choice.seed = pointer<const int64_t>(seed);
            args_.choice.index = pointer<int64_t>(index), args_.choice.chosen_score = pointer<float>(chosen_score);
            args_.choice.inclusion = pointer<float>(inclusion);
        }
        lay_out_scorer(kernel_, args_, scratch);
        args_.tickets = pointer<int32_t>(tickets);
        return args_;
    }

    ScorerKernel kernel() const { return kernel_; }
    const char* name() const { return kernel_ == ScorerKernel::hopper ? "hopper" : "portable"; }
    int processors() const { return processors_; }
    int64_t scratch_bytes() const { return scratch_bytes_; }
    int64_t tickets() const { return tickets_; }

  private:
    static constexpr std::array<float* ScorerArgs::*, 3> SCORES{&ScorerArgs::mean_loss, &ScorerArgs::logit,
                                                                &ScorerArgs::head};
    ScorerArgs args_;
    ScorerKernel kernel_;
    int processors_;
    std::array<int64_t, SCORES.size()> offsets_;  // -1: not asked for
    int64_t scratch_bytes_, tickets_;
};

/// A method that starts a ScorerLaunch at the addresses that `at` takes, on a stream.
template <typename... Addresses>
auto starting(gpu::Status (*launch)(ScorerKernel, const ScorerArgs&, int, cudaStream_t),
              const ScorerArgs& (ScorerLaunch::*at)(Addresses...)) {
    return [=](ScorerLaunch& self, Addresses... addresses, uintptr_t stream) {
        const ScorerArgs& args = (self.*at)(addresses...);
        raise_unless_ok(launch(self.kernel(), args, self.processors(), stream_of(stream)));
    };
}

gpu::Status not_launched(ScorerKernel, const ScorerArgs& args, int, cudaStream_t) {
    return check_scorer(args);
}

py::dict tiles(const std::string& kernel, bool smoothed, bool capped) {
    const ScorerKernel which = kernel_of(kernel);
    const ScorerTiles of = scorer_tiles(which, sums_of(which, smoothed, capped));
    return py::dict(py::arg("rows") = of.rows, py::arg("classes") = of.classes, py::arg("width") = of.width,
                    py::arg("threads") = of.threads, py::arg("stages") = of.stages, py::arg("resident") = of.resident,
                    py::arg("shared_bytes") = of.shared_bytes, py::arg("kept") = of.kept);
}

py::dict plan(const std::string& kernel, const ScorerArgs& args, int processors) {
    const ScorerPlan of = plan_scorer(kernel_of(kernel), args, processors);
    return py::dict(py::arg("grid") = of.grid, py::arg("threads") = of.threads,
                    py::arg("shared_bytes") = of.shared_bytes, py::arg("tickets") = of.tickets,
                    py::arg("scratch_floats") = of.scratch_floats);
}

}  // namespace

void bind_scorer(py::module_& module) {
    py::class_<ScorerArgs>(module, "ScorerArgs", py::module_local(),
                           "A launch's arguments by group; csrc/cuda/scorer.h says what they are.")
        .def(py::init(&scorer_args), py::arg("hidden"), py::arg("weight"), py::arg("target"), py::arg("bias"),
             py::arg("class_weight"), py::arg("example_weight"), py::arg("cu_seqlens"), py::arg("sizes"),
             py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("softcap"), py::arg("how"),
             py::arg("outputs"), py::arg("choice"), py::arg("temperature"), py::arg("delayed"), py::arg("cut"));
    py::class_<ScorerLaunch> launches(module, "ScorerLaunch", py::module_local(),
                                      "Launches of a kernel that differ in addresses alone.");
    launches.def(py::init<const std::string&, const ScorerArgs&, int>(), py::arg("kernel"), py::arg("first"),
                 py::arg("processors"));
    launches.def_property_readonly("kernel", &ScorerLaunch::name);
    launches.def_property_readonly("scratch_bytes", &ScorerLaunch::scratch_bytes);
    launches.def_property_readonly("tickets", &ScorerLaunch::tickets);
    launches.def("not_start", starting(&not_launched, &ScorerLaunch::at), "For tests: as start, up to the launch.");
#if defined(ATTENT_CUDA) || defined(ATTENT_EMULATE)
    launches.def(
        "start", starting(&launch_scorer, &ScorerLaunch::at),
        "Starts the scorer on the current device: the addresses of hidden, weight, target, bias, class_weight, "
        "example_weight, cu_seqlens, seed, loss, counts, scores, index, chosen_score, inclusion, scratch and "
        "tickets, 0 for what there is not, and the stream.");
#endif
    module.def("scorer_tiles", &tiles, py::arg("kernel"), py::arg("smoothed"), py::arg("capped"),
               "The tiles of the kernel 'portable' or 'hopper'.");
    module.def("plan_scorer", &plan, py::arg("kernel"), py::arg("args"), py::arg("processors"),
               "The launch's shape, and what it is lent.");
    module.def("hopper_scorer_refuses", &hopper_scorer_refuses, py::arg("args"),
               "Why the Hopper kernel cannot take these arguments; None if it can.");
}

}  // namespace attent
