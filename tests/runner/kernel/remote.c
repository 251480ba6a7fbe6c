// The functions of kernel.c in a program that a test drives over a pipe, so that they can be those of another kind of
// processor under an emulator, or have sanitizers in them; remote.py is the other end.
//
// A request: the function's name in 32 bytes; the number of buffers; of each its size and its bytes, or, of memory that
// holds nothing before and after, its size below zero; the number of pointers; of each the buffer that it stands in, its
// place there, and the buffer that it points to; the number of arguments; of each the buffer that it is the address of,
// or -1, and the number that it is otherwise. Numbers have 64 bits. The answer: what the function returns, and the bytes
// of all buffers that came with theirs.
//
// Each buffer ends right before memory that nobody may touch.

#if !__has_feature(address_sanitizer)
// Neither page faults of mapped files nor a C library.
#define WITHOUT_SYSTEM
#endif
#include "kernel.c"

#if __has_feature(address_sanitizer)
#include <stdlib.h>
#include <unistd.h>

static uint8_t *reserve(size_t nbytes) { return malloc(nbytes); }
static void release(uint8_t *memory, size_t nbytes) { (void)nbytes, free(memory); }
#else
// The rest of this program needs no C library, which would take a minute to compile for another architecture.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>

static int64_t ask(int64_t what, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e) {
    register int64_t x8 __asm__("x8") = what, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register int64_t x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = 0;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}

static ssize_t read(int file, void *place, size_t nbytes) {
    return ask(SYS_read, file, (int64_t)place, (int64_t)nbytes, 0, 0);
}
static ssize_t write(int file, const void *place, size_t nbytes) {
    return ask(SYS_write, file, (int64_t)place, (int64_t)nbytes, 0, 0);
}
static void _exit(int status) {
    for (;;) ask(SYS_exit_group, status, 0, 0, 0, 0);
}

// Loops that the compiler would replace with a call of the function itself.
#define OWN __attribute__((no_builtin))
OWN void *memcpy(void *restrict to, const void *restrict from, size_t nbytes) {
    for (size_t i = 0; i < nbytes; i++) ((uint8_t *)to)[i] = ((const uint8_t *)from)[i];
    return to;
}
OWN void *memset(void *to, int value, size_t nbytes) {
    for (size_t i = 0; i < nbytes; i++) ((uint8_t *)to)[i] = (uint8_t)value;
    return to;
}
OWN int strcmp(const char *a, const char *b) {
    for (; *a && *a == *b; a++, b++) {}
    return *a - *b;
}

enum { PAGE = 65536 };

static uint8_t *reserve(size_t nbytes) {
    size_t whole = rounded_up(nbytes, PAGE) + PAGE;
    int64_t start = ask(SYS_mmap, 0, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    if (start < 0 || ask(SYS_mprotect, start + whole - PAGE, PAGE, PROT_NONE, 0, 0)) _exit(4);
    return (uint8_t *)start + whole - PAGE - nbytes;
}
static void release(uint8_t *memory, size_t nbytes) {
    size_t whole = rounded_up(nbytes, PAGE) + PAGE;
    ask(SYS_munmap, (int64_t)memory + nbytes + PAGE - whole, whole, 0, 0, 0);
}

int main(void);
extern void (*__init_array_start[])(void), (*__init_array_end[])(void);
void _start(void) {
    for (void (**each)(void) = __init_array_start; each < __init_array_end; each++) (*each)();
    _exit(main());
}
#endif

enum { MOST = 16 };

static void get(void *place, size_t nbytes) {
    for (uint8_t *next = place, *end = next + nbytes; next < end;) {
        ssize_t count = read(0, next, end - next);
        if (count <= 0) _exit(0);
        next += count;
    }
}

static void put(const void *place, size_t nbytes) {
    for (const uint8_t *next = place, *end = next + nbytes; next < end;) {
        ssize_t count = write(1, next, end - next);
        if (count <= 0) _exit(5);
        next += count;
    }
}

static int64_t number(void) {
    int64_t value;
    get(&value, sizeof value);
    return value;
}

static int64_t call(const char *name, int64_t *a) {
#define IS(function) !strcmp(name, #function)
#define P(type, place) ((type *)(intptr_t)a[place])
    if (IS(multiply)) return multiply(P(struct task, 0), P(uint8_t, 1)), 0;
    if (IS(layer_norm)) return layer_norm(P(struct task, 0), P(uint8_t, 1)), 0;
    if (IS(attend)) return attend(P(struct task, 0), P(uint8_t, 1)), 0;
    if (IS(store)) return store(P(struct task, 0), P(uint8_t, 1)), 0;
    if (IS(decode_rows))
        return decode_rows(P(uint8_t, 0), P(int64_t, 1), a[2], a[3], P(uint8_t, 4), P(uint8_t, 5));
    if (IS(encode_rows))
        return encode_rows(P(uint8_t, 0), a[1], a[2], P(uint8_t, 3), P(int64_t, 4), P(struct encoder, 5)), 0;
    if (IS(encode_quantised))
        return encode_quantised(a[0], a[1], P(uint8_t, 2), a[3], a[4], P(uint8_t, 5), P(uint8_t, 6));
    if (IS(decode_quantised))
        return decode_quantised(a[0], a[1], P(uint8_t, 2), P(uint8_t, 3), a[4], a[5], P(uint8_t, 6), P(uint8_t, 7)), 0;
    if (IS(scratch_bytes_of_decoder)) return scratch_bytes_of_decoder();
    if (IS(scratch_bytes_of_encoder)) return scratch_bytes_of_encoder();
    _exit(6);
    return 0;
}

int main(void) {
    for (;;) {
        char name[32];
        uint8_t *buffers[MOST];
        int64_t sizes[MOST], sent[MOST], arguments[MOST] = {0}, count;
        get(name, sizeof name);
        count = number();
        if (count > MOST) _exit(7);
        for (int i = 0; i < count; i++) {
            int64_t size = number();
            sizes[i] = size < 0 ? -size : size;
            sent[i] = size < 0 ? 0 : size;
            buffers[i] = reserve(sizes[i]);
            get(buffers[i], sent[i]);
        }
        for (int64_t left = number(); left; left--) {
            int64_t buffer = number(), place = number();
            int64_t address = (int64_t)(intptr_t)buffers[number()];
            memcpy(buffers[buffer] + place, &address, sizeof address);
        }
        int64_t given = number();
        if (given > MOST) _exit(7);
        for (int i = 0; i < given; i++) {
            int64_t buffer = number(), value = number();
            arguments[i] = buffer < 0 ? value : (int64_t)(intptr_t)buffers[buffer];
        }
        int64_t found = call(name, arguments);
        put(&found, sizeof found);
        for (int i = 0; i < count; i++) {
            put(buffers[i], sent[i]);
            release(buffers[i], sizes[i]);
        }
    }
}
