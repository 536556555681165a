// Matching, merging, biases and padded keys on a CPU. Rows are shared out among threads, and each is
// worked out by one of them in a fixed order: results depend neither on the number of threads nor
// on the batch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr float PADDED = 1e-6f;  // tomepass/ops/padding.py
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float value, float& to) { to = value; }

inline void narrow(float value, bfloat16& to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // To nearest even. What is not a number came from 16 bits, and stays one in 16.
    to.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The head mean of one token's keys, of length 1 (or 0 where it is too short to say).
template <class T>
void metric_of(const T* keys, int64_t head_stride, int64_t heads, int64_t width, float* metric) {
    std::fill(metric, metric + width, 0.f);
    for (int64_t h = 0; h < heads; ++h) {
        const T* head = keys + h * head_stride;
        for (int64_t d = 0; d < width; ++d) metric[d] += widen(head[d]);
    }
    float squares = 0.f;
    for (int64_t d = 0; d < width; ++d) {
        metric[d] /= float(heads);
        squares += metric[d] * metric[d];
    }
    const float divisor = std::max(std::sqrt(squares), 1e-12f);
    for (int64_t d = 0; d < width; ++d) metric[d] /= divisor;
}

constexpr int64_t ROWS = 4, LANES = 16;  // scores worked out at a time, in registers
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

int64_t padded(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

// For ROWS even tokens: the most similar odd token, the first of several. A row's and a column's
// ``apart`` differ where one token is padding and the other is not.
void best_partners(const float* even, const float* odd, const int32_t* even_apart,
                   const int32_t* odd_apart, int64_t width, int64_t columns, int64_t rows,
                   float* similarity, int32_t* partner) {
    Floats best[ROWS];
    Ints from[ROWS], column;
    for (int64_t j = 0; j < LANES; ++j) column[j] = int32_t(j);
    for (int64_t i = 0; i < ROWS; ++i) best[i] = Floats{} + LOWEST, from[i] = column;
    for (int64_t first = 0; first < columns; first += LANES, column += int32_t(LANES)) {
        Floats score[ROWS] = {};
        for (int64_t d = 0; d < width; ++d) {
            Floats metrics;
            std::memcpy(&metrics, odd + d * padded(columns) + first, sizeof metrics);
            for (int64_t i = 0; i < ROWS; ++i) score[i] += metrics * even[i * width + d];
        }
        Ints apart;
        std::memcpy(&apart, odd_apart + first, sizeof apart);
        for (int64_t i = 0; i < ROWS; ++i) {
            const Ints better = (score[i] > best[i]) & (apart == even_apart[i]);
            best[i] = better ? score[i] : best[i];
            from[i] = better ? column : from[i];
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        int64_t lane = 0;
        for (int64_t j = 1; j < LANES; ++j)
            if (best[i][j] > best[i][lane] ||
                (best[i][j] == best[i][lane] && from[i][j] < from[i][lane]))
                lane = j;
        similarity[i] = best[i][lane];
        partner[i] = from[i][lane];
    }
}

struct Sequence {
    const int64_t *even, *odd, *held;
    int64_t evens, odds, helds;
};

// The r largest edges merge, the first of several equal ones; what stays keeps its order.
void write_assign(const Sequence& of, int64_t r, const float* similarity, const int32_t* partner,
                  int64_t* assign) {
    std::vector<int64_t> edges(of.evens);
    for (int64_t i = 0; i < of.evens; ++i) edges[i] = i;
    std::nth_element(edges.begin(), edges.begin() + r, edges.end(), [&](int64_t a, int64_t b) {
        return similarity[a] != similarity[b] ? similarity[a] > similarity[b] : a < b;
    });
    std::vector<bool> merged(of.evens, false);
    for (int64_t i = 0; i < r; ++i) merged[edges[i]] = true;
    const int64_t first_odd = of.helds + of.evens - r;
    int64_t next = of.helds;
    for (int64_t i = 0; i < of.helds; ++i) assign[of.held[i]] = i;
    for (int64_t i = 0; i < of.evens; ++i)
        assign[of.even[i]] = merged[i] ? first_odd + partner[i] : next++;
    for (int64_t j = 0; j < of.odds; ++j) assign[of.odd[j]] = first_odd + j;
}

// Whatever lies in the spare rows and columns is left out, but must not be slow to add.
void clear_spare(float* image, const Sequence& of, int64_t rows, int64_t columns, int64_t width) {
    std::fill(image + of.evens * width, image + rows * width, 0.f);
    float* odd = image + rows * width;
    for (int64_t d = 0; d < width; ++d)
        std::fill(odd + d * columns + of.odds, odd + (d + 1) * columns, 0.f);
}

template <class T>
void match(const T* keys, const int64_t* strides, int64_t batch, int64_t heads, int64_t tokens,
           int64_t width, int64_t r, const Sequence& of, const float* size, float* scratch,
           int64_t* assign, int threads) {
    // A few rows and columns to spare, so that no block of scores needs an edge of its own.
    const int64_t rows = of.evens + ROWS, columns = padded(of.odds);
    const int64_t per_image = (rows + columns) * width;
    std::vector<float> similarity(batch * of.evens);
    std::vector<int32_t> partner(batch * of.evens);
    const int64_t free = of.evens + of.odds, blocks = (of.evens + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> metric(width);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t i = 0; i < free; ++i) {
                const bool is_even = i < of.evens;
                const int64_t at = is_even ? of.even[i] : of.odd[i - of.evens];
                metric_of(keys + b * strides[0] + at * strides[2], strides[1], heads, width,
                          metric.data());
                float* image = scratch + b * per_image;
                if (i == 0) clear_spare(image, of, rows, columns, width);
                if (is_even) {
                    std::copy(metric.begin(), metric.end(), image + i * width);
                } else {  // odd tokens lie in columns
                    float* column = image + rows * width + (i - of.evens);
                    for (int64_t d = 0; d < width; ++d) column[d * columns] = metric[d];
                }
            }
        // 0 or 1 for tokens and padding; 2 for what is no token.
        std::vector<int32_t> odd_apart(columns, 2), even_apart(ROWS, 0);
        std::fill(odd_apart.begin(), odd_apart.begin() + of.odds, 0);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t first = block * ROWS, count = std::min(ROWS, of.evens - first);
                bool padding = false;  // among the odd ones
                if (size != nullptr) {
                    const float* sizes = size + b * tokens;
                    for (int64_t j = 0; j < of.odds; ++j)
                        padding |= odd_apart[j] = sizes[of.odd[j]] < PADDED;
                    for (int64_t i = 0; i < count; ++i)
                        even_apart[i] = sizes[of.even[first + i]] < PADDED;
                }
                const float* image = scratch + b * per_image;
                float* best = similarity.data() + b * of.evens + first;
                best_partners(image + first * width, image + rows * width, even_apart.data(),
                              odd_apart.data(), width, of.odds, count, best,
                              partner.data() + b * of.evens + first);
                // Padding merges first, whatever it holds.
                for (int64_t i = 0; padding && i < count; ++i)
                    if (even_apart[i]) best[i] = std::numeric_limits<float>::infinity();
            }
#pragma omp for
        for (int64_t b = 0; b < batch; ++b)
            write_assign(of, r, similarity.data() + b * of.evens, partner.data() + b * of.evens,
                         assign + b * tokens);
    }
}

// Which tokens of an image go to each index, as lists in ascending order: the first one, then
// each one's successor.
void lists_of(const int64_t* assign, int64_t tokens, int64_t left, int32_t* first,
              int32_t* successor) {
    std::fill(first, first + left, -1);
    for (int64_t i = tokens - 1; i >= 0; --i) {
        if (assign[i] < 0 || assign[i] >= left) continue;  // it goes nowhere
        successor[i] = first[assign[i]];
        first[assign[i]] = int32_t(i);
    }
}

template <class T>
void merge(const T* x, const int64_t* strides, const float* size, const int64_t* assign,
           int64_t batch, int64_t tokens, int64_t width, int64_t left, T* out, float* size_out,
           int threads) {
    std::vector<int32_t> first(batch * left), successor(batch * tokens);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sum(width);
#pragma omp for
        for (int64_t b = 0; b < batch; ++b)
            lists_of(assign + b * tokens, tokens, left, first.data() + b * left,
                     successor.data() + b * tokens);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t j = 0; j < left; ++j) {
                const int32_t* next = successor.data() + b * tokens;
                const float* sizes = size == nullptr ? nullptr : size + b * tokens;
                const int32_t head = first[b * left + j];
                float total = 0.f;
                int32_t base = head;  // the last one of any size
                for (int32_t i = head; i >= 0; i = next[i]) {
                    total += sizes ? sizes[i] : 1.f;
                    if (!sizes || sizes[i] > 0.f) base = i;
                }
                size_out[b * left + j] = total;
                T* to = out + (b * left + j) * width;
                // Out of use: nothing goes there, or nothing of any size. A size that is not a
                // number stays one.
                if (head < 0 || total <= 0.f) {
                    std::fill(to, to + width, T{});
                    continue;
                }
                const T* own = x + b * strides[0] + base * strides[1];
                if (next[head] < 0 && total / total == 1.f) {
                    std::memcpy(to, own, width * sizeof(T));
                    continue;
                }
                // Summed is how far tokens are from one of them: nothing, where they are equal.
                std::fill(sum.begin(), sum.end(), 0.f);
                for (int32_t i = head; i >= 0; i = next[i]) {
                    const T* from = x + b * strides[0] + i * strides[1];
                    const float weight = (sizes ? sizes[i] : 1.f) / total;
                    for (int64_t c = 0; c < width; ++c)
                        sum[c] += weight * (widen(own[c]) - widen(from[c]));
                }
                for (int64_t c = 0; c < width; ++c) narrow(widen(own[c]) - sum[c], to[c]);
            }
    }
}

// log(x) for x from 0, in a form that vectorises: x = m 2^e with m near 1, and
// log(m) = 2 artanh(s) = 2 (s + s^3 / 3 + ...) where s = (m - 1) / (m + 1), at most 0.172.
inline float logarithm(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const int32_t nothing = -int32_t(bits == 0);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // m is between sqrt(1/2) and sqrt(2)
    bits -= exponent * (1 << 23);
    float m;
    std::memcpy(&m, &bits, sizeof m);
    const float s = (m - 1.f) / (m + 1.f), t = s * s;
    const float series = 1.f + t * (1.f / 3 + t * (1.f / 5 + t * (1.f / 7 + t * (1.f / 9))));
    const float found = float(exponent) * 0.693147181f + 2.f * s * series;
    // log(0) is -inf, and what is not a number stays none.
    return found + (x - x) + float(nothing) * std::numeric_limits<float>::max() * 2.f;
}

// A head's bias turned, [key][query], and its exponential, the largest of a row kept out of it.
template <class T>
void turn(const T* bias, int64_t tokens, float* plain, float* exponential, float* largest) {
    for (int64_t i = 0; i < tokens; ++i) {
        const T* row = bias + i * tokens;
        largest[i] = widen(row[0]);
        for (int64_t j = 1; j < tokens; ++j) largest[i] = std::max(largest[i], widen(row[j]));
        for (int64_t j = 0; j < tokens; ++j) {
            plain[j * tokens + i] = widen(row[j]);
            exponential[j * tokens + i] = std::exp(widen(row[j]) - largest[i]);
        }
    }
}

// One image's head: over the keys of an index the log-mean-exp, then over its queries the mean.
template <class T>
void merge_head(const float* plain, const float* exponential, const float* largest,
                const int32_t* first, const int32_t* successor, int64_t tokens, int64_t left,
                float* sum, float* columns, T* out) {
    for (int64_t j = 0; j < left; ++j) {
        const bool single = first[j] >= 0 && successor[first[j]] < 0;
        const float* own = plain + std::max(first[j], 0) * tokens;
        std::fill(sum, sum + tokens, 0.f);
        if (single) {
            std::copy(own, own + tokens, sum);
        } else if (first[j] >= 0) {  // without a key it stays 0
            // Summed is how far keys are from the first: nothing, where they are equal.
            const float* one = exponential + first[j] * tokens;
            int64_t count = 0;
            for (int32_t i = first[j]; i >= 0; i = successor[i], ++count) {
                const float* key = exponential + i * tokens;
                for (int64_t q = 0; q < tokens; ++q) sum[q] += one[q] - key[q];
            }
            for (int64_t q = 0; q < tokens; ++q) {
                const float mean = one[q] - sum[q] / float(count);
                sum[q] = mean == one[q] ? own[q] : logarithm(mean) + largest[q];
            }
        }
        for (int64_t q = 0; q < tokens; ++q) columns[q * left + j] = sum[q];
    }
    for (int64_t i = 0; i < left; ++i) {
        std::fill(sum, sum + left, 0.f);
        int64_t count = 0;
        const float* own = columns + std::max(first[i], 0) * left;
        for (int32_t q = first[i]; q >= 0; q = successor[q], ++count)
            for (int64_t j = 0; j < left; ++j) {
                const float other = columns[q * left + j];
                sum[j] += own[j] == other ? 0.f : own[j] - other;  // both may be -inf
            }
        const float number = float(std::max<int64_t>(count, 1));
        for (int64_t j = 0; j < left; ++j)
            narrow(count > 0 ? own[j] - sum[j] / number : 0.f, out[i * left + j]);
    }
}

// The bias to and from an index that no token goes to is 0.
template <class T>
void merge_bias(const T* bias, const int64_t* source, int64_t batch, int64_t heads, int64_t tokens,
                int64_t left, float* scratch, T* out, int threads) {
    const int64_t square = tokens * tokens;
    float *plain = scratch, *exponential = plain + heads * square;
    float* largest = exponential + heads * square;
    std::vector<int32_t> first(batch * left), successor(batch * tokens);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t b = 0; b < batch; ++b)
            lists_of(source + b * tokens, tokens, left, first.data() + b * left,
                     successor.data() + b * tokens);
#pragma omp for
        for (int64_t h = 0; h < heads; ++h)
            turn(bias + h * square, tokens, plain + h * square, exponential + h * square,
                 largest + h * tokens);
        std::vector<float> sum(std::max(tokens, left)), columns(tokens * left);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h)
                merge_head(plain + h * square, exponential + h * square, largest + h * tokens,
                           first.data() + b * left, successor.data() + b * tokens, tokens, left,
                           sum.data(), columns.data(), out + (b * heads + h) * left * left);
    }
}

// Keys or values of one image, heads within tokens, with zeros after them.
template <class T>
void pad(const T* x, const int64_t* strides, int64_t heads, int64_t tokens, int64_t width,
         int64_t padded_tokens, T* out) {
    // As a projection leaves them, all is one run.
    const bool whole = strides[1] == width && strides[2] == heads * width;
    const int64_t rows = whole ? 1 : tokens, columns = whole ? 1 : heads;
    const int64_t run = whole ? tokens * heads * width : width;
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t h = 0; h < columns; ++h)
            std::memcpy(out + (n * heads + h) * width, x + h * strides[1] + n * strides[2],
                        run * sizeof(T));
    std::fill(out + tokens * heads * width, out + padded_tokens * heads * width, T{});
}

template <class T>
void pad_keys(const T* keys, const int64_t* key_strides, const T* values,
              const int64_t* value_strides, const float* size, int64_t batch, int64_t heads,
              int64_t tokens, int64_t key_width, int64_t value_width, int64_t padded_tokens,
              float lowest, T* keys_out, T* values_out, T* bias, int threads) {
    const int64_t rows = padded_tokens * heads;
#pragma omp parallel for num_threads(threads)
    for (int64_t image = 0; image < 2 * batch; ++image) {
        const int64_t b = image / 2;
        if (image % 2) {
            pad(values + b * value_strides[0], value_strides, heads, tokens, value_width,
                padded_tokens, values_out + b * rows * value_width);
            continue;
        }
        pad(keys + b * key_strides[0], key_strides, heads, tokens, key_width, padded_tokens,
            keys_out + b * rows * key_width);
        for (int64_t n = 0; n < padded_tokens; ++n) {
            const float weight = n < tokens ? size[b * tokens + n] : 0.f;
            narrow(weight < PADDED ? lowest : std::log(weight), bias[b * padded_tokens + n]);
        }
    }
}

}  // namespace

#define EXPORTED(T, NAME)                                                                         \
    extern "C" void match_##NAME(const T* keys, const int64_t* strides, int64_t batch,            \
                                 int64_t heads, int64_t tokens, int64_t width, int64_t r,         \
                                 const int64_t* even, int64_t evens, const int64_t* odd,          \
                                 int64_t odds, const int64_t* held, int64_t helds,                \
                                 const float* size, float* scratch, int64_t* assign,              \
                                 int threads) {                                                   \
        match(keys, strides, batch, heads, tokens, width, r,                                      \
              Sequence{even, odd, held, evens, odds, helds}, size, scratch, assign, threads);     \
    }                                                                                             \
    extern "C" void merge_##NAME(const T* x, const int64_t* strides, const float* size,           \
                                 const int64_t* assign, int64_t batch, int64_t tokens,            \
                                 int64_t width, int64_t left, T* out, float* size_out,            \
                                 int threads) {                                                   \
        merge(x, strides, size, assign, batch, tokens, width, left, out, size_out, threads);      \
    }                                                                                             \
    extern "C" void merge_bias_##NAME(const T* bias, const int64_t* source, int64_t batch,        \
                                      int64_t heads, int64_t tokens, int64_t left,                \
                                      float* scratch, T* out, int threads) {                      \
        merge_bias(bias, source, batch, heads, tokens, left, scratch, out, threads);              \
    }                                                                                             \
    extern "C" void pad_keys_##NAME(const T* keys, const int64_t* key_strides, const T* values,   \
                                    const int64_t* value_strides, const float* size,              \
                                    int64_t batch, int64_t heads, int64_t tokens,                 \
                                    int64_t key_width, int64_t value_width,                       \
                                    int64_t padded_tokens, float lowest, T* keys_out,             \
                                    T* values_out, T* bias, int threads) {                        \
        pad_keys(keys, key_strides, values, value_strides, size, batch, heads, tokens, key_width, \
                 value_width, padded_tokens, lowest, keys_out, values_out, bias, threads);        \
    }

EXPORTED(float, float32)
EXPORTED(bfloat16, bfloat16)
