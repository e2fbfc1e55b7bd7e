/* Large vectors of numbers and of logical values as they are in a payload's memory: a worker maps
 * them where it would otherwise have a copy of its own, as does the head those of an answer from a
 * worker on its machine.
 *
 * In the stream of R's serialization such a vector is an ALTREP object of one of these classes, whose
 * state is an offset and a length (codec/mapped.rs writes it so). The mapping is private and writable, and
 * each reading of a message makes its own: vectors are written to in place, by R and by C code, which
 * neither another worker nor the next task that reads the same message may see. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <R_ext/Altrep.h>
#include <Rversion.h>
#include <R_ext/Rallocators.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
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
 * classes, so that whoever writes the stream can refer to them later: see codec/mapped.rs. The result is not
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

/* A message whose vectors are being read. Its data is mapped when the first vector asks for it.
 * src/mapped.rs has this struct, too. */
struct message {
    /* All of it; NULL if it is in the file alone. */
    const char *bytes;
    /* Bytes; 0 if there is no message. */
    size_t length;
    /* Its mapping, preserved: see below. NULL: there is none. */
    SEXP mapping;
    /* The file that it is in, or -1 if nothing is to be mapped. */
    int file;
    /* It could not be mapped. */
    int unmappable;
};

static struct message now = {NULL, 0, NULL, -1, 0};

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

/* A mapping has a holder, an R object by which its vectors hold it. It must end no sooner than any R code can
 * reach one of them, but R runs the finalizers of all that it has found unreachable one after the other, and a
 * later one may still read a vector, or keep it. See new_holder(). */
struct mapping {
    void *at;
    size_t length;
    /* What it counts in `mapped`. */
    double cost;
    /* No vector has been read since its holder's finalizer was run. */
    int unused;
};

/* Bytes of memory that mappings keep. R does not count them, and so would not look for what is not used
 * any more: that is looked for whenever they pass this bound. To look takes a worker tens of
 * milliseconds, so that the bound leaves room for some messages. */
static double mapped = 0, bound = 536870912;
/* By how much they may grow at least until then. */
static const double room = 536870912;

/* The file that was mapped last. Each task maps the same one: that keeps no more memory than one mapping
 * does, but for page tables and for what is written to. */
static ino_t last_file = 0;
static const double again = 1.0 / 64;
/* Bytes that have been mapped since it was last looked how much has been written to, and how much memory of
 * its own this process had when R last collected garbage. */
static double unwatched = 0, own_then = 0;

static double cost_of_now(void)
{
    struct stat of;

    if (fstat(now.file, &of))
        return (double) now.length;
    int same = of.st_ino == last_file;
    last_file = of.st_ino;
    return same ? again * (double) now.length : (double) now.length;
}

/* Bytes of this process's own memory, heap and pages that were written to; 0 if it is not known. */
static double own_memory(void)
{
    double all = 0, shared = 0;
    FILE *file = fopen("/proc/self/statm", "r");

    if (!file)
        return 0;
    if (fscanf(file, "%*f %lf %lf", &all, &shared) != 2)
        all = shared = 0;
    fclose(file);
    return (all - shared) * (double) sysconf(_SC_PAGESIZE);
}

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

static void end_mapping(struct mapping *mapping)
{
    if (mapping->at) {
        munmap(mapping->at, mapping->length);
        mapped -= mapping->cost;
        mappings--;
        if (mappings < most_mappings / 2)
            looked = 0;
    }
    free(mapping);
}

#if R_VERSION < R_Version(4, 6, 0)

/* The holder is a vector without a use. R frees it with the memory function here, and so only when no R code
 * can reach it any more. */

static void *take_holder(R_allocator_t *allocator, size_t size)
{
    void *memory = malloc(size);
    allocator->data = memory ? calloc(1, sizeof(struct mapping)) : NULL;

    if (!allocator->data) {
        free(memory);
        return NULL;
    }
    return memory;
}

static void free_holder(R_allocator_t *allocator, void *memory)
{
    end_mapping(allocator->data);
    free(memory);
}

static SEXP new_holder(void)
{
    R_allocator_t allocator = {take_holder, free_holder, NULL, NULL};
    SEXP holder = Rf_allocVector3(RAWSXP, sizeof(struct mapping *), &allocator);

    *(struct mapping **) RAW(holder) = allocator.data;
    return holder;
}

static struct mapping *mapping_in(SEXP holder)
{
    return *(struct mapping **) RAW(holder);
}

static void collect(void)
{
    R_gc();
}

#else

/* This API has no such vectors any more. The holder is an external pointer that protects a second one, that
 * a third one, and so on: its heirs, which are kept in a list. The finalizer of each takes the next off that
 * list, so that the next one's is run by a later collection: no finalizer may be registered while others are
 * run, since R may forget it. The mapping ends with the first heir since whose predecessor's end no vector has
 * been read, which those finalizers may have done that were run with it, or with the last heir. */
#define HEIRS 4

/* Of the heirs that are kept: a pairlist whose cells have the cell before them for a value and the heir for a
 * tag. An heir has its cell for a tag. */
static SEXP heirs = NULL;

static void keep_heir(SEXP heir)
{
    if (!heirs) {
        SEXP first = PROTECT(Rf_cons(R_NilValue, R_NilValue));
        R_PreserveObject(first);
        heirs = first;
        UNPROTECT(1);
    }
    SEXP cell = PROTECT(Rf_cons(heirs, CDR(heirs)));
    SET_TAG(cell, heir);
    if (CDR(heirs) != R_NilValue)
        SETCAR(CDR(heirs), cell);
    SETCDR(heirs, cell);
    R_SetExternalPtrTag(heir, cell);
    UNPROTECT(1);
}

static void let_go_of_heir(SEXP heir)
{
    SEXP cell = heir == R_NilValue ? R_NilValue : R_ExternalPtrTag(heir);

    if (cell == R_NilValue)
        return;
    SETCDR(CAR(cell), CDR(cell));
    if (CDR(cell) != R_NilValue)
        SETCAR(CDR(cell), CAR(cell));
    R_SetExternalPtrTag(heir, R_NilValue);
}

/* The last heir, whose address is that of the mapping. */
static SEXP last_heir(SEXP of)
{
    while (R_ExternalPtrProtected(of) != R_NilValue)
        of = R_ExternalPtrProtected(of);
    return of;
}

/* The holder's own finalizer. */
static void finalize_holder(SEXP holder)
{
    struct mapping *mapping = R_ExternalPtrAddr(last_heir(holder));

    if (mapping)
        mapping->unused = 1;
    let_go_of_heir(R_ExternalPtrProtected(holder));
}

static void finalize_heir(SEXP heir)
{
    SEXP last = last_heir(heir);
    struct mapping *mapping = R_ExternalPtrAddr(last);

    if (mapping && mapping->at && !mapping->unused && heir != last) {
        mapping->unused = 1;
    } else if (mapping) {
        R_ClearExternalPtr(last);
        end_mapping(mapping);
    }
    let_go_of_heir(R_ExternalPtrProtected(heir));
}

static SEXP new_holder(void)
{
    SEXP heir = PROTECT(R_MakeExternalPtr(NULL, R_NilValue, R_NilValue));

    R_RegisterCFinalizerEx(heir, finalize_heir, FALSE);
    R_SetExternalPtrAddr(heir, calloc(1, sizeof(struct mapping)));
    if (!R_ExternalPtrAddr(heir))
        Rf_error("cannot allocate memory");
    for (int i = 1; i < HEIRS; i++) {
        SEXP before = PROTECT(R_MakeExternalPtr(NULL, R_NilValue, heir));
        R_RegisterCFinalizerEx(before, finalize_heir, FALSE);
        keep_heir(heir);
        UNPROTECT(2);
        heir = PROTECT(before);
    }
    SEXP holder = PROTECT(R_MakeExternalPtr(NULL, R_NilValue, heir));
    keep_heir(heir);
    R_RegisterCFinalizerEx(holder, finalize_holder, FALSE);
    UNPROTECT(2);
    return holder;
}

static struct mapping *mapping_in(SEXP holder)
{
    struct mapping *mapping = R_ExternalPtrAddr(last_heir(holder));

    if (!mapping)
        Rf_error("a vector that is no more");
    mapping->unused = 0;
    return mapping;
}

static void collect(void)
{
    R_gc();
    R_gc();
}

#endif

/* Collects garbage if mappings that are not used any more may keep much memory. R may jump. */
static void make_room(double cost)
{
    int much = mapped + cost > bound;

    unwatched += (double) now.length;
    if (!much && unwatched > room) {
        unwatched = 0;
        much = own_memory() > own_then + room;
    }
    if (!much)
        return;
    collect();
    double used = mapped + cost;
    bound = used + (used > room ? used : room);
    own_then = own_memory();
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
        collect();
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
        return mapping_in(now.mapping)->at;
    if (now.file < 0 || now.unmappable || !has_room())
        return NULL;
    double cost = cost_of_now();
    make_room(cost);
    SEXP holder = PROTECT(new_holder());
    struct mapping *mapping = mapping_in(holder);
    R_PreserveObject(holder);
    UNPROTECT(1);
    void *at = map();
    if (at == MAP_FAILED) {
        /* What is not used any more may be in the way. */
        collect();
        at = map();
    }
    if (at == MAP_FAILED) {
        R_ReleaseObject(holder);
        now.unmappable = 1;
        return NULL;
    }
    mapping->at = at;
    mapping->length = now.length;
    mapping->cost = cost;
    mapped += cost;
    mappings++;
    now.mapping = holder;
    return at;
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
    SEXP data = R_altrep_data1(x);

    mapping_in(R_ExternalPtrProtected(data));
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
