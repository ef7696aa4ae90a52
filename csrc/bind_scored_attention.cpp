// scored_attention in the module: its plan and its launcher. Tensors come as tuples of an address and strides (in
// numbers, not bytes), in the order of the records of csrc/cuda/scored_attention.h; address 0: there is none.

#include <pybind11/stl.h>

#include <tuple>

#include "binds.h"
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
// processors.
using SizesTuple = std::tuple<int, int, int, int, int, int, int, bool, bool, bool, int, int>;
// Weight; bias; labels, their stride, whether they are int64; classes; pooled; logits; gradient.
using ClassifierTuple =
    std::tuple<ViewTuple, ViewTuple, uintptr_t, int64_t, bool, int, uintptr_t, uintptr_t, uintptr_t>;
// Output; logsumexp and its strides of examples and heads; losses; scores; valid.
using ResultsTuple = std::tuple<RowsTuple, uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;
// Index; score; inclusion; seed; scratch; k; k_floor; temperature.
using ChoiceTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, int, float>;
// Tickets; slots; split slots; whether blocks are delayed before tickets.
using WorkspaceTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, bool>;

gpu::AttentionSizes sizes_of(const SizesTuple& t) {
    const auto& [examples, heads, sharing, rows, keys, width, value_width, packed, only, target, pool, processors] = t;
    return {
        examples,  heads, sharing, rows, keys, width, value_width, packed, only, target, static_cast<gpu::Pool>(pool),
        processors};
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
    const auto& [weight, bias, labels, label_stride, labels_are_64_bits, classes, pooled, logits, gradient] = t;
    return {view_of(weight),          view_of(bias), pointer<const void>(labels), label_stride,
            labels_are_64_bits,       classes,       pointer<void>(pooled),       pointer<void>(logits),
            pointer<float>(gradient), pool};
}

gpu::AttentionResults results_of(const ResultsTuple& t) {
    const auto& [output, logsumexp, of_example, of_head, losses, scores, valid] = t;
    return {rows_of(output),        pointer<float>(logsumexp), of_example, of_head, pointer<float>(losses),
            pointer<float>(scores), pointer<int8_t>(valid)};
}

#if defined(ATTENT_CUDA) || defined(ATTENT_EMULATE)
gpu::Choice choice_of(const ChoiceTuple& t) {
    const auto& [index, score, inclusion, seed, scratch, k, k_floor, temperature] = t;
    return {pointer<int64_t>(index),
            pointer<float>(score),
            pointer<float>(inclusion),
            pointer<const int64_t>(seed),
            pointer<int64_t>(scratch),
            k,
            k_floor,
            temperature};
}

void scored_attention(const SizesTuple& sizes, int dtype, const RowsTuple& query, const RowsTuple& key,
                      const RowsTuple& value, const RowsTuple& target, const SegmentsTuple& queries,
                      const SegmentsTuple& keys, int left, int right, float scale, float softcap,
                      const ClassifierTuple& classifier, int score, int per_example, const ResultsTuple& results,
                      const ChoiceTuple& choice, const WorkspaceTuple& workspace, uintptr_t stream) {
    gpu::ScoredAttention a{};
    a.sizes = sizes_of(sizes);
    a.dtype = static_cast<gpu::Dtype>(dtype);
    a.query = rows_of(query);
    a.key = rows_of(key);
    a.value = rows_of(value);
    a.target = rows_of(target);
    a.queries = segments_of(queries);
    a.keys = segments_of(keys);
    a.left = left;
    a.right = right;
    a.scale = scale;
    a.softcap = softcap;
    a.classifier = classifier_of(classifier, a.sizes.pool);
    a.score = static_cast<gpu::Score>(score);
    a.per_example = static_cast<gpu::PerExample>(per_example);
    a.results = results_of(results);
    a.choice = choice_of(choice);
    a.workspace = {pointer<int>(std::get<0>(workspace)), pointer<float>(std::get<1>(workspace)),
                   pointer<float>(std::get<2>(workspace)), std::get<3>(workspace)};
    raise_unless_ok(gpu::launch_scored_attention(a, stream_of(stream)));
}
#endif

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
        .def_property_readonly("width", [](const gpu::AttentionPlan& plan) { return plan.shape.width; })
        .def_property_readonly("block_m", [](const gpu::AttentionPlan& plan) { return plan.shape.block_m(); })
        .def_property_readonly("block_n", [](const gpu::AttentionPlan& plan) { return plan.shape.block_n; })
        .def_property_readonly("threads", [](const gpu::AttentionPlan& plan) { return plan.shape.threads(); })
        .def_property_readonly("shared_bytes",
                               [](const gpu::AttentionPlan& plan) { return plan.shape.shared_bytes(); });
    module.def(
        "plan_scored_attention", [](const SizesTuple& sizes) { return gpu::plan_scored_attention(sizes_of(sizes)); },
        "attent::gpu::plan_scored_attention of csrc/cuda/scored_attention.h.");
#if defined(ATTENT_CUDA) || defined(ATTENT_EMULATE)
    module.def("scored_attention", &scored_attention,
               "attent::gpu::launch_scored_attention of csrc/cuda/scored_attention.h.");
#endif
}

}  // namespace attent
