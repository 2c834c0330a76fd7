// Kernels for CPUs, in plain C++ with vectors of the compiler, for float32 and bfloat16. `build.py` compiles them.
//
// All products are one microkernel: a few rows of A times a panel of columns of B, in units of 4 bytes. A unit is one
// float, or a pair of bfloat16 whose products are added in float32. B is packed into panels first:
//
//     attend   S = Q K^T   A: queries of a group's heads   B: a block of keys     C: logits, float32, in the caches
//              O += P V    A: weights of the softmax       B: a block of values   C: outputs, float32
//     linear   y = x W^T   A: rows of x                    B: rows of a weight    C: rows of y

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <omp.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, COLUMNS = 4, ROWS = 6;  // floats of a vector; vectors of a panel, and rows, in registers at once
#elif defined(__AVX2__)
constexpr int W = 8, COLUMNS = 2, ROWS = 4;
#else
constexpr int W = 4, COLUMNS = 3, ROWS = 4;
#endif
constexpr int PANEL = W * COLUMNS;
constexpr int KEYS = 256 / PANEL * PANEL;  // of a block: its keys, values and logits stay in a core's caches
constexpr int QUERIES = 96;                // rows of a task: queries of all heads of a group
constexpr int TILED_QUERIES = 288;         // the same where tiles multiply: packing keys takes longer than products
constexpr long LAYER_ROWS = 1024;           // of hidden states that go through a part of a layer together
constexpr long CHUNK = 1 << 20;            // bytes of a packed weight that stay in a core's second cache
constexpr int AHEAD = 4096;                // bytes of a weight that are fetched before they are read
constexpr long PIECE = 64 << 10;           // bytes of a weight that a thread takes at once
constexpr long SMALL = 1 << 17;             // products and sums that are not worth a second thread
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(W * 4)));
typedef uint32_t Units __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint16_t Bf16;

inline Vec load(const float* p) { Vec v; memcpy(&v, p, sizeof v); return v; }
inline Units load(const uint32_t* p) { Units v; memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline void store(uint32_t* p, Units v) { memcpy(p, &v, sizeof v); }
inline Vec all(float x) { return Vec{} + x; }
#if defined(__AVX512F__)
inline Vec wider(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#else
inline Vec wider(Vec a, Vec b) { return a > b ? a : b; }
#endif
inline float from_bf16(Bf16 x) { uint32_t u = uint32_t(x) << 16; float f; memcpy(&f, &u, 4); return f; }
inline uint32_t bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline Bf16 to_bf16(float x) { uint32_t u = bits(x); return Bf16((u + 0x7fff + ((u >> 16) & 1)) >> 16); }
inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return from_bf16(x); }
inline void put(float* p, float x) { *p = x; }
inline void put(Bf16* p, float x) { *p = to_bf16(x); }

inline Ints places() { Ints p; for (int i = 0; i < W; i++) p[i] = i; return p; }
inline float sum(Vec v) {
#pragma GCC unroll 4
    for (int s = W / 2; s; s /= 2) v += __builtin_shuffle(v, places() ^ s);
    return v[0];
}
// Lane i of the result is the sum of vector i.
inline Vec sums_of(Vec* v) {
#pragma GCC unroll 4
    for (int s = W / 2; s; s /= 2) {
        Ints place = places(), low = (place & s) ? place - s + W : place, high = (place & s) ? place + W : place + s;
#pragma GCC unroll 8
        for (int i = 0; i < s; i++) v[i] = __builtin_shuffle(v[i], v[i + s], low) + __builtin_shuffle(v[i], v[i + s], high);
    }
    return v[0];
}
inline float largest(Vec v) {
#pragma GCC unroll 4
    for (int s = W / 2; s; s /= 2) v = wider(v, __builtin_shuffle(v, places() ^ s));
    return v[0];
}

// e^x for x <= 0, off by 2 units in the last place; 0 for -inf.
inline Vec exponential(Vec x) {
    x = wider(x, all(-87.3f));
    Vec n = x * 1.44269504f + 12582912.0f;  // rounds to the nearest integer in the last bits
    Ints e;
    memcpy(&e, &n, sizeof e);
    n -= 12582912.0f;
    Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    e = (e << 23) + 0x3f800000;
    Vec scale;
    memcpy(&scale, &e, sizeof scale);
    return p * scale;
}

constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 0, off by 4e-5 of it: less than what rounding to bfloat16 changes. At least 2^-126, which is nothing.
inline Vec power_of_2(Vec x) {
    x = wider(x, all(-126.0f));
#if defined(__AVX512F__)
    Vec n = (Vec)_mm512_roundscale_ps((__m512)x, 0);
#else
    Vec n = (x + 12582912.0f) - 12582912.0f;
#endif
    Vec r = x - n, p = r * 9.6181291e-3f + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (Vec)(__builtin_convertvector(n, Ints) + 127 << 23);
#endif
}

// One unit of A with a vector of units of B.
template <class T> inline Vec multiply(Vec c, uint32_t a, Units b);
template <> inline Vec multiply<float>(Vec c, uint32_t a, Units b) {
    float x;
    memcpy(&x, &a, 4);
    Vec y;
    memcpy(&y, &b, sizeof y);
    return c + x * y;
}
template <> inline Vec multiply<Bf16>(Vec c, uint32_t a, Units b) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
#else
    float low, high;
    uint32_t a_low = a << 16, a_high = a & 0xffff0000u;
    memcpy(&low, &a_low, 4);
    memcpy(&high, &a_high, 4);
    Units b_low = b << 16, b_high = b & 0xffff0000u;
    Vec y, z;
    memcpy(&y, &b_low, sizeof y);
    memcpy(&z, &b_high, sizeof z);
    return c + low * y + high * z;
#endif
}
template <class T> constexpr int PER_UNIT = 4 / sizeof(T);

// C [M, N * W] = A [M, steps] B, or += ; A and B in units, `a` and `c` strides of rows, B [steps, N * W].
template <class T, int M, int N, bool ADDS>
inline void micro(const uint32_t* A, long a, const uint32_t* B, long steps, float* C, long c) {
    Vec sums[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[i][j] = ADDS ? load(C + i * c + j * W) : Vec{};
    for (long s = 0; s < steps; s++) {
        Units columns[N];
        for (int j = 0; j < N; j++) columns[j] = load(B + (s * N + j) * W);
        for (int i = 0; i < M; i++) {
            uint32_t unit;
            memcpy(&unit, A + i * a + s, 4);
            for (int j = 0; j < N; j++) sums[i][j] = multiply<T>(sums[i][j], unit, columns[j]);
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) store(C + i * c + j * W, sums[i][j]);
}

// Intel's AMX multiplies tiles of 16 rows of 16 units, bfloat16 only: 8 to 16 times as fast as vectors.
#if HAS_TILES
static_assert(W == 16);

bool may_use_tiles() {  // the system saves tiles for processes that ask
    static const bool may = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */);
    return may;
}

// A thread has 8 tiles while it has one of these. Others (oneDNN) load configurations of their own.
struct Tiles {
    Tiles() {
        struct alignas(64) { uint8_t palette = 1, start = 0, unused[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } all;
        for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = 16;
        if (may_use_tiles()) _tile_loadconfig(&all);
    }
    ~Tiles() { if (may_use_tiles()) _tile_release(); }
};

// C [16 M, 16 N] = A [16 M, steps] B, or += ; `a`, `b` and `c` are strides of rows, in units. M and N are 1 or 2.
template <int M, int N, bool ADDS>
inline void tile_product(const uint32_t* A, long a, const uint32_t* B, long b, long steps, float* C, long c) {
    if constexpr (ADDS) {
        _tile_loadd(0, C, c * 4);
        if constexpr (N > 1) _tile_loadd(1, C + 16, c * 4);
        if constexpr (M > 1) _tile_loadd(2, C + 16 * c, c * 4);
        if constexpr (M > 1 && N > 1) _tile_loadd(3, C + 16 * c + 16, c * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long s = 0; s < steps; s += 16) {
        _tile_loadd(4, A + s, a * 4);
        _tile_loadd(6, B + s * b, b * 4);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) _tile_loadd(7, B + s * b + 16, b * 4);
        if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (M > 1) _tile_loadd(5, A + 16 * a + s, a * 4);
        if constexpr (M > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, c * 4);
    if constexpr (N > 1) _tile_stored(1, C + 16, c * 4);
    if constexpr (M > 1) _tile_stored(2, C + 16 * c, c * 4);
    if constexpr (M > 1 && N > 1) _tile_stored(3, C + 16 * c + 16, c * 4);
}

template <int N, bool ADDS>
void tiled_panel(const uint32_t* A, long a, const uint32_t* B, long steps, float* C, long c, long rows) {
    constexpr long b = N * 16;
    for (long i = 0; i < rows; i += 32) {
        const bool one = rows - i <= 16;
#pragma GCC unroll 2
        for (int j = 0; j < N; j += 2) {
            const uint32_t *from = A + i * a, *columns = B + j * 16;
            float* to = C + i * c + j * 16;
            if (j + 1 < N) one ? tile_product<1, 2, ADDS>(from, a, columns, b, steps, to, c) : tile_product<2, 2, ADDS>(from, a, columns, b, steps, to, c);
            else one ? tile_product<1, 1, ADDS>(from, a, columns, b, steps, to, c) : tile_product<2, 1, ADDS>(from, a, columns, b, steps, to, c);
        }
    }
}
#else
inline bool may_use_tiles() { return false; }
struct Tiles { Tiles() {} };
#endif

template <class T> inline bool tiles_fit(long steps) { return sizeof(T) == 2 && steps % 16 == 0 && may_use_tiles(); }

// Where tiles fit, A and C have memory for `rows` rounded up to 16, and the calling thread has `Tiles`.
template <class T, int N, bool ADDS>
void rows_times_panel(const uint32_t* A, long a, const uint32_t* B, long steps, float* C, long c, long rows) {
#if HAS_TILES
    if (tiles_fit<T>(steps)) return tiled_panel<N, ADDS>(A, a, B, steps, C, c, rows);
#endif
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS) micro<T, ROWS, N, ADDS>(A + i * a, a, B, steps, C + i * c, c);
    for (; i + 2 <= rows; i += 2) micro<T, 2, N, ADDS>(A + i * a, a, B, steps, C + i * c, c);
    for (; i < rows; i++) micro<T, 1, N, ADDS>(A + i * a, a, B, steps, C + i * c, c);
}

// C [rows, columns] (+)= A [rows, steps] B; B in panels of PANEL columns, the last with as many vectors as it needs.
template <class T, bool ADDS>
void product(const uint32_t* A, long a, const uint32_t* B, long steps, float* C, long c, long rows, long columns) {
    for (long j = 0; j < columns; j += PANEL, B += steps * PANEL) {
        long vectors = std::min<long>(COLUMNS, (columns - j + W - 1) / W);
        if (vectors == COLUMNS) rows_times_panel<T, COLUMNS, ADDS>(A, a, B, steps, C + j, c, rows);
        else if (vectors == 1) rows_times_panel<T, 1, ADDS>(A, a, B, steps, C + j, c, rows);
        else if (vectors == 2) rows_times_panel<T, 2, ADDS>(A, a, B, steps, C + j, c, rows);
        else rows_times_panel<T, 3, ADDS>(A, a, B, steps, C + j, c, rows);
    }
}

inline void transpose(Units* r) {  // W rows of W units, in place
    Units place;
    for (int i = 0; i < W; i++) place[i] = i;
#pragma GCC unroll 4
    for (int s = W / 2; s; s /= 2) {
        Units low = (place & s) ? place - s + W : place, high = (place & s) ? place + W : place + s;
#pragma GCC unroll 16
        for (int i = 0; i < W; i++)
            if (!(i & s)) {
                Units x = r[i], y = r[i + s];
                r[i] = __builtin_shuffle(x, y, low);
                r[i + s] = __builtin_shuffle(x, y, high);
            }
    }
}

// Packs `count` rows of `steps` units, found by `row(i)`, as the columns of B; columns up to the panel's end are zeros.
template <class Row> void pack_columns(Row row, long count, long steps, uint32_t* B) {
    static const uint32_t zeros[W] = {};
    for (long j = 0; j < count; j += PANEL) {
        int vectors = std::min<long>(COLUMNS, (count - j + W - 1) / W);
        for (int v = 0; v < vectors; v++) {
            const uint32_t* from[W];
            for (int i = 0; i < W; i++) from[i] = j + v * W + i < count ? row(j + v * W + i) : nullptr;
            long s = 0;
            for (; s + W <= steps; s += W) {
                Units block[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) block[i] = load(from[i] ? from[i] + s : zeros);
                transpose(block);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) store(B + ((s + i) * vectors + v) * W, block[i]);
            }
            for (; s < steps; s++)
                for (int i = 0; i < W; i++) B[(s * vectors + v) * W + i] = from[i] ? from[i][s] : 0;
        }
        B += steps * vectors * W;
    }
}

// Units of `count` numbers, zeros at the end included.
template <class T> inline long padded_units(long count) {
    const long units = (count + PER_UNIT<T> - 1) / PER_UNIT<T>;
    return tiles_fit<T>(0) ? (units + 15) / 16 * 16 : units;
}

// Packs `count` rows of `width` numbers, found by `row(i)`, as the rows of B: in bfloat16 two rows are one of units.
inline uint32_t pair(float x, float) { return bits(x); }
inline uint32_t pair(Bf16 x, Bf16 y) { return uint32_t(x) | uint32_t(y) << 16; }
template <class T, class Row> void pack_rows(Row row, long count, long width, uint32_t* B) {
    static const std::vector<T> zeros(1 << 16);
    long steps = padded_units<T>(count);
    for (long j = 0; j < width; j += PANEL) {
        long vectors = std::min<long>(COLUMNS, (width - j + W - 1) / W), columns = std::min<long>(width - j, PANEL);
        for (long s = 0; s < steps; s++, B += vectors * W) {
            const T* x = s * PER_UNIT<T> < count ? row(s * PER_UNIT<T>) + j : zeros.data();
            const T* y = s * PER_UNIT<T> + 1 < count ? row(s * PER_UNIT<T> + 1) + j : zeros.data();
            if (columns == PANEL)
                for (int i = 0; i < PANEL; i++) B[i] = pair(x[i], y[i]);
            else {
                for (int i = 0; i < columns; i++) B[i] = pair(x[i], y[i]);
                for (int i = columns; i < vectors * W; i++) B[i] = 0;
            }
        }
    }
}

inline void put_vector(float* p, Vec v) { store(p, v); }
inline void put_vector(Bf16* p, Vec v) {
#if defined(__AVX512BF16__)
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &half, sizeof half);
#else
    for (int i = 0; i < W; i++) p[i] = to_bf16(v[i]);
#endif
}

inline Vec get_vector(const float* p) { return load(p); }
inline Vec get_vector(const Bf16* p) {
    typedef Bf16 Half __attribute__((vector_size(W * 2)));
    Half h;
    memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Units) << 16);
}
template <class T> inline Vec rounded(Vec x) {
    if constexpr (sizeof(T) == 4) return x;
    T y[W];
    put_vector(y, x);
    return get_vector(y);
}
template <class T> inline float rounded(float x) { T y; put(&y, x); return to_float(y); }

template <class T> T* scratch(std::vector<char>& memory, size_t count) {
    if (memory.size() < count * sizeof(T) + 64) memory.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}
thread_local std::vector<char> memory[6], between[3];

// Attention of all rows of a step, over blocks of keys and values wherever they lie.
struct Attention {
    const char *query, *keys, *values;  // [N, H, D], [blocks, block_size, Hk, D], [blocks, block_size, Hk, Dv]
    char* out;                          // [N, H, Dv]
    float* lse;                         // [N, H]
    const int32_t* tables;              // [rows, table_stride] row, its block -> block
    const int32_t* starts;              // [rows + 1] row -> its first token
    const int32_t* lens;                // [rows] row -> its keys
    int64_t query_strides[2], key_strides[3], value_strides[3], table_stride;  // in numbers, of all dims but the last
    int64_t rows, block_size, heads, kv_heads, dim, v_dim, window;             // window, softcap: 0 if there is none
    bool causal;
    float scaling, softcap;
};

struct Task {
    int64_t row, first, count, kv_head, low, high;  // queries of a row, their keys from low to high
    int64_t part;                                   // place of a partial result; -1: the task has all keys
};

template <class T> void run(const Attention& o, const Task& t, float* parts) {
    const long groups = o.heads / o.kv_heads, rows = t.count * groups, dim = o.dim, width = (o.v_dim + W - 1) / W * W;
    const long steps = dim / PER_UNIT<T>;
    const int32_t* table = o.tables + t.row * o.table_stride;
    const T* keys_of_head = reinterpret_cast<const T*>(o.keys) + t.kv_head * o.key_strides[2];
    const T* values_of_head = reinterpret_cast<const T*>(o.values) + t.kv_head * o.value_strides[2];
    const T* query = reinterpret_cast<const T*>(o.query);
    const long token = o.starts[t.row] + t.first;
    const long position = o.lens[t.row] - (o.starts[t.row + 1] - o.starts[t.row]) + t.first;  // of the first query

    const Tiles tiles;
    const long memory_rows = (rows + 15) / 16 * 16;
    T* Q = scratch<T>(memory[0], memory_rows * dim);
    uint32_t* B = scratch<uint32_t>(memory[1], std::max<long>(KEYS * steps, KEYS / PER_UNIT<T> * width) + PANEL);
    float* S = scratch<float>(memory[2], memory_rows * KEYS);
    T* P = sizeof(T) == 4 ? reinterpret_cast<T*>(S) : scratch<T>(memory[3], memory_rows * KEYS);
    float* O = scratch<float>(memory[4], memory_rows * width);
    float* state = scratch<float>(memory[5], rows * 2);  // the largest logit, and the sum of weights
    for (long r = 0; r < rows; r++) {
        long q = r / groups, h = t.kv_head * groups + r % groups;
        memcpy(Q + r * dim, query + (token + q) * o.query_strides[0] + h * o.query_strides[1], dim * sizeof(T));
        state[2 * r] = NONE, state[2 * r + 1] = 0;
    }
    memset(O, 0, rows * width * sizeof(float));

    const T *key_rows[KEYS], *value_rows[KEYS];
    for (long key = t.low; key < t.high; key += KEYS) {
        const long keys = std::min<long>(KEYS, t.high - key), padded = (keys + W - 1) / W * W, units = padded_units<T>(keys);
        for (long i = 0, k = key; i < keys; i++, k++) {
            const long block = table[k / o.block_size], place = k % o.block_size;
            key_rows[i] = keys_of_head + block * o.key_strides[0] + place * o.key_strides[1];
            value_rows[i] = values_of_head + block * o.value_strides[0] + place * o.value_strides[1];
        }
        pack_columns([&](long i) { return reinterpret_cast<const uint32_t*>(key_rows[i]); }, keys, steps, B);
        product<T, false>(reinterpret_cast<uint32_t*>(Q), steps, B, steps, S, KEYS, rows, padded);
        for (long r = 0; r < rows; r++) {
            const long p = o.causal ? position + r / groups : o.lens[t.row] - 1;  // the last key that it attends to
            const long last = std::min(keys, p + 1 - key), begin = o.window ? std::max(0l, p + 1 - o.window - key) : 0;
            float* s = S + r * KEYS;
            T* weights = P + r * KEYS;
            if (begin >= last) {
                memset(weights, 0, units * 4);
                continue;
            }
            if (units * PER_UNIT<T> > padded) memset(weights + padded, 0, units * 4 - padded * sizeof(T));
            for (long i = 0; i < begin; i++) s[i] = NONE;
            for (long i = last; i < padded; i++) s[i] = NONE;
            Vec most = all(NONE);
            const bool is_quick = sizeof(T) == 2 && !o.softcap && o.scaling > 0;
            if (is_quick) {
                for (long i = 0; i < padded; i += W) most = wider(most, load(s + i));
                most *= o.scaling;
            } else if (o.softcap) {
                for (long i = begin; i < last; i++) s[i] = o.softcap * std::tanh(s[i] * o.scaling / o.softcap);
                for (long i = 0; i < padded; i += W) most = wider(most, load(s + i));
            } else {
                for (long i = 0; i < padded; i += W) {
                    Vec x = load(s + i) * o.scaling;
                    store(s + i, x);
                    most = wider(most, x);
                }
            }
            const float before = state[2 * r], now = std::max(before, largest(most));
            Vec total = {};
            if (is_quick) {
                const float factor = o.scaling * LOG2_E, shift = now * LOG2_E;
                for (long i = 0; i < padded; i += W) {
                    Vec e = power_of_2(load(s + i) * factor - shift);
                    total += e;
                    put_vector(weights + i, e);
                }
            } else
                for (long i = 0; i < padded; i += W) {
                    Vec x = load(s + i), e = exponential(x - now);
                    e = x == NONE ? Vec{} : e;
                    total += e;
                    put_vector(weights + i, e);
                }
            const float scale = before == NONE ? 0.0f : std::exp(before - now);
            state[2 * r] = now, state[2 * r + 1] = state[2 * r + 1] * scale + sum(total);
            if (scale != 1.0f)
                for (long i = 0; i < width; i += W) store(O + r * width + i, load(O + r * width + i) * scale);
        }
        pack_rows<T>([&](long i) { return value_rows[i]; }, keys, o.v_dim, B);
        product<T, true>(reinterpret_cast<uint32_t*>(P), KEYS / PER_UNIT<T>, B, units, O, width, rows, width);
    }
    for (long r = 0; r < rows; r++) {
        if (t.part >= 0) {
            float* part = parts + (t.part * rows + r) * (width + 2);
            part[0] = state[2 * r], part[1] = state[2 * r + 1];
            memcpy(part + 2, O + r * width, width * sizeof(float));
            continue;
        }
        const long place = (token + r / groups) * o.heads + t.kv_head * groups + r % groups;
        const float total = state[2 * r + 1];
        T* out = reinterpret_cast<T*>(o.out) + place * o.v_dim;
        for (long i = 0; i < o.v_dim; i++) put(out + i, total > 0 ? O[r * width + i] / total : 0.0f);
        o.lse[place] = total > 0 ? state[2 * r] + std::log(total) : NONE;
    }
}

template <class T> void merge(const Attention& o, const Task& t, long count, const float* parts) {
    const long groups = o.heads / o.kv_heads, width = (o.v_dim + W - 1) / W * W;
    for (long r = 0; r < groups; r++) {
        float most = NONE, total = 0;
        for (long c = 0; c < count; c++) most = std::max(most, parts[((t.part + c) * groups + r) * (width + 2)]);
        std::vector<float> O(width);
        for (long c = 0; c < count && most > NONE; c++) {
            const float* part = parts + ((t.part + c) * groups + r) * (width + 2);
            const float scale = part[0] == NONE ? 0.0f : std::exp(part[0] - most);
            total += part[1] * scale;
            for (long i = 0; i < width; i++) O[i] += part[2 + i] * scale;
        }
        const long place = o.starts[t.row] * o.heads + t.kv_head * groups + r;
        T* out = reinterpret_cast<T*>(o.out) + place * o.v_dim;
        for (long i = 0; i < o.v_dim; i++) put(out + i, total > 0 ? O[i] / total : 0.0f);
        o.lse[place] = total > 0 ? most + std::log(total) : NONE;
    }
}

template <class T> void attend_rows(const Attention& o) {
    const long groups = o.heads / o.kv_heads, queries = tiles_fit<T>(0) ? TILED_QUERIES : QUERIES;
    const long size = std::max<long>(1, queries / groups);
    const long width = (o.v_dim + W - 1) / W * W;
    std::vector<Task> tasks;
    std::vector<std::pair<long, long>> split;  // tasks of one row and head: the first, and how many
    long num_parts = 0, all_keys = 0;
    for (long row = 0; row < o.rows; row++) all_keys += o.lens[row];
    const long run_keys = std::max<long>(KEYS, (all_keys * o.kv_heads / 8 + KEYS - 1) / KEYS * KEYS);
    for (long row = o.rows - 1; row >= 0; row--) {
        const long length = o.starts[row + 1] - o.starts[row], start = o.lens[row] - length;
        for (long first = (length - 1) / size * size; first >= 0; first -= size) {
            const long count = std::min(size, length - first), high = o.causal ? start + first + count : start + length;
            const long low = o.window ? std::max(0l, start + first + 1 - o.window) : 0;
            for (long head = 0; head < o.kv_heads; head++) {
                if (length > 1 || high - low <= run_keys) {
                    tasks.push_back({row, first, count, head, low, high, -1});
                    continue;
                }
                split.push_back({long(tasks.size()), 0});
                for (long key = low; key < high; key += run_keys, split.back().second++)
                    tasks.push_back({row, 0, 1, head, key, std::min(key + run_keys, high), num_parts++});
            }
        }
    }
    std::vector<float> parts(num_parts * groups * (width + 2));
    long work = 0;
    for (const Task& t : tasks) work += t.count * groups * (t.high - t.low) * (o.dim + o.v_dim);
#pragma omp parallel for schedule(dynamic, 1) if (work > SMALL)
    for (size_t i = 0; i < tasks.size(); i++) run<T>(o, tasks[i], parts.data());
    for (auto [first, count] : split) merge<T>(o, tasks[first], count, parts.data());
}

// What follows up to the operations is called by all threads, which share its loops.

// y [rows, N] of 8 rows at most: each row of the weight is read once, from where it is.
template <class T, int M>
void few_rows(const T* x, const T* weight, long w_row, const T* bias, T* y, long y_row, long N, long K) {
    constexpr int OWN = std::max(1, M <= 2 ? W / 2 : M <= 4 ? W / 4 : W / 8);  // rows of the weight at once
    const long units = K / PER_UNIT<T>;
    const long piece = std::max<long>(1, PIECE / (OWN * K * long(sizeof(T))));
#pragma omp for schedule(dynamic, piece) nowait
    for (long n = 0; n < N / OWN * OWN; n += OWN) {
        Vec sums[std::max(W, OWN * M)] = {};  // [OWN, M]
        long k = 0;
        for (; k + W <= units; k += W) {
            Units rows[M];
            for (int m = 0; m < M; m++) rows[m] = load(reinterpret_cast<const uint32_t*>(x + m * K) + k);
            for (int i = 0; i < OWN; i++) {
                const uint32_t* from = reinterpret_cast<const uint32_t*>(weight + (n + i) * w_row) + k;
                Units own = load(from);
                __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD);
                for (int m = 0; m < M; m++) {
#if defined(__AVX512BF16__)
                    if constexpr (sizeof(T) == 2) {
                        sums[i * M + m] = (Vec)_mm512_dpbf16_ps((__m512)sums[i * M + m], (__m512bh)rows[m], (__m512bh)own);
                        continue;
                    }
#endif
                    if constexpr (sizeof(T) == 2) {
                        sums[i * M + m] += (Vec)(rows[m] << 16) * (Vec)(own << 16);
                        sums[i * M + m] += (Vec)(rows[m] & 0xffff0000u) * (Vec)(own & 0xffff0000u);
                    } else {
                        sums[i * M + m] += (Vec)rows[m] * (Vec)own;
                    }
                }
            }
        }
        Vec totals = sums_of(sums);
        for (int i = 0; i < OWN; i++)
            for (int m = 0; m < M; m++) {
                float total = totals[i * M + m] + (bias ? to_float(bias[n + i]) : 0);
                for (long j = k * PER_UNIT<T>; j < K; j++)
                    total += to_float(x[m * K + j]) * to_float(weight[(n + i) * w_row + j]);
                put(y + m * y_row + n + i, total);
            }
    }
#pragma omp for schedule(static) nowait
    for (long n = N / OWN * OWN; n < N; n++)
        for (int m = 0; m < M; m++) {
            float total = bias ? to_float(bias[n]) : 0;
            for (long j = 0; j < K; j++) total += to_float(x[m * K + j]) * to_float(weight[n * w_row + j]);
            put(y + m * y_row + n, total);
        }
}

#if HAS_TILES
// The same of 16 V rows at most, by tiles: y^T = W x^T, where W's rows are read from where they are.
template <int V>
void few_tiled_rows(const Bf16* x, const Bf16* weight, long w_row, const Bf16* bias, Bf16* y, long y_row, long M, long N, long K) {
    const long steps = K / 2, piece = std::max<long>(1, PIECE / (16 * K * 2));
    const Tiles tiles;
    uint32_t* B = scratch<uint32_t>(memory[0], steps * V * 16);
    float* C = scratch<float>(memory[1], 16 * V * 16);
    pack_columns([&](long m) { return reinterpret_cast<const uint32_t*>(x + m * K); }, M, steps, B);
#pragma omp for schedule(dynamic, piece) nowait
    for (long n = 0; n < N; n += 16) {
        const long own = std::min<long>(16, N - n);
        const uint32_t* A = reinterpret_cast<const uint32_t*>(weight + n * w_row);
        long a = w_row / 2;
        if (own < 16) {
            uint32_t* all = scratch<uint32_t>(memory[2], 16 * steps);
            for (long i = 0; i < own; i++) memcpy(all + i * steps, A + i * a, steps * 4);
            A = all, a = steps;
        }
        for (const char* line = (const char*)A; line < (const char*)(A + 16 * a); line += 64) __builtin_prefetch(line + 32 * a * 4);
        tile_product<1, V, false>(A, a, B, V * 16, steps, C, V * 16);
        for (int v = 0; v < V; v++) {
            Units block[16];
            for (int i = 0; i < 16; i++) block[i] = load(reinterpret_cast<uint32_t*>(C) + i * V * 16 + v * 16);
            transpose(block);
            Vec added = {};
            for (long i = 0; bias && i < own; i++) added[i] = from_bf16(bias[n + i]);
            for (long m = 0; m < std::min<long>(16, M - v * 16); m++) {
                Bf16* to = y + (v * 16 + m) * y_row + n;
                Vec sums = (Vec)block[m] + added;
                if (own == 16) put_vector(to, sums);
                else for (long i = 0; i < own; i++) put(to + i, sums[i]);
            }
        }
    }
}
#endif

// y [M, N] = x [M, K] times weight [N, K]^T + bias.
template <class T>
void multiply_rows(const T* x, const T* weight, long w_row, const T* bias, T* y, long y_row, long M, long N, long K) {
#if HAS_TILES
    if constexpr (sizeof(T) == 2) {
        if (M > 2 && M <= 32 && w_row % 2 == 0 && tiles_fit<T>(K / 2))
            return M <= 16 ? few_tiled_rows<1>(x, weight, w_row, bias, y, y_row, M, N, K)
                           : few_tiled_rows<2>(x, weight, w_row, bias, y, y_row, M, N, K);
    }
#endif
    switch (M) {
#define CASE(m) case m: return few_rows<T, m>(x, weight, w_row, bias, y, y_row, N, K);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
    const long steps = K / PER_UNIT<T>, threads = omp_get_num_threads();
    const bool is_tiled = tiles_fit<T>(steps);
    // Columns that a thread packs and multiplies by all of x.
    long chunk = PANEL;
    if (is_tiled) chunk = std::max<long>(32, std::min(CHUNK / (K * 2), (N + threads - 1) / threads + 31) / 32 * 32);
    const long rows = is_tiled ? 32 : 48, a = is_tiled ? steps + 16 : steps;  // of x, at once
#pragma omp for schedule(dynamic, 1) nowait
    for (long n = 0; n < N; n += chunk) {
        const Tiles tiles;
        const long columns = std::min<long>(chunk, N - n), padded = (columns + W - 1) / W * W;
        uint32_t* B = scratch<uint32_t>(memory[0], steps * padded);
        float* C = scratch<float>(memory[1], rows * padded);
        float* added = scratch<float>(memory[2], padded);
        uint32_t* A = scratch<uint32_t>(memory[3], rows * a);
        pack_columns([&](long i) { return reinterpret_cast<const uint32_t*>(weight + (n + i) * w_row); }, columns, steps, B);
        for (long j = 0; j < padded; j++) added[j] = bias && j < columns ? to_float(bias[n + j]) : 0;
        for (long m = 0; m < M; m += rows) {
            const long count = std::min(rows, M - m);
            const uint32_t* from = reinterpret_cast<const uint32_t*>(x + m * K);
            if (is_tiled) {  // at a stride that is no power of 2, whose rows would share a place in the cache
                for (long i = 0; i < count; i++) memcpy(A + i * a, from + i * steps, steps * 4);
                from = A;
            }
            product<T, false>(from, a, B, steps, C, padded, count, padded);
            for (long i = 0; i < count; i++) {
                T* out = y + (m + i) * y_row + n;
                long j = 0;
                for (; j + W <= columns; j += W) put_vector(out + j, load(C + i * padded + j) + load(added + j));
                for (; j < columns; j++) put(out + j, C[i * padded + j] + added[j]);
            }
        }
    }
}

template <class T> void norm_rows(const T* x, const T* weight, T* y, long M, long K, float epsilon) {
#pragma omp parallel for schedule(static) if (M * K > SMALL)
    for (long m = 0; m < M; m++) {
        const T* from = x + m * K;
        Vec squares[2] = {};
        long k = 0;
        for (; k + 2 * W <= K; k += 2 * W)
            for (int i = 0; i < 2; i++) squares[i] += get_vector(from + k + i * W) * get_vector(from + k + i * W);
        float total = sum(squares[0] + squares[1]);
        for (; k < K; k++) total += to_float(from[k]) * to_float(from[k]);
        const float scale = 1 / std::sqrt(total / K + epsilon);
        T* to = y + m * K;
        for (k = 0; k + W <= K; k += W) put_vector(to + k, get_vector(weight + k) * rounded<T>(get_vector(from + k) * scale));
        for (; k < K; k++) put(to + k, to_float(weight[k]) * rounded<T>(to_float(from[k]) * scale));
    }
}

template <class T> void add_rows(const T* x, const T* y, T* sum, long count) {
#pragma omp parallel for schedule(static) if (count > SMALL)
    for (long i = 0; i < count / W * W; i += W) put_vector(sum + i, get_vector(x + i) + get_vector(y + i));
    for (long i = count / W * W; i < count; i++) put(sum + i, to_float(x[i]) + to_float(y[i]));
}

template <class T> void gate_rows(const T* x, T* y, long M, long K) {
#pragma omp parallel for schedule(static) if (M * K > SMALL)
    for (long m = 0; m < M; m++) {
        const T *gate = x + m * 2 * K, *up = gate + K;
        // silu(g) = g / (1 + e^-g), by powers of e that are 1 at most
        auto gated = [](Vec g, Vec u) {
            Vec x = g < 0 ? g : -g, e = sizeof(T) == 2 ? power_of_2(x * LOG2_E) : exponential(x), share = (g < 0 ? e : all(1)) / (e + 1.0f);
            return rounded<T>(g * share) * u;
        };
        long k = 0;
        for (; k + W <= K; k += W) put_vector(y + m * K + k, gated(get_vector(gate + k), get_vector(up + k)));
        for (; k < K; k++) put(y + m * K + k, gated(all(to_float(gate[k])), all(to_float(up[k])))[0]);
    }
}

template <class T> inline void turn(const T* from, const T* cos, const T* sin, T* to, long half) {
    long i = 0;
    for (; i + W <= half; i += W) {
        const Vec x = get_vector(from + i), y = get_vector(from + half + i);
        put_vector(to + i, x * get_vector(cos + i) - y * get_vector(sin + i));
        put_vector(to + half + i, y * get_vector(cos + half + i) + x * get_vector(sin + half + i));
    }
    for (; i < half; i++) {
        const float x = to_float(from[i]), y = to_float(from[half + i]);
        put(to + i, x * to_float(cos[i]) - y * to_float(sin[i]));
        put(to + half + i, y * to_float(cos[half + i]) + x * to_float(sin[half + i]));
    }
}

template <class T>
void rotate_rows(const T* qkv, const T* cos, const T* sin, T* q, T* entries, long M, long heads, long kv_heads, long D) {
#pragma omp parallel for schedule(static) if (M * heads * D > SMALL)
    for (long m = 0; m < M; m++) {
        const T *from = qkv + m * (heads + 2 * kv_heads) * D, *c = cos + m * D, *s = sin + m * D;
        for (long h = 0; h < heads; h++) turn(from + h * D, c, s, q + (m * heads + h) * D, D / 2);
        T* entry = entries + m * kv_heads * 2 * D;
        for (long h = 0; h < kv_heads; h++) {
            turn(from + (heads + h) * D, c, s, entry + h * 2 * D, D / 2);
            memcpy(entry + (h * 2 + 1) * D, from + (heads + kv_heads + h) * D, D * sizeof(T));
        }
    }
}

}  // namespace

using torch::stable::Tensor;

namespace {

// Calls one of two functions, by the type of x.
#define BY_TYPE(x, call)              \
    do {                              \
        if ((x).element_size() == 2) { \
            typedef Bf16 T;           \
            call;                     \
        } else {                      \
            typedef float T;          \
            call;                     \
        }                             \
    } while (0)

Tensor like(const Tensor& x, long width) {  // x's shape, with another last dim
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = width;
    return torch::stable::new_empty(x, shape);
}

}  // namespace

long width_of(const std::vector<Tensor>& weights) {
    long width = 0;
    for (auto& weight : weights) width += weight.size(0);
    return width;
}

// x [M, K] times each weight -> y [M, width_of(weights)].
template <class T>
void multiply_all(const T* x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, T* y, long M, long K) {
    struct Part { const T *weight, *bias; long row, N, start; };
    std::vector<Part> parts;
    const long width = width_of(weights);
    long start = 0;
    for (size_t i = 0; i < weights.size(); i++) {
        parts.push_back({(const T*)weights[i].data_ptr(), biases.empty() ? nullptr : (const T*)biases[i].data_ptr(),
                         weights[i].stride(0), weights[i].size(0), start});
        start += parts.back().N;
    }
#pragma omp parallel
    for (auto& p : parts) multiply_rows(x, p.weight, p.row, p.bias, y + p.start, width, M, p.N, K);
}

// x [..., K], contiguous; weights [N, K] each, dense in K; biases [N] each, or none -> [..., sum of N].
Tensor linear(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
    const long K = x.size(x.dim() - 1), M = x.numel() / K;
    Tensor y = like(x, width_of(weights));
    BY_TYPE(x, multiply_all((const T*)x.data_ptr(), weights, biases, (T*)y.data_ptr(), M, K));
    return y;
}

// Llama's norm: x [..., K], contiguous; weight [K] -> weight * round(x / rms(x)).
Tensor rms_norm(Tensor x, Tensor weight, double epsilon) {
    const long K = weight.size(0), M = x.numel() / K;
    Tensor y = like(x, K);
    BY_TYPE(x, norm_rows((const T*)x.data_ptr(), (const T*)weight.data_ptr(), (T*)y.data_ptr(), M, K, float(epsilon)));
    return y;
}

// x [..., 2 * K], contiguous: gates and what they gate -> silu(gate) * up [..., K].
Tensor silu_mul(Tensor x) {
    const long K = x.size(x.dim() - 1) / 2, M = x.numel() / (2 * K);
    Tensor y = like(x, K);
    BY_TYPE(x, gate_rows((const T*)x.data_ptr(), (T*)y.data_ptr(), M, K));
    return y;
}

// qkv [T, (H + 2 * Hk) * D]; cos, sin [T, D] of Llama's RoPE, which turns halves of a head -> queries [T, H, D], and KV
// entries [T, Hk * 2 * D], each head's key before its value.
std::tuple<Tensor, Tensor> rotate(Tensor qkv, Tensor cos, Tensor sin, int64_t heads, int64_t kv_heads) {
    const long M = qkv.size(0), D = qkv.size(1) / (heads + 2 * kv_heads);
    Tensor q = torch::stable::new_empty(qkv, {M, heads, D}), entries = torch::stable::new_empty(qkv, {M, kv_heads * 2 * D});
    BY_TYPE(qkv, rotate_rows((const T*)qkv.data_ptr(), (const T*)cos.data_ptr(), (const T*)sin.data_ptr(), (T*)q.data_ptr(),
                             (T*)entries.data_ptr(), M, heads, kv_heads, D));
    return {q, entries};
}

// A layer like Llama's before its attention: hidden states x [T, K] -> queries and KV entries, as `rotate` has them.
std::tuple<Tensor, Tensor> before_attention(Tensor x, Tensor norm, double epsilon, std::vector<Tensor> qkv,
                                            std::vector<Tensor> biases, Tensor cos, Tensor sin, int64_t heads, int64_t kv_heads) {
    return rotate(linear(rms_norm(x, norm, epsilon), qkv, biases), cos, sin, heads, kv_heads);
}

// In blocks of rows, whose results in between stay where they are: new memory costs more than what is computed there.
template <class T>
void finish_layer(const T* x, const T* attended, const T* norm, float epsilon, const std::vector<Tensor>& weights, T* out, long M) {
    const long K = weights[0].size(0), width = weights[0].size(1), inner = weights[3].size(1);
    for (long m = 0; m < M; m += LAYER_ROWS) {
        const long count = std::min(LAYER_ROWS, M - m);
        T *sums = out + m * K, *gates = scratch<T>(between[0], count * 2 * inner), *gated = scratch<T>(between[1], count * inner);
        T* normed = scratch<T>(between[2], count * K);
        multiply_all(attended + m * width, {weights[0]}, {}, sums, count, width);
        add_rows(x + m * K, sums, sums, count * K);
        norm_rows(sums, norm, normed, count, K, epsilon);
        multiply_all(normed, {weights[1], weights[2]}, {}, gates, count, K);
        gate_rows(gates, gated, count, inner);
        multiply_all(gated, {weights[3]}, {}, normed, count, inner);
        add_rows(sums, normed, sums, count * K);
    }
}

// The same layer after it: hidden states x [T, K] and what attention gave [T, H * D] -> hidden states [T, K].
Tensor after_attention(Tensor x, Tensor attended, Tensor norm, double epsilon, std::vector<Tensor> weights) {
    Tensor out = like(x, x.size(1));
    BY_TYPE(x, finish_layer((const T*)x.data_ptr(), (const T*)attended.data_ptr(), (const T*)norm.data_ptr(), float(epsilon),
                            weights, (T*)out.data_ptr(), x.size(0)));
    return out;
}

// query [N, H, D], keys [blocks, block_size, Hk, D], values [blocks, block_size, Hk, Dv]; starts, tables and lens of
// `rows` rows or more, int32 -> out [N, H, Dv], zeros where there is no row; lse [N, H].
std::tuple<Tensor, Tensor> attend(Tensor query, Tensor keys, Tensor values, Tensor starts, Tensor lens, Tensor tables,
                                  int64_t rows, double scaling, int64_t window, double softcap, bool causal) {
    const long N = query.size(0), H = query.size(1), Dv = values.size(3);
    Tensor out = torch::stable::new_empty(query, {N, H, Dv});
    Tensor lse = torch::stable::new_empty(query, {N, H}, torch::headeronly::ScalarType::Float);
    Attention o{(const char*)query.data_ptr(), (const char*)keys.data_ptr(), (const char*)values.data_ptr(),
                (char*)out.data_ptr(), (float*)lse.data_ptr(), (const int32_t*)tables.data_ptr(),
                (const int32_t*)starts.data_ptr(), (const int32_t*)lens.data_ptr(),
                {query.stride(0), query.stride(1)}, {keys.stride(0), keys.stride(1), keys.stride(2)},
                {values.stride(0), values.stride(1), values.stride(2)}, tables.stride(0),
                rows, keys.size(1), H, keys.size(2), query.size(2), Dv, window, causal, float(scaling), float(softcap)};
    const long first = o.starts[0], end = o.starts[rows], width = H * Dv * query.element_size();
    memset(o.out, 0, first * width);
    memset(o.out + end * width, 0, (N - end) * width);
    std::fill(o.lse, o.lse + first * H, NONE);
    std::fill(o.lse + end * H, o.lse + N * H, NONE);
    query.element_size() == 2 ? attend_rows<Bf16>(o) : attend_rows<float>(o);
    return {out, lse};
}

STABLE_TORCH_LIBRARY(twofold_cpu, m) {
    m.def("linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor");
    m.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
    m.def("silu_mul(Tensor x) -> Tensor");
    m.def("rotate(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads) -> (Tensor, Tensor)");
    m.def("before_attention(Tensor x, Tensor norm, float epsilon, Tensor[] qkv, Tensor[] biases, Tensor cos, Tensor sin, "
          "int heads, int kv_heads) -> (Tensor, Tensor)");
    m.def("after_attention(Tensor x, Tensor attended, Tensor norm, float epsilon, Tensor[] weights) -> Tensor");
    m.def("attend(Tensor query, Tensor keys, Tensor values, Tensor starts, Tensor lens, Tensor tables, int rows, "
          "float scaling, int window, float softcap, bool causal) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(twofold_cpu, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("silu_mul", TORCH_BOX(&silu_mul));
    m.impl("rotate", TORCH_BOX(&rotate));
    m.impl("before_attention", TORCH_BOX(&before_attention));
    m.impl("after_attention", TORCH_BOX(&after_attention));
    m.impl("attend", TORCH_BOX(&attend));
}
