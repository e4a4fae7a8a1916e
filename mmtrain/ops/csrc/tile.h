// Tiles: `rows` positions by W channels, row-major (one vector a position), loaded from and stored to either layout.
// Positions are those of the recurrence: with `reverse` position 0 is the last one in memory.
#pragma once
#include "args.h"
#include "vec.h"

namespace MMT_ISA {

struct Lane {  // one batch element and one block of channels of a View3
    float *data;
    int64_t channel, position;  // strides
    int64_t length;
    int lanes;  // channels really there, at most W
    bool reverse;

    Lane(const View3 &v, int64_t b, int64_t first_channel, int lanes_, int64_t length_, bool reverse_)
        : data(v.data + b * v.batch + first_channel * v.channel),
          channel(v.channel),
          position(v.position),
          length(length_),
          lanes(lanes_),
          reverse(reverse_) {}
};

static void load_tile(vf *tile, const Lane &s, int64_t start, int rows) {
    const int64_t first = s.reverse ? s.length - start - rows : start;  // lowest address of the tile
    const int64_t step = s.reverse ? -1 : 1;
    vf *row = s.reverse ? tile + rows - 1 : tile;
    const float *p = s.data + first * s.position;
    if (s.channel == 1) {
        for (int r = 0; r < rows; ++r, p += s.position, row += step)
            *row = s.lanes == W ? load(p) : load_first(p, s.lanes);
    } else if (s.position == 1) {
        for (int r = 0; r < rows; r += W) {
            const int n = rows - r < W ? rows - r : W;
            vf v[W];
            for (int i = 0; i < W; ++i) {
                const float *q = p + i * s.channel + r;
                v[i] = i >= s.lanes ? vf{} : n == W ? load(q) : load_first(q, n);
            }
            transpose(v);
            for (int i = 0; i < n; ++i, row += step) *row = v[i];
        }
    } else {
        for (int r = 0; r < rows; ++r, p += s.position, row += step) {
            vf v{};
            for (int i = 0; i < s.lanes; ++i) v[i] = p[i * s.channel];
            *row = v;
        }
    }
}

static void store_tile(const vf *tile, const Lane &s, int64_t start, int rows) {
    const int64_t first = s.reverse ? s.length - start - rows : start;
    const int64_t step = s.reverse ? -1 : 1;
    const vf *row = s.reverse ? tile + rows - 1 : tile;
    float *p = s.data + first * s.position;
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
                float *q = p + i * s.channel + r;
                if (n == W)
                    store(q, v[i]);
                else
                    store_first(q, v[i], n);
            }
        }
    } else {
        for (int r = 0; r < rows; ++r, p += s.position, row += step)
            for (int i = 0; i < s.lanes; ++i) p[i * s.channel] = (*row)[i];
    }
}

}  // namespace MMT_ISA
