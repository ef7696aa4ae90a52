// The scorer's launch shapes and workspace: host arithmetic, built and tested where there is no CUDA compiler.
#include "cuda/scorer.h"
#include "cuda/scorer/tiles.h"

namespace attent {

namespace {

/// Whether 16-byte chunks of rows can be loaded as they lie: adjacent columns, rows at multiples of 16 bytes.
bool has_whole_chunks(const void* data, int64_t column) {
    return column == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <typename Tiles>
ScorerTiles described(Sums sums) {
    return {Tiles::BM,     Tiles::BN,       Tiles::BK, Tiles::THREADS,
            Tiles::STAGES, Tiles::RESIDENT, Tiles::shared_bytes(sums)};
}

}  // namespace

ScorerTiles scorer_tiles(ScorerKernel kernel, Sums sums) {
    return kernel == ScorerKernel::hopper ? described<scorer::Hopper>(sums) : described<scorer::Portable>(sums);
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

ScorerPlan plan_scorer(ScorerKernel kernel, const ScorerArgs& args, int processors) {
    const ScorerTiles tiles = scorer_tiles(kernel, sums_of(args));
    const int64_t capacity = static_cast<int64_t>(args.row_tiles) * tiles.rows;
    const int64_t items = static_cast<int64_t>(args.row_tiles) * args.groups;
    ScorerPlan plan{};
    // The Hopper kernel is persistent: a block of threads takes one item after the other.
    plan.grid = kernel == ScorerKernel::hopper && items > processors ? processors : items;
    plan.threads = tiles.threads;
    plan.shared_bytes = tiles.shared_bytes;
    plan.tickets = args.row_tiles + args.blocks + 1;
    const int64_t a_token = 4 + (args.token_share != nullptr) + 2 * (args.head != nullptr);
    plan.scratch_floats = (kept_numbers(sums_of(args)) * args.groups + a_token) * capacity + 2 * args.blocks;
    return plan;
}

}  // namespace attent
