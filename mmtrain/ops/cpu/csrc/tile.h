// Tiles of `rows` positions by W channels, one vector per position, loaded from and stored to memory of any layout.
// Positions are numbered in the order of the recurrence: with `reverse`, position 0 is the last one in memory.
#pragma once
#include "args.h"
#include "vec.h"

namespace MMT_ISA {

struct Lane {  // one batch element and one block of channels of a View3
    void *data;
    int64_t channel, position;  // strides
    int64_t length;
    int lanes;  // number of existing channels, at most W
    bool reverse, narrow;
    const int64_t *order = nullptr;  // if given, position t of the recurrence is position order[t] in memory

    // The address of the first channel at position t. E is float, or uint16_t for bfloat16.
    template <class E>
    const E *at(int64_t t) const {
        return static_cast<const E *>(data) + (order ? order[t] : reverse ? length - 1 - t : t) * position;
    }

    Lane(const View3 &v, int64_t b, int64_t first_channel, int lanes_, int64_t length_, bool reverse_)
        : data(static_cast<char *>(v.data) + (b * v.batch + first_channel * v.channel) * (v.narrow ? 2 : 4)),
          channel(v.channel),
          position(v.position),
          length(length_),
          lanes(lanes_),
          reverse(reverse_),
          narrow(v.narrow) {}

    // Move to the next block of channels.
    void advance() { data = static_cast<char *>(data) + W * channel * (narrow ? 2 : 4); }
};

template <class E>
static void load_tile_of(vf *tile, const Lane &s, int64_t start, int rows) {
    if (s.order) {
        for (int r = 0; r < rows; ++r) {
            const E *p = s.at<E>(start + r);
            if (s.channel == 1) {
                tile[r] = s.lanes == W ? load(p) : load_first(p, s.lanes);
            } else {
                vf v{};
                for (int i = 0; i < s.lanes; ++i) v[i] = widened(p[i * s.channel]);
                tile[r] = v;
            }
        }
        return;
    }
    const int64_t first = s.reverse ? s.length - start - rows : start;  // lowest address of the tile
    const int64_t step = s.reverse ? -1 : 1;
    vf *row = s.reverse ? tile + rows - 1 : tile;
    const E *p = static_cast<const E *>(s.data) + first * s.position;
    if (s.channel == 1) {
        for (int r = 0; r < rows; ++r, p += s.position, row += step)
            *row = s.lanes == W ? load(p) : load_first(p, s.lanes);
    } else if (s.position == 1) {
        for (int r = 0; r < rows; r += W) {
            const int n = rows - r < W ? rows - r : W;
            vf v[W];
            for (int i = 0; i < W; ++i) {
                const E *q = p + i * s.channel + r;
                v[i] = i >= s.lanes ? vf{} : n == W ? load(q) : load_first(q, n);
            }
            transpose(v);
            for (int i = 0; i < n; ++i, row += step) *row = v[i];
        }
    } else {
        for (int r = 0; r < rows; ++r, p += s.position, row += step) {
            vf v{};
            for (int i = 0; i < s.lanes; ++i) v[i] = widened(p[i * s.channel]);
            *row = v;
        }
    }
}

template <class E>
static void store_tile_of(const vf *tile, const Lane &s, int64_t start, int rows) {
    if (s.order) {
        for (int r = 0; r < rows; ++r) {
            E *p = const_cast<E *>(s.at<E>(start + r));
            if (s.channel == 1 && s.lanes == W)
                store(p, tile[r]);
            else if (s.channel == 1)
                store_first(p, tile[r], s.lanes);
            else
                for (int i = 0; i < s.lanes; ++i) put(p + i * s.channel, tile[r][i]);
        }
        return;
    }
    const int64_t first = s.reverse ? s.length - start - rows : start;
    const int64_t step = s.reverse ? -1 : 1;
    const vf *row = s.reverse ? tile + rows - 1 : tile;
    E *p = static_cast<E *>(s.data) + first * s.position;
    if (s.channel == 1) {
        for (int r = 0; r < rows; ++r, p += s.position, row += step) {
            if (s.lanes == W)
                store(p, *row);
            else
                store_first(p, *row, s.lanes);
        }
    } else if (s.position == 1) {
        for (int r = 0; r < rows; r += W) {
            const int n = rows - r < W ? rows - r : W;
            vf v[W] = {};
            for (int i = 0; i < n; ++i, row += step) v[i] = *row;
            transpose(v);
            for (int i = 0; i < s.lanes; ++i) {
                E *q = p + i * s.channel + r;
                if (n == W)
                    store(q, v[i]);
                else
                    store_first(q, v[i], n);
            }
        }
    } else {
        for (int r = 0; r < rows; ++r, p += s.position, row += step)
            for (int i = 0; i < s.lanes; ++i) put(p + i * s.channel, (*row)[i]);
    }
}

static void load_tile(vf *tile, const Lane &s, int64_t start, int rows) {
    s.narrow ? load_tile_of<uint16_t>(tile, s, start, rows) : load_tile_of<float>(tile, s, start, rows);
}

static void store_tile(const vf *tile, const Lane &s, int64_t start, int rows) {
    s.narrow ? store_tile_of<uint16_t>(tile, s, start, rows) : store_tile_of<float>(tile, s, start, rows);
}

// Load all channels of some positions from channels-last memory.
template <class E>
static void load_whole_rows(vf *to, const Lane &first, int64_t blocks, int rest, int64_t start, int rows) {
    for (int r = 0; r < rows; ++r, to += blocks) {
        const E *p = first.at<E>(start + r);
        for (int64_t block = 0; block < blocks - 1; ++block) to[block] = load(p + block * W);
        to[blocks - 1] = rest == W ? load(p + (blocks - 1) * W) : load_first(p + (blocks - 1) * W, rest);
    }
}

// Load all channels of some positions: row r of `to` (one vector per block) is position start + r. `first` is the lane of
// the first block.
static void load_rows(vf *to, const Lane &first, int64_t channels, int64_t start, int rows) {
    const int64_t blocks = (channels + W - 1) / W;
    const int rest = (int)(channels - (blocks - 1) * W);
    if (first.channel == 1) {
        first.narrow ? load_whole_rows<uint16_t>(to, first, blocks, rest, start, rows)
                     : load_whole_rows<float>(to, first, blocks, rest, start, rows);
        return;
    }
    Lane lane = first;
    vf tile[kChunk];
    for (int64_t block = 0; block < blocks; ++block, lane.advance()) {
        lane.lanes = block < blocks - 1 ? W : rest;
        for (int done = 0; done < rows; done += kChunk) {
            const int n = rows - done < kChunk ? rows - done : (int)kChunk;
            load_tile(tile, lane, start + done, n);
            for (int r = 0; r < n; ++r) to[(done + r) * blocks + block] = tile[r];
        }
    }
}

// Prefetch rows that will be read block by block. The hardware prefetcher does not detect reads that are so far apart.
static void prefetch_rows(const Lane &first, int64_t channels, int64_t start, int rows) {
    if (first.channel != 1) return;
    for (int r = 0; r < rows; ++r) {
        const char *p = first.narrow ? reinterpret_cast<const char *>(first.at<uint16_t>(start + r))
                                     : reinterpret_cast<const char *>(first.at<float>(start + r));
        for (int64_t i = 0; i < channels * (first.narrow ? 2 : 4); i += 64) __builtin_prefetch(p + i);
    }
}

}  // namespace MMT_ISA
