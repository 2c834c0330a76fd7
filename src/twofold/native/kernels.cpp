// Kernels for CPUs, in plain C++ with vectors of the compiler, for float32 and bfloat16. `build.py` compiles them.
//
// All products are one microkernel: a few rows of A times a panel of columns of B, in units of 4 bytes. A unit is one
// float, or a pair of bfloat16 whose products are added in float32. B is packed into panels first:
//
//     attend   S = Q K^T   A: queries of a group's heads   B: a block of keys     C: logits, float32, in the caches
//              O += P V    A: weights of the softmax       B: a block of values   C: outputs, float32
//     linear   y = x W^T   A: rows of x                    B: rows of a weight    C: rows of y
//
// With tiles (AMX) weights, keys and values are A, and tokens are the columns of B: see "panels".

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <thread>
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
constexpr long PART = 96;                  // steps of a product by vectors: that part of B stays in the first cache
constexpr int QUERIES = 192;               // rows of a task: queries of all heads of a group
constexpr int TILED_QUERIES = 288;         // the same where tiles multiply: packing keys takes longer than products
constexpr long LEAST_PANEL_TOKENS = 33;    // of a step whose products are by panels
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

// silu(g) = g / (1 + e^-g), by powers of e that are 1 at most; of T's precision
template <class T> inline Vec silu(Vec g) {
    const Vec x = g < 0 ? g : -g, e = sizeof(T) == 2 ? power_of_2(x * LOG2_E) : exponential(x);
    return g * ((g < 0 ? e : all(1)) / (e + 1.0f));
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
        asm volatile("" : : "r"(&all) : "memory");  // the compiler thinks that 8 bytes are read
        if (may_use_tiles()) _tile_loadconfig(&all);
    }
    ~Tiles() { if (may_use_tiles()) _tile_release(); }
};

// A product is 4 tiles at most, C [16 M, 16 N] = A [16 M, steps] B, or += ; M and N are 1 or 2. Strides are in units.
template <int M, int N, bool ADDS> inline void begin_tiles(const float* C, long c) {
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
}

// 16 steps.
template <int M, int N> inline void multiply_tiles(const uint32_t* A, long a, const uint32_t* B, long b) {
    _tile_loadd(4, A, a * 4);
    _tile_loadd(6, B, b * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) _tile_loadd(7, B + 16, b * 4);
    if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (M > 1) _tile_loadd(5, A + 16 * a, a * 4);
    if constexpr (M > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
}

template <int M, int N> inline void end_tiles(float* C, long c) {
    _tile_stored(0, C, c * 4);
    if constexpr (N > 1) _tile_stored(1, C + 16, c * 4);
    if constexpr (M > 1) _tile_stored(2, C + 16 * c, c * 4);
    if constexpr (M > 1 && N > 1) _tile_stored(3, C + 16 * c + 16, c * 4);
}

template <int M, int N, bool ADDS>
inline void tile_product(const uint32_t* A, long a, const uint32_t* B, long b, long steps, float* C, long c) {
    begin_tiles<M, N, ADDS>(C, c);
    for (long s = 0; s < steps; s += 16) multiply_tiles<M, N>(A + s, a, B + s * b, b);
    end_tiles<M, N>(C, c);
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

template <class T, int N, bool ADDS>
void rows_times_part(const uint32_t* A, long a, const uint32_t* B, long steps, float* C, long c, long rows) {
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS) micro<T, ROWS, N, ADDS>(A + i * a, a, B, steps, C + i * c, c);
    for (; i + 2 <= rows; i += 2) micro<T, 2, N, ADDS>(A + i * a, a, B, steps, C + i * c, c);
    for (; i < rows; i++) micro<T, 1, N, ADDS>(A + i * a, a, B, steps, C + i * c, c);
}

// Where tiles fit, A and C have memory for `rows` rounded up to 16, and the calling thread has `Tiles`.
template <class T, int N, bool ADDS>
void rows_times_panel(const uint32_t* A, long a, const uint32_t* B, long steps, float* C, long c, long rows) {
#if HAS_TILES
    if (tiles_fit<T>(steps)) return tiled_panel<N, ADDS>(A, a, B, steps, C, c, rows);
#endif
    for (long s = 0; s < steps; s += PART) {
        const long count = std::min(PART, steps - s);
        if (s) rows_times_part<T, N, true>(A + s, a, B + s * N * W, count, C, c, rows);
        else rows_times_part<T, N, ADDS>(A, a, B, count, C, c, rows);
    }
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

struct Heads { long all, of_keys, dim; };  // of queries, of keys and of values, and the numbers of each

#if HAS_TILES
// A layer's products for many tokens, by tiles, with all but its ends transposed. A panel is 32 tokens as the columns of
// B: [K / 2, 32] units. Then weights are A, and are read from where they are; norms, RoPE and gates have a token a lane,
// and two rows of a product are one of units:
//
//     C = W X   [32 outputs, 32 tokens]   W: rows of a weight   X: a panel   C ──round──► rows of the next panel
constexpr int TOKENS = 32;                 // of a panel
constexpr long BLOCK_TOKENS = 256;         // of a task: their panels stay in a core's second cache
constexpr int V = TOKENS / W;              // vectors of a panel's row

inline Vec low(Units u) { return (Vec)(u << 16); }
inline Vec high(Units u) { return (Vec)(u & 0xffff0000u); }
inline Units paired(Vec low, Vec high) {  // rounds both
    typedef uint16_t Halves __attribute__((vector_size(64)));
    Halves places;
    for (int i = 0; i < W; i++) places[2 * i] = i, places[2 * i + 1] = W + i;
    return (Units)_mm512_permutexvar_epi16((__m512i)places, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

// 2^x for any x, off by 8e-5 of it; 0 from far below.
inline Vec rough_power_of_2(Vec x) {
    const Vec r = (Vec)_mm512_reduce_ps((__m512)x, 1 /* x - floor(x) */);
    Vec p = r * 7.8024521e-2f + 2.2606716e-1f;
    p = p * r + 6.9583354e-1f;
    p = p * r + 9.9992522e-1f;
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// Rows of `steps` units, found by `row(token)`, become a panel; tokens from `count` on are zeros.
template <class Row> void to_panel(Row row, long count, long steps, uint32_t* panel) {
    static const std::vector<uint32_t> zeros(1 << 16);
    for (int v = 0; v < V; v++) {
        const uint32_t* from[W];
        for (int i = 0; i < W; i++) from[i] = v * W + i < count ? (const uint32_t*)row(v * W + i) : zeros.data();
        for (long s = 0; s < steps; s += W) {
            Units block[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) block[i] = load(from[i] + s);
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) store(panel + (s + i) * TOKENS + v * W, block[i]);
        }
    }
}

template <class Row> void from_panel(const uint32_t* panel, long count, long steps, Row row) {
    for (int v = 0; v < V; v++)
        for (long s = 0; s < steps; s += W) {
            Units block[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) block[i] = load(panel + (s + i) * TOKENS + v * W);
            transpose(block);
            for (int i = 0; i < W && v * W + i < count; i++) store((uint32_t*)row(v * W + i) + s, block[i]);
        }
}

void norm_panel(const uint32_t* x, const Bf16* weight, uint32_t* y, long K, float epsilon) {
    for (int v = 0; v < V; v++) {
        Vec squares[2] = {};
        for (long s = 0; s < K / 2; s++) {
            const Units u = load(x + s * TOKENS + v * W);
            squares[0] += low(u) * low(u), squares[1] += high(u) * high(u);
        }
        const Vec scale = 1.0f / (Vec)_mm512_sqrt_ps((__m512)((squares[0] + squares[1]) / float(K) + epsilon));
        for (long s = 0; s < K / 2; s++) {
            const Units u = load(x + s * TOKENS + v * W), scaled = paired(low(u) * scale, high(u) * scale);
            store(y + s * TOKENS + v * W, paired(low(scaled) * from_bf16(weight[2 * s]), high(scaled) * from_bf16(weight[2 * s + 1])));
        }
    }
}

// C [count, 32, 32] = 32 rows of a weight [N, K] times each of `count` panels. In parts of K that stay in the first cache.
void multiply_panels(const Bf16* rows, long K, const uint32_t* panels, long count, float* C) {
    constexpr long PART = 160;  // units
    for (long s = 0; s < K / 2; s += PART)
        for (long p = 0; p < count; p++) {
            const uint32_t *A = reinterpret_cast<const uint32_t*>(rows) + s, *B = panels + (p * K / 2 + s) * TOKENS;
            const long steps = std::min(PART, K / 2 - s);
            float* to = C + p * 32 * TOKENS;
            if (s) tile_product<2, 2, true>(A, K / 2, B, TOKENS, steps, to, TOKENS);
            else tile_product<2, 2, false>(A, K / 2, B, TOKENS, steps, to, TOKENS);
        }
}

inline Vec row_of(const float* C, long row, int v) { return load(C + row * TOKENS + v * W); }

// Adds a rounded product C of rows from `n` to a panel.
inline void add_to_panel(uint32_t* panel, long n, const float* C) {
    for (int j = 0; j < 16; j++)
        for (int v = 0; v < V; v++) {
            const Units u = paired(row_of(C, 2 * j, v), row_of(C, 2 * j + 1, v));
            uint32_t* to = panel + (n / 2 + j) * TOKENS + v * W;
            store(to, paired(low(load(to)) + low(u), high(load(to)) + high(u)));
        }
}

inline Vec rough_silu(Vec g) {
    return g * (Vec)_mm512_rcp14_ps((__m512)(1.0f + rough_power_of_2(g * -LOG2_E)));
}

// 32 rows of gates, and of what they gate -> 16 units of a panel.
inline void gate_panel(const float* gates, const float* ups, uint32_t* to) {
    for (int j = 0; j < 16; j++)
        for (int v = 0; v < V; v++) {
            const Units g = paired(row_of(gates, 2 * j, v), row_of(gates, 2 * j + 1, v)), u = paired(row_of(ups, 2 * j, v), row_of(ups, 2 * j + 1, v));
            const Units s = paired(rough_silu(low(g)), rough_silu(high(g)));
            store(to + j * TOKENS + v * W, paired(low(s) * low(u), high(s) * high(u)));
        }
}

// Tokens of a task: multiples of a panel, with an equal share for each thread.
inline long block_tokens(long M) {
    const long threads = omp_get_max_threads(), blocks = (M + threads * BLOCK_TOKENS - 1) / (threads * BLOCK_TOKENS) * threads;
    return ((M + blocks - 1) / blocks + TOKENS - 1) / TOKENS * TOKENS;
}

// As `before_attention`, for tokens from `first` on.
template <class Entry>
void tiled_before(const Bf16* x, const Bf16* norm, float epsilon, const Bf16* const* weights, const Bf16* const* biases, const Bf16* cos,
                  const Bf16* sin, Bf16* q, Entry entry, long first, long tokens, long K, Heads heads) {
    const Tiles tiles;
    const long D = heads.dim, count = (tokens + TOKENS - 1) / TOKENS, panel = K / 2 * TOKENS, head = D / 2 * TOKENS;
    uint32_t* X = scratch<uint32_t>(memory[0], count * panel);
    uint32_t* angles = scratch<uint32_t>(memory[1], count * 2 * head);
    uint32_t* result = scratch<uint32_t>(memory[2], head);
    float* numbers = scratch<float>(memory[3], count * D * TOKENS);  // [D / 32, count, 32, 32] of a head
    auto of_panel = [&](long p) { return std::min<long>(TOKENS, tokens - p * TOKENS); };
    for (long p = 0; p < count; p++) {
        const long m = first + p * TOKENS;
        to_panel([&](long i) { return x + (m + i) * K; }, of_panel(p), K / 2, X + p * panel);
        norm_panel(X + p * panel, norm, X + p * panel, K, epsilon);
        to_panel([&](long i) { return cos + (m + i) * D; }, of_panel(p), D / 2, angles + p * 2 * head);
        to_panel([&](long i) { return sin + (m + i) * D; }, of_panel(p), D / 2, angles + p * 2 * head + head);
    }
    for (long h = 0; h < heads.all + 2 * heads.of_keys; h++) {
        const long key = h - heads.all, value = key - heads.of_keys;
        const long kind = value >= 0 ? 2 : key >= 0, number = value >= 0 ? value : key >= 0 ? key : h;
        const Bf16* bias = biases[kind] ? biases[kind] + number * D : nullptr;
        for (long n = 0; n < D; n += 32) multiply_panels(weights[kind] + (number * D + n) * K, K, X, count, numbers + n * count * TOKENS);
        for (long p = 0; p < count; p++) {
            auto unit_of = [&](long j, int v) {
                const float* C = numbers + (j / 16 * count + p) * 32 * TOKENS;
                Vec x = row_of(C, 2 * (j % 16), v), y = row_of(C, 2 * (j % 16) + 1, v);
                if (bias) x += from_bf16(bias[2 * j]), y += from_bf16(bias[2 * j + 1]);
                return paired(x, y);
            };
            const uint32_t *c = angles + p * 2 * head, *s = c + head;
            if (kind == 2)
                for (long j = 0; j < D / 2; j++)
                    for (int v = 0; v < V; v++) store(result + j * TOKENS + v * W, unit_of(j, v));
            else  // halves of the head turn together
                for (long j = 0; j < D / 4; j++)
                    for (int v = 0; v < V; v++) {
                        const long at = j * TOKENS + v * W, other = at + D / 4 * TOKENS;
                        const Units x = unit_of(j, v), y = unit_of(j + D / 4, v);
                        const Units a = load(c + at), b = load(s + at), e = load(c + other), f = load(s + other);
                        store(result + at, paired(low(x) * low(a) - low(y) * low(b), high(x) * high(a) - high(y) * high(b)));
                        store(result + other, paired(low(y) * low(e) + low(x) * low(f), high(y) * high(e) + high(x) * high(f)));
                    }
            const long m = first + p * TOKENS;
            from_panel(result, of_panel(p), D / 2, [&](long i) {
                return kind == 0 ? q + ((m + i) * heads.all + number) * D : entry(m + i) + (number * 2 + kind - 1) * D;
            });
        }
    }
}

// As `after_attention`, for tokens from `first` on. weights: o, gate, up, down.
void tiled_after(const Bf16* x, const Bf16* attended, const Bf16* norm, float epsilon, const Bf16* const* weights, Bf16* out, long first,
                 long tokens, long K, long width, long inner) {
    const Tiles tiles;
    const long count = (tokens + TOKENS - 1) / TOKENS, panel = K / 2 * TOKENS, wide = width / 2 * TOKENS, gates = inner / 2 * TOKENS;
    uint32_t* X = scratch<uint32_t>(memory[0], count * panel);
    uint32_t* A = scratch<uint32_t>(memory[1], count * std::max(panel, wide));  // of attention, then normed
    uint32_t* G = scratch<uint32_t>(memory[2], count * gates);
    float *C = scratch<float>(memory[3], 2 * count * 32 * TOKENS), *ups = C + count * 32 * TOKENS;
    auto of_panel = [&](long p) { return std::min<long>(TOKENS, tokens - p * TOKENS); };
    for (long p = 0; p < count; p++) {
        const long m = first + p * TOKENS;
        to_panel([&](long i) { return x + (m + i) * K; }, of_panel(p), K / 2, X + p * panel);
        to_panel([&](long i) { return attended + (m + i) * width; }, of_panel(p), width / 2, A + p * wide);
    }
    for (long n = 0; n < K; n += 32) {
        multiply_panels(weights[0] + n * width, width, A, count, C);
        for (long p = 0; p < count; p++) add_to_panel(X + p * panel, n, C + p * 32 * TOKENS);
    }
    for (long p = 0; p < count; p++) norm_panel(X + p * panel, norm, A + p * panel, K, epsilon);
    for (long n = 0; n < inner; n += 32) {
        multiply_panels(weights[1] + n * K, K, A, count, C);
        multiply_panels(weights[2] + n * K, K, A, count, ups);
        for (long p = 0; p < count; p++) gate_panel(C + p * 32 * TOKENS, ups + p * 32 * TOKENS, G + p * gates + n / 2 * TOKENS);
    }
    for (long n = 0; n < K; n += 32) {
        multiply_panels(weights[3] + n * inner, inner, G, count, C);
        for (long p = 0; p < count; p++) add_to_panel(X + p * panel, n, C + p * 32 * TOKENS);
    }
    for (long p = 0; p < count; p++)
        from_panel(X + p * panel, of_panel(p), K / 2, [&](long i) { return out + (first + p * TOKENS + i) * K; });
}

// Attention of 32 queries of each head of a group, in the same form: S = K Q is [keys, queries], O = V^T P is [Dv, queries].
// Keys and values of a row are packed once for all of its tasks: keys [len, D], values [len / 512][Dv, 512].
constexpr long TILED_KEYS = 512;
constexpr long LEAST_QUERIES = 16;  // of a row that is worth packing for
constexpr float MOST = 8;           // of a weight: its logarithm to base 2
constexpr float FAR = -1e30f;       // in the place of masked logits: its power is 0, and differences are finite

struct PackedKeys { Bf16 *keys, *values; };  // of a row and head

void pack_keys(const Attention& o, long row, long head, long first, PackedKeys to) {
    static const Bf16 zeros[1 << 12] = {};
    const int32_t* table = o.tables + row * o.table_stride;
    const long count = std::min<long>(TILED_KEYS, o.lens[row] - first), padded = (count + 31) / 32 * 32;
    auto place = [&](const char* base, const int64_t* strides, long k) {
        k += first;
        return (const Bf16*)base + table[k / o.block_size] * strides[0] + k % o.block_size * strides[1] + head * strides[2];
    };
    for (long k = 0; k < padded; k++) {
        Bf16* key = to.keys + (first + k) * o.dim;
        if (k < count) memcpy(key, place(o.keys, o.key_strides, k), o.dim * 2);
        else memset(key, 0, o.dim * 2);
    }
    Bf16* values = to.values + first * o.v_dim;
    for (long k = 0; k < padded; k += 32) {
        const Bf16* rows[32];
        for (int i = 0; i < 32; i++) rows[i] = k + i < count ? place(o.values, o.value_strides, k + i) : zeros;
        for (long d = 0; d < o.v_dim; d += 16) {
            Units block[16];
            for (int i = 0; i < 16; i++) block[i] = paired(get_vector(rows[2 * i] + d), get_vector(rows[2 * i + 1] + d));
            transpose(block);
            for (int i = 0; i < 16; i++) store((uint32_t*)(values + (d + i) * TILED_KEYS + k), block[i]);
        }
    }
}

// Tiles multiply the next 32 keys while vectors compute the softmax of these. Weights may be as large as 2^MOST, so what
// was computed before seldom changes when a larger logit comes.
void tiled_run(const Attention& o, const Task& t, PackedKeys packed) {
    const Tiles tiles;
    const long groups = o.heads / o.kv_heads, D = o.dim, Dv = o.v_dim, token = o.starts[t.row] + t.first, len = o.lens[t.row];
    const long position = len - (o.starts[t.row + 1] - o.starts[t.row]) + t.first;  // of the first query
    const float factor = o.scaling * LOG2_E, most_logit = MOST / factor;
    uint32_t* Q = scratch<uint32_t>(memory[0], groups * D / 2 * TOKENS);
    float* logits = scratch<float>(memory[1], 2 * 32 * TOKENS);
    uint32_t* P = scratch<uint32_t>(memory[2], TILED_KEYS / 2 * TOKENS);
    float* O = scratch<float>(memory[3], groups * Dv * TOKENS);
    float* state = scratch<float>(memory[4], groups * 2 * TOKENS);  // a logit close to the largest, and the sums of weights
    uint32_t* result = scratch<uint32_t>(memory[5], Dv / 2 * TOKENS);
    for (long g = 0; g < groups; g++) {
        const Bf16* from = (const Bf16*)o.query + token * o.query_strides[0] + (t.kv_head * groups + g) * o.query_strides[1];
        to_panel([&](long i) { return from + i * o.query_strides[0]; }, t.count, D / 2, Q + g * D / 2 * TOKENS);
    }
    memset(O, 0, groups * Dv * TOKENS * sizeof(float));
    for (long i = 0; i < groups * 2 * TOKENS; i++) state[i] = i / TOKENS % 2 ? 0 : FAR;
    auto multiply_keys = [&](long key, long g, float* to) {
        tile_product<2, 2, false>((const uint32_t*)(packed.keys + key * D), D / 2, Q + g * D / 2 * TOKENS, TOKENS, D / 2, to, TOKENS);
    };
    float *S = logits, *next_S = logits + 32 * TOKENS;
    const long begin = t.low / 32 * 32;
    multiply_keys(begin, 0, S);
    for (long block = t.low / TILED_KEYS * TILED_KEYS; block < t.high; block += TILED_KEYS) {
        const long first = std::max(block, begin), end = std::min(block + TILED_KEYS, (t.high + 31) / 32 * 32);
        for (long g = 0; g < groups; g++) {
            float *maxima = state + g * 2 * TOKENS, *sums = maxima + TOKENS, *out = O + g * Dv * TOKENS;
            for (long key = first; key < end; key += 32, std::swap(S, next_S)) {
                if (key + 32 < end) multiply_keys(key + 32, g, next_S);
                else if (g + 1 < groups) multiply_keys(first, g + 1, next_S);
                else if (end < t.high) multiply_keys(end, 0, next_S);
                uint32_t* weights = P + (key - first) / 2 * TOKENS;
                const char* values = (const char*)(packed.values + block * Dv + (key - block));
                for (int v = 0; v < V; v++) {
                    const long masked = o.window ? 0 : o.causal ? std::max(0l, position + v * W + 1 - key) : len - key;  // the first that may be
                    if (masked < 32) {
                        const Ints query = places() + int(position + v * W);  // the last key that it attends to
                        for (long k = masked; k < 32; k++) {
                            const int at = int(key + k);
                            const Ints seen = o.causal ? query >= at : Ints{} + -(at < len), in_window = o.window ? query - int(o.window) < at : Ints{} - 1;
                            store(S + k * TOKENS + v * W, (seen & in_window) ? row_of(S, k, v) : all(FAR));
                        }
                    }
                    Vec most[4] = {all(FAR), all(FAR), all(FAR), all(FAR)};
#pragma GCC unroll 8
                    for (long k = 0; k < 32; k += 4)
                        for (int i = 0; i < 4; i++) most[i] = wider(most[i], row_of(S, k + i, v));
                    const Vec largest = wider(wider(most[0], most[1]), wider(most[2], most[3]));
                    Vec shift = load(maxima + v * W), total = load(sums + v * W);
                    if (_mm512_cmp_ps_mask((__m512)largest, (__m512)(shift + most_logit), _CMP_GT_OQ)) {
                        const Vec now = wider(shift, largest), scale = exponential((shift - now) * o.scaling);
                        for (long d = 0; d < Dv; d++) store(out + d * TOKENS + v * W, row_of(out, d, v) * scale);
                        for (long k = 0; k < (key - first) / 2; k++) {
                            const Units u = load(P + k * TOKENS + v * W);
                            store(P + k * TOKENS + v * W, paired(low(u) * scale, high(u) * scale));
                        }
                        total *= scale, shift = now;
                        store(maxima + v * W, now);
                    }
                    shift *= factor;
                    Vec other = {};
#pragma GCC unroll 2
                    for (long k = 0; k < 32; k += 2) {
                        const Vec a = rough_power_of_2(row_of(S, k, v) * factor - shift), b = rough_power_of_2(row_of(S, k + 1, v) * factor - shift);
                        total += a, other += b;
                        store(weights + k / 2 * TOKENS + v * W, paired(a, b));
                        for (int i = 0; i < 2; i++) __builtin_prefetch(values + (v * Dv / 2 + k + i) * TILED_KEYS * 2);
                    }
                    store(sums + v * W, total + other);
                }
            }
            const uint32_t* values = (const uint32_t*)(packed.values + block * Dv + (first - block));
            for (long d = 0; d < Dv; d += 32)
                tile_product<2, 2, true>(values + d * TILED_KEYS / 2, TILED_KEYS / 2, P, TOKENS, (end - first) / 2, out + d * TOKENS, TOKENS);
        }
    }
    for (long g = 0; g < groups; g++) {
        const float *maxima = state + g * 2 * TOKENS, *sums = maxima + TOKENS, *from = O + g * Dv * TOKENS;
        const long head = t.kv_head * groups + g;
        for (int v = 0; v < V; v++) {
            const Vec share = 1.0f / load(sums + v * W);
            for (long j = 0; j < Dv / 2; j++) store(result + j * TOKENS + v * W, paired(row_of(from, 2 * j, v) * share, row_of(from, 2 * j + 1, v) * share));
        }
        from_panel(result, t.count, Dv / 2, [&](long i) { return (Bf16*)o.out + ((token + i) * o.heads + head) * Dv; });
        for (long i = 0; i < t.count; i++) o.lse[(token + i) * o.heads + head] = maxima[i] * o.scaling + std::log(sums[i]);
    }
}
#endif

// The tasks of a step's attention; those of all layers with one window are the same.
struct AttentionPlan {
    std::vector<Task> tasks;
    std::vector<std::pair<long, long>> split;  // tasks of one row and head: the first, and how many
    std::vector<float> parts;                  // partial results
    long work = 0;
#if HAS_TILES
    std::vector<Task> packing, tiled;  // keys of a row and head that are packed, from `first` on; and tasks over them
    std::vector<PackedKeys> packed;    // [rows, Hk]
#endif
};

// Where all threads of a loop wait for each other. It takes less time than OpenMP's barrier, and a thread that waits long
// gives its core to another program: on a busy machine the one that it waits for may have none.
class Meeting {
    std::atomic<int> arrived{0};
    std::atomic<long> round{0};

public:
    void wait() {
        const long now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == omp_get_num_threads() - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
            if (spins > 2000) std::this_thread::yield();
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }
};

// Whether `tiled_run` attends for rows of many tokens.
template <class T> bool is_tiled(const Attention& o) {
    return tiles_fit<T>(0) && o.dim % 32 == 0 && o.v_dim % 32 == 0 && !o.softcap && o.scaling > 0;
}

#if HAS_TILES
void plan_tiled(const Attention& o, AttentionPlan& plan) {
    long numbers = 0;
    for (long row = 0; row < o.rows; row++)
        if (o.starts[row + 1] - o.starts[row] >= LEAST_QUERIES) numbers += (o.lens[row] + TILED_KEYS) * o.kv_heads * (o.dim + o.v_dim);
    plan.packed.resize(o.rows * o.kv_heads);
    Bf16* next = scratch<Bf16>(between[2], numbers);
    for (long row = o.rows - 1; row >= 0; row--) {
        const long length = o.starts[row + 1] - o.starts[row], start = o.lens[row] - length, size = (o.lens[row] + TILED_KEYS - 1) / TILED_KEYS * TILED_KEYS;
        if (length < LEAST_QUERIES) continue;
        for (long head = 0; head < o.kv_heads; head++) {
            plan.packed[row * o.kv_heads + head] = {next, next + size * o.dim};
            next += size * (o.dim + o.v_dim);
            for (long key = 0; key < size; key += TILED_KEYS) plan.packing.push_back({row, key, 0, head, 0, 0, -1});
        }
        for (long first = (length - 1) / TOKENS * TOKENS; first >= 0; first -= TOKENS) {
            const long count = std::min<long>(TOKENS, length - first), high = o.causal ? start + first + count : o.lens[row];
            const long low = o.window ? std::max(0l, start + first + 1 - o.window) : 0;
            for (long head = 0; head < o.kv_heads; head++) plan.tiled.push_back({row, first, count, head, low, high, -1});
        }
    }
}
#endif

template <class T> AttentionPlan plan_attention(const Attention& o) {
    AttentionPlan plan;
    const long groups = o.heads / o.kv_heads, queries = tiles_fit<T>(0) ? TILED_QUERIES : QUERIES;
    const long size = std::max<long>(1, queries / groups);
    const long width = (o.v_dim + W - 1) / W * W;
    long num_parts = 0, all_keys = 0;
    for (long row = 0; row < o.rows; row++) all_keys += o.lens[row];
    const long run_keys = std::max<long>(KEYS, (all_keys * o.kv_heads / 8 + KEYS - 1) / KEYS * KEYS);
    for (long row = o.rows - 1; row >= 0; row--) {
        const long length = o.starts[row + 1] - o.starts[row], start = o.lens[row] - length;
#if HAS_TILES
        if (is_tiled<T>(o) && length >= LEAST_QUERIES) continue;
#endif
        for (long first = (length - 1) / size * size; first >= 0; first -= size) {
            const long count = std::min(size, length - first), high = o.causal ? start + first + count : start + length;
            const long low = o.window ? std::max(0l, start + first + 1 - o.window) : 0;
            for (long head = 0; head < o.kv_heads; head++) {
                if (length > 1 || high - low <= run_keys) {
                    plan.tasks.push_back({row, first, count, head, low, high, -1});
                    continue;
                }
                plan.split.push_back({long(plan.tasks.size()), 0});
                for (long key = low; key < high; key += run_keys, plan.split.back().second++)
                    plan.tasks.push_back({row, 0, 1, head, key, std::min(key + run_keys, high), num_parts++});
            }
        }
    }
    plan.parts.resize(num_parts * groups * (width + 2));
#if HAS_TILES
    if (is_tiled<T>(o)) plan_tiled(o, plan);
    for (const Task& t : plan.tiled) plan.work += t.count * groups * (t.high - t.low) * (o.dim + o.v_dim);
#endif
    for (const Task& t : plan.tasks) plan.work += t.count * groups * (t.high - t.low) * (o.dim + o.v_dim);
    return plan;
}

// What follows up to the operations is called by all threads, which share its loops.

template <class T> void attend_rows(const Attention& o, AttentionPlan& plan, Meeting& meeting) {
#if HAS_TILES
    auto packed = [&](const Task& t) { return plan.packed[t.row * o.kv_heads + t.kv_head]; };
    if (!plan.tiled.empty()) {
#pragma omp for schedule(dynamic, 1) nowait
        for (size_t i = 0; i < plan.packing.size(); i++) pack_keys(o, plan.packing[i].row, plan.packing[i].kv_head, plan.packing[i].first, packed(plan.packing[i]));
        meeting.wait();
#pragma omp for schedule(dynamic, 1) nowait
        for (size_t i = 0; i < plan.tiled.size(); i++) tiled_run(o, plan.tiled[i], packed(plan.tiled[i]));
    }
#endif
#pragma omp for schedule(dynamic, 1) nowait
    for (size_t i = 0; i < plan.tasks.size(); i++) run<T>(o, plan.tasks[i], plan.parts.data());
    meeting.wait();
    if (plan.split.empty()) return;
#pragma omp for schedule(static) nowait
    for (size_t i = 0; i < plan.split.size(); i++)
        merge<T>(o, plan.tasks[plan.split[i].first], plan.split[i].second, plan.parts.data());
    meeting.wait();
}

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

// Loops over rows: each takes those from `first` to `last`.

template <class T> void norm_rows(const T* x, const T* weight, T* y, long first, long last, long K, float epsilon) {
    for (long m = first; m < last; m++) {
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

template <class T> void add_rows(const T* x, const T* y, T* sum, long first, long last, long K) {
    long i = first * K;
    for (; i + W <= last * K; i += W) put_vector(sum + i, get_vector(x + i) + get_vector(y + i));
    for (; i < last * K; i++) put(sum + i, to_float(x[i]) + to_float(y[i]));
}

template <class T> void gate_rows(const T* x, T* y, long first, long last, long K) {
    for (long m = first; m < last; m++) {
        const T *gate = x + m * 2 * K, *up = gate + K;
        long k = 0;
        for (; k + W <= K; k += W) put_vector(y + m * K + k, rounded<T>(silu<T>(get_vector(gate + k))) * get_vector(up + k));
        for (; k < K; k++) put(y + m * K + k, rounded<T>(silu<T>(all(to_float(gate[k])))[0]) * to_float(up[k]));
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

// qkv [M, all heads side by side] -> queries q [M, H, D], and each token's KV entry, at `entry(m)`.
template <class T, class Entry>
void rotate_rows(const T* qkv, const T* cos, const T* sin, T* q, Entry entry, long first, long last, Heads heads) {
    const long D = heads.dim;
    for (long m = first; m < last; m++) {
        const T *from = qkv + m * (heads.all + 2 * heads.of_keys) * D, *c = cos + m * D, *s = sin + m * D;
        for (long h = 0; h < heads.all; h++) turn(from + h * D, c, s, q + (m * heads.all + h) * D, D / 2);
        T* to = entry(m);
        for (long h = 0; h < heads.of_keys; h++) {
            turn(from + (heads.all + h) * D, c, s, to + h * 2 * D, D / 2);
            memcpy(to + (h * 2 + 1) * D, from + (heads.all + heads.of_keys + h) * D, D * sizeof(T));
        }
    }
}

// A layer's weights and its KV cache: their addresses, 0 for no bias. Linears are [N, K] and dense.
struct Layer { const void *norm, *qkv[3], *biases[3], *o, *norm_after, *gate, *up, *down; void* entries; int64_t window; };

// All layers of a step.
struct Stack {
    const Layer* layers;
    long num_layers, tokens, width, inner;  // of hidden states, and between gate and down
    Heads heads;
    float epsilon;
    const void *cos, *sin, *norm;  // of RoPE [tokens, D]; of the last hidden states
    const int64_t* slots;          // token -> the place of its entry
    Attention attention;           // without queries, keys and values
};

template <class T> Attention attention_of(const Stack& s, const Layer& layer, const T* query, T* out, float* lse) {
    Attention o = s.attention;
    o.query = (const char*)query, o.out = (char*)out, o.lse = lse, o.window = layer.window;
    o.keys = (const char*)layer.entries, o.values = o.keys + s.heads.dim * sizeof(T);
    return o;
}

// A layer's queries, keys and values side by side, of normed hidden states. Called by all threads.
template <class T> void multiply_qkv(const Stack& s, const Layer& layer, const T* normed, T* qkv) {
    const long D = s.heads.dim, width = (s.heads.all + 2 * s.heads.of_keys) * D, counts[] = {s.heads.all * D, s.heads.of_keys * D, s.heads.of_keys * D};
    for (long i = 0, start = 0; i < 3; start += counts[i++])
        multiply_rows((const T*)normed, (const T*)layer.qkv[i], s.width, (const T*)layer.biases[i], qkv + start, width, s.tokens, counts[i], s.width);
}

// x [tokens, width] -> the last hidden states, normed; one loop of all threads. Each has the hidden states of its own:
// making them twice takes less time than waiting for others.
template <class T> void layers_of_few(const Stack& s, const T* x, T* out) {
    const long M = s.tokens, K = s.width, of_heads = s.heads.all * s.heads.dim, entry_width = 2 * s.heads.of_keys * s.heads.dim;
    std::vector<T> qkv(M * (of_heads + entry_width)), queries(M * of_heads), attended(M * of_heads), sums(M * K), gates(M * 2 * s.inner), gated(M * s.inner);
    std::vector<float> lse(M * s.heads.all);
    std::vector<std::pair<int64_t, AttentionPlan>> plans;  // by window
    auto plan_of = [&](const Layer& layer) -> AttentionPlan* {
        for (auto& [window, plan] : plans) if (window == layer.window) return &plan;
        return nullptr;
    };
    for (long l = 0; l < s.num_layers; l++)
        if (!plan_of(s.layers[l])) plans.push_back({s.layers[l].window, plan_attention<T>(attention_of<T>(s, s.layers[l], nullptr, nullptr, nullptr))});
    Meeting meeting;
#pragma omp parallel
    {
        T *mine = scratch<T>(between[0], M * K), *normed = scratch<T>(between[1], M * K);
        memcpy(mine, x, M * K * sizeof(T));
        for (const Layer* layer = s.layers; layer < s.layers + s.num_layers; layer++) {
            norm_rows(mine, (const T*)layer->norm, normed, 0, M, K, s.epsilon);
            multiply_qkv(s, *layer, normed, qkv.data());
            meeting.wait();
            auto entry = [&](long m) { return (T*)layer->entries + s.slots[m] * entry_width; };
#pragma omp for schedule(static) nowait
            for (long m = 0; m < M; m++) rotate_rows(qkv.data(), (const T*)s.cos, (const T*)s.sin, queries.data(), entry, m, m + 1, s.heads);
            meeting.wait();
            attend_rows<T>(attention_of<T>(s, *layer, queries.data(), attended.data(), lse.data()), *plan_of(*layer), meeting);
            multiply_rows<T>(attended.data(), (const T*)layer->o, of_heads, nullptr, sums.data(), K, M, K, of_heads);
            meeting.wait();
            add_rows<T>(mine, sums.data(), mine, 0, M, K);
            norm_rows<T>(mine, (const T*)layer->norm_after, normed, 0, M, K, s.epsilon);
            multiply_rows<T>(normed, (const T*)layer->gate, K, nullptr, gates.data(), 2 * s.inner, M, s.inner, K);
            multiply_rows<T>(normed, (const T*)layer->up, K, nullptr, gates.data() + s.inner, 2 * s.inner, M, s.inner, K);
            meeting.wait();
#pragma omp for schedule(static) nowait
            for (long m = 0; m < M; m++) gate_rows(gates.data(), gated.data(), m, m + 1, s.inner);
            meeting.wait();
            multiply_rows<T>(gated.data(), (const T*)layer->down, s.inner, nullptr, sums.data(), K, M, K, s.inner);
            meeting.wait();
            add_rows<T>(mine, sums.data(), mine, 0, M, K);
        }
#pragma omp for schedule(static)
        for (long m = 0; m < M; m++) norm_rows(mine, (const T*)s.norm, out, m, m + 1, K, s.epsilon);
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

// Calls f for ranges of M rows, by several threads if there are many numbers.
template <class F> void share_rows(long M, long width, F f) {
#pragma omp parallel for schedule(static) if (M * width > SMALL)
    for (long m = 0; m < M; m++) f(m, m + 1);
}

// Llama's norm: x [..., K], contiguous; weight [K] -> weight * round(x / rms(x)).
Tensor rms_norm(Tensor x, Tensor weight, double epsilon) {
    const long K = weight.size(0), M = x.numel() / K;
    Tensor y = like(x, K);
    BY_TYPE(x, share_rows(M, K, [&](long first, long last) {
        norm_rows((const T*)x.data_ptr(), (const T*)weight.data_ptr(), (T*)y.data_ptr(), first, last, K, float(epsilon));
    }));
    return y;
}

// x [..., 2 * K], contiguous: gates and what they gate -> silu(gate) * up [..., K].
Tensor silu_mul(Tensor x) {
    const long K = x.size(x.dim() - 1) / 2, M = x.numel() / (2 * K);
    Tensor y = like(x, K);
    BY_TYPE(x, share_rows(M, K, [&](long first, long last) { gate_rows((const T*)x.data_ptr(), (T*)y.data_ptr(), first, last, K); }));
    return y;
}

// qkv [T, (H + 2 * Hk) * D]; cos, sin [T, D] of Llama's RoPE, which turns halves of a head -> queries [T, H, D], and KV
// entries [T, Hk * 2 * D], each head's key before its value.
std::tuple<Tensor, Tensor> rotate(Tensor qkv, Tensor cos, Tensor sin, int64_t heads, int64_t kv_heads) {
    const long M = qkv.size(0), D = qkv.size(1) / (heads + 2 * kv_heads);
    Tensor q = torch::stable::new_empty(qkv, {M, heads, D}), entries = torch::stable::new_empty(qkv, {M, kv_heads * 2 * D});
    BY_TYPE(qkv, share_rows(M, heads * D, [&](long first, long last) {
        auto entry = [&](long m) { return (T*)entries.data_ptr() + m * kv_heads * 2 * D; };
        rotate_rows((const T*)qkv.data_ptr(), (const T*)cos.data_ptr(), (const T*)sin.data_ptr(), (T*)q.data_ptr(), entry, first, last,
                    Heads{heads, kv_heads, D});
    }));
    return {q, entries};
}

// Whether layers of these sizes are multiplied by panels.
template <class T> bool uses_panels(long M, std::initializer_list<long> sizes) {
    return M >= LEAST_PANEL_TOKENS && tiles_fit<T>(0) && std::all_of(sizes.begin(), sizes.end(), [](long size) { return size % 32 == 0; });
}
inline bool are_dense(const std::vector<Tensor>& weights) {
    return std::all_of(weights.begin(), weights.end(), [](const Tensor& weight) { return weight.stride(0) == weight.size(1); });
}

// A layer like Llama's before its attention: hidden states x [T, K] -> queries and KV entries, as `rotate` has them.
std::tuple<Tensor, Tensor> before_attention(Tensor x, Tensor norm, double epsilon, std::vector<Tensor> qkv,
                                            std::vector<Tensor> biases, Tensor cos, Tensor sin, int64_t heads, int64_t kv_heads) {
#if HAS_TILES
    const long M = x.size(0), K = x.size(1), D = qkv[0].size(0) / heads;
    if (x.element_size() == 2 && uses_panels<Bf16>(M, {K, D}) && are_dense(qkv)) {
        Tensor q = torch::stable::new_empty(x, {M, heads, D}), entries = torch::stable::new_empty(x, {M, kv_heads * 2 * D});
        const Bf16 *weights[3], *added[3] = {};
        for (int i = 0; i < 3; i++) weights[i] = (const Bf16*)qkv[i].data_ptr();
        for (size_t i = 0; i < biases.size(); i++) added[i] = (const Bf16*)biases[i].data_ptr();
        auto entry = [&](long m) { return (Bf16*)entries.data_ptr() + m * kv_heads * 2 * D; };
        const long block = block_tokens(M);
#pragma omp parallel for schedule(dynamic, 1)
        for (long m = 0; m < M; m += block)
            tiled_before((const Bf16*)x.data_ptr(), (const Bf16*)norm.data_ptr(), float(epsilon), weights, added, (const Bf16*)cos.data_ptr(),
                         (const Bf16*)sin.data_ptr(), (Bf16*)q.data_ptr(), entry, m, std::min(block, M - m), K, Heads{heads, kv_heads, D});
        return {q, entries};
    }
#endif
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
        share_rows(count, K, [&](long first, long last) {
            add_rows(x + m * K, sums, sums, first, last, K);
            norm_rows(sums, norm, normed, first, last, K, epsilon);
        });
        multiply_all(normed, {weights[1], weights[2]}, {}, gates, count, K);
        share_rows(count, inner, [&](long first, long last) { gate_rows(gates, gated, first, last, inner); });
        multiply_all(gated, {weights[3]}, {}, normed, count, inner);
        share_rows(count, K, [&](long first, long last) { add_rows(sums, normed, sums, first, last, K); });
    }
}

// The same layer after it: hidden states x [T, K] and what attention gave [T, H * D] -> hidden states [T, K].
Tensor after_attention(Tensor x, Tensor attended, Tensor norm, double epsilon, std::vector<Tensor> weights) {
    Tensor out = like(x, x.size(1));
#if HAS_TILES
    const long M = x.size(0), K = x.size(1), width = weights[0].size(1), inner = weights[3].size(1);
    if (x.element_size() == 2 && uses_panels<Bf16>(M, {K, width, inner}) && are_dense(weights)) {
        const Bf16* all[4];
        for (int i = 0; i < 4; i++) all[i] = (const Bf16*)weights[i].data_ptr();
        const long block = block_tokens(M);
#pragma omp parallel for schedule(dynamic, 1)
        for (long m = 0; m < M; m += block)
            tiled_after((const Bf16*)x.data_ptr(), (const Bf16*)attended.data_ptr(), (const Bf16*)norm.data_ptr(), float(epsilon), all,
                        (Bf16*)out.data_ptr(), m, std::min(block, M - m), K, width, inner);
        return out;
    }
#endif
    BY_TYPE(x, finish_layer((const T*)x.data_ptr(), (const T*)attended.data_ptr(), (const T*)norm.data_ptr(), float(epsilon),
                            weights, (T*)out.data_ptr(), x.size(0)));
    return out;
}

// All layers like Llama's, and the norm after them: hidden states x [T, K] -> [T, K]; new KV entries go to the cache.
// layers [L, 14] int64 are `Layer`s; norm [K]; cos, sin [T, D]; slots [T] int64; starts, lens and tables as `attend` has
// them. Few tokens only: each thread keeps the hidden states of all.
Tensor layers(Tensor x, Tensor layers, Tensor norm, double epsilon, Tensor cos, Tensor sin, Tensor slots, Tensor starts, Tensor lens,
              Tensor tables, int64_t rows, int64_t block_size, int64_t heads, int64_t kv_heads, int64_t inner, double scaling,
              double softcap) {
    static_assert(sizeof(Layer) == 14 * sizeof(int64_t));
    const long D = cos.size(1), width = kv_heads * 2 * D;
    Tensor out = like(x, x.size(1));
    Attention attention{nullptr, nullptr, nullptr, nullptr, nullptr, (const int32_t*)tables.data_ptr(),
                        (const int32_t*)starts.data_ptr(), (const int32_t*)lens.data_ptr(),
                        {heads * D, D}, {block_size * width, width, 2 * D}, {block_size * width, width, 2 * D}, tables.stride(0),
                        rows, block_size, heads, kv_heads, D, D, 0, true, float(scaling), float(softcap)};
    Stack stack{(const Layer*)layers.data_ptr(), layers.size(0), x.size(0), x.size(1), inner, {heads, kv_heads, D}, float(epsilon),
                cos.data_ptr(), sin.data_ptr(), norm.data_ptr(), (const int64_t*)slots.data_ptr(), attention};
    BY_TYPE(x, layers_of_few<T>(stack, (const T*)x.data_ptr(), (T*)out.data_ptr()));
    return out;
}

template <class T> void attend_alone(const Attention& o) {
    AttentionPlan plan = plan_attention<T>(o);
    Meeting meeting;
#pragma omp parallel if (plan.work > SMALL)
    attend_rows<T>(o, plan, meeting);
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
    BY_TYPE(query, attend_alone<T>(o));
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
    m.def("layers(Tensor x, Tensor layers, Tensor norm, float epsilon, Tensor cos, Tensor sin, Tensor slots, Tensor starts, "
          "Tensor lens, Tensor tables, int rows, int block_size, int heads, int kv_heads, int inner, float scaling, "
          "float softcap) -> Tensor");
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
    m.impl("layers", TORCH_BOX(&layers));
    m.impl("attend", TORCH_BOX(&attend));
}
