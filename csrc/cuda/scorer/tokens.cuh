// Which example a token belongs to, what it is to predict, and whether it has to be computed: on the device.
//
// Tokens are numbered r = 0 … N − 1 through all examples. Packed examples begin where cu_seqlens says, whose values
// nobody has checked. They are sanitised by how they are searched: a binary search takes the same way for all rows
// until one turns left and a later row right, so whatever the numbers are, the example found never falls as r rises.
// That cuts the rows into B runs, and first_token finds where a run begins by walking the same way: for offsets that
// rise from 0 to N it is the offset itself. So every row has one example, every address lies inside, and every block of
// threads agrees on how many tiles an example spans.
#pragma once

#include "numbers.cuh"

namespace attent::gpu::scorer {

/// The example of a row; row N counts as one more token of the last example.
__device__ __forceinline__ int example_of(const ScorerArgs& args, int row) {
    if (args.cu_seqlens == nullptr) return row / args.tokens_each;
    int example = 0;
    for (int size = args.batch; size > 1;) {
        const int half = size / 2;
        if (args.cu_seqlens[(example + half) * args.cu_seqlens_stride] <= row) example += half;
        size -= half;
    }
    return example;
}

/// The first row of an example, N for example B: the smallest r with example_of(r) >= example.
__device__ __forceinline__ int first_token(const ScorerArgs& args, int example) {
    if (args.cu_seqlens == nullptr) {
        const int64_t first = static_cast<int64_t>(example) * args.tokens_each;  // T is 1 where there is no token
        return first < args.tokens ? static_cast<int>(first) : args.tokens;
    }
    if (example <= 0) return 0;
    int below = 0;                    // where the search is
    int low = 0, high = args.tokens;  // the rows whose search comes the same way are low … high − 1
    for (int size = args.batch; size > 1;) {
        const int half = size / 2, middle = below + half;
        const int begins = smaller(larger(args.cu_seqlens[middle * args.cu_seqlens_stride], low), high);
        if (middle < example) {
            low = begins;
            below = middle;
        } else {
            high = begins;
        }
        size -= half;
    }
    return high;
}

struct Token {
    int label;      // −1 below the classes, −2 above them; anything where the token is not counted
    bool counted;   // it has a target, and is in its example's count
    bool computed;  // its example has a weight too
    float factor;   // that weight
};

/// Of a row, also of N and beyond.
__device__ __forceinline__ Token read_token(const ScorerArgs& args, int row) {
    Token token{-1, row < args.tokens, false, 1.0f};
    if (!token.counted) return token;
    int source = row;  // the row that holds the target
    if (args.shift) {
        if (args.cu_seqlens != nullptr) {
            token.counted = row + 1 < args.tokens && example_of(args, row) == example_of(args, row + 1);
        } else {
            token.counted = row % args.tokens_each != args.tokens_each - 1;
        }
        if (!token.counted) return token;
        source = row + 1;
    }
    const int64_t at = source / args.tokens_each * args.target_example + source % args.tokens_each * args.target_token;
    const int64_t given = load_integer(args.target, args.target_number, at);
    token.counted = given != args.ignore_index;
    token.label = given < 0 ? -1 : given < args.classes ? static_cast<int>(given) : -2;
    token.computed = token.counted;
    if (token.counted && args.example_weight.data != nullptr) {
        const Vector& weight = args.example_weight;
        token.factor = load_float(weight.data, weight.number, example_of(args, row) * weight.stride);
        token.computed = token.factor != 0.0f;
    }
    return token;
}

/// Where a row's hidden state stands. Rows from N on are computed as the last token, for nothing.
__device__ __forceinline__ int64_t hidden_offset(const ScorerArgs& args, int row) {
    const int inside = smaller(row, larger(args.tokens - 1, 0));
    return inside / args.tokens_each * args.hidden_example + inside % args.tokens_each * args.hidden_token;
}

struct Range {
    int first, last;
};

/// The blocks of examples that have a token, or begin, in a tile of `rows` rows.
__device__ __forceinline__ Range blocks_of_tile(const ScorerArgs& args, int tile, int rows) {
    const int begin = tile * rows;
    const int here = example_of(args, begin) / args.block_examples;
    const int before = example_of(args, larger(begin - 1, 0)) / args.block_examples;
    Range range;
    range.first = tile == 0 ? 0 : smaller(here, before + 1);  // blocks between the two have no token
    range.last =
        tile == args.row_tiles - 1 ? args.blocks - 1 : example_of(args, begin + rows - 1) / args.block_examples;
    return range;
}

/// How many tiles blocks_of_tile gives the block to.
__device__ __forceinline__ int tiles_of_block(const ScorerArgs& args, int block, int rows) {
    const int begin = first_token(args, block * args.block_examples);
    const int end = first_token(args, smaller((block + 1) * args.block_examples, args.batch));
    const int first = smaller(begin / rows, args.row_tiles - 1);
    const int last = end > 0 ? (end - 1) / rows : 0;
    return larger(first, last) - first + 1;
}

struct Item {
    int tile, group;
};

/// The i-th of row_tiles × groups items, fewer than 2^31: a sweep takes `sweep` row tiles through the whole vocabulary,
/// group after group, so that they stay in L2.
__device__ __forceinline__ Item item_at(const ScorerArgs& args, int i) {
    const int of_sweep = smaller(args.sweep, args.row_tiles) * args.groups;
    const int first = i / of_sweep * args.sweep, within = i % of_sweep;
    const int tiles = smaller(args.row_tiles - first, args.sweep);
    return {first + within % tiles, within / tiles};
}

}  // namespace attent::gpu::scorer
