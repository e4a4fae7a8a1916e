// Common code of the forward and the backward pass of the inner part of a mixer: sizes, packed parameters, chunk inputs.
//
// The passes run chunk by chunk (kChunk positions of all channels), so that a chunk stays in the caches. It is convolved,
// projected to Δ, B and C by small matrix products, then scanned block by block. One vector lane is one channel.
#pragma once
#include <new>

#include "conv.h"
#include "gemm.h"
#include "scan_common.h"

namespace MMT_ISA {

struct MixPlan {
    int64_t blocks, width;   // blocks of channels; floats in a row of all channels
    int64_t chunks;
    int64_t state4;          // states padded to a multiple of 4
    int64_t low, low_width;  // offset of the low-rank Δ in a row of projections (after B and C), and its padded size
    int64_t columns, used;   // floats in a row of projections, with and without padding at the end
    int64_t padded;          // channels in a row of saved states, with padding
    explicit MixPlan(const MixArgs &s)
        : blocks(ceil_div(s.dim, W)),
          width(blocks * W),
          chunks(ceil_div(s.length, T)),
          state4(ceil_div(s.state, 4) * 4),
          low(2 * state4),
          low_width(ceil_div(s.rank, W) * W),
          columns(ceil_div(low + low_width, W) * W),
          used(low + s.rank),
          padded(ceil_div(s.dim, kChannelPad) * kChannelPad) {}
    int rows(int64_t chunk, int64_t length) const { return (int)min64(T, length - chunk * T); }
    int lanes(const MixArgs &s, int64_t block) const { return (int)min64(W, s.dim - block * W); }
    // The row of x_proj for a column of the projections, or -1 for padding. Rows are (low rank, B, C), columns are
    // (B, C, low rank).
    int64_t source(const MixArgs &s, int64_t column) const {
        if (column >= low) return column < used ? column - low : -1;
        const int64_t n = column % state4;
        return n < s.state ? s.rank + (column / state4) * s.state + n : -1;
    }
};

static inline float *mix_saved_state(const MixArgs &s, const MixPlan &plan, int64_t b, int64_t k, int64_t chunk, int64_t block) {
    return s.states + ((b * s.directions + k) * (plan.chunks - 1) + chunk - 1) * s.state * plan.padded + block * W;
}

// One block of channels of one sequence, in memory order.
static inline Lane memory_lane(const MixArgs &s, const MixPlan &plan, const MixView &v, int64_t b, int64_t block) {
    char *first = static_cast<char *>(v.data) + (b / s.inner * v.outer + b % s.inner * v.inner) * (v.narrow ? 2 : 4);
    const View3 sequence{first, v.narrow, 0, v.channel, v.position};
    return Lane(sequence, 0, block * W, plan.lanes(s, block), s.length, false);
}

// The output of direction k if directions are computed separately; `parts` is (directions, batch, length, width).
static inline MixView part_view(const MixArgs &s, const MixPlan &plan, float *parts, int64_t k) {
    const int64_t sequence = s.length * plan.width;
    return {parts + k * s.batch * sequence, 0, s.inner * sequence, sequence, 1, plan.width};
}

// The parameters of one direction by block and lane. Lanes past the last channel are 0.
struct MixWeights {
    Buffer<vf> A, D, bias, dt, conv;       // A times log2(e); dt: `rank` vectors per block; conv: taps, then bias
    Buffer<float> project, project_back;   // x_proj as (width, columns) and as (columns, width)
    Buffer<float> low_back;                // dt_proj as (width, low_width)
    int64_t step;                          // 1 for memory order, -1 for reversed memory order, 0 for other orders

    MixWeights(const MixArgs &s, const MixPlan &plan, bool backward)
        : A(plan.blocks * s.state, true),
          D(plan.blocks, true),
          bias(plan.blocks, true),
          dt(plan.blocks * s.rank, true),
          conv(plan.blocks * (s.taps + 1), true),
          project(plan.width * plan.columns, true),
          project_back(backward ? plan.columns * plan.width : 0, true),
          low_back(backward ? plan.width * plan.low_width : 0, true) {}

    bool ok() const {
        return A.data && D.data && bias.data && dt.data && conv.data && project.data && project_back.data && low_back.data;
    }

    // Set `step` from the order of this direction.
    void find_step(const MixArgs &s, int64_t k) {
        const int64_t *order = s.order + k * s.length;
        step = s.length == 1 ? 1 : order[1] - order[0];
        if (step != 1 && step != -1) step = 0;
        for (int64_t t = 1; t < s.length && step; ++t)
            if (order[t] - order[t - 1] != step) step = 0;
    }

    // Pack the parameters of one block of channels.
    void fill(const MixArgs &s, const MixPlan &plan, int64_t k, int64_t block, bool backward) {
        const int64_t d0 = block * W, rows = s.rank + 2 * s.state;
        const int lanes = plan.lanes(s, block);
        for (int i = 0; i < lanes; ++i) {
            const int64_t channel = k * s.dim + d0 + i;
            for (int64_t n = 0; n < s.state; ++n)
                A.data[block * s.state + n][i] = s.A[channel * s.state + n] * 1.44269504f;
            D.data[block][i] = s.D[channel];
            bias.data[block][i] = s.dt_bias[channel];
            for (int64_t r = 0; r < s.rank; ++r) dt.data[block * s.rank + r][i] = s.dt_proj[channel * s.rank + r];
            if (backward)
                memcpy(low_back.data + (d0 + i) * plan.low_width, s.dt_proj + channel * s.rank, s.rank * sizeof(float));
            for (int64_t j = 0; j < s.taps; ++j) conv.data[block * (s.taps + 1) + j][i] = s.conv[channel * s.taps + j];
            if (s.taps && s.conv_bias) conv.data[block * (s.taps + 1) + s.taps][i] = s.conv_bias[channel];
        }
        for (int64_t column = 0; column < plan.used; ++column) {
            const int64_t row = plan.source(s, column);
            if (row < 0) continue;
            const float *from = s.x_proj + (k * rows + row) * s.dim + d0;
            for (int i = 0; i < lanes; ++i) project.data[(d0 + i) * plan.columns + column] = from[i];
            if (backward) memcpy(project_back.data + column * plan.width + d0, from, lanes * sizeof(float));
        }
    }

    // A block of channels of a tensor, in the order of this direction.
    Lane lane(const MixArgs &s, const MixPlan &plan, const MixView &v, int64_t b, int64_t k, int64_t block) const {
        Lane lane = memory_lane(s, plan, v, b, block);
        lane.reverse = step == -1;
        if (!step) lane.order = s.order + k * s.length;
        return lane;
    }
};

// The parameters of all directions. `data` is null if an allocation failed.
struct MixPacked {
    MixWeights **data;
    int64_t count;
    MixPacked(const MixArgs &s, const MixPlan &plan, bool backward)
        : data(static_cast<MixWeights **>(calloc(s.directions, sizeof(MixWeights *)))), count(s.directions) {
        bool good = data;
        for (int64_t k = 0; good && k < count; ++k) {
            data[k] = new (std::nothrow) MixWeights(s, plan, backward);
            good = data[k] && data[k]->ok();
        }
        if (!good) {
            clear();
            return;
        }
        for (int64_t k = 0; k < count; ++k) data[k]->find_step(s, k);
#pragma omp parallel for num_threads((int)s.threads) schedule(static)
        for (int64_t i = 0; i < count * plan.blocks; ++i)
            data[i / plan.blocks]->fill(s, plan, i / plan.blocks, i % plan.blocks, backward);
    }
    ~MixPacked() { clear(); }
    MixPacked(const MixPacked &) = delete;
    MixPacked &operator=(const MixPacked &) = delete;
    const MixWeights &operator[](int64_t k) const { return *data[k]; }

  private:
    void clear() {
        for (int64_t k = 0; data && k < count; ++k) delete data[k];
        free(data);
        data = nullptr;
    }
};

// The input of one chunk, in rows of all channels: u and the projections. With a convolution also x with the earlier
// positions that the convolution needs, and the derivative of silu.
struct MixInput {
    Buffer<vf> x, u, slope;
    Buffer<float> projected;
    MixInput(const MixArgs &s, const MixPlan &plan, bool backward)
        : x(s.taps ? (T + s.taps) * plan.blocks : 0),
          u(T * plan.blocks),
          slope(backward && s.taps ? T * plan.blocks : 0),
          projected(T * plan.columns) {}
    bool ok() const { return x.data && u.data && slope.data && projected.data; }

    void fill(const MixArgs &s, const MixPlan &plan, const MixWeights &w, int64_t b, int64_t k, int64_t chunk, bool backward) {
        const int64_t t0 = chunk * T;
        const int rows = plan.rows(chunk, s.length);
        const Lane lane = w.lane(s, plan, s.x, b, k, 0);
        if (s.taps) {
            load_rows_with_history(s, plan, lane, t0, rows);
            vf *slopes = backward ? slope.data : nullptr;
            switch (s.taps) {
                case 3: convolve_rows<3>(s, plan, w, rows, slopes); break;
                case 4: convolve_rows<4>(s, plan, w, rows, slopes); break;
                default: convolve_rows<0>(s, plan, w, rows, slopes);
            }
        } else {
            load_rows(u.data, lane, s.dim, t0, rows);
        }
        memset(projected.data, 0, rows * plan.columns * sizeof(float));
        gemm(projected.data, plan.columns, {reinterpret_cast<const float *>(u.data), plan.width, 1}, w.project.data,
             plan.columns, rows, plan.columns, s.dim);
    }

  private:
    // Load rows t0 - taps + 1 to t0 + rows - 1, with zeros before the first position.
    void load_rows_with_history(const MixArgs &s, const MixPlan &plan, const Lane &lane, int64_t t0, int rows) {
        const int64_t have = min64(t0, s.taps - 1), missing = s.taps - 1 - have;
        for (int64_t i = 0; i < missing * plan.blocks; ++i) x.data[i] = vf{};
        load_rows(x.data + missing * plan.blocks, lane, s.dim, t0 - have, (int)(rows + have));
    }

    template <int K>
    void convolve_rows(const MixArgs &s, const MixPlan &plan, const MixWeights &w, int rows, vf *slopes) {
        const int64_t taps = K ? K : s.taps, blocks = plan.blocks;
        for (int64_t block = 0; block < blocks; ++block) {
            const vf *weight = w.conv.data + block * (taps + 1), *in = x.data + block;
            for (int t = 0; t < rows; ++t) {
                vf pre = weight[taps];
#pragma GCC unroll 4
                for (int64_t j = 0; j < taps; ++j) pre += weight[j] * in[(t + j) * blocks];
                const vf sig = sigmoid(pre);
                u.data[t * blocks + block] = pre * sig;
                if (slopes) slopes[t * blocks + block] = sig * (1.0f + pre * (1.0f - sig));
            }
        }
    }
};

// Δ before softplus for one block: bias + dt_proj low, in four independent sums.
MMT_INLINE vf raw_step(const vf *weight, int64_t rank, const float *low, vf bias) {
    vf sum[4] = {bias};
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) {
        sum[0] += weight[r] * low[r];
        sum[1] += weight[r + 1] * low[r + 1];
        sum[2] += weight[r + 2] * low[r + 2];
        sum[3] += weight[r + 3] * low[r + 3];
    }
    for (; r < rank; ++r) sum[0] += weight[r] * low[r];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Return whether each direction writes a separate float array, which are added afterwards. This allows several threads to
// work on one batch element, if there are too few of them. It is also needed for bfloat16 results, because sums over
// directions must be accumulated in float.
static inline bool split_directions(int64_t tasks, int64_t directions, int64_t threads, bool narrow) {
    return directions > 1 && (narrow || 4 * tasks < 3 * threads * ceil_div(tasks, threads));
}

}  // namespace MMT_ISA
