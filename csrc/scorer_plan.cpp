// The scorer's launch shapes and workspace: host arithmetic, built and tested where there is no CUDA compiler.
#include <cstdint>

#include "cuda/lent_memory.h"
#include "cuda/scorer.h"
#include "cuda/scorer/tiles.h"
#include "cuda/select.cuh"

namespace attent::gpu::scorer {

namespace {

/// Whether 16-byte chunks of rows can be loaded as they lie: adjacent columns, rows at multiples of 16 bytes.
bool has_whole_chunks(const void* data, int64_t column) {
    return column == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <typename Tiles>
ScorerTiles described(Sums sums) {
    return {Tiles::BM,
            Tiles::BN,
            Tiles::BK,
            Tiles::THREADS,
            Tiles::STAGES,
            Tiles::RESIDENT,
            Tiles::shared_bytes(sums),
            kept_numbers(sums)};
}

}  // namespace

static_assert(Portable::BM == Hopper::BM, "check_scorer counts a tile's rows once for both");

ScorerTiles scorer_tiles(ScorerKernel kernel, Sums sums) {
    return kernel == ScorerKernel::hopper ? described<Hopper>(sums) : described<Portable>(sums);
}

const char* hopper_scorer_refuses(const ScorerArgs& args) {
    if (args.tokens == 0 || args.width == 0) return "there is nothing to multiply";
    if (!has_whole_chunks(args.hidden, args.hidden_column) || !has_whole_chunks(args.weight, args.weight_column)) {
        return "rows of input and linear_weight have to be contiguous and to start at a multiple of 16 bytes";
    }
    // A tensor map's rows lie evenly, a multiple of 16 bytes apart: examples have to follow one another as tokens do.
    const bool is_even = args.tokens_each == 1 || args.batch == 1 || args.cu_seqlens != nullptr ||
                         args.hidden_example == args.tokens_each * args.hidden_token;
    const int64_t row = hidden_row_stride(args);
    if (!is_even || row % 8 != 0 || args.weight_row % 8 != 0) {
        return "rows of input and linear_weight have to lie evenly, a multiple of 16 bytes apart";
    }
    if (row < args.width || args.weight_row < args.width) return "rows of input and linear_weight overlap";
    return nullptr;
}

int64_t lay_out_scorer(ScorerKernel kernel, ScorerArgs& args, uintptr_t memory) {
    const ScorerTiles tiles = scorer_tiles(kernel, sums_of(kernel, args));
    const int64_t capacity = static_cast<int64_t>(args.row_tiles) * tiles.rows;
    const bool has_head = args.head != nullptr, makes_choice = args.choice.score != nullptr;
    // Without class weights a token's share of the mean's denominator is its count.
    const bool has_share = args.class_weight.data != nullptr && args.reduction == Reduction::mean;
    LentMemory lent(memory);
    args.slots = lent.take<float>(capacity * tiles.kept * args.groups);
    args.own = lent.take<float>(capacity);
    args.hidden_square = lent.take<float>(has_head ? capacity : 0);
    args.token_loss = lent.take<float>(capacity);
    args.token_square = lent.take<float>(capacity);
    args.token_count = lent.take<float>(capacity);
    args.token_share = lent.take<float>(has_share ? capacity : 0);
    args.token_head = lent.take<float>(has_head ? capacity : 0);
    args.block_loss = lent.take<float>(args.blocks);
    args.block_share = lent.take<float>(args.blocks);
    args.valid = lent.take<int8_t>(makes_choice ? args.batch : 0);
    args.selection = lent.take<int64_t>(makes_choice ? select_scratch_length(args.batch) : 0);
    return lent.bytes();
}

Status check_scorer(const ScorerArgs& args) {
    if (args.number != Number::bfloat16 && args.number != Number::float16) {
        return say(Status::refused, "input: got number format %d; takes bfloat16 (0) and float16 (1)",
                   static_cast<int>(args.number));
    }
    if (args.target_number != Number::int32 && args.target_number != Number::int64) {
        return say(Status::refused, "target: got number format %d; takes int32 (4) and int64 (5)",
                   static_cast<int>(args.target_number));
    }
    if (args.tokens < 0 || args.tokens_each < 1 || args.batch < 1 || args.width < 0 || args.classes < 1) {
        return say(Status::refused, "sizes: got %d tokens, %d each, %d examples, width %d, %d classes", args.tokens,
                   args.tokens_each, args.batch, args.width, args.classes);
    }
    const int examples = args.block_examples;
    if (examples < 1 || examples > Portable::BM || (examples & (examples - 1)) != 0 ||
        static_cast<int64_t>(args.blocks) * examples < args.batch) {
        return say(Status::refused,
                   "cut: got %d blocks of %d examples for %d; takes powers of two up to %d that hold all", args.blocks,
                   examples, args.batch, Portable::BM);
    }
    if (args.row_tiles < 1 || static_cast<int64_t>(args.row_tiles) * Portable::BM < args.tokens || args.groups < 1 ||
        args.group_tiles < 1 || args.sweep < 1 || static_cast<int64_t>(args.row_tiles) * args.groups > INT32_MAX) {
        return say(Status::refused, "cut: got %d row tiles, %d groups of %d vocabulary tiles, sweeps of %d",
                   args.row_tiles, args.groups, args.group_tiles, args.sweep);
    }
    return Status{};
}

ScorerPlan plan_scorer(ScorerKernel kernel, const ScorerArgs& args, int processors) {
    const ScorerTiles tiles = scorer_tiles(kernel, sums_of(kernel, args));
    const int64_t capacity = static_cast<int64_t>(args.row_tiles) * tiles.rows;
    const int64_t items = static_cast<int64_t>(args.row_tiles) * args.groups;
    ScorerPlan plan{};
    // The Hopper kernel is persistent: a block of threads takes one item after the other.
    plan.grid = kernel == ScorerKernel::hopper && items > processors ? processors : items;
    plan.threads = tiles.threads;
    plan.shared_bytes = tiles.shared_bytes;
    plan.tickets = args.row_tiles + args.blocks + 1;
    const int64_t a_token = 4 + (args.token_share != nullptr) + 2 * (args.head != nullptr);
    plan.scratch_floats = (tiles.kept * args.groups + a_token) * capacity + 2 * args.blocks;
    return plan;
}

}  // namespace attent::gpu::scorer
