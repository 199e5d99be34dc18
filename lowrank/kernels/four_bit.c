/* Index of each value in a table of 16, by counting the 15 bounds below it; two indices to a byte, the first in the
 * high half. `order` (or null) renames bytes where the table is not sorted. Compiled with the vector instructions of
 * the machine (kernels/native.py). A block is scaled by the reciprocal of its absolute maximum, exactly as bitsandbytes
 * does, so the codes are the same bit for bit. */
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

#define QUANTISE(NAME, TYPE, LOAD)                                                                                 \
    void NAME(const TYPE *weight, const float *bounds, const uint8_t *order, int64_t block, int64_t num_blocks,   \
              uint8_t *packed, float *absmax) {                                                                    \
        float value[BLOCK_LIMIT];                                                                                  \
        int32_t size[BLOCK_LIMIT], count[BLOCK_LIMIT];                                                             \
        for (int64_t b = 0; b < num_blocks; b++) {                                                                 \
            for (int64_t i = 0; i < block; i++) value[i] = LOAD(weight[b * block + i]);                            \
            memcpy(size, value, 4 * (size_t)block);                                                                \
            int32_t largest = 0; /* absolute floats are ordered as their bits are */                               \
            for (int64_t i = 0; i < block; i++) {                                                                  \
                int32_t bits = size[i] & 0x7fffffff;                                                               \
                largest = bits > largest ? bits : largest;                                                         \
            }                                                                                                      \
            memcpy(absmax + b, &largest, 4);                                                                       \
            float factor = 1.0f / (absmax[b] > 1e-38f ? absmax[b] : 1e-38f);                                       \
            for (int64_t i = 0; i < block; i++) value[i] *= factor;                                                \
            for (int64_t i = 0; i < block; i++) {                                                                  \
                count[i] = (value[i] > bounds[0]) + (value[i] > bounds[1]) + (value[i] > bounds[2]) +              \
                           (value[i] > bounds[3]) + (value[i] > bounds[4]) + (value[i] > bounds[5]) +              \
                           (value[i] > bounds[6]) + (value[i] > bounds[7]) + (value[i] > bounds[8]) +              \
                           (value[i] > bounds[9]) + (value[i] > bounds[10]) + (value[i] > bounds[11]) +            \
                           (value[i] > bounds[12]) + (value[i] > bounds[13]) + (value[i] > bounds[14]);            \
            }                                                                                                      \
            uint8_t *to = packed + b * block / 2;                                                                  \
            for (int64_t i = 0; i < block / 2; i++) to[i] = (uint8_t)(count[2 * i] << 4 | count[2 * i + 1]);       \
            for (int64_t i = 0; order && i < block / 2; i++) to[i] = order[to[i]];                                 \
        }                                                                                                          \
    }

#define SAME(x) (x)
QUANTISE(quantise_float32, float, SAME)
QUANTISE(quantise_bfloat16, uint16_t, from_bf16)
