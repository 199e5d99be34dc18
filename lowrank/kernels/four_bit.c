/* Index of each value in a table of 16, by counting the 15 bounds below it; two indices to a byte, the first in the
 * high half. `order` (or null) renames bytes where the table is not sorted. Compiled with the vector instructions of
 * the machine (kernels/native.py). A block is scaled by the reciprocal of its absolute maximum, exactly as bitsandbytes
 * does, so the codes are the same bit for bit. Blocks are shared among `threads` of OpenMP, if the compiler has it. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#define BLOCK_LIMIT 4096
#ifdef _OPENMP
#define SHARED _Pragma("omp parallel for num_threads(threads) schedule(static)")
#else
#define SHARED (void)threads;
#endif

/* `value` is scaled in its place. */
static inline void quantize_block(float *value, const float *bounds, const uint8_t *order, int64_t block,
                                  uint8_t *packed, float *absmax) {
    int32_t size[BLOCK_LIMIT], count[BLOCK_LIMIT], largest = 0; /* absolute floats are ordered as their bits are */
    memcpy(size, value, 4 * (size_t)block);
    for (int64_t i = 0; i < block; i++) {
        int32_t bits = size[i] & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    memcpy(absmax, &largest, 4);
    float factor = 1.0f / (*absmax > 1e-38f ? *absmax : 1e-38f);
    for (int64_t i = 0; i < block; i++) value[i] *= factor;
    for (int64_t i = 0; i < block; i++) {
        count[i] = (value[i] > bounds[0]) + (value[i] > bounds[1]) + (value[i] > bounds[2]) + (value[i] > bounds[3]) +
                   (value[i] > bounds[4]) + (value[i] > bounds[5]) + (value[i] > bounds[6]) + (value[i] > bounds[7]) +
                   (value[i] > bounds[8]) + (value[i] > bounds[9]) + (value[i] > bounds[10]) +
                   (value[i] > bounds[11]) + (value[i] > bounds[12]) + (value[i] > bounds[13]) +
                   (value[i] > bounds[14]);
    }
    for (int64_t i = 0; i < block / 2; i++) packed[i] = (uint8_t)(count[2 * i] << 4 | count[2 * i + 1]);
    for (int64_t i = 0; order && i < block / 2; i++) packed[i] = order[packed[i]];
}

void quantize_float32(const float *weight, const float *bounds, const uint8_t *order, int64_t block,
                      int64_t num_blocks, uint8_t *packed, float *absmax, int threads) {
    SHARED
    for (int64_t b = 0; b < num_blocks; b++) {
        float value[BLOCK_LIMIT];
        memcpy(value, weight + b * block, 4 * (size_t)block);
        quantize_block(value, bounds, order, block, packed + b * block / 2, absmax + b);
    }
}

void quantize_bfloat16(const uint16_t *weight, const float *bounds, const uint8_t *order, int64_t block,
                       int64_t num_blocks, uint8_t *packed, float *absmax, int threads) {
    SHARED
    for (int64_t b = 0; b < num_blocks; b++) {
        float value[BLOCK_LIMIT];
        for (int64_t i = 0; i < block; i++) value[i] = from_bf16(weight[b * block + i]);
        quantize_block(value, bounds, order, block, packed + b * block / 2, absmax + b);
    }
}

/* Codes back to values. A block knows 16 values only, so those are made first, scaled and rounded to the type wanted,
 * and each code then looks up the bytes of its value: 16 codes by one instruction, or 32. */
#if defined(__SSSE3__)
#include <immintrin.h>
typedef __m128i bytes16;
#define LOAD16(from) _mm_loadu_si128((const __m128i *)(from))
#define STORE16(to, bytes) _mm_storeu_si128((__m128i *)(to), bytes)
#define HIGH_NIBBLES(bytes) _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15))
#define LOW_NIBBLES(bytes) _mm_and_si128(bytes, _mm_set1_epi8(15))
#define LOOK_UP(table, index) _mm_shuffle_epi8(table, index)
#define ZIP_LOW_8(a, b) _mm_unpacklo_epi8(a, b)
#define ZIP_HIGH_8(a, b) _mm_unpackhi_epi8(a, b)
#define ZIP_LOW_16(a, b) _mm_unpacklo_epi16(a, b)
#define ZIP_HIGH_16(a, b) _mm_unpackhi_epi16(a, b)
#define BYTE_OF_EACH(bytes) _mm_and_si128(bytes, _mm_set1_epi16(255))
#define EVEN_BYTES(a, b) _mm_packus_epi16(BYTE_OF_EACH(a), BYTE_OF_EACH(b))
#define ODD_BYTES(a, b) _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))
#define HAS_LOOK_UP
#elif defined(__aarch64__)
#include <arm_neon.h>
typedef uint8x16_t bytes16;
#define AS_16(bytes) vreinterpretq_u16_u8(bytes)
#define LOAD16(from) vld1q_u8((const uint8_t *)(from))
#define STORE16(to, bytes) vst1q_u8((uint8_t *)(to), bytes)
#define HIGH_NIBBLES(bytes) vshrq_n_u8(bytes, 4)
#define LOW_NIBBLES(bytes) vandq_u8(bytes, vdupq_n_u8(15))
#define LOOK_UP(table, index) vqtbl1q_u8(table, index)
#define ZIP_LOW_8(a, b) vzip1q_u8(a, b)
#define ZIP_HIGH_8(a, b) vzip2q_u8(a, b)
#define ZIP_LOW_16(a, b) vreinterpretq_u8_u16(vzip1q_u16(AS_16(a), AS_16(b)))
#define ZIP_HIGH_16(a, b) vreinterpretq_u8_u16(vzip2q_u16(AS_16(a), AS_16(b)))
#define EVEN_BYTES(a, b) vuzp1q_u8(a, b)
#define ODD_BYTES(a, b) vuzp2q_u8(a, b)
#define HAS_LOOK_UP
#endif

/* The 16 values of a block as the bits of the type wanted, to nearest, ties to even, as torch rounds. Loops without
 * branches over one array each: that is what compilers make vector instructions of. */
static inline void round_float32(const float *value, uint32_t *bits) { memcpy(bits, value, 64); }

static inline void round_bfloat16(const float *value, uint16_t *bits) {
    uint32_t wide[16];
    memcpy(wide, value, 64);
    for (int code = 0; code < 16; code++) {
        uint32_t rounded = (wide[code] + 0x7fff + (wide[code] >> 16 & 1)) >> 16;
        uint32_t is_nan = 0u - ((wide[code] & 0x7fffffff) > 0x7f800000);
        bits[code] = (uint16_t)((rounded & ~is_nan) | (0x7fc0 & is_nan));
    }
}

#ifdef __FLT16_MANT_DIG__
static inline void round_float16(const float *value, uint16_t *bits) {
    _Float16 half[16];
    for (int code = 0; code < 16; code++) half[code] = (_Float16)value[code];
    memcpy(bits, half, 32);
}
#endif

#ifdef HAS_LOOK_UP
/* table[i]: byte i of each of the 16 values. */
static inline void table_2(const void *bits, bytes16 *table) {
    bytes16 first = LOAD16(bits), second = LOAD16((const uint8_t *)bits + 16);
    table[0] = EVEN_BYTES(first, second);
    table[1] = ODD_BYTES(first, second);
}

static inline void table_4(const void *bits, bytes16 *table) {
    const uint8_t *from = bits;
    bytes16 even[2] = {EVEN_BYTES(LOAD16(from), LOAD16(from + 16)), EVEN_BYTES(LOAD16(from + 32), LOAD16(from + 48))};
    bytes16 odd[2] = {ODD_BYTES(LOAD16(from), LOAD16(from + 16)), ODD_BYTES(LOAD16(from + 32), LOAD16(from + 48))};
    table[0] = EVEN_BYTES(even[0], even[1]);
    table[1] = EVEN_BYTES(odd[0], odd[1]);
    table[2] = ODD_BYTES(even[0], even[1]);
    table[3] = ODD_BYTES(odd[0], odd[1]);
}

static inline void expand_2(bytes16 codes, const bytes16 *table, void *out) {
    bytes16 byte0 = LOOK_UP(table[0], codes), byte1 = LOOK_UP(table[1], codes);
    STORE16(out, ZIP_LOW_8(byte0, byte1));
    STORE16((uint8_t *)out + 16, ZIP_HIGH_8(byte0, byte1));
}

static inline void expand_4(bytes16 codes, const bytes16 *table, void *out) {
    bytes16 byte0 = LOOK_UP(table[0], codes), byte1 = LOOK_UP(table[1], codes);
    bytes16 byte2 = LOOK_UP(table[2], codes), byte3 = LOOK_UP(table[3], codes);
    bytes16 low01 = ZIP_LOW_8(byte0, byte1), high01 = ZIP_HIGH_8(byte0, byte1);
    bytes16 low23 = ZIP_LOW_8(byte2, byte3), high23 = ZIP_HIGH_8(byte2, byte3);
    STORE16(out, ZIP_LOW_16(low01, low23));
    STORE16((uint8_t *)out + 16, ZIP_HIGH_16(low01, low23));
    STORE16((uint8_t *)out + 32, ZIP_LOW_16(high01, high23));
    STORE16((uint8_t *)out + 48, ZIP_HIGH_16(high01, high23));
}

#ifdef __AVX512F__
/* 16 values by one instruction, which reads four bits of an index: what stands above a code does no harm. */
static inline void block_4(const uint8_t *from, const uint32_t *bits, int64_t block, uint32_t *to) {
    __m512i table = _mm512_loadu_si512(bits);
    for (int64_t i = 0; i < block / 2; i += 16) {
        bytes16 both = LOAD16(from + i), first = _mm_srli_epi16(both, 4);
        __m512i low = _mm512_cvtepu8_epi32(ZIP_LOW_8(first, both)), high = _mm512_cvtepu8_epi32(ZIP_HIGH_8(first, both));
        _mm512_storeu_si512(to + 2 * i, _mm512_permutexvar_epi32(low, table));
        _mm512_storeu_si512(to + 2 * i + 16, _mm512_permutexvar_epi32(high, table));
    }
}
#else
static inline void block_4(const uint8_t *from, const uint32_t *bits, int64_t block, uint32_t *to) {
    bytes16 table[4];
    table_4(bits, table);
    for (int64_t i = 0; i < block / 2; i += 16) {
        bytes16 both = LOAD16(from + i), first = HIGH_NIBBLES(both), second = LOW_NIBBLES(both);
        expand_4(ZIP_LOW_8(first, second), table, to + 2 * i);
        expand_4(ZIP_HIGH_8(first, second), table, to + 2 * i + 16);
    }
}
#endif

#ifdef __AVX512BW__
/* 32 values by one instruction. It reads five bits of an index, and the table is there twice, so what stands above the
 * four of a code does no harm. */
static inline void block_2(const uint8_t *from, const uint16_t *bits, int64_t block, uint16_t *to) {
    __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)bits));
    for (int64_t i = 0; i < block / 2; i += 16) {
        __m512i both = _mm512_cvtepu8_epi32(LOAD16(from + i));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(both, 4), _mm512_slli_epi32(both, 16));
        _mm512_storeu_si512(to + 2 * i, _mm512_permutexvar_epi16(index, table));
    }
}
#else
static inline void block_2(const uint8_t *from, const uint16_t *bits, int64_t block, uint16_t *to) {
    bytes16 table[2];
    table_2(bits, table);
    for (int64_t i = 0; i < block / 2; i += 16) {
        bytes16 both = LOAD16(from + i), first = HIGH_NIBBLES(both), second = LOW_NIBBLES(both);
        expand_2(ZIP_LOW_8(first, second), table, to + 2 * i);
        expand_2(ZIP_HIGH_8(first, second), table, to + 2 * i + 16);
    }
}
#endif
#else
#define PLAIN_BLOCK(BITS, SIZE)                                                                                        \
    static inline void block_##SIZE(const uint8_t *from, const BITS *bits, int64_t block, BITS *to) {                  \
        for (int64_t i = 0; i < block / 2; i++) {                                                                      \
            to[2 * i] = bits[from[i] >> 4];                                                                            \
            to[2 * i + 1] = bits[from[i] & 15];                                                                        \
        }                                                                                                              \
    }
PLAIN_BLOCK(uint32_t, 4)
PLAIN_BLOCK(uint16_t, 2)
#endif

#define DEQUANTIZE(TYPE, BITS, SIZE)                                                                                   \
    void dequantize_##TYPE(const uint8_t *packed, const float *absmax, const float *values, int64_t block,             \
                           int64_t num_blocks, BITS *out, int threads) {                                               \
        SHARED                                                                                                         \
        for (int64_t b = 0; b < num_blocks; b++) {                                                                     \
            float scaled[16];                                                                                          \
            BITS bits[16];                                                                                             \
            for (int code = 0; code < 16; code++) scaled[code] = values[code] * absmax[b];                             \
            round_##TYPE(scaled, bits);                                                                                \
            block_##SIZE(packed + b * block / 2, bits, block, out + b * block);                                        \
        }                                                                                                              \
    }

DEQUANTIZE(float32, uint32_t, 4)
DEQUANTIZE(bfloat16, uint16_t, 2)
#ifdef __FLT16_MANT_DIG__
DEQUANTIZE(float16, uint16_t, 2)
#endif

/* Scales that are kept in 8 bits: the value of each code, times the scale of its block, plus their mean. */
void dequantize_scales(const uint8_t *codes, const float *values, const float *absmax, float offset, int64_t block,
                       int64_t count, float *out, int threads) {
    int64_t num_blocks = (count + block - 1) / block;
    SHARED
    for (int64_t b = 0; b < num_blocks; b++) {
        int64_t first = b * block, end = first + block < count ? first + block : count;
        for (int64_t i = first; i < end; i++) out[i] = values[codes[i]] * absmax[b] + offset;
    }
}
