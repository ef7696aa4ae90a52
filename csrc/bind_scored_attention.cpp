// scored_attention in the module: its plan and its launcher. Tensors come as tuples of an address and strides (in
// numbers, not bytes), in the order of the records of csrc/cuda/scored_attention.h; address 0: there is none.

#include <pybind11/stl.h>

#include <tuple>

#include "binds.h"
#include "cuda/lent_memory.h"
#include "cuda/scored_attention.h"

namespace py = pybind11;

namespace attent {

namespace {

// Address; strides of examples, heads and rows.
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
// cu_seqlens; lengths; whether those are int64; the most rows.
using SegmentsTuple = std::tuple<uintptr_t, uintptr_t, bool, int>;
// Address; dtype; strides.
using ViewTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;
// Examples; heads; heads that share a key; rows; keys; width; value_width; packed; only the pooled row; target; pool;
// processors; whether the Hopper kernel may run.
using SizesTuple = std::tuple<int, int, int, int, int, int, int, bool, bool, bool, int, int, bool>;
// Weight; bias; the labels' stride, whether they are int64; classes.
using ClassifierTuple = std::tuple<ViewTuple, ViewTuple, int64_t, bool, int>;
// Output; logsumexp and its strides of examples and heads.
using ResultsTuple = std::tuple<RowsTuple, uintptr_t, int64_t, int64_t>;
// k; k_floor; temperature.
using ChoiceTuple = std::tuple<int, int, float>;

const char* name_of(gpu::AttentionKernel kernel) {
    return kernel == gpu::AttentionKernel::hopper ? "hopper" : "portable";
}

gpu::AttentionSizes sizes_of(const SizesTuple& t) {
    const auto& [examples, heads, sharing, rows, keys, width, value_width, packed, only, target, pool, processors,
                 hopper] = t;
    return {
        examples,   heads, sharing, rows, keys, width, value_width, packed, only, target, static_cast<gpu::Pool>(pool),
        processors, hopper};
}

gpu::Rows rows_of(const RowsTuple& t) {
    return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

gpu::Segments segments_of(const SegmentsTuple& t) {
    return {pointer<const int32_t>(std::get<0>(t)), pointer<const void>(std::get<1>(t)), std::get<2>(t),
            std::get<3>(t)};
}

gpu::View view_of(const ViewTuple& t) {
    return {pointer<const void>(std::get<0>(t)), static_cast<gpu::Dtype>(std::get<1>(t)), std::get<2>(t),
            std::get<3>(t)};
}

gpu::Classifier classifier_of(const ClassifierTuple& t, gpu::Pool pool) {
    const auto& [weight, bias, label_stride, labels_are_64_bits, classes] = t;
    gpu::Classifier classifier{};
    classifier.weight = view_of(weight);
    classifier.bias = view_of(bias);
    classifier.label_stride = label_stride;
    classifier.labels_are_64_bits = labels_are_64_bits;
    classifier.classes = classes;
    classifier.pool = pool;
    return classifier;
}

gpu::AttentionResults results_of(const ResultsTuple& t) {
    const auto& [output, logsumexp, of_example, of_head] = t;
    gpu::AttentionResults results{};
    results.output = rows_of(output);
    results.logsumexp = pointer<float>(logsumexp);
    results.logsumexp_example = of_example;
    results.logsumexp_head = of_head;
    return results;
}

gpu::Choice choice_of(const ChoiceTuple& t) {
    gpu::Choice choice{};
    std::tie(choice.k, choice.k_floor, choice.temperature) = t;
    return choice;
}

// Launches that differ in addresses alone: all else is said once, by a first launch's arguments.
class AttentionLaunch {
  public:
    AttentionLaunch(const SizesTuple& sizes, int dtype, const RowsTuple& query, const RowsTuple& key,
                    const RowsTuple& value, const RowsTuple& target, const SegmentsTuple& queries,
                    const SegmentsTuple& keys, int left, int right, float scale, float softcap,
                    const ClassifierTuple& classifier, int score, int per_example, const ResultsTuple& results,
                    const ChoiceTuple& choice, bool delayed) {
        a_.sizes = sizes_of(sizes);
        a_.dtype = static_cast<gpu::Dtype>(dtype);
        a_.query = rows_of(query);
        a_.key = rows_of(key);
        a_.value = rows_of(value);
        a_.target = rows_of(target);
        a_.queries = segments_of(queries);
        a_.keys = segments_of(keys);
        a_.left = left;
        a_.right = right;
        a_.scale = scale;
        a_.softcap = softcap;
        a_.classifier = classifier_of(classifier, a_.sizes.pool);
        a_.score = static_cast<gpu::Score>(score);
        a_.per_example = static_cast<gpu::PerExample>(per_example);
        a_.results = results_of(results);
        a_.choice = choice_of(choice);
        a_.workspace.delayed = delayed;
        plan_ = gpu::plan_scored_attention(a_.sizes);
        scratch_bytes_ = lay_out(0);
    }

    const gpu::ScoredAttention& at(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t target,
                                   uintptr_t query_lengths, uintptr_t key_lengths, uintptr_t cu_seqlens_q,
                                   uintptr_t cu_seqlens_k, uintptr_t weight, uintptr_t bias, uintptr_t labels,
                                   uintptr_t seed, uintptr_t output, uintptr_t logsumexp, uintptr_t losses,
                                   uintptr_t logits, uintptr_t pooled, uintptr_t gradient, uintptr_t scores,
                                   uintptr_t index, uintptr_t chosen_score, uintptr_t inclusion, uintptr_t scratch,
                                   uintptr_t tickets) {
        a_.query.data = pointer<void>(query);
        a_.key.data = pointer<void>(key);
        a_.value.data = pointer<void>(value);
        a_.target.data = pointer<void>(target);
        a_.queries.lengths = pointer<const void>(query_lengths);
        a_.keys.lengths = pointer<const void>(key_lengths);
        a_.queries.cu = pointer<const int32_t>(cu_seqlens_q);
        a_.keys.cu = pointer<const int32_t>(cu_seqlens_k);
        a_.classifier.weight.data = pointer<const void>(weight);
        a_.classifier.bias.data = pointer<const void>(bias);
        a_.classifier.labels = pointer<const void>(labels);
        a_.classifier.pooled = pointer<void>(pooled);
        a_.classifier.logits = pointer<void>(logits);
        a_.classifier.gradient = pointer<float>(gradient);
        a_.results.output.data = pointer<void>(output);
        a_.results.logsumexp = pointer<float>(logsumexp);
        a_.results.losses = pointer<float>(losses);
        a_.results.scores = pointer<float>(scores);
        a_.choice.index = pointer<int64_t>(index);
        a_.choice.score = pointer<float>(chosen_score);
        a_.choice.inclusion = pointer<float>(inclusion);
        a_.choice.seed = pointer<const int64_t>(seed);
        a_.workspace.tickets = pointer<int>(tickets);
        lay_out(scratch);
        return a_;
    }

    int64_t scratch_bytes() const { return scratch_bytes_; }
    int64_t tickets() const { return plan_.tickets; }
    const char* kernel() const { return name_of(plan_.kernel); }

  private:
    int64_t lay_out(uintptr_t memory) {
        gpu::LentMemory lent(memory);
        a_.workspace.slots = lent.take<float>(plan_.slots);
        a_.workspace.split_slots = lent.take<float>(plan_.split_slots);
        a_.results.valid = lent.take<int8_t>(a_.sizes.examples);
        a_.choice.scratch = lent.take<int64_t>(a_.choice.k > 0 ? plan_.choice_scratch : 0);
        return lent.bytes();
    }

    gpu::ScoredAttention a_{};
    gpu::AttentionPlan plan_;
    int64_t scratch_bytes_;
};

// A method that starts an AttentionLaunch at the addresses that `at` takes, on a stream.
template <typename... Addresses>
auto starting(gpu::Status (*launch)(const gpu::ScoredAttention&, cudaStream_t),
              const gpu::ScoredAttention& (AttentionLaunch::*at)(Addresses...)) {
    return [=](AttentionLaunch& self, Addresses... addresses, uintptr_t stream) {
        raise_unless_ok(launch((self.*at)(addresses...), stream_of(stream)));
    };
}

gpu::Status not_launched(const gpu::ScoredAttention&, cudaStream_t) {
    return gpu::Status{};
}

}  // namespace

void bind_scored_attention(py::module_& module) {
    py::class_<gpu::AttentionPlan>(module, "ScoredAttentionPlan", py::module_local())
        .def_readonly("blocks", &gpu::AttentionPlan::blocks)
        .def_readonly("tiles", &gpu::AttentionPlan::tiles)
        .def_readonly("splits", &gpu::AttentionPlan::splits)
        .def_readonly("tickets", &gpu::AttentionPlan::tickets)
        .def_readonly("slots", &gpu::AttentionPlan::slots)
        .def_readonly("split_slots", &gpu::AttentionPlan::split_slots)
        .def_readonly("choice_scratch", &gpu::AttentionPlan::choice_scratch)
        .def_readonly("width", &gpu::AttentionPlan::width)
        .def_readonly("block_m", &gpu::AttentionPlan::block_m)
        .def_readonly("block_n", &gpu::AttentionPlan::block_n)
        .def_readonly("threads", &gpu::AttentionPlan::threads)
        .def_readonly("shared_bytes", &gpu::AttentionPlan::shared_bytes)
        .def_property_readonly("kernel", [](const gpu::AttentionPlan& plan) { return name_of(plan.kernel); });
    module.def(
        "hopper_attention_refuses",
        [](const SizesTuple& sizes) { return gpu::hopper_attention_refuses(sizes_of(sizes)); },
        "Why the portable kernel runs and not the Hopper kernel; None if the Hopper kernel does.");
    module.def(
        "plan_scored_attention", [](const SizesTuple& sizes) { return gpu::plan_scored_attention(sizes_of(sizes)); },
        "attent::gpu::plan_scored_attention of csrc/cuda/scored_attention.h.");
    py::class_<AttentionLaunch> launches(module, "AttentionLaunch", py::module_local(),
                                         "Launches that differ in addresses alone, by the first one's arguments.");
    launches.def(py::init<const SizesTuple&, int, const RowsTuple&, const RowsTuple&, const RowsTuple&,
                          const RowsTuple&, const SegmentsTuple&, const SegmentsTuple&, int, int, float, float,
                          const ClassifierTuple&, int, int, const ResultsTuple&, const ChoiceTuple&, bool>());
    launches.def_property_readonly("scratch_bytes", &AttentionLaunch::scratch_bytes);
    launches.def_property_readonly("tickets", &AttentionLaunch::tickets);
    launches.def_property_readonly("kernel", &AttentionLaunch::kernel);
    launches.def("not_start", starting(&not_launched, &AttentionLaunch::at), "For tests: as start, up to the launch.");
#if defined(ATTENT_CUDA) || defined(ATTENT_EMULATE)
    launches.def("start", starting(&gpu::launch_scored_attention, &AttentionLaunch::at),
                 "attent::gpu::launch_scored_attention: the addresses that AttentionLaunch::at takes, the stream.");
#endif
}

}  // namespace attent
