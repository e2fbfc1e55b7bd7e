/* Large vectors of numbers and of logical values as they are in a payload's memory: a worker maps
 * them where it would otherwise have a copy of its own, as does the head those of an answer from a
 * worker on its machine.
 *
 * In the stream of R's serialization such a vector is an ALTREP object of one of these classes, whose
 * state is an offset and a length (mapped.rs writes it so). The mapping is private and writable, and
 * each reading of a message makes its own: vectors are written to in place, by R and by C code, which
 * neither another worker nor the next task that reads the same message may see. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <R_ext/Altrep.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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

/* The writer ------------------------------------------------------------------------------------*/

/* About how many bytes the large vectors of a value have. R does not jump. */
double rustcluster_large_bytes(void *value, int depth)
{
    SEXP x = (SEXP) value;
    int kind = kind_of(x);
    double bytes = 0;

    if (kind < KINDS) {
        bytes = (double) XLENGTH(x) * (double) size_of(kind);
        return bytes < LARGE || !DATAPTR_OR_NULL(x) ? 0 : bytes;
    }
    if (TYPEOF(x) != VECSXP || ALTREP(x) || depth == DEPTH)
        return 0;
    for (R_xlen_t i = 0; i < XLENGTH(x); i++)
        bytes += rustcluster_large_bytes(VECTOR_ELT(x, i), depth + 1);
    return bytes;
}

/* A list of an empty vector of each class, and of the value. R's serialization of it begins with the
 * classes, so that whoever writes the stream can refer to them later: see mapped.rs. The result is not
 * protected. */
SEXP rustcluster_with_classes(void *value)
{
    SEXP list = PROTECT(Rf_allocVector(VECSXP, KINDS + 1));

    for (int kind = 0; kind < KINDS; kind++) {
        SEXP where = PROTECT(Rf_allocVector(REALSXP, 2));
        REAL(where)[0] = REAL(where)[1] = 0;
        SET_VECTOR_ELT(list, kind, R_new_altrep(classes[kind], R_NilValue, where));
        UNPROTECT(1);
    }
    SET_VECTOR_ELT(list, KINDS, (SEXP) value);
    UNPROTECT(1);
    return list;
}

/* The value of such a list. R jumps if it is none. */
SEXP rustcluster_without_classes(void *list)
{
    SEXP all = (SEXP) list;

    if (TYPEOF(all) != VECSXP || XLENGTH(all) != KINDS + 1)
        Rf_error("a message that is damaged");
    return VECTOR_ELT(all, KINDS);
}

/* The reader ------------------------------------------------------------------------------------*/

/* The message that is being read. Its data is mapped when the first vector asks for it. */
static struct {
    /* All of it; NULL if it is in the file alone. */
    const char *bytes;
    /* Bytes; 0 if there is none. */
    size_t length;
    /* The file that it is in, or -1. */
    int file;
} now = {NULL, 0, -1};

/* Its mapping, an external pointer, as an element of a preserved list. */
static SEXP kept = NULL;

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

/* What is read from here on has its vectors in this message, until the next. `file`: -1 if none is
 * to be mapped. */
void rustcluster_begin_mapped(const void *bytes, size_t length, int file)
{
    now.bytes = bytes;
    now.length = length;
    now.file = file;
    if (kept)
        SETCAR(kept, R_NilValue);
}

void rustcluster_end_mapped(void)
{
    rustcluster_begin_mapped(NULL, 0, -1);
}

static void unmap(SEXP pointer)
{
    struct mapping *mapping = R_ExternalPtrAddr(pointer);

    if (!mapping)
        return;
    R_ClearExternalPtr(pointer);
    munmap(mapping->at, mapping->length);
    mapped -= (double) mapping->length;
    free(mapping);
}

static void *map(void)
{
    return mmap(NULL, now.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, now.file, 0);
}

/* The mapping of the message that is being read. Not protected, but kept. */
static SEXP mapping_of_now(void)
{
    if (!kept) {
        SEXP list = PROTECT(Rf_cons(R_NilValue, R_NilValue));
        R_PreserveObject(list);
        kept = list;
        UNPROTECT(1);
    }
    if (CAR(kept) != R_NilValue)
        return CAR(kept);
    SEXP pointer = PROTECT(R_MakeExternalPtr(NULL, R_NilValue, R_NilValue));
    R_RegisterCFinalizerEx(pointer, unmap, FALSE);
    if (bound < room)
        bound = room;
    if (mapped + (double) now.length > bound) {
        R_gc();
        double used = mapped + (double) now.length;
        bound = used + (used > room ? used : room);
    }
    void *at = map();
    if (at == MAP_FAILED) {
        /* What is not used any more may be in the way. */
        R_gc();
        at = map();
    }
    if (at == MAP_FAILED)
        Rf_error("cannot allocate vector of size %0.1f Mb", (double) now.length / 1048576);
    /* Not R_Calloc(): R would jump, and leave the mapping behind. */
    struct mapping *mapping = (struct mapping *) calloc(1, sizeof *mapping);
    if (!mapping) {
        munmap(at, now.length);
        Rf_error("cannot allocate memory");
    }
    mapping->at = at;
    mapping->length = now.length;
    mapped += (double) now.length;
    R_SetExternalPtrAddr(pointer, mapping);
    SETCAR(kept, pointer);
    UNPROTECT(1);
    return pointer;
}

static SEXP unserialize(int kind, SEXP state)
{
    static const SEXPTYPE types[KINDS] = {LGLSXP, INTSXP, REALSXP, CPLXSXP, RAWSXP};

    if (!now.length || TYPEOF(state) != REALSXP || XLENGTH(state) != 2)
        Rf_error("a vector that is nowhere");
    double offset = REAL(state)[0], n = REAL(state)[1], bytes = n * (double) size_of(kind);
    if (!(offset >= 0 && n >= 0 && offset + bytes <= (double) now.length) ||
        offset != (double) (size_t) offset || n != (double) (R_xlen_t) n ||
        (size_t) offset % ALIGNED)
        Rf_error("a vector beyond the end of its message");
    size_t begin = (size_t) offset;
    if (n == 0)
        return Rf_allocVector(types[kind], 0);
    if (now.file < 0) {
        if (!now.bytes)
            Rf_error("a vector that is nowhere");
        SEXP copy = Rf_allocVector(types[kind], (R_xlen_t) n);
        memcpy(room_of(copy), now.bytes + begin, (size_t) bytes);
        return copy;
    }
    SEXP mapping = PROTECT(mapping_of_now());
    char *at = ((struct mapping *) R_ExternalPtrAddr(mapping))->at;
    SEXP data = PROTECT(R_MakeExternalPtr(at + begin, R_NilValue, mapping));
    SEXP length = PROTECT(Rf_ScalarReal(n));
    SEXP made = R_new_altrep(classes[kind], data, length);
    UNPROTECT(3);
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
    SEXP data = R_altrep_data1(x);

    /* A finalizer may get to see a vector whose mapping has been finalized before. */
    if (!R_ExternalPtrAddr(R_ExternalPtrProtected(data)))
        Rf_error("a vector that is no more");
    return R_ExternalPtrAddr(data);
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
