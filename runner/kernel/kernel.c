// The machine code of bloomdesk: products with plain and losslessly coded weights, what a pass computes between them, the
// decoder and the encoder of the lossless form, and the epoch barrier of the threads. One file in plain C with clang's vector types, compiled once for
// each kind of processor; runner/kernel/compiler.py lists them, tests/runner/kernel/reference.py says in Python what
// each function computes, and docs/format.md describes the bytes of a coded panel.
//
//     out[b, t, n] += sum over k of x[b, t, k] * weight[b, n, k]
//
// Every sum is taken in one order on every processor: 8 lanes over each 4,096 columns, the lanes folded in halves, then
// the columns beyond the last multiple of 8 one by one, these partial sums one after another, and each multiplication
// fused with its addition. How the loops are cut around that order is a matter of speed alone.

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#if !defined(_WIN32) && !defined(WITHOUT_SYSTEM)
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(_WIN32)
#define EXPORT __attribute__((dllexport))
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("clang loop unroll(full)")
#define VECTOR(type, count) type __attribute__((vector_size(sizeof(type) * (count)), aligned(sizeof(type))))

// What a file of the lossless form depends on, too: see runner/format/coded.py.
enum { ROW_GROUP_ROWS = 12, PANEL_COLUMNS = 4096 };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE const uint8_t *least_pointer(const uint8_t *a, const uint8_t *b) { return a < b ? a : b; }
INLINE int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }


// ---------------------------------------------------------------------------------------------------- the processor

// 2: this processor runs the AVX-512 code, 1: that for AVX2, 0: the one that every processor of its architecture runs.
EXPORT int64_t processor_level(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned first = 1u << 9 | 1u << 12 | 1u << 20 | 1u << 22 | 1u << 23 | 1u << 27 | 1u << 28 | 1u << 29;
    if ((c & first) != first) return 0;  // SSSE3, FMA, SSE4.2, MOVBE, POPCNT, OSXSAVE, AVX, F16C
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6) return 0;  // the system does not keep the 256-bit registers
    if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !(c & 1u << 5)) return 0;  // LZCNT
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const unsigned second = 1u << 3 | 1u << 5 | 1u << 8;
    if ((b & second) != second) return 0;  // BMI, AVX2, BMI2
    const unsigned wide = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31, bytes = 1u << 1 | 1u << 6;
    // AVX-512 F, DQ, CD, BW, VL; VBMI, VBMI2; and the system keeps the 512-bit registers
    return (b & wide) == wide && (c & bytes) == bytes && (low & 0xe6) == 0xe6 ? 2 : 1;
#else
    return 0;
#endif
}


// ------------------------------------------------------------------------------------- the epoch barrier (threads.py)

struct task;
typedef void task_function(struct task *, uint8_t *scratch);

// The table that the threads share: the words of the barrier, then those of the task's function.
struct task {
    _Atomic int64_t epoch, active;
    task_function *function;
    _Atomic int64_t share, failed;
    int64_t arguments[27];
};

EXPORT void open_task(struct task *task) { atomic_fetch_or(&task->epoch, 1); }

// Compute too, close the task, and wait until no worker is in it.
EXPORT void close_task(struct task *task, uint8_t *scratch) {
    task->function(task, scratch);
    atomic_store(&task->epoch, (atomic_load(&task->epoch) | 1) + 1);
    while (atomic_load(&task->active)) {}
}

INLINE void pause_a_moment(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Enter each task that is open, except that of the epoch `seen`; after `spins` turns without one, the last epoch.
EXPORT int64_t spin_for_tasks(struct task *task, int64_t seen, int64_t spins, uint8_t *scratch) {
    int64_t left = spins;
    do {
        int64_t epoch = atomic_load(&task->epoch);
        if ((epoch & 1) && epoch != seen) {
            atomic_fetch_add(&task->active, 1);
            if (atomic_load(&task->epoch) == epoch) task->function(task, scratch);
            atomic_fetch_sub(&task->active, 1);
            seen = epoch;
            left = spins;
        } else {
            pause_a_moment();
            left--;
        }
    } while (left > 0);
    return seen;
}


// ------------------------------------------------------------------------------- faults in mapped files (page_faults.py)

// Bytes of a mapped file, and how many of its pages could not be had; free if `end` is 0.
struct mapped { _Atomic uintptr_t start, end; _Atomic int64_t faults; };
enum { MOST_MAPPED = 8192 };

#if defined(_WIN32) || defined(WITHOUT_SYSTEM)
EXPORT struct mapped *watch_mapped(uintptr_t start, uintptr_t end) { (void)start; (void)end; return 0; }
EXPORT void forget_mapped(struct mapped *mapped) { (void)mapped; }
#else
static struct mapped watched[MOST_MAPPED];
static _Atomic int64_t most_watched, is_installed;
static struct sigaction others;

// Zeros take the place of what the file no longer has, so that the product ends, and its caller learns of it.
static void on_bus_error(int number, siginfo_t *info, void *context) {
    uintptr_t address = (uintptr_t)info->si_addr;
    for (int64_t i = 0; i < most_watched; i++) {
        struct mapped *each = &watched[i];
        if (address < each->start || address >= each->end) continue;
        uintptr_t page = address & -(uintptr_t)sysconf(_SC_PAGESIZE);
        int how = MAP_PRIVATE | MAP_ANON | MAP_FIXED;
        if (mmap((void *)page, each->end - page, PROT_READ, how, -1, 0) == MAP_FAILED) break;
        atomic_fetch_add(&each->faults, 1);
        return;
    }
    if (others.sa_flags & SA_SIGINFO) others.sa_sigaction(number, info, context);
    else if (others.sa_handler != SIG_DFL && others.sa_handler != SIG_IGN) others.sa_handler(number);
    else {
        signal(number, SIG_DFL);
        raise(number);
    }
}

// What counts the faults between two addresses, or 0 if there are too many such ranges.
EXPORT struct mapped *watch_mapped(uintptr_t start, uintptr_t end) {
    if (!atomic_exchange(&is_installed, 1)) {
        struct sigaction own = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        if (sigaction(SIGBUS, &own, &others)) return 0;
    }
    for (int64_t i = 0; i < MOST_MAPPED; i++) {
        struct mapped *each = &watched[i];
        uintptr_t free = 0;
        // While it is being filled its range is empty.
        if (!atomic_compare_exchange_strong(&each->end, &free, 1)) continue;
        each->faults = 0;
        each->start = start;
        each->end = end;
        for (int64_t most = most_watched; most <= i;)
            if (atomic_compare_exchange_weak(&most_watched, &most, i + 1)) break;
        return each;
    }
    return 0;
}

EXPORT void forget_mapped(struct mapped *mapped) {
    mapped->start = UINTPTR_MAX;
    mapped->end = 0;
}
#endif


// ------------------------------------------------------------------------ the decoder of the lossless form (decode.py)

// Bytes of a panel's header, the byte that is 1 if the weights follow uncoded, and the exponents of the three levels.
enum { HEADER = 32, STORED = 12, LEVEL_1 = 16, LEVEL_2 = 20, LEVEL_3 = 24 };
// Symbols of a group, bytes of their codes, and the code that refers to the next level.
enum { GROUP = 64, CODES = 16, ESCAPE = 3 };
// Bytes that may be read or written beyond what is asked for.
enum { SLACK = 128 };
// The most weights of a panel, and the scratch memory to decode it: its weights, then the symbols of levels 2, 3 and 4.
enum { PANEL_WEIGHTS = ROW_GROUP_ROWS * PANEL_COLUMNS, DECODER_SCRATCH = 5 * (PANEL_WEIGHTS + SLACK) };

// Symbols that are decoded at a time: all of a group if the processor can spread bytes over 64 places.
#if defined(__AVX512VBMI2__)
enum { UNIT = 64 };
#else
enum { UNIT = 16 };
#endif
typedef VECTOR(uint8_t, UNIT) unit;
typedef VECTOR(uint8_t, CODES) code_bytes;
typedef VECTOR(uint16_t, CODES) code_weights;
typedef VECTOR(uint16_t, UNIT) unit_weights;
typedef VECTOR(uint16_t, 32) quarter_shifts;

// One level: the exponents of its codes, for the escape zero, and the next escape, a symbol of the level after it.
struct level {
    unit symbols;
    const uint8_t *next;
};

INLINE struct level level_at(const uint8_t *panel, int place, const uint8_t *next) {
    unit symbols = {0};
    for (int byte = 0; byte < UNIT; byte++)
        if (byte % CODES < ESCAPE) symbols[byte] = panel[place + byte % CODES];
    return (struct level){symbols, next};
}

// The symbols of codes by their level's table; zero for an escape.
INLINE unit known_symbols(unit symbols, unit codes) {
#if defined(__AVX512VBMI2__)
    return (unit)_mm512_shuffle_epi8((__m512i)symbols, (__m512i)codes);
#elif defined(__SSSE3__)
    return (unit)_mm_shuffle_epi8((__m128i)symbols, (__m128i)codes);
#elif defined(__aarch64__)
    return (unit)vqtbl1q_u8((uint8x16_t)symbols, (uint8x16_t)codes);
#else
    return ((unit)(codes == 0) & symbols[0]) | ((unit)(codes == 1) & symbols[1]) | ((unit)(codes == 2) & symbols[2]);
#endif
}

#if defined(__SSSE3__) || defined(__aarch64__)
// For a mask of 8 codes: the rank of each escape among the escapes, and 128, which gives zero, for the others.
static uint8_t places[256][8];

__attribute__((constructor)) static void fill_places(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int bit = 0; bit < 8; bit++)
            places[mask][bit] = mask >> bit & 1 ? __builtin_popcount(mask & ((1 << bit) - 1)) : 128;
}
#endif

// The escaped symbols in their places, and zero in the others.
INLINE unit escaped_symbols(struct level *level, unit codes) {
#if defined(__AVX512VBMI2__)
    __mmask64 mask = _mm512_cmpeq_epi8_mask((__m512i)codes, _mm512_set1_epi8(ESCAPE));
    unit found = (unit)_mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(level->next));
    level->next += __builtin_popcountll(mask);
    return found;
#elif defined(__SSSE3__) || defined(__aarch64__)
#if defined(__SSSE3__)
    unsigned mask = (unsigned)_mm_movemask_epi8((__m128i)(codes == ESCAPE));
#else
    uint8x16_t bits = vandq_u8((uint8x16_t)(codes == ESCAPE), (uint8x16_t){1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128});
    unsigned mask = vaddv_u8(vget_low_u8(bits)) | (unsigned)vaddv_u8(vget_high_u8(bits)) << 8;
#endif
    int before = __builtin_popcount(mask & 255);
    uint64_t low, high;
    memcpy(&low, places[mask & 255], 8);
    memcpy(&high, places[mask >> 8], 8);
    // Adding to 128 leaves it above 127.
    high += before * 0x0101010101010101u;
    VECTOR(uint64_t, 2) both = {low, high};
    unit symbols = *(const unit *)level->next;
    level->next += __builtin_popcount(mask);
#if defined(__SSSE3__)
    return (unit)_mm_shuffle_epi8((__m128i)symbols, (__m128i)both);
#else
    return (unit)vqtbl1q_u8((uint8x16_t)symbols, (uint8x16_t)both);
#endif
#else
    unit found = {0};
    for (int lane = 0; lane < UNIT; lane++)
        if (codes[lane] == ESCAPE) found[lane] = *level->next++;
    return found;
#endif
}

// The symbols of unit number `part` of a group with these codes.
INLINE unit next_symbols(struct level *level, const uint8_t *group, int part) {
    code_bytes packed = *(const code_bytes *)group;
#if defined(__AVX512VBMI2__)
    // Byte j holds the codes of symbols j, 16 + j, 32 + j and 48 + j: each quarter of the register takes its own.
    __m512i quarters = _mm512_broadcast_i32x4((__m128i)packed);
    unit codes = (unit)_mm512_srlv_epi16(quarters, (__m512i)(quarter_shifts){
        0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6}) & ESCAPE;
    (void)part;
#else
    unit codes = (packed >> (uint8_t)(2 * part)) & ESCAPE;
#endif
    return known_symbols(level->symbols, codes) | escaped_symbols(level, codes);
}

// Write the `count` symbols of one level, padded, as bytes.
static void decode_symbols(struct level level, const uint8_t *codes, int64_t count, uint8_t *out) {
    for (int64_t done = 0; done < count; done += GROUP, codes += CODES)
        for (int part = 0; part < GROUP / UNIT; part++)
            *(unit *)(out + done + part * UNIT) = next_symbols(&level, codes, part);
}

static void decode_weights(struct level level, const uint8_t *group, int64_t groups, uint8_t *out) {
    for (int64_t done = 0; done < groups; done++, group += CODES + GROUP)
        for (int part = 0; part < GROUP / UNIT; part++) {
            // A weight, rotated left by one bit, is its exponent above its mantissa and sign.
            unit_weights exponents = __builtin_convertvector(next_symbols(&level, group, part), unit_weights);
            unit_weights others = __builtin_convertvector(*(const unit *)(group + CODES + part * UNIT), unit_weights);
            unit_weights turned = exponents << 8 | others;
            *(unit_weights *)(out + 2 * (done * GROUP + part * UNIT)) = turned >> 1 | turned << 15;
        }
}

INLINE int64_t count_at(const uint8_t *panel, int place) {
    uint32_t count;
    memcpy(&count, panel + place, sizeof count);
    return count;
}

INLINE int64_t code_bytes_of(int64_t symbols) { return rounded_up(symbols, GROUP) / (GROUP / CODES); }

// Bytes of the panel, or -1 if it is damaged. Reads nothing at or beyond `end` and writes nothing outside of `scratch`,
// whatever the panel holds; its weights then begin there.
static int64_t decode_panel(const uint8_t *panel, const uint8_t *end, int64_t weights, uint8_t *scratch) {
    int64_t room = end - panel, step = weights + SLACK;
    if (room < HEADER) return -1;
    if (panel[STORED]) {
        int64_t whole = HEADER + rounded_up(2 * weights, CODES);
        if (room < whole) return -1;
        memcpy(scratch, panel + HEADER, 2 * weights);
        return whole;
    }
    int64_t second = count_at(panel, 0), third = count_at(panel, 4), kept = count_at(panel, 8);
    if (second > weights || third > weights || kept > weights) return -1;
    int64_t groups = rounded_up(weights, GROUP) / GROUP;
    const uint8_t *second_codes = panel + HEADER + groups * (CODES + GROUP);
    const uint8_t *third_codes = second_codes + code_bytes_of(second);
    const uint8_t *bytes = third_codes + code_bytes_of(third);
    int64_t whole = bytes + rounded_up(kept, CODES) - panel;
    if (room < whole) return -1;

    uint8_t *symbols_2 = scratch + 2 * step, *symbols_3 = symbols_2 + step, *symbols_4 = symbols_3 + step;
    memcpy(symbols_4, bytes, kept);
    // From the last level to the first: each has the escapes of the one before.
    decode_symbols(level_at(panel, LEVEL_3, symbols_4), third_codes, third, symbols_3);
    decode_symbols(level_at(panel, LEVEL_2, symbols_3), second_codes, second, symbols_2);
    decode_weights(level_at(panel, LEVEL_1, symbols_2), panel + HEADER, groups, scratch);
    return whole;
}

// Decode the row groups at `offsets` into `rows` rows of bfloat16 bits: 0, or 1 if they are damaged.
EXPORT int64_t decode_rows(const uint8_t *coded, const int64_t *offsets, int64_t rows, int64_t columns, uint8_t *out,
                           uint8_t *scratch) {
    for (int64_t first = 0; first < rows; first += ROW_GROUP_ROWS, offsets++) {
        const uint8_t *panel = coded + offsets[0], *end = coded + offsets[1];
        int64_t count = least(ROW_GROUP_ROWS, rows - first);
        for (int64_t k = 0; k < columns; k += PANEL_COLUMNS) {
            int64_t width = least(PANEL_COLUMNS, columns - k);
            int64_t taken = decode_panel(panel, end, count * width, scratch);
            if (taken < 0) return 1;
            panel += taken;
            for (int64_t row = 0; row < count; row++)
                memcpy(out + 2 * ((first + row) * columns + k), scratch + 2 * row * width, 2 * width);
        }
        // A row group consists of its panels and nothing else.
        if (panel != end) return 1;
    }
    return 0;
}


// ------------------------------------------------------------------------ the encoder of the lossless form (encode.py)

enum { KINDS = 256, LEVELS = 3, COUNTERS = 4 };

struct encoder {
    uint8_t exponents[PANEL_WEIGHTS + GROUP], others[PANEL_WEIGHTS + GROUP], codes[PANEL_WEIGHTS + GROUP];
    uint8_t escapes[2][PANEL_WEIGHTS + GROUP];
    uint8_t coded[4 * PANEL_WEIGHTS];
    // The code of every exponent on each level.
    uint8_t table[LEVELS][KINDS];
    int32_t counts[COUNTERS][KINDS];
};

EXPORT int64_t scratch_bytes_of_encoder(void) { return sizeof(struct encoder); }

// Write the nine most common exponents into the header, and each level's code of every exponent into the tables.
// Of equally common exponents the lower one comes first.
static void choose_codes(struct encoder *e, int64_t count) {
    memset(e->counts, 0, sizeof e->counts);
    memset(e->table, ESCAPE, sizeof e->table);
    // With one counter an exponent that comes twice in a row would wait for itself.
    int64_t place = 0;
    for (; place + COUNTERS <= count; place += COUNTERS)
        for (int own = 0; own < COUNTERS; own++) e->counts[own][e->exponents[place + own]]++;
    for (; place < count; place++) e->counts[0][e->exponents[place]]++;
    int32_t *total = e->counts[0];
    for (int kind = 0; kind < KINDS; kind++)
        for (int own = 1; own < COUNTERS; own++) total[kind] += e->counts[own][kind];
    for (int level = 0; level < LEVELS; level++)
        for (int code = 0; code < ESCAPE; code++) {
            int best = 0;
            for (int kind = 1; kind < KINDS; kind++)
                if (total[kind] > total[best]) best = kind;
            total[best] = -1;
            e->table[level][best] = code;
            e->coded[LEVEL_1 + 4 * level + code] = best;
        }
}

// Write the code of each symbol, and the symbols that escape; the number of those.
static int64_t code_symbols(const uint8_t *symbols, int64_t count, const uint8_t *table, uint8_t *codes, uint8_t *escapes) {
    int64_t escaped = 0;
    for (int64_t place = 0; place < count; place++) {
        uint8_t symbol = symbols[place], code = table[symbol];
        codes[place] = code;
        escapes[escaped] = symbol;
        escaped += code == ESCAPE;
    }
    return escaped;
}

// Pack the codes of 64 symbols into 16 bytes.
INLINE void pack_codes(const uint8_t *codes, uint8_t *out) {
    const code_bytes *quarters = (const code_bytes *)codes;
    *(code_bytes *)out = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6;
}

static int64_t store_panel(const uint8_t *weights, int64_t stride, int64_t rows, int64_t columns, uint8_t *out) {
    int64_t whole = HEADER + rounded_up(2 * rows * columns, CODES);
    memset(out, 0, HEADER);
    memset(out + whole - CODES, 0, CODES);
    out[STORED] = 1;
    for (int64_t row = 0; row < rows; row++)
        memcpy(out + HEADER + 2 * row * columns, weights + 2 * row * stride, 2 * columns);
    return whole;
}

// Split each weight, rotated left by one bit, into its exponent and its mantissa with the sign.
static void split(const uint8_t *weights, int64_t count, uint8_t *exponents, uint8_t *others) {
    int64_t place = 0;
    for (; place + CODES <= count; place += CODES) {
        code_weights weight = *(const code_weights *)(weights + 2 * place), turned = weight << 1 | weight >> 15;
        *(code_bytes *)(exponents + place) = __builtin_convertvector(turned >> 8, code_bytes);
        *(code_bytes *)(others + place) = __builtin_convertvector(turned, code_bytes);
    }
    for (; place < count; place++) {
        uint8_t low = weights[2 * place], high = weights[2 * place + 1];
        exponents[place] = (uint8_t)(high << 1 | low >> 7);
        others[place] = (uint8_t)(low << 1 | high >> 7);
    }
}

// Bytes of the coded panel.
static int64_t encode_panel(const uint8_t *weights, int64_t stride, int64_t rows, int64_t columns, uint8_t *out,
                            struct encoder *e) {
    int64_t count = rows * columns, left = count, place = HEADER;
    memset(e->coded, 0, HEADER);
    for (int64_t row = 0; row < rows; row++)
        split(weights + 2 * row * stride, columns, e->exponents + row * columns, e->others + row * columns);
    choose_codes(e, count);
    memset(e->others + count, 0, GROUP);
    uint8_t *source = e->exponents;
    for (int level = 0; level < LEVELS; level++) {
        // The header has the counts of the levels after the first, whose own is known.
        uint32_t symbols = (uint32_t)left;
        if (level) memcpy(e->coded + 4 * (level - 1), &symbols, sizeof symbols);
        // The padding of the last group has the code 0.
        memset(source + left, e->coded[LEVEL_1 + 4 * level], GROUP);
        int64_t full = rounded_up(left, GROUP);
        uint8_t *escapes = e->escapes[level % 2];
        left = code_symbols(source, full, e->table[level], e->codes, escapes);
        for (int64_t done = 0; done < full; done += GROUP, place += CODES) {
            pack_codes(e->codes + done, e->coded + place);
            if (level) continue;
            // The codes of the first level lie beside mantissas and signs.
            memcpy(e->coded + place + CODES, e->others + done, GROUP);
            place += GROUP;
        }
        source = escapes;
    }
    uint32_t kept = (uint32_t)left;
    memcpy(e->coded + 8, &kept, sizeof kept);
    memset(e->coded + place + left, 0, CODES);
    memcpy(e->coded + place, source, left);
    int64_t end = place + rounded_up(left, CODES);
    if (end >= HEADER + rounded_up(2 * count, CODES)) return store_panel(weights, stride, rows, columns, out);
    memcpy(out, e->coded, end);
    return end;
}

// Encode rows of bfloat16 bits; the bytes of each row group go to `lengths`.
EXPORT void encode_rows(const uint8_t *rows, int64_t count, int64_t columns, uint8_t *out, int64_t *lengths,
                        struct encoder *scratch) {
    for (int64_t first = 0; first < count; first += ROW_GROUP_ROWS) {
        uint8_t *begin = out;
        int64_t height = least(ROW_GROUP_ROWS, count - first);
        for (int64_t k = 0; k < columns; k += PANEL_COLUMNS) {
            int64_t width = least(PANEL_COLUMNS, columns - k);
            out += encode_panel(rows + 2 * (first * columns + k), columns, height, width, out, scratch);
        }
        *lengths++ = out - begin;
    }
}


// ------------------------------------------------------------------------------- weights in fewer bits (quantised.py)

enum kind { BFLOAT16, FLOAT16, FLOAT32, CODED };
// How a matrix is stored in fewer bits, as runner/format/quantised.py numbers it; docs/format.md has the layouts.
enum coding { UNCODED, INT8, INT4, INT5 };
// Columns of a group, those of a row that share the bytes of one entry of scales, and the values of such an entry.
enum { INT8_GROUP = 64, INT4_GROUP = 32, SUPER_GROUP = 256, GROUPS = SUPER_GROUP / INT4_GROUP, SCALE_BYTES = 16, TOP_SCALE = 63 };
enum { QUARTER = 16, FOLDED = 8 };

typedef VECTOR(float, QUARTER) values_16;
typedef VECTOR(int32_t, QUARTER) integers_16;
typedef VECTOR(uint32_t, QUARTER) bits_16;
typedef VECTOR(uint16_t, QUARTER) halves_16;
typedef VECTOR(int8_t, QUARTER) signed_16;
typedef VECTOR(uint8_t, QUARTER) bytes_16;
typedef VECTOR(_Float16, QUARTER) float16_16;
typedef VECTOR(float, FOLDED) values_8;

INLINE int64_t group_columns(enum coding coding) { return coding == INT8 ? INT8_GROUP : INT4_GROUP; }
// Bytes of a group's integers.
INLINE int64_t group_bytes(enum coding coding) { return coding == INT8 ? 64 : coding == INT4 ? 16 : 20; }
INLINE int64_t groups_of(enum coding coding, int64_t columns) {
    return rounded_up(columns, group_columns(coding)) / group_columns(coding);
}
// Bytes of a row of integers, and of a row of scales.
INLINE int64_t data_bytes(enum coding coding, int64_t columns) { return groups_of(coding, columns) * group_bytes(coding); }
INLINE int64_t scale_bytes(enum coding coding, int64_t columns) {
    return coding == INT8 ? 2 * groups_of(coding, columns) : rounded_up(columns, SUPER_GROUP) / SUPER_GROUP * SCALE_BYTES;
}
INLINE int64_t size_of(enum kind kind) { return kind == FLOAT32 ? 4 : 2; }

INLINE float bfloat16_at(const uint8_t *place) {
    uint16_t half;
    memcpy(&half, place, sizeof half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// What scales are multiplied with so that `rounded_16` gives weights.
INLINE float factor_of(enum kind kind) { return kind == BFLOAT16 ? 65536 : 1; }

// The nearest numbers of the dtype to values over its factor, ties to even. The product of v and 1 - 2^-16 is rounded to
// 24 bits, which are the first 8 of the 2^-16 v that it has lost: so the difference is that, rounded to 8 bits.
INLINE values_16 rounded_16(enum kind kind, values_16 values) {
    if (kind == FLOAT16) return __builtin_convertvector(__builtin_convertvector(values, float16_16), values_16);
    return kind == BFLOAT16 ? values - values * (65535 / 65536.0f) : values;
}

INLINE void store_16(enum kind kind, values_16 values, uint8_t *out) {
    if (kind == FLOAT32) *(values_16 *)out = values;
    if (kind == FLOAT16) *(float16_16 *)out = __builtin_convertvector(values, float16_16);
    if (kind == BFLOAT16) *(halves_16 *)out = __builtin_convertvector((bits_16)values >> 16, halves_16);
}

// Columns that share a scale and a minimum, half a group of INT8, and the bytes of their integers.
enum { PART = INT4_GROUP, PARTS = SUPER_GROUP / PART };
INLINE int64_t part_bytes(enum coding coding) { return group_bytes(coding) * PART / group_columns(coding); }
typedef VECTOR(uint32_t, PARTS) part_bits;
typedef VECTOR(int32_t, PARTS) part_integers;
typedef VECTOR(float, PARTS) part_values;

INLINE uint32_t word_at(const uint8_t *place) {
    uint32_t word;
    memcpy(&word, place, sizeof word);
    return word;
}

// The eight numbers of 6 bits in 48: four lie within the first 32, four within the last.
INLINE part_values sixes_at(const uint8_t *place) {
    uint32_t low = word_at(place), high = word_at(place + 2);
    const part_bits shifts = {0, 6, 12, 18, 8, 14, 20, 26};
    part_bits sixes = (part_bits){low, low, low, low, high, high, high, high} >> shifts & TOP_SCALE;
    return __builtin_convertvector((part_integers)sixes, part_values);
}

// Of each part of a super-group what its integers are multiplied with, and what is added then, times the dtype's factor.
struct lines {
    float scale[PARTS], less[PARTS];
};

INLINE struct lines lines_at(enum coding coding, enum kind kind, const uint8_t *scales, int64_t parts) {
    struct lines lines = {{0}, {0}};
    if (coding == INT8) {
        for (int i = 0; i < parts; i++) lines.scale[i] = bfloat16_at(scales + i / 2 * 2) * factor_of(kind);
    } else {
        // Each unit is the upper half of a float.
        part_bits units = word_at(scales) - (part_bits){0};
        *(part_values *)lines.scale = sixes_at(scales + 4) * ((part_values)(units << 16) * factor_of(kind));
        *(part_values *)lines.less = sixes_at(scales + 10) * ((part_values)(units & 0xffff0000) * -factor_of(kind));
    }
    return lines;
}

// 16 weights of a part with these integers. The product is exact, so it makes no difference whether its addition is fused.
INLINE values_16 weights_of(enum kind kind, integers_16 q, float scale, float less) {
#pragma clang fp contract(fast)
    return rounded_16(kind, __builtin_convertvector(q, values_16) * scale + less);
}

// The weights of a part.
struct part {
    values_16 low, high;
};

INLINE struct part decode_part(enum coding coding, enum kind kind, const uint8_t *data, float scale, float less) {
    const integers_16 places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    integers_16 low, high;
    if (coding == INT8) {
        low = __builtin_convertvector(*(const signed_16 *)data, integers_16);
        high = __builtin_convertvector(*(const signed_16 *)(data + QUARTER), integers_16);
    } else {
        integers_16 packed = __builtin_convertvector(*(const bytes_16 *)data, integers_16);
        low = packed & 15;
        high = packed >> 4;
    }
#if defined(__AVX512F__)
    if (coding == INT4) {
        // One register holds all 16 weights that there are.
        __m512 all = (__m512)weights_of(kind, places, scale, less);
        return (struct part){(values_16)_mm512_permutexvar_ps((__m512i)low, all),
                             (values_16)_mm512_permutexvar_ps((__m512i)high, all)};
    }
#endif
    if (coding == INT5) {
        integers_16 fifths = (int32_t)word_at(data + QUARTER) - (integers_16){0};
        low |= fifths >> places << 4 & 16;
        high |= fifths >> QUARTER >> places << 4 & 16;
    }
    return (struct part){weights_of(kind, low, scale, less), weights_of(kind, high, scale, less)};
}

INLINE void decode_row(enum coding coding, enum kind kind, const uint8_t *data, const uint8_t *scales, int64_t columns,
                       float *out) {
    for (int64_t k = 0; k < columns; k += SUPER_GROUP, scales += scale_bytes(coding, SUPER_GROUP)) {
        int64_t parts = (least(columns - k, SUPER_GROUP) + PART - 1) / PART;
        struct lines lines = lines_at(coding, kind, scales, parts);
        for (int64_t i = 0; i < parts; i++, data += part_bytes(coding), out += PART)
            *(struct part *)out = decode_part(coding, kind, data, lines.scale[i], lines.less[i]);
    }
}

// Columns of a row that are decoded at a time: as float32, those of a group of outputs stay in the first cache.
enum { DECODED_COLUMNS = 512 };

// Decode `rows` rows of up to that many columns, which begin at a multiple of them, into rows of them.
#define FOR_CODINGS(kind)                                                                   \
    switch (coding) {                                                                       \
    case INT8: decode_row(INT8, kind, data, scales, columns, out); break;                   \
    case INT4: decode_row(INT4, kind, data, scales, columns, out); break;                   \
    default: decode_row(INT5, kind, data, scales, columns, out); break;                     \
    }
static void decode_columns(enum coding coding, enum kind kind, const uint8_t *data, int64_t data_stride,
                           const uint8_t *scales, int64_t scale_stride, int64_t rows, int64_t columns, float *out) {
    for (int64_t row = 0; row < rows; row++, data += data_stride, scales += scale_stride, out += DECODED_COLUMNS) {
        switch (kind) {
        case FLOAT32: FOR_CODINGS(FLOAT32); break;
        case FLOAT16: FOR_CODINGS(FLOAT16); break;
        default: FOR_CODINGS(BFLOAT16); break;
        }
    }
}

EXPORT void decode_quantised(int64_t coding, int64_t kind, const uint8_t *data, const uint8_t *scales, int64_t rows,
                             int64_t columns, uint8_t *out, uint8_t *scratch) {
    int64_t size = size_of(kind), data_stride = data_bytes(coding, columns), scale_stride = scale_bytes(coding, columns);
    float *decoded = (float *)scratch;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < columns; k += DECODED_COLUMNS) {
            int64_t width = least(DECODED_COLUMNS, columns - k);
            decode_columns(coding, kind, data + row * data_stride + data_bytes(coding, k), 0,
                           scales + row * scale_stride + scale_bytes(coding, k), 0, 1, width, decoded);
            // Narrowed in their place.
            for (int64_t i = 0; i < width; i += QUARTER) store_16(kind, *(values_16 *)(decoded + i), scratch + i * size);
            memcpy(out + (row * columns + k) * size, scratch, width * size);
        }
}

INLINE values_8 values_of(const float *values) { return *(const values_8 *)values; }
// The sum of the lanes: the upper half is added to the lower half until one lane is left.
INLINE float folded_8(values_8 v) {
    VECTOR(float, 4) fours = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
    VECTOR(float, 4) twos = fours + __builtin_shufflevector(fours, fours, 2, 3, 0, 1);
    return twos[0] + twos[1];
}
// The nearest integers from `low` to `top`, ties to even.
INLINE values_8 nearest(values_8 v, float low, float top) {
    v = __builtin_elementwise_min(__builtin_elementwise_max(v, (values_8){0} + low), (values_8){0} + top);
    return (v + 12582912.0f) - 12582912.0f;
}
INLINE float nearest_one(float value, float top) { return nearest((values_8){0} + value, 0, top)[0]; }

// The upper half of a float's bits, rounded to the nearest or, if that is asked for, away from zero.
INLINE uint16_t bfloat16_of(float value, int away) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + (away ? 0xffff : 0x7fff + (bits >> 16 & 1))) >> 16);
}

// Below this a range of weights counts as none.
static const float LEAST_RANGE = 1e-30f;
// Scales that are tried for a group of 4 or 5 bits: so many, from one level less than the plain one on.
enum { SEARCHED = 11 };
static const float SEARCH_STEP = 0.2f;

static int encode_int8(const float *weights, uint8_t *data, uint8_t *scales) {
    float most = 0;
    for (int i = 0; i < INT8_GROUP; i++) {
        float size = __builtin_fabsf(weights[i]);
        if (size > most) most = size;
    }
    uint16_t stored = most < LEAST_RANGE ? 0 : bfloat16_of(most / 127, 1);
    memcpy(scales, &stored, sizeof stored);
    float scale = bfloat16_at(scales);
    for (int i = 0; i < INT8_GROUP; i += FOLDED) {
        values_8 q = stored ? nearest(values_of(weights + i) / scale, -127, 127) : (values_8){0};
        for (int lane = 0; lane < FOLDED; lane++) data[i + lane] = (uint8_t)(int8_t)q[lane];
    }
    return 1;
}

// What a group of weights becomes: integers times `scale`, minus `least_value`.
struct line {
    float scale, least_value;
};

// Of the lines that least squares give for the integers of some scales around the plain one, that of the least error.
// `count` of the weights are there; unless that is all, the others are zero and so is their `mask`.
INLINE struct line best_line(const float *weights, const float *mask, int count, float top) {
    enum { EIGHTS = INT4_GROUP / FOLDED };
    const int is_full = count == INT4_GROUP;
    values_8 v[EIGHTS], there[EIGHTS], low, high, sum = {0};
    UNROLLED for (int i = 0; i < EIGHTS; i++) {
        v[i] = values_of(weights + FOLDED * i);
        there[i] = is_full ? (values_8){0} + 1 : values_of(mask + FOLDED * i);
        values_8 some = is_full ? v[i] : v[i] + (1 - there[i]) * weights[0];
        low = i ? __builtin_elementwise_min(some, low) : some;
        high = i ? __builtin_elementwise_max(some, high) : some;
        sum += v[i];
    }
    float least_one = 0, most = high[0], total = folded_8(sum), n = (float)count;
    for (int lane = 0; lane < FOLDED; lane++) {
        if (low[lane] < least_one) least_one = low[lane];
        if (high[lane] > most) most = high[lane];
    }
    float range = most - least_one;
    if (!(range >= LEAST_RANGE)) return (struct line){0, 0 - least_one};
    struct line best = {range / top, 0 - least_one};
    float best_error = __builtin_inff();
    for (int step = 0; step < SEARCHED; step++) {
        float inverse = (top - 1 + (float)step * SEARCH_STEP) / range;
        values_8 q[EIGHTS], ones = {0}, squares = {0}, products = {0}, errors = {0};
        UNROLLED for (int i = 0; i < EIGHTS; i++) {
            q[i] = nearest((v[i] - least_one) * inverse, 0, top);
            if (!is_full) q[i] *= there[i];
            ones += q[i];
            squares += q[i] * q[i];
            products += q[i] * v[i];
        }
        float one = folded_8(ones), square = folded_8(squares), product = folded_8(products);
        float determinant = n * square - one * one;
        if (!(determinant > 0)) continue;
        float scale = (n * product - total * one) / determinant, least_value = (one * product - square * total) / determinant;
        if (least_value < 0) {
            least_value = 0;
            scale = product / square;
        }
        UNROLLED for (int i = 0; i < EIGHTS; i++) {
            values_8 off = q[i] * scale - least_value - v[i];
            if (!is_full) off *= there[i];
            errors += off * off;
        }
        float error = folded_8(errors);
        if (scale >= 0 && error < best_error) {
            best_error = error;
            best = (struct line){scale, least_value};
        }
    }
    return best;
}

// A super-group, of which `count` weights are there and the others are zero.
static int encode_int45(enum coding coding, const float *weights, int count, uint8_t *data, uint8_t *scales) {
    const float top = coding == INT4 ? 15 : 31;
    struct line lines[GROUPS] = {{0}};
    float mask[SUPER_GROUP], most = 0, most_least = 0;
    int groups = (count + INT4_GROUP - 1) / INT4_GROUP;
    for (int i = 0; i < SUPER_GROUP; i++) mask[i] = i < count;
    for (int g = 0; g < groups; g++) {
        int own = (int)least(INT4_GROUP, count - g * INT4_GROUP);
        const float *first = weights + g * INT4_GROUP, *there = mask + g * INT4_GROUP;
        lines[g] = own == INT4_GROUP ? best_line(first, there, INT4_GROUP, top) : best_line(first, there, own, top);
        if (lines[g].scale > most) most = lines[g].scale;
        if (lines[g].least_value > most_least) most_least = lines[g].least_value;
    }
    uint16_t units[2] = {bfloat16_of(most / TOP_SCALE, 0), bfloat16_of(most_least / TOP_SCALE, 0)};
    memcpy(scales, units, sizeof units);
    float scale_unit = bfloat16_at(scales), least_unit = bfloat16_at(scales + 2);
    if (!(scale_unit * TOP_SCALE <= __FLT_MAX__ && least_unit * TOP_SCALE <= __FLT_MAX__)) return 0;
    uint64_t sixes[2] = {0};
    for (int g = 0; g < groups; g++, data += group_bytes(coding)) {
        float six = scale_unit > 0 ? nearest_one(lines[g].scale / scale_unit, TOP_SCALE) : 0;
        float least_six = least_unit > 0 ? nearest_one(lines[g].least_value / least_unit, TOP_SCALE) : 0;
        sixes[0] |= (uint64_t)six << 6 * g;
        sixes[1] |= (uint64_t)least_six << 6 * g;
        float scale = scale_unit * six, least_value = least_unit * least_six;
        uint8_t q[INT4_GROUP] = {0};
        for (int i = 0; i < INT4_GROUP && scale > 0; i += FOLDED) {
            int place = g * INT4_GROUP + i;
            values_8 found = nearest((values_of(weights + place) + least_value) / scale, 0, top) * values_of(mask + place);
            for (int lane = 0; lane < FOLDED; lane++) q[i + lane] = (uint8_t)found[lane];
        }
        uint32_t fifths = 0;
        for (int i = 0; i < QUARTER; i++) data[i] = (uint8_t)((q[i] & 15) | q[i + QUARTER] << 4);
        for (int i = 0; i < INT4_GROUP; i++) fifths |= (uint32_t)(q[i] >> 4) << i;
        if (coding == INT5) memcpy(data + QUARTER, &fifths, sizeof fifths);
    }
    memcpy(scales + 4, &sixes[0], 6);
    memcpy(scales + 10, &sixes[1], 6);
    return 1;
}

INLINE float load_weight(enum kind kind, const uint8_t *weight);

// Encode rows of weights of one dtype: 0, or 1 if some of them are infinite, not numbers, or too large.
EXPORT int64_t encode_quantised(int64_t coding, int64_t kind, const uint8_t *rows, int64_t count, int64_t columns,
                                uint8_t *data, uint8_t *scales) {
    int64_t step = coding == INT8 ? INT8_GROUP : SUPER_GROUP;
    // What they decode to may be a little larger, and is to be finite, too.
    const float limit = kind == FLOAT16 ? 3e4f : kind == BFLOAT16 ? 1e32f : 1e38f;
    for (int64_t row = 0; row < count; row++)
        for (int64_t k = 0; k < columns; k += step) {
            float weights[SUPER_GROUP] = {0};
            int own = (int)least(step, columns - k), is_sound = 1;
            for (int i = 0; i < own; i++) {
                weights[i] = load_weight(kind, rows + ((row * columns) + k + i) * size_of(kind));
                is_sound &= __builtin_fabsf(weights[i]) <= limit;
            }
            if (!is_sound) return 1;
            uint8_t *integers = data + row * data_bytes(coding, columns) + data_bytes(coding, k);
            uint8_t *own_scales = scales + row * scale_bytes(coding, columns) + scale_bytes(coding, k);
            if (coding == INT8 ? !encode_int8(weights, integers, own_scales)
                               : !encode_int45(coding, weights, own, integers, own_scales))
                return 1;
        }
    return 0;
}


// ---------------------------------------------------------------------------------------------- products (matmul.py)

// Partial sums of an output, and columns that they sum at a time.
enum { LANES = 8, COLUMN_CHUNK = PANEL_COLUMNS };
// Rows of x that are multiplied with a group of outputs before the next group.
enum { ROWS_IN_CACHE = 64, OUTPUTS_IN_CACHE = ROW_GROUP_ROWS };
// Columns of x times its rows that stay in the first cache while a group of outputs uses them.
enum { VALUES_IN_CACHE = 4096 };

// Outputs that share a register, the most rows of a tile, and registers of weights for a tile of each number of rows:
// sums, weights and x fit into the 16 registers of AVX2, the 32 of AVX-512, the 32 of half the size of NEON.
#if defined(__AVX512F__)
enum { WIDE = 2, MOST_ROWS = 8 };
INLINE int registers_of(int rows) { return rows <= 2 || rows > 4 ? 3 : 6; }
#else
enum { WIDE = 1, MOST_ROWS = 4 };
INLINE int registers_of(int rows) { return rows == 1 ? 6 : rows == 2 ? 4 : 3; }
#endif
enum { MOST_REGISTERS = 6 };
// Registers of a group of outputs.
enum { GROUP_REGISTERS = OUTPUTS_IN_CACHE / WIDE };

typedef VECTOR(float, LANES) lanes;
typedef VECTOR(float, 4) four;
typedef VECTOR(float, LANES *WIDE) sums;
typedef VECTOR(uint32_t, LANES *WIDE) sum_bits;
typedef VECTOR(uint16_t, LANES) halves;
typedef VECTOR(_Float16, LANES) float16_lanes;
typedef VECTOR(double, LANES *WIDE) doubles;
typedef VECTOR(int64_t, LANES *WIDE) double_bits;

// a * b + c, rounded once.
INLINE sums fused(sums a, sums b, sums c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_elementwise_fma(a, b, c);
#else
    // The product is exact in double. Their sum is rounded to odd (Boldo and Melquiond, 2008), which keeps what decides
    // the second rounding: its error, exact too (Knuth's TwoSum), moves an even last bit towards the true sum.
    doubles product = __builtin_convertvector(a, doubles) * __builtin_convertvector(b, doubles);
    doubles addend = __builtin_convertvector(c, doubles);
    doubles sum = product + addend, part = sum - product;
    doubles error = (product - (sum - part)) + (addend - part);
    double_bits bits = (double_bits)sum;
    // -1 where the sum is not exact; never so for NaN and infinity.
    double_bits inexact = (error > 0) | (error < 0);
    double_bits away = (error > 0) == (sum > 0);
    double_bits step = (away & 1) | (~away & -1);
    bits += inexact & ((bits & 1) - 1) & step;
    return __builtin_convertvector((doubles)bits, sums);
#endif
}

INLINE float fused_one(float a, float b, float c) {
    sums found = fused((sums){a}, (sums){b}, (sums){c});
    return found[0];
}

// 8 columns of a row of x, for each of the outputs that share a register.
INLINE sums load_x(const float *x) {
    lanes values = *(const lanes *)x;
#if defined(__AVX512F__)
    return __builtin_shufflevector(values, values, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
#else
    return values;
#endif
}

// 8 columns of the WIDE outputs at `weight`, as exact float32; bfloat16 is the upper half of a float32's bits.
INLINE sums load_weights(enum kind kind, const uint8_t *weight, int64_t stride) {
#if defined(__AVX512F__)
#define PAIR(type) __builtin_shufflevector(*(const type *)weight, *(const type *)(weight + stride), \
                                           0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#else
#define PAIR(type) (*(const type *)weight)
    (void)stride;
#endif
    if (kind == FLOAT32) return PAIR(lanes);
    if (kind == FLOAT16) return __builtin_convertvector(PAIR(float16_lanes), sums);
    return (sums)(__builtin_convertvector(PAIR(halves), sum_bits) << 16);
}

INLINE float load_weight(enum kind kind, const uint8_t *weight) {
    if (kind == FLOAT32) {
        float value;
        memcpy(&value, weight, sizeof value);
        return value;
    }
    uint16_t half;
    memcpy(&half, weight, sizeof half);
    if (kind == FLOAT16) {
        _Float16 value;
        memcpy(&value, &half, sizeof value);
        return value;
    }
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// A matrix in memory: a stride is the bytes from one row to the next.
struct matrix {
    uint8_t *data;
    int64_t stride;
};

// Add whole vectors of `columns` columns to the sums of `rows` rows of x times `registers` registers of outputs. The
// sums are in registers meanwhile: all loops but that over the columns are unrolled. One that fetches ahead prefetches
// the weights of the next outputs, and one that begins starts from zero.
INLINE void tile(enum kind kind, int rows, int registers, int fetches_ahead, struct matrix weight, struct matrix x,
                 int64_t columns, int begins, sums *state) {
    const int size = kind == FLOAT32 ? 4 : 2;
    sums sum[MOST_ROWS][MOST_REGISTERS];
    UNROLLED for (int t = 0; t < rows; t++)
        UNROLLED for (int r = 0; r < registers; r++) sum[t][r] = begins ? (sums){0} : state[t * GROUP_REGISTERS + r];
    for (int64_t k = 0; k < columns; k += LANES) {
        sums weights[MOST_REGISTERS];
        UNROLLED for (int r = 0; r < registers; r++) {
            const uint8_t *place = weight.data + WIDE * r * weight.stride + k * size;
            weights[r] = load_weights(kind, place, weight.stride);
            UNROLLED for (int w = 0; w < WIDE * fetches_ahead; w++)
                __builtin_prefetch(place + (WIDE * registers + w) * weight.stride);
        }
        UNROLLED for (int t = 0; t < rows; t++) {
            sums values = load_x((const float *)(x.data + t * x.stride) + k);
            UNROLLED for (int r = 0; r < registers; r++) sum[t][r] = fused(weights[r], values, sum[t][r]);
            // Rows one after another: loaded all at once, they would take the registers of sums.
            __asm__ volatile("" ::: "memory");
        }
    }
    UNROLLED for (int t = 0; t < rows; t++)
        UNROLLED for (int r = 0; r < registers; r++) state[t * GROUP_REGISTERS + r] = sum[t][r];
}

// The tiles of each kind and number of rows: with the registers that suit these, the same with prefetching, and one with
// a single register for the outputs that are left over.
typedef void tile_function(struct matrix weight, struct matrix x, int64_t columns, int begins, sums *state);
enum tile_sort { WHOLE, FETCHING, REST };

#define DEFINE_TILE(name, kind, rows, registers, fetches_ahead)                                                 \
    static void name##_##kind##_##rows(struct matrix w, struct matrix x, int64_t columns, int begins, sums *state) { \
        tile(kind, rows, registers, fetches_ahead, w, x, columns, begins, state);                               \
    }
#define DEFINE_TILES(kind, rows)                              \
    DEFINE_TILE(whole, kind, rows, registers_of(rows), 0)     \
    DEFINE_TILE(fetching, kind, rows, registers_of(rows), 1)  \
    DEFINE_TILE(rest, kind, rows, 1, 0)
#define NAME_TILES(kind, rows) {whole_##kind##_##rows, fetching_##kind##_##rows, rest_##kind##_##rows},
#if defined(__AVX512F__)
#define FOR_ROWS(do, kind) do(kind, 1) do(kind, 2) do(kind, 3) do(kind, 4) do(kind, 5) do(kind, 6) do(kind, 7) do(kind, 8)
#else
#define FOR_ROWS(do, kind) do(kind, 1) do(kind, 2) do(kind, 3) do(kind, 4)
#endif
FOR_ROWS(DEFINE_TILES, BFLOAT16)
FOR_ROWS(DEFINE_TILES, FLOAT16)
FOR_ROWS(DEFINE_TILES, FLOAT32)
static tile_function *const tiles[][MOST_ROWS][3] = {
    {FOR_ROWS(NAME_TILES, BFLOAT16)}, {FOR_ROWS(NAME_TILES, FLOAT16)}, {FOR_ROWS(NAME_TILES, FLOAT32)}};

// The sums of all lanes of four outputs: the upper half is added to the lower half until one lane is left.
INLINE four folded(const lanes *sum) {
    lanes fours[2];
    UNROLLED for (int n = 0; n < 2; n++)
        fours[n] = __builtin_shufflevector(sum[2 * n], sum[2 * n + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
                   __builtin_shufflevector(sum[2 * n], sum[2 * n + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    lanes twos = __builtin_shufflevector(fours[0], fours[1], 0, 1, 4, 5, 8, 9, 12, 13) +
                 __builtin_shufflevector(fours[0], fours[1], 2, 3, 6, 7, 10, 11, 14, 15);
    return __builtin_shufflevector(twos, twos, 0, 2, 4, 6) + __builtin_shufflevector(twos, twos, 1, 3, 5, 7);
}

// Add the sums of `rows` rows times a group of outputs to `out`: their lanes folded, then the columns from `first` on.
static void add_sums(enum kind kind, int rows, struct matrix weight, int64_t outputs, struct matrix x, int64_t first,
                     int64_t columns, const sums *state, struct matrix out) {
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    for (int t = 0; t < rows; t++) {
        float *place = (float *)(out.data + t * out.stride);
        const float *values = (const float *)(x.data + t * x.stride);
        for (int64_t n = 0; n < outputs; n += 4) {
            four sum = folded((const lanes *)(state + t * GROUP_REGISTERS) + n);
            if (first == columns && n + 4 <= outputs) {
                *(four *)(place + n) += sum;
                continue;
            }
            for (int64_t i = 0; i < least(4, outputs - n); i++) {
                float one = sum[i];
                for (int64_t k = first; k < columns; k++)
                    one = fused_one(load_weight(kind, weight.data + (n + i) * weight.stride + k * size), values[k], one);
                place[n + i] += one;
            }
        }
    }
}

// Coded weights that come next. The memory would have nothing to do while a panel is multiplied: so each tile prefetches
// some of them.
struct ahead {
    const uint8_t *next, *end;
};
enum { FETCHING_VALUES = 512, FETCHED = 4096 };

INLINE void fetch(struct ahead *ahead) {
    const uint8_t *stop = ahead->next + least(FETCHED, ahead->end - ahead->next);
    for (; ahead->next < stop; ahead->next += 64) __builtin_prefetch(ahead->next, 0, 2);
}

// Add `width` columns of `rows` rows of x, up to those of a tile, times a group of outputs to their sums.
static void multiply_columns(enum kind kind, int rows, struct matrix weight, int64_t outputs, enum tile_sort sort,
                             struct matrix x, int64_t width, int begins, sums *state, struct ahead *ahead) {
    const int64_t most = WIDE * registers_of(rows);
    for (int64_t n = 0; n < outputs;) {
        struct matrix here = {weight.data + n * weight.stride, weight.stride};
        int is_rest = n + most > outputs;
        // The second half of a register without a second output computes the first one again.
        if (n + 1 == outputs) here.stride = 0;
        fetch(ahead);
        tiles[kind][rows - 1][is_rest ? REST : sort](here, x, width, begins, state + n / WIDE);
        n += is_rest ? WIDE : most;
    }
}

// Add `rows` rows of x, up to those of a tile, times a group of outputs, over one chunk of columns, to `out`.
static void multiply_few(enum kind kind, int rows, struct matrix weight, int64_t outputs, enum tile_sort sort,
                         struct matrix x, int64_t columns, struct matrix out, struct ahead *ahead) {
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    int64_t whole = columns / LANES * LANES, values = ahead->next < ahead->end ? FETCHING_VALUES : VALUES_IN_CACHE;
    int64_t step = least(values, VALUES_IN_CACHE / rows) / LANES * LANES;
    __attribute__((aligned(64))) sums state[MOST_ROWS * GROUP_REGISTERS];
    if (!whole) memset(state, 0, sizeof state);
    for (int64_t k = 0; k < whole; k += step) {
        struct matrix some = {x.data + k * sizeof(float), x.stride}, here = {weight.data + k * size, weight.stride};
        multiply_columns(kind, rows, here, outputs, sort, some, least(step, whole - k), !k, state, ahead);
    }
    add_sums(kind, rows, weight, outputs, x, whole, columns, state, out);
}

// The same for any number of rows, which are spread evenly over as few tiles as they need.
static void multiply_rows(enum kind kind, int64_t rows, struct matrix weight, int64_t outputs, enum tile_sort sort,
                          struct matrix x, int64_t columns, struct matrix out, struct ahead ahead) {
    for (int64_t left = (rows + MOST_ROWS - 1) / MOST_ROWS; left; left--) {
        int64_t some = (rows + left - 1) / left;
        multiply_few(kind, (int)some, weight, outputs, sort, x, columns, out, &ahead);
        x.data += some * x.stride;
        out.data += some * out.stride;
        rows -= some;
        sort = WHOLE;
    }
}

// Add whole super-groups of columns of `rows` rows of x times a few outputs in fewer bits to their sums. The weights are
// decoded in registers.
enum { MOST_DECODED = 6 };
INLINE int decoded_outputs(int rows) { return rows == 1 ? 6 : rows == 2 ? 4 : 2; }

INLINE void decoding_tile(enum coding coding, int rows, struct matrix weight, struct matrix scales, struct matrix x,
                          int64_t columns, sums *state) {
    const int outputs = decoded_outputs(rows), registers = outputs / WIDE;
    sums sum[MOST_ROWS][MOST_DECODED] = {{{0}}};
    for (int64_t k = 0; k < columns; k += SUPER_GROUP) {
        struct lines lines[MOST_DECODED];
        const uint8_t *data = weight.data + data_bytes(coding, k);
        UNROLLED for (int n = 0; n < outputs; n++) {
            lines[n] = lines_at(coding, BFLOAT16, scales.data + n * scales.stride + scale_bytes(coding, k), PARTS);
            UNROLLED for (int64_t byte = 0; byte < data_bytes(coding, SUPER_GROUP); byte += 64)
                __builtin_prefetch(data + (n + outputs) * weight.stride + byte);
        }
        for (int i = 0; i < PARTS; i++, data += part_bytes(coding)) {
            const float *values = (const float *)x.data + k + i * PART;
            UNROLLED for (int n = 0; n < outputs; n += WIDE) {
                struct part parts[WIDE];
                UNROLLED for (int w = 0; w < WIDE; w++) {
                    const struct lines *own = &lines[n + w];
                    parts[w] = decode_part(coding, BFLOAT16, data + (n + w) * weight.stride, own->scale[i], own->less[i]);
                }
                UNROLLED for (int j = 0; j < PART; j += LANES) {
                    sums weights = load_weights(FLOAT32, (const uint8_t *)((const float *)parts + j), sizeof *parts);
                    UNROLLED for (int t = 0; t < rows; t++)
                        sum[t][n / WIDE] = fused(weights, load_x(values + t * x.stride / 4 + j), sum[t][n / WIDE]);
                }
                // Outputs one after another, as the rows of `tile`.
                if (rows > 1) __asm__ volatile("" ::: "memory");
            }
        }
    }
    UNROLLED for (int t = 0; t < rows; t++)
        UNROLLED for (int r = 0; r < registers; r++) state[t * GROUP_REGISTERS + r] = sum[t][r];
}

typedef void decoding_function(struct matrix weight, struct matrix scales, struct matrix x, int64_t columns, sums *state);
#define DEFINE_DECODING(coding, rows)                                                                               \
    static void decoding_##coding##_##rows(struct matrix w, struct matrix s, struct matrix x, int64_t k, sums *state) { \
        decoding_tile(coding, rows, w, s, x, k, state);                                                             \
    }
#define NAME_DECODING(coding, rows) decoding_##coding##_##rows,
FOR_ROWS(DEFINE_DECODING, INT8)
FOR_ROWS(DEFINE_DECODING, INT4)
FOR_ROWS(DEFINE_DECODING, INT5)
static decoding_function *const decoding_tiles[][MOST_ROWS] = {
    {0}, {FOR_ROWS(NAME_DECODING, INT8)}, {FOR_ROWS(NAME_DECODING, INT4)}, {FOR_ROWS(NAME_DECODING, INT5)}};

// Add `rows` rows of x times a group of outputs in fewer bits, over one chunk of columns, to `out`. Few rows decode in
// registers, each tile by itself. Many share weights that are decoded some columns at a time into the first cache.
static void multiply_quantised(enum coding coding, enum kind kind, struct matrix weight, struct matrix scales, int64_t rows,
                               int64_t outputs, struct matrix x, int64_t columns, struct matrix out, uint8_t *scratch) {
    struct matrix decoded = {scratch, DECODED_COLUMNS * sizeof(float)};
    sums *state = (sums *)(scratch + OUTPUTS_IN_CACHE * decoded.stride);
    if (rows <= MOST_ROWS && kind == BFLOAT16 && outputs == OUTPUTS_IN_CACHE && columns % SUPER_GROUP == 0) {
        for (int64_t n = 0; n < outputs; n += decoded_outputs((int)rows)) {
            struct matrix here = {weight.data + n * weight.stride, weight.stride};
            struct matrix own = {scales.data + n * scales.stride, scales.stride};
            decoding_tiles[coding][rows - 1](here, own, x, columns, state + n / WIDE);
        }
        add_sums(FLOAT32, (int)rows, decoded, outputs, x, columns, columns, state, out);
        return;
    }
    for (int64_t k = 0; k < columns; k += DECODED_COLUMNS) {
        int64_t width = least(DECODED_COLUMNS, columns - k), whole = width / LANES * LANES;
        struct matrix some = {x.data + k * sizeof(float), x.stride};
        struct ahead nothing = {0, 0};
        decode_columns(coding, kind, weight.data + data_bytes(coding, k), weight.stride, scales.data + scale_bytes(coding, k),
                       scales.stride, outputs, width, (float *)decoded.data);
        for (int64_t left = (rows + MOST_ROWS - 1) / MOST_ROWS, row = 0, few; left; left--, row += few) {
            few = (rows - row + left - 1) / left;
            struct matrix here = {some.data + row * x.stride, x.stride};
            multiply_columns(FLOAT32, (int)few, decoded, outputs, WHOLE, here, whole, !k, state + row * GROUP_REGISTERS, &nothing);
        }
        if (k + width == columns) add_sums(FLOAT32, (int)rows, decoded, outputs, some, whole, width, state, out);
    }
}

// x [T, K] times weights [N, K], added to out [T, N], on one thread. With `offsets`, where their row groups begin, the
// weights are coded losslessly; with a `coding` they are in fewer bits, and `scales` belong to them. Whether these are
// sound.
static int multiply_on_thread(enum kind kind, struct matrix weight, const int64_t *offsets, enum coding coding,
                              struct matrix scales, struct matrix x, struct matrix out, int64_t T, int64_t N, int64_t K,
                              uint8_t *scratch) {
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    // The processor fetches long rows well enough by itself, and decoded ones are in the cache.
    const uint8_t *all_end = offsets ? weight.data + offsets[rounded_up(N, ROW_GROUP_ROWS) / ROW_GROUP_ROWS] : 0;
    enum tile_sort sort = offsets || coding || K > COLUMN_CHUNK ? WHOLE : FETCHING;
    for (int64_t first = 0; first < T; first += ROWS_IN_CACHE) {
        int64_t rows = least(ROWS_IN_CACHE, T - first);
        for (int64_t start = 0; start < N; start += OUTPUTS_IN_CACHE) {
            int64_t outputs = least(OUTPUTS_IN_CACHE, N - start);
            const uint8_t *panel = 0, *end = 0;
            if (offsets) {
                panel = weight.data + offsets[start / ROW_GROUP_ROWS];
                end = weight.data + offsets[start / ROW_GROUP_ROWS + 1];
            }
            for (int64_t k = 0; k < K; k += COLUMN_CHUNK) {
                int64_t columns = least(COLUMN_CHUNK, K - k);
                struct ahead ahead = {0, 0};
                struct matrix here = {weight.data + start * weight.stride + k * size, weight.stride};
                if (offsets) {
                    int64_t taken = decode_panel(panel, end, outputs * columns, scratch);
                    if (taken < 0) return 0;
                    panel += taken;
                    ahead = (struct ahead){panel, least_pointer(panel + taken, all_end)};
                    here = (struct matrix){scratch, columns * size};
                }
                struct matrix some = {x.data + first * x.stride + k * sizeof(float), x.stride};
                struct matrix there = {out.data + first * out.stride + start * sizeof(float), out.stride};
                if (coding) {
                    here.data = weight.data + start * weight.stride + data_bytes(coding, k);
                    struct matrix own = {scales.data + start * scales.stride + scale_bytes(coding, k), scales.stride};
                    multiply_quantised(coding, kind, here, own, rows, outputs, some, columns, there, scratch);
                } else
                    multiply_rows(kind, rows, here, outputs, sort, some, columns, there, ahead);
            }
            // A row group consists of its panels and nothing else.
            if (offsets && panel != end) return 0;
        }
    }
    return 1;
}


// ------------------------------------------------------------------------------ between the products (operations.py)
//
// Activations are float32 numbers that the model's dtype has, too: whatever is computed of them is rounded to it at the
// places at which the reference implementation rounds. Sums, exponentials and roots are those of float64 in one order,
// without fused multiplications, so that they have the same bits on every processor.

typedef VECTOR(uint32_t, LANES) lane_bits;
typedef VECTOR(double, LANES) lane_doubles;
typedef VECTOR(int64_t, LANES) lane_longs;

// The nearest numbers of the dtype, ties to even.
INLINE lanes rounded(enum kind kind, lanes values) {
    if (kind == FLOAT32) return values;
    if (kind == FLOAT16) return __builtin_convertvector(__builtin_convertvector(values, float16_lanes), lanes);
    lane_bits bits = (lane_bits)values, nearest = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    lane_bits is_number = (lane_bits)(values == values);
    return (lanes)((nearest & is_number) | (bits & ~is_number));
}

// Up to 8 numbers, and zeros after them.
INLINE lanes load_lanes(const float *values, int64_t count) {
    if (count >= LANES) return *(const lanes *)values;
    lanes found = {0};
    for (int lane = 0; lane < count; lane++) found[lane] = values[lane];
    return found;
}

INLINE lanes load_lanes_of(enum kind kind, const uint8_t *values, int64_t index, int64_t count) {
    const uint8_t *place = values + index * (kind == FLOAT32 ? 4 : 2);
    if (count >= LANES) {
        if (kind == FLOAT32) return *(const lanes *)place;
        if (kind == FLOAT16) return __builtin_convertvector(*(const float16_lanes *)place, lanes);
        return (lanes)(__builtin_convertvector(*(const halves *)place, lane_bits) << 16);
    }
    lanes found = {0};
    for (int lane = 0; lane < count; lane++) found[lane] = load_weight(kind, place + lane * (kind == FLOAT32 ? 4 : 2));
    return found;
}

INLINE void store_lanes(float *place, lanes values, int64_t count) {
    if (count >= LANES)
        *(lanes *)place = values;
    else
        for (int lane = 0; lane < count; lane++) place[lane] = values[lane];
}

INLINE double sum_of_lanes(lane_doubles sum) {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// `value`, or `bound` where that is less; NaN stays.
INLINE lane_doubles bounded(lane_doubles value, double bound) {
    lane_longs is_above = value > bound;
    return (lane_doubles)(((lane_longs)value & ~is_above) | ((lane_longs)((lane_doubles){0} + bound) & is_above));
}

// 2^n * (1 + rest) is e to the power of x, for |x| up to 700; the rest has 40 good bits, even close to zero.
struct power {
    lane_doubles scale, rest;
};

INLINE struct power power_of_e(lane_doubles x) {
    static const double factorials[] = {1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800};
    enum { TERMS = sizeof factorials / sizeof *factorials };
    // So large that a number which is added to it loses its fraction, and has its whole part in the lowest bits.
    const double whole = 0x1.8p52, ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
    lane_doubles shifted = x * 0x1.71547652b82fep0 + whole, n = shifted - whole;
    lane_doubles r = (x - n * ln2_high) - n * ln2_low, sum = {0};
    UNROLLED for (int term = TERMS; term > 0; term--) sum = (sum + 1 / factorials[term - 1]) * r;
    return (struct power){(lane_doubles)(((lane_longs)shifted << 52) + (1023LL << 52)), sum};
}

INLINE lane_doubles exponential(lane_doubles x) {
    // Less than this is zero in float32.
    struct power power = power_of_e(-bounded(-x, 150));
    return power.scale + power.scale * power.rest;
}

INLINE lanes hyperbolic_tangent(lanes values) {
    lane_bits signs = (lane_bits)values & 0x80000000u;
    lane_doubles size = __builtin_convertvector((lanes)((lane_bits)values ^ signs), lane_doubles);
    // From 20 on it is 1. e^-2x - 1, whose bits near zero are those of the rest.
    struct power power = power_of_e(-2 * bounded(size, 20));
    lane_doubles less = power.scale * power.rest + (power.scale - 1);
    lanes found = __builtin_convertvector(-less / (less + 2), lanes);
    return (lanes)((lane_bits)found | signs);
}

// The tanh approximation in the grouping of the reference implementation.
INLINE lanes gelu(enum kind kind, lanes x) {
    lanes cube = rounded(kind, rounded(kind, x * 0.044715f) * x);
    lanes inner = rounded(kind, rounded(kind, x * 0.79788456f) * rounded(kind, cube + 1));
    lanes outer = rounded(kind, rounded(kind, hyperbolic_tangent(inner)) + 1);
    return rounded(kind, rounded(kind, x * 0.5f) * outer);
}

// What becomes of the sums of a product: nothing, or they are rounded, GELU is taken, and a residual added.
struct finish {
    // Whether the sums begin with the bias or zero, and not with what stands in their place.
    int64_t begins;
    // The model's dtype.
    int64_t kind;
    // Vector of outputs, or none.
    uint8_t *bias;
    int64_t rounds, activates;
    // Rows of float32 at a stride of elements, or none.
    uint8_t *residual;
    int64_t residual_stride;
};

static void begin_sums(const struct finish *f, struct matrix out, int64_t T, int64_t first, int64_t N) {
    for (int64_t t = 0; t < T; t++) {
        float *row = (float *)(out.data + t * out.stride);
        if (!f->bias)
            memset(row, 0, N * sizeof *row);
        else
            for (int64_t n = 0; n < N; n += LANES)
                store_lanes(row + n, load_lanes_of((enum kind)f->kind, f->bias, first + n, N - n), N - n);
    }
}

INLINE void finish_sums(enum kind kind, const struct finish *f, struct matrix out, int64_t T, int64_t first, int64_t N) {
    for (int64_t t = 0; t < T; t++) {
        float *row = (float *)(out.data + t * out.stride);
        const float *residual = f->residual ? (const float *)f->residual + t * f->residual_stride + first : 0;
        for (int64_t n = 0; n < N; n += LANES) {
            lanes values = rounded(kind, load_lanes(row + n, N - n));
            if (f->activates) values = gelu(kind, values);
            if (residual) values = rounded(kind, load_lanes(residual + n, N - n) + values);
            store_lanes(row + n, values, N - n);
        }
    }
}

static void finish_rows(const struct finish *f, struct matrix out, int64_t T, int64_t first, int64_t N) {
    if (f->kind == BFLOAT16) finish_sums(BFLOAT16, f, out, T, first, N);
    if (f->kind == FLOAT16) finish_sums(FLOAT16, f, out, T, first, N);
    if (f->kind == FLOAT32) finish_sums(FLOAT32, f, out, T, first, N);
}

// LayerNorm of `rows` rows of `columns` columns, as arguments of a task. Strides are in elements, vectors of the dtype.
struct norm {
    int64_t kind;
    const float *x;
    int64_t x_stride;
    float *out;
    int64_t out_stride;
    const uint8_t *weight, *bias;
    int64_t rows, columns;
    double epsilon;
};

static void normalise(const struct norm *p, const float *x, float *out) {
    enum kind kind = (enum kind)p->kind;
    lane_doubles sum = {0}, squares = {0};
    for (int64_t k = 0; k < p->columns; k += LANES)
        sum += __builtin_convertvector(load_lanes(x + k, p->columns - k), lane_doubles);
    double mean = sum_of_lanes(sum) / (double)p->columns;
    for (int64_t k = 0; k < p->columns; k += LANES) {
        lane_doubles far = __builtin_convertvector(load_lanes(x + k, p->columns - k), lane_doubles) - mean;
        for (int64_t lane = p->columns - k; lane < LANES; lane++) far[lane] = 0;
        squares += far * far;
    }
    double scale = 1 / __builtin_sqrt(sum_of_lanes(squares) / (double)p->columns + p->epsilon);
    for (int64_t k = 0; k < p->columns; k += LANES) {
        int64_t count = p->columns - k;
        lane_doubles far = __builtin_convertvector(load_lanes(x + k, count), lane_doubles) - mean;
        lane_doubles weight = __builtin_convertvector(load_lanes_of(kind, p->weight, k, count), lane_doubles);
        lane_doubles bias = __builtin_convertvector(load_lanes_of(kind, p->bias, k, count), lane_doubles);
        store_lanes(out + k, rounded(kind, __builtin_convertvector(far * scale * weight + bias, lanes)), count);
    }
}

EXPORT void layer_norm(struct task *task, uint8_t *scratch) {
    struct norm p;
    memcpy(&p, task->arguments, sizeof p);
    (void)scratch;
    for (int64_t row; (row = atomic_fetch_add(&task->share, 1)) < p.rows;)
        normalise(&p, p.x + row * p.x_stride, p.out + row * p.out_stride);
}

// Products of queries and keys become the weights of the values, as arguments of a task: [H, T, S] float32, dense, S a
// multiple of the lanes. Row t attends to the positions up to `start` + t.
struct attention {
    int64_t kind;
    float *products;
    const float *alibi;
    int64_t alibi_stride, H, T, S, start;
    double scale;
};

static void weigh(enum kind kind, float *row, const float *alibi, int64_t S, int64_t last, float scale) {
    const float lowest = kind == FLOAT16 ? -65504.0f : kind == BFLOAT16 ? -0x1.fep127f : -__FLT_MAX__;
    lanes most = {0};
    for (int64_t s = 0; s < S; s += LANES) {
        lanes scores = rounded(kind, *(lanes *)(row + s) * scale + *(const lanes *)(alibi + s));
        // The mask of the reference implementation: zero, or the lowest number.
        lanes mask = {0};
        for (int64_t lane = last + 1 - s < 0 ? 0 : last + 1 - s; lane < LANES; lane++) mask[lane] = lowest;
        scores = rounded(kind, scores + mask);
        *(lanes *)(row + s) = scores;
        // The larger one; scores that are no numbers make all weights NaN below.
        lane_bits is_more = s ? (lane_bits)(scores > most) : ~(lane_bits){0};
        most = (lanes)(((lane_bits)scores & is_more) | ((lane_bits)most & ~is_more));
    }
    float highest = most[0];
    for (int lane = 1; lane < LANES; lane++) highest = most[lane] > highest ? most[lane] : highest;
    lane_doubles sum = {0};
    for (int64_t s = 0; s < S; s += LANES) {
        lanes powers = __builtin_convertvector(
            exponential(__builtin_convertvector(*(lanes *)(row + s), lane_doubles) - highest), lanes);
        *(lanes *)(row + s) = powers;
        sum += __builtin_convertvector(powers, lane_doubles);
    }
    double part = 1 / sum_of_lanes(sum);
    for (int64_t s = 0; s < S; s += LANES) {
        lanes *place = (lanes *)(row + s);
        *place = rounded(kind, __builtin_convertvector(__builtin_convertvector(*place, lane_doubles) * part, lanes));
    }
}

EXPORT void attend(struct task *task, uint8_t *scratch) {
    struct attention p;
    memcpy(&p, task->arguments, sizeof p);
    (void)scratch;
    for (int64_t mine; (mine = atomic_fetch_add(&task->share, 1)) < p.H * p.T;) {
        const float *alibi = p.alibi + mine / p.T * p.alibi_stride;
        weigh((enum kind)p.kind, p.products + mine * p.S, alibi, p.S, p.start + mine % p.T, (float)p.scale);
    }
}

// Keys and values of T rows go to the cache, as arguments of a task: `fused` has rows of [H, 3, D] float32 that the dtype
// has, `keys` are [H, capacity, D] and `values` [H, D, capacity] of the dtype, strides in elements over heads, and for
// values over D.
struct storing {
    int64_t kind;
    const float *fused;
    int64_t fused_stride;
    uint8_t *keys;
    int64_t keys_step;
    uint8_t *values;
    int64_t values_step, values_stride, first, H, T, D;
};

INLINE void store_one(enum kind kind, uint8_t *values, int64_t index, float value) {
    if (kind == FLOAT32) {
        memcpy(values + 4 * index, &value, 4);
    } else if (kind == FLOAT16) {
        _Float16 half = (_Float16)value;
        memcpy(values + 2 * index, &half, 2);
    } else {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        uint16_t half = (uint16_t)(bits >> 16);
        memcpy(values + 2 * index, &half, 2);
    }
}

INLINE void store_head(enum kind kind, const struct storing *p, int64_t h) {
    for (int64_t t = 0; t < p->T; t++) {
        const float *key = p->fused + t * p->fused_stride + (3 * h + 1) * p->D;
        for (int64_t d = 0; d < p->D; d++) {
            store_one(kind, p->keys, h * p->keys_step + (p->first + t) * p->D + d, key[d]);
            store_one(kind, p->values, h * p->values_step + d * p->values_stride + p->first + t, key[p->D + d]);
        }
    }
}

EXPORT void store(struct task *task, uint8_t *scratch) {
    struct storing p;
    memcpy(&p, task->arguments, sizeof p);
    (void)scratch;
    for (int64_t h; (h = atomic_fetch_add(&task->share, 1)) < p.H;) {
        if (p.kind == BFLOAT16) store_head(BFLOAT16, &p, h);
        if (p.kind == FLOAT16) store_head(FLOAT16, &p, h);
        if (p.kind == FLOAT32) store_head(FLOAT32, &p, h);
    }
}


// --------------------------------------------------------------------------------------------- the task of a product

// B products at once, as arguments of a task. Strides are in elements, over b and over rows. Of coded weights, B is 1 and
// the second stride is the address of their offsets, or of the scales of weights in fewer bits, whose coding stands above
// the two bits of their kind. A thread takes `share` outputs at a time.
struct product {
    int64_t kind;
    uint8_t *weight;
    int64_t weight_step, weight_stride;
    uint8_t *x;
    int64_t x_step, x_stride;
    uint8_t *out;
    int64_t out_step, out_stride, B, T, N, K, share;
    struct finish finish;
};

EXPORT int64_t scratch_bytes_of_decoder(void) { return DECODER_SCRATCH; }
EXPORT void multiply(struct task *task, uint8_t *scratch) {
    struct product p;
    memcpy(&p, task->arguments, sizeof p);
    enum coding coding = (enum coding)(p.kind >> 2);
    int is_coded = p.kind == CODED;
    enum kind kind = is_coded ? BFLOAT16 : (enum kind)(p.kind & 3);
    const int64_t size = kind == FLOAT32 ? 4 : 2, shares = (p.N + p.share - 1) / p.share;
    for (int64_t mine; (mine = atomic_fetch_add(&task->share, 1)) < p.B * shares;) {
        int64_t b = mine / shares, n = mine % shares * p.share;
        const int64_t *offsets = 0;
        struct matrix weight = {p.weight, 0}, scales = {0, 0};
        if (coding) {
            weight = (struct matrix){p.weight + n * data_bytes(coding, p.K), data_bytes(coding, p.K)};
            scales.stride = scale_bytes(coding, p.K);
            scales.data = (uint8_t *)(intptr_t)p.weight_stride + n * scales.stride;
        } else if (is_coded)
            offsets = (const int64_t *)(intptr_t)p.weight_stride + n / ROW_GROUP_ROWS;
        else
            weight = (struct matrix){p.weight + (b * p.weight_step + n * p.weight_stride) * size, p.weight_stride * size};
        struct matrix x = {p.x + b * p.x_step * 4, p.x_stride * 4};
        struct matrix out = {p.out + (b * p.out_step + n) * 4, p.out_stride * 4};
        int64_t outputs = least(p.share, p.N - n);
        if (p.finish.begins) begin_sums(&p.finish, out, p.T, n, outputs);
        if (!multiply_on_thread(kind, weight, offsets, coding, scales, x, out, p.T, outputs, p.K, scratch))
            atomic_store(&task->failed, 1);
        if (p.finish.rounds) finish_rows(&p.finish, out, p.T, n, outputs);
    }
}

