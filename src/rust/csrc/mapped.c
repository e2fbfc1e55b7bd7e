/* Large vectors of numbers and of logical values as they are in a payload's memory: a worker maps
 * them where it would otherwise have a copy of its own, as does the head those of an answer from a
 * worker on its machine.
 *
 * R's serialization of ALTREP objects says where they are: the head gives it stand-ins, whose state
 * is an offset and a length, and a worker makes vectors out of these. The mapping is private and
 * writable, and one of its own for each time that a message is read: R writes to vectors in place,
 * which neither another worker nor the next to read the same message is to see. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <R_ext/Altrep.h>
#include <R_ext/Rallocators.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Bytes of a vector from which on it is worth it. */
#define LARGE 65536
/* Where a vector may begin. */
#define ALIGNED 64
/* Lists in lists, at most. */
#define DEPTH 64

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

enum { LOGICALS, INTEGERS, REALS, COMPLEXES, RAWS, KINDS };
static R_altrep_class_t classes[KINDS];

/* KINDS if it is none of these. */
static int kind_of(SEXP value)
{
    switch (TYPEOF(value)) {
    case LGLSXP:
        return LOGICALS;
    case INTSXP:
        return INTEGERS;
    case REALSXP:
        return REALS;
    case CPLXSXP:
        return COMPLEXES;
    case RAWSXP:
        return RAWS;
    default:
        return KINDS;
    }
}

static size_t size_of(int kind)
{
    static const size_t sizes[KINDS] = {
        sizeof(int), sizeof(int), sizeof(double), sizeof(Rcomplex), sizeof(Rbyte),
    };

    return sizes[kind];
}

/* Of a vector that is none of ours. */
static void *room_of(SEXP value)
{
    switch (TYPEOF(value)) {
    case LGLSXP:
        return LOGICAL(value);
    case INTSXP:
        return INTEGER(value);
    case REALSXP:
        return REAL(value);
    case CPLXSXP:
        return COMPLEX(value);
    default:
        return RAW(value);
    }
}

/* The head: stand-ins ---------------------------------------------------------------------------*/

struct found {
    /* A pairlist of the vectors, and where it ends. */
    SEXP first, last;
    /* Bytes of their data, with what is between them. */
    double bytes;
};

/* R's compact sequences have data as well once somebody has asked for it; as sequences they take
 * some bytes. */
static int is_sequence(SEXP x)
{
    R_xlen_t n = XLENGTH(x);

    switch (TYPEOF(x)) {
    case INTSXP: {
        double by = (double) INTEGER_ELT(x, 1) - INTEGER_ELT(x, 0);
        return INTEGER_NO_NA(x) && (by == 1 || by == -1) &&
            INTEGER_ELT(x, n - 1) == INTEGER_ELT(x, 0) + by * (double) (n - 1);
    }
    case REALSXP: {
        double by = REAL_ELT(x, 1) - REAL_ELT(x, 0);
        return REAL_NO_NA(x) && (by == 1 || by == -1) &&
            REAL_ELT(x, n - 1) == REAL_ELT(x, 0) + by * (double) (n - 1);
    }
    default:
        return 0;
    }
}

static SEXP stand_in(SEXP x, int kind, struct found *found)
{
    R_xlen_t n = XLENGTH(x);
    double bytes = (double) n * (double) size_of(kind);

    if (bytes < LARGE || !DATAPTR_OR_NULL(x) || (ALTREP(x) && is_sequence(x)))
        return x;
    SEXP cell = PROTECT(Rf_cons(x, R_NilValue));
    SETCDR(found->last, cell);
    found->last = cell;
    SEXP where = PROTECT(Rf_allocVector(REALSXP, 2));
    REAL(where)[0] = found->bytes;
    REAL(where)[1] = (double) n;
    SEXP made = PROTECT(R_new_altrep(classes[kind], R_NilValue, where));
    SHALLOW_DUPLICATE_ATTRIB(made, x);
    found->bytes += ALIGNED * (double) ((uint64_t) (bytes + ALIGNED - 1) / ALIGNED);
    UNPROTECT(3);
    return made;
}

/* The value with stand-ins; itself if there are none. */
static SEXP with_stand_ins(SEXP x, int depth, struct found *found)
{
    int kind = kind_of(x);

    if (kind < KINDS)
        return stand_in(x, kind, found);
    if (TYPEOF(x) != VECSXP || ALTREP(x) || depth == DEPTH)
        return x;
    SEXP copy = x;
    PROTECT_INDEX at;
    PROTECT_WITH_INDEX(copy, &at);
    R_xlen_t n = XLENGTH(x);
    for (R_xlen_t i = 0; i < n; i++) {
        SEXP element = VECTOR_ELT(x, i);
        SEXP instead = with_stand_ins(element, depth + 1, found);
        if (instead == element)
            continue;
        PROTECT(instead);
        if (copy == x)
            REPROTECT(copy = Rf_shallow_duplicate(x), at);
        SET_VECTOR_ELT(copy, i, instead);
        UNPROTECT(1);
    }
    UNPROTECT(1);
    return copy;
}

/* The large vectors of a message, as a pairlist, and the message with stand-ins for them before it;
 * NULL if there are none. `*bytes`: of their data. The result is not protected. R may jump. */
SEXP rustcluster_stand_ins(void *message, double *bytes)
{
    SEXP all = PROTECT(Rf_cons(R_NilValue, R_NilValue));
    struct found found = {all, all, 0};
    SEXP instead = with_stand_ins((SEXP) message, 0, &found);

    SETCAR(all, instead);
    UNPROTECT(1);
    *bytes = found.bytes;
    return CDR(all) == R_NilValue ? R_NilValue : all;
}

/* The data of the vector at the front of such a list, and its bytes; returns what follows it. */
SEXP rustcluster_vector_data(void *list, const void **data, size_t *bytes)
{
    SEXP x = CAR((SEXP) list);

    *data = DATAPTR_OR_NULL(x);
    *bytes = *data ? (size_t) XLENGTH(x) * size_of(kind_of(x)) : 0;
    return CDR((SEXP) list);
}

/* A worker: vectors -----------------------------------------------------------------------------*/

/* A message whose vectors are being read. Its data is mapped when the first vector asks for it.
 * src/mapped.rs has this struct, too. */
struct message {
    /* All of it; NULL if it is in the file alone. */
    const char *bytes;
    /* Bytes; 0 if there is no message. */
    size_t length;
    /* Where its data begins and how much that is. */
    size_t from, data;
    /* Its mapping, preserved: see below. NULL: there is none. */
    SEXP mapping;
    /* The file that it is in, or -1 if nothing is to be mapped. */
    int file;
    /* It could not be mapped. */
    int unmappable;
};

static struct message now = {NULL, 0, 0, 0, NULL, -1, 0};

/* What is read from here on has its vectors in this message, until the end of that. R code may run in
 * between, a finalizer, and read another message: `before` is to be handed to the end. */
void rustcluster_begin_mapped(struct message *message, struct message *before)
{
    *before = now;
    now = *message;
}

void rustcluster_end_mapped(struct message *before)
{
    if (now.mapping)
        R_ReleaseObject(now.mapping);
    now = *before;
}

/* A mapping belongs to a vector without a use, which is what the vectors in it are held by. R frees that
 * vector with the memory function below, and so only when no R code can reach it any more. A finalizer of
 * the mapping would be run while others, run at the same time, may still reach the vectors. */
struct mapping {
    void *at;
    size_t length;
};

/* Bytes that are mapped. R does not count them, and so would not look for what is not used any
 * more: that is looked for whenever they pass this bound. To look takes a worker tens of
 * milliseconds, so that the bound leaves room for some messages. */
static double mapped = 0, bound = 0;
/* By how much they may grow at least until then. */
static const double room = 536870912;

/* Mappings, and the most that there may be: the system allows a process so many (vm.max_map_count), and
 * when there are no more, nothing can be allocated. */
static double mappings = 0, most_mappings = 0;
/* It was looked for mappings that are not used any more when there were too many. */
static int looked = 0;

/* Three quarters are left to R and to user code. */
static double read_most_mappings(void)
{
    /* Where the system does not tell, its default. */
    double most = 65530;
    FILE *file = fopen("/proc/sys/vm/max_map_count", "r");

    if (file) {
        if (fscanf(file, "%lf", &most) != 1)
            most = 65530;
        fclose(file);
    }
    return most / 4;
}

static void *take_mapping(R_allocator_t *allocator, size_t size)
{
    void *memory = malloc(size);
    allocator->data = memory ? calloc(1, sizeof(struct mapping)) : NULL;

    if (!allocator->data) {
        free(memory);
        return NULL;
    }
    return memory;
}

static void free_mapping(R_allocator_t *allocator, void *memory)
{
    struct mapping *mapping = allocator->data;

    if (mapping->at) {
        munmap(mapping->at, mapping->length);
        mapped -= (double) mapping->length;
        mappings--;
        if (mappings < most_mappings / 2)
            looked = 0;
    }
    free(mapping);
    free(memory);
}

static void *map(void)
{
    return mmap(NULL, now.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, now.file, 0);
}

/* Whether there may be one more mapping. R may jump. */
static int has_room(void)
{
    if (most_mappings == 0)
        most_mappings = read_most_mappings();
    if (mappings >= most_mappings && !looked) {
        looked = 1;
        R_gc();
    }
    return mappings < most_mappings;
}

/* Copies data of the message that is being read. R may jump. */
static void copy_data(char *to, size_t begin, size_t bytes)
{
    if (now.bytes) {
        memcpy(to, now.bytes + begin, bytes);
        return;
    }
    while (bytes > 0) {
        ssize_t n = pread(now.file, to, bytes, (off_t) begin);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            Rf_error("a vector that could not be read");
        to += n;
        begin += (size_t) n;
        bytes -= (size_t) n;
    }
}

/* Where the message that is being read is mapped; its mapping is then in `now`. NULL: its vectors are to be
 * copied. R may jump. */
static char *mapping_of_now(void)
{
    if (now.mapping)
        return *(char **) RAW(now.mapping);
    if (now.file < 0 || now.unmappable || !has_room())
        return NULL;
    if (bound < room)
        bound = room;
    if (mapped + (double) now.length > bound) {
        R_gc();
        double used = mapped + (double) now.length;
        bound = used + (used > room ? used : room);
    }
    R_allocator_t allocator = {take_mapping, free_mapping, NULL, NULL};
    SEXP holder = PROTECT(Rf_allocVector3(RAWSXP, sizeof(char *), &allocator));
    struct mapping *mapping = allocator.data;
    R_PreserveObject(holder);
    UNPROTECT(1);
    void *at = map();
    if (at == MAP_FAILED) {
        /* What is not used any more may be in the way. */
        R_gc();
        at = map();
    }
    if (at == MAP_FAILED) {
        R_ReleaseObject(holder);
        now.unmappable = 1;
        return NULL;
    }
    mapping->at = at;
    mapping->length = now.length;
    mapped += (double) now.length;
    mappings++;
    *(void **) RAW(holder) = at;
    now.mapping = holder;
    return at;
}

static SEXP unserialize(int kind, SEXP state)
{
    static const SEXPTYPE types[KINDS] = {LGLSXP, INTSXP, REALSXP, CPLXSXP, RAWSXP};

    if (!now.length || TYPEOF(state) != REALSXP || XLENGTH(state) != 2)
        Rf_error("a vector that is nowhere");
    double offset = REAL(state)[0], n = REAL(state)[1], bytes = n * (double) size_of(kind);
    if (!(offset >= 0 && n >= 0 && offset + bytes <= (double) now.data) ||
        offset != (double) (size_t) offset || n != (double) (R_xlen_t) n ||
        (size_t) offset % ALIGNED)
        Rf_error("a vector beyond the end of its message");
    size_t begin = now.from + (size_t) offset;
    char *at = mapping_of_now();
    if (!at) {
        if (!now.bytes && now.file < 0)
            Rf_error("a vector that is nowhere");
        SEXP copy = PROTECT(Rf_allocVector(types[kind], (R_xlen_t) n));
        copy_data(room_of(copy), begin, (size_t) bytes);
        UNPROTECT(1);
        return copy;
    }
    SEXP data = PROTECT(R_MakeExternalPtr(at + begin, R_NilValue, now.mapping));
    SEXP length = PROTECT(Rf_ScalarReal(n));
    SEXP made = R_new_altrep(classes[kind], data, length);
    UNPROTECT(2);
    return made;
}

static int is_stand_in(SEXP x)
{
    return R_altrep_data1(x) == R_NilValue;
}

static SEXP state_of(SEXP x)
{
    /* Elsewhere, a vector that is mapped is one like any other. */
    return is_stand_in(x) ? R_altrep_data2(x) : NULL;
}

static R_xlen_t length(SEXP x)
{
    return (R_xlen_t) REAL_ELT(R_altrep_data2(x), is_stand_in(x) ? 1 : 0);
}

static void *at_data(SEXP x)
{
    return R_ExternalPtrAddr(R_altrep_data1(x));
}

static void *data_of(SEXP x, Rboolean writable)
{
    (void) writable;
    if (is_stand_in(x))
        Rf_error("a vector without data");
    return at_data(x);
}

static const void *data_or_null(SEXP x)
{
    return is_stand_in(x) ? NULL : at_data(x);
}

static Rboolean inspect(SEXP x, int pre, int deep, int pvec, void (*subtree)(SEXP, int, int, int))
{
    (void) pre;
    (void) deep;
    (void) pvec;
    (void) subtree;
    Rprintf(is_stand_in(x) ? " stand-in\n" : " mapped\n");
    return TRUE;
}

/* Elements by their numbers, counted from 1: R would ask for one after the other. */
#define SUBSET(name, type, ctype, na)                                                              \
    static SEXP name(SEXP x, SEXP index, SEXP call)                                                \
    {                                                                                              \
        (void) call;                                                                               \
        if (is_stand_in(x) || (TYPEOF(index) != INTSXP && TYPEOF(index) != REALSXP))               \
            return NULL;                                                                           \
        R_xlen_t count = XLENGTH(index), most = length(x);                                         \
        SEXP made = PROTECT(Rf_allocVector(type, count));                                          \
        ctype *to = room_of(made);                                                       \
        const ctype *from = at_data(x);                                                            \
        if (TYPEOF(index) == INTSXP) {                                                             \
            const int *at = INTEGER(index);                                                        \
            for (R_xlen_t i = 0; i < count; i++)                                                   \
                to[i] = at[i] > 0 && at[i] <= most ? from[at[i] - 1] : na;                         \
        } else {                                                                                   \
            const double *at = REAL(index);                                                        \
            for (R_xlen_t i = 0; i < count; i++)                                                   \
                to[i] = at[i] >= 1 && at[i] < (double) most + 1 ? from[(R_xlen_t) at[i] - 1] : na; \
        }                                                                                          \
        UNPROTECT(1);                                                                              \
        return made;                                                                               \
    }

static Rcomplex na_complex(void)
{
    Rcomplex na = {.r = NA_REAL, .i = NA_REAL};

    return na;
}

SUBSET(logical_subset, LGLSXP, int, NA_LOGICAL)
SUBSET(integer_subset, INTSXP, int, NA_INTEGER)
SUBSET(real_subset, REALSXP, double, NA_REAL)
SUBSET(complex_subset, CPLXSXP, Rcomplex, na_complex())
SUBSET(raw_subset, RAWSXP, Rbyte, 0)

/* There is no element of what has no data. */
#define ELEMENT(name, ctype)                                                                       \
    static ctype name(SEXP x, R_xlen_t i)                                                          \
    {                                                                                              \
        return ((const ctype *) data_of(x, FALSE))[i];                                             \
    }

ELEMENT(int_element, int)
ELEMENT(real_element, double)
ELEMENT(complex_element, Rcomplex)
ELEMENT(raw_element, Rbyte)

#define UNSERIALIZE(name, kind)                                                                    \
    static SEXP name(SEXP class, SEXP state)                                                       \
    {                                                                                              \
        (void) class;                                                                              \
        return unserialize(kind, state);                                                           \
    }

UNSERIALIZE(unserialize_logical, LOGICALS)
UNSERIALIZE(unserialize_integer, INTEGERS)
UNSERIALIZE(unserialize_real, REALS)
UNSERIALIZE(unserialize_complex, COMPLEXES)
UNSERIALIZE(unserialize_raw, RAWS)

/* Makes the classes known to R. Once, when the package is loaded. */
void rustcluster_register_mapped(DllInfo *dll)
{
    static const char package[] = "rustcluster";
    static SEXP (*const unserializers[KINDS])(SEXP, SEXP) = {
        unserialize_logical, unserialize_integer, unserialize_real, unserialize_complex,
        unserialize_raw,
    };
    static SEXP (*const subsets[KINDS])(SEXP, SEXP, SEXP) = {
        logical_subset, integer_subset, real_subset, complex_subset, raw_subset,
    };

    classes[LOGICALS] = R_make_altlogical_class("mapped_logical", package, dll);
    classes[INTEGERS] = R_make_altinteger_class("mapped_integer", package, dll);
    classes[REALS] = R_make_altreal_class("mapped_real", package, dll);
    classes[COMPLEXES] = R_make_altcomplex_class("mapped_complex", package, dll);
    classes[RAWS] = R_make_altraw_class("mapped_raw", package, dll);
    for (int kind = 0; kind < KINDS; kind++) {
        R_set_altrep_Length_method(classes[kind], length);
        R_set_altrep_Inspect_method(classes[kind], inspect);
        R_set_altrep_Serialized_state_method(classes[kind], state_of);
        R_set_altrep_Unserialize_method(classes[kind], unserializers[kind]);
        R_set_altvec_Dataptr_method(classes[kind], data_of);
        R_set_altvec_Dataptr_or_null_method(classes[kind], data_or_null);
        R_set_altvec_Extract_subset_method(classes[kind], subsets[kind]);
    }
    R_set_altlogical_Elt_method(classes[LOGICALS], int_element);
    R_set_altinteger_Elt_method(classes[INTEGERS], int_element);
    R_set_altreal_Elt_method(classes[REALS], real_element);
    R_set_altcomplex_Elt_method(classes[COMPLEXES], complex_element);
    R_set_altraw_Elt_method(classes[RAWS], raw_element);
}
