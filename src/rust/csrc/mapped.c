/* ALTREP classes for large atomic vectors whose data is mapped from shared memory. Workers map the vectors of a
 * blob, and the head maps the vectors of a result from a worker on the same host. Neither copies them.
 *
 * In a serialized message, a mapped vector is an ALTREP object of one of these classes. Its serialized state is
 * an offset into the message and a length (see codec/mapped.rs, the writer).
 *
 * A mapping is private and writable, because R and C code may modify vectors in place. Each unserialization of a
 * message makes a mapping of its own: other workers, and later tasks that read the same message, never see the
 * modifications. */
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

/* Minimum size of a vector that is mapped, in bytes. codec/mapped.rs has the same constant. */
#define LARGE 65536
/* Alignment of the data of a vector in bytes. codec/mapped.rs has the same constant. */
#define ALIGNED 64
/* Maximum depth of nested lists that are searched for large vectors. */
#define DEPTH 64

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

enum { LOGICALS, INTEGERS, REALS, COMPLEXES, RAWS, KINDS };
static R_altrep_class_t classes[KINDS];

/* Returns the kind of a vector, or KINDS if there is no class for its type. */
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

/* Returns the size of an element in bytes. */
static size_t size_of(int kind)
{
    static const size_t sizes[KINDS] = {
        sizeof(int), sizeof(int), sizeof(double), sizeof(Rcomplex), sizeof(Rbyte),
    };

    return sizes[kind];
}

/* Returns the data of a vector that is not of one of these classes. */
static void *plain_data(SEXP value)
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

/* Returns the approximate size of the large vectors of a value, in bytes. R does not jump. */
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

/* Returns a list of an empty vector of each class, followed by the value. The serialized list begins with the
 * names of the classes, so that the writer in codec/mapped.rs can refer to them further on in the stream. The
 * result is not protected. */
SEXP rustcluster_with_classes(void *value)
{
    SEXP list = PROTECT(Rf_allocVector(VECSXP, KINDS + 1));

    for (int kind = 0; kind < KINDS; kind++) {
        SEXP state = PROTECT(Rf_allocVector(REALSXP, 2));
        REAL(state)[0] = REAL(state)[1] = 0;
        SET_VECTOR_ELT(list, kind, R_new_altrep(classes[kind], R_NilValue, state));
        UNPROTECT(1);
    }
    SET_VECTOR_ELT(list, KINDS, (SEXP) value);
    UNPROTECT(1);
    return list;
}

/* Returns the value of a list that rustcluster_with_classes() has returned. R jumps if it is another object. */
SEXP rustcluster_without_classes(void *list)
{
    SEXP all = (SEXP) list;

    if (TYPEOF(all) != VECSXP || XLENGTH(all) != KINDS + 1)
        Rf_error("damaged message");
    return VECTOR_ELT(all, KINDS);
}

/* The reader ------------------------------------------------------------------------------------*/

/* A message that is being unserialized. It is mapped when its first vector is read. codec/mapped.rs declares the
 * same struct as MappedMessage. */
struct message {
    /* The whole message, or NULL if only the file has it. */
    const char *bytes;
    /* Length in bytes, or 0 if no message is being unserialized. */
    size_t length;
    /* The holder of its mapping (see struct mapping), preserved; NULL if it is not mapped yet. */
    SEXP mapping;
    /* The descriptor of its file, or -1 if its vectors are to be copied. */
    int file;
    /* Whether an attempt to map it has failed. */
    int unmappable;
};

static struct message current = {NULL, 0, NULL, -1, 0};

/* Makes `message` the current one, to which the offsets of unserialized vectors refer, until
 * rustcluster_end_mapped(). Calls nest, because a finalizer that runs in between may unserialize another message:
 * pass `before`, in which this function stores the previous message, to rustcluster_end_mapped(). */
void rustcluster_begin_mapped(struct message *message, struct message *before)
{
    *before = current;
    current = *message;
}

/* Releases the current message and restores the previous one. */
void rustcluster_end_mapped(struct message *before)
{
    if (current.mapping)
        R_ReleaseObject(current.mapping);
    current = *before;
}

/* A mapping of a message. Its holder is an R object that all vectors in the mapping reference, and that keeps the
 * mapping alive.
 *
 * The mapping must outlive its last vector. One finalizer of the holder cannot ensure this: when a garbage
 * collection finds the holder unreachable, R runs the finalizers of all unreachable objects one after the other,
 * and a finalizer that runs after the holder's may still read a vector or make it reachable again. new_holder()
 * shows how this is solved. */
struct mapping {
    void *at;
    size_t length;
    /* Its share of `mapped_bytes`. */
    double cost;
    /* Whether no vector has been read since the last finalizer of its holder or of a sentinel ran. Used from
     * R 4.6 on. */
    int unused;
};

/* Memory that mappings occupy, in bytes. R does not count it, and therefore does not start a garbage collection
 * when unused mappings occupy much memory. This code starts one when `mapped_bytes` exceeds `gc_threshold`. A
 * collection takes tens of milliseconds, so the threshold leaves room for several messages. */
static double mapped_bytes = 0, gc_threshold = 536870912;
/* Minimum growth of `mapped_bytes`, or of modified pages, between two garbage collections. */
static const double min_growth = 536870912;

/* The inode of the file that was mapped last. Successive tasks map the same blob. Their mappings share its pages,
 * so that a further mapping costs only page tables and the pages that are modified: `repeat_cost` of its size. */
static ino_t last_file = 0;
static const double repeat_cost = 1.0 / 64;
/* Bytes mapped since the last check for modified pages, and the private memory of this process after the last
 * garbage collection that this code started. */
static double mapped_since_check = 0, own_at_gc = 0;

/* Returns how much a mapping of the current message adds to `mapped_bytes`. */
static double cost_of_current(void)
{
    struct stat info;

    if (fstat(current.file, &info))
        return (double) current.length;
    int same = info.st_ino == last_file;
    last_file = info.st_ino;
    return same ? repeat_cost * (double) current.length : (double) current.length;
}

/* Returns the private memory of this process (heap and modified pages) in bytes, or 0 if it is unknown. */
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

/* Number of mappings, and its maximum. The kernel limits the mappings of a process (vm.max_map_count). A process
 * that has reached the limit cannot allocate memory. */
static double mappings = 0, max_mappings = 0;
/* Whether a garbage collection has been started because the maximum was reached. */
static int collected_at_max = 0;

/* Returns a quarter of the kernel's limit: the rest is left to R and to user code. */
static double read_max_mappings(void)
{
    /* The default of Linux, used if the limit cannot be read. */
    double limit = 65530;
    FILE *file = fopen("/proc/sys/vm/max_map_count", "r");

    if (file) {
        if (fscanf(file, "%lf", &limit) != 1)
            limit = 65530;
        fclose(file);
    }
    return limit / 4;
}

static void end_mapping(struct mapping *mapping)
{
    if (mapping->at) {
        munmap(mapping->at, mapping->length);
        mapped_bytes -= mapping->cost;
        mappings--;
        if (mappings < max_mappings / 2)
            collected_at_max = 0;
    }
    free(mapping);
}

#if R_VERSION < R_Version(4, 6, 0)

/* The holder is a raw vector with a custom allocator. R calls its free function after all finalizers, when no R
 * code can reach the vectors any more. */

static void *allocate_holder(R_allocator_t *allocator, size_t size)
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

/* Returns a new holder, which is not protected. Its mapping is zeroed. R may jump. */
static SEXP new_holder(void)
{
    R_allocator_t allocator = {allocate_holder, free_holder, NULL, NULL};
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

/* From R 4.6 on, the API has no custom allocators. The holder is an external pointer that protects the first of a
 * chain of external pointers, the sentinels: holder -> sentinel 1 -> ... -> sentinel 4 -> mapping. All of them have
 * finalizers.
 *
 * `sentinels` keeps each sentinel alive until the finalizer of its predecessor has removed it from that list. The
 * finalizers of the chain therefore run in successive garbage collections, one in each. A sentinel is unreachable
 * only if the holder is (each object of the chain protects the next), so its finalizer does not run while R code
 * can reach a vector.
 *
 * A sentinel's finalizer unmaps the memory if no vector has been read since its predecessor's finalizer ran. If a
 * vector has been read, by another finalizer of the same collection, the next sentinel decides. The last sentinel
 * unmaps in any case.
 *
 * All finalizers are registered when the chain is made: R may lose a finalizer that is registered while
 * finalizers run. */
#define SENTINELS 4

/* A doubly linked list of the sentinels that are kept alive: a preserved pairlist with an empty first cell. The CAR
 * of a cell is the previous cell, and its TAG is the sentinel. The tag of a sentinel is its cell. */
static SEXP sentinels = NULL;

/* Adds a sentinel to `sentinels`. R may jump. */
static void preserve_sentinel(SEXP sentinel)
{
    if (!sentinels) {
        SEXP first = PROTECT(Rf_cons(R_NilValue, R_NilValue));
        R_PreserveObject(first);
        sentinels = first;
        UNPROTECT(1);
    }
    SEXP cell = PROTECT(Rf_cons(sentinels, CDR(sentinels)));
    SET_TAG(cell, sentinel);
    if (CDR(sentinels) != R_NilValue)
        SETCAR(CDR(sentinels), cell);
    SETCDR(sentinels, cell);
    R_SetExternalPtrTag(sentinel, cell);
    UNPROTECT(1);
}

/* Removes a sentinel from `sentinels`, if it is there. Does nothing for R_NilValue, the end of a chain. */
static void release_sentinel(SEXP sentinel)
{
    SEXP cell = sentinel == R_NilValue ? R_NilValue : R_ExternalPtrTag(sentinel);

    if (cell == R_NilValue)
        return;
    SETCDR(CAR(cell), CDR(cell));
    if (CDR(cell) != R_NilValue)
        SETCAR(CDR(cell), CAR(cell));
    R_SetExternalPtrTag(sentinel, R_NilValue);
}

/* Returns the last sentinel of a chain. Its address is the mapping. */
static SEXP last_sentinel(SEXP of)
{
    while (R_ExternalPtrProtected(of) != R_NilValue)
        of = R_ExternalPtrProtected(of);
    return of;
}

static void finalize_holder(SEXP holder)
{
    struct mapping *mapping = R_ExternalPtrAddr(last_sentinel(holder));

    if (mapping)
        mapping->unused = 1;
    release_sentinel(R_ExternalPtrProtected(holder));
}

static void finalize_sentinel(SEXP sentinel)
{
    SEXP last = last_sentinel(sentinel);
    struct mapping *mapping = R_ExternalPtrAddr(last);

    if (mapping && mapping->at && !mapping->unused && sentinel != last) {
        mapping->unused = 1;
    } else if (mapping) {
        R_ClearExternalPtr(last);
        end_mapping(mapping);
    }
    release_sentinel(R_ExternalPtrProtected(sentinel));
}

/* Returns a new holder, which is not protected. Its mapping is zeroed. R may jump. */
static SEXP new_holder(void)
{
    SEXP sentinel = PROTECT(R_MakeExternalPtr(NULL, R_NilValue, R_NilValue));

    R_RegisterCFinalizerEx(sentinel, finalize_sentinel, FALSE);
    R_SetExternalPtrAddr(sentinel, calloc(1, sizeof(struct mapping)));
    if (!R_ExternalPtrAddr(sentinel))
        Rf_error("cannot allocate memory");
    for (int i = 1; i < SENTINELS; i++) {
        SEXP before = PROTECT(R_MakeExternalPtr(NULL, R_NilValue, sentinel));
        R_RegisterCFinalizerEx(before, finalize_sentinel, FALSE);
        preserve_sentinel(sentinel);
        UNPROTECT(2);
        sentinel = PROTECT(before);
    }
    SEXP holder = PROTECT(R_MakeExternalPtr(NULL, R_NilValue, sentinel));
    preserve_sentinel(sentinel);
    R_RegisterCFinalizerEx(holder, finalize_holder, FALSE);
    UNPROTECT(2);
    return holder;
}

/* Returns the mapping of a holder, and marks it as used. R jumps if it has been unmapped. */
static struct mapping *mapping_in(SEXP holder)
{
    struct mapping *mapping = R_ExternalPtrAddr(last_sentinel(holder));

    if (!mapping)
        Rf_error("the memory of this vector has been unmapped");
    mapping->unused = 0;
    return mapping;
}

/* Collects garbage twice: the first collection runs the finalizers of unused holders, the second those of their
 * first sentinels. */
static void collect(void)
{
    R_gc();
    R_gc();
}

#endif

/* Collects garbage if unused mappings may occupy much memory. `cost`: of the mapping to be made. R may jump. */
static void collect_if_worthwhile(double cost)
{
    int worthwhile = mapped_bytes + cost > gc_threshold;

    mapped_since_check += (double) current.length;
    if (!worthwhile && mapped_since_check > min_growth) {
        mapped_since_check = 0;
        worthwhile = own_memory() > own_at_gc + min_growth;
    }
    if (!worthwhile)
        return;
    collect();
    double used = mapped_bytes + cost;
    gc_threshold = used + (used > min_growth ? used : min_growth);
    own_at_gc = own_memory();
}

static void *map_file(void)
{
    return mmap(NULL, current.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, current.file, 0);
}

/* Returns whether another mapping may be made. R may jump. */
static int can_map_more(void)
{
    if (max_mappings == 0)
        max_mappings = read_max_mappings();
    if (mappings >= max_mappings && !collected_at_max) {
        collected_at_max = 1;
        collect();
    }
    return mappings < max_mappings;
}

/* Copies data from the current message. R may jump. */
static void copy_data(char *to, size_t begin, size_t bytes)
{
    if (current.bytes) {
        memcpy(to, current.bytes + begin, bytes);
        return;
    }
    while (bytes > 0) {
        ssize_t n = pread(current.file, to, bytes, (off_t) begin);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            Rf_error("cannot read the data of a vector");
        to += n;
        begin += (size_t) n;
        bytes -= (size_t) n;
    }
}

/* Maps the current message, unless that has been done. Returns the address of the mapping, or NULL if the vectors
 * of the message are to be copied. R may jump. */
static char *map_current(void)
{
    if (current.mapping)
        return mapping_in(current.mapping)->at;
    if (current.file < 0 || current.unmappable || !can_map_more())
        return NULL;
    double cost = cost_of_current();
    collect_if_worthwhile(cost);
    SEXP holder = PROTECT(new_holder());
    struct mapping *mapping = mapping_in(holder);
    R_PreserveObject(holder);
    UNPROTECT(1);
    void *at = map_file();
    if (at == MAP_FAILED) {
        /* Unused mappings may occupy the address space. */
        collect();
        at = map_file();
    }
    if (at == MAP_FAILED) {
        R_ReleaseObject(holder);
        current.unmappable = 1;
        return NULL;
    }
    mapping->at = at;
    mapping->length = current.length;
    mapping->cost = cost;
    mapped_bytes += cost;
    mappings++;
    current.mapping = holder;
    return at;
}

/* Makes a vector from its serialized state: mapped if possible, otherwise a copy. */
static SEXP unserialize(int kind, SEXP state)
{
    static const SEXPTYPE types[KINDS] = {LGLSXP, INTSXP, REALSXP, CPLXSXP, RAWSXP};

    if (!current.length || TYPEOF(state) != REALSXP || XLENGTH(state) != 2)
        Rf_error("a vector without its message");
    double offset = REAL(state)[0], n = REAL(state)[1], bytes = n * (double) size_of(kind);
    if (!(offset >= 0 && n >= 0 && offset + bytes <= (double) current.length) ||
        offset != (double) (size_t) offset || n != (double) (R_xlen_t) n ||
        (size_t) offset % ALIGNED)
        Rf_error("a vector beyond the end of its message");
    size_t begin = (size_t) offset;
    if (n == 0)
        return Rf_allocVector(types[kind], 0);
    char *at = map_current();
    if (!at) {
        if (!current.bytes && current.file < 0)
            Rf_error("a vector without its message");
        SEXP copy = PROTECT(Rf_allocVector(types[kind], (R_xlen_t) n));
        copy_data(plain_data(copy), begin, (size_t) bytes);
        UNPROTECT(1);
        return copy;
    }
    SEXP data = PROTECT(R_MakeExternalPtr(at + begin, R_NilValue, current.mapping));
    SEXP length = PROTECT(Rf_ScalarReal(n));
    SEXP made = R_new_altrep(classes[kind], data, length);
    UNPROTECT(2);
    return made;
}

/* Returns whether a vector is one of rustcluster_with_classes(), without data. */
static int is_placeholder(SEXP x)
{
    return R_altrep_data1(x) == R_NilValue;
}

static SEXP state_of(SEXP x)
{
    /* NULL: R serializes a mapped vector as an ordinary one. */
    return is_placeholder(x) ? R_altrep_data2(x) : NULL;
}

static R_xlen_t length(SEXP x)
{
    return (R_xlen_t) REAL_ELT(R_altrep_data2(x), is_placeholder(x) ? 1 : 0);
}

static void *mapped_data(SEXP x)
{
    SEXP data = R_altrep_data1(x);

    mapping_in(R_ExternalPtrProtected(data));
    return R_ExternalPtrAddr(data);
}

static void *data_of(SEXP x, Rboolean writable)
{
    (void) writable;
    if (is_placeholder(x))
        Rf_error("a vector without data");
    return mapped_data(x);
}

static const void *data_or_null(SEXP x)
{
    return is_placeholder(x) ? NULL : mapped_data(x);
}

static Rboolean inspect(SEXP x, int pre, int deep, int pvec, void (*subtree)(SEXP, int, int, int))
{
    (void) pre;
    (void) deep;
    (void) pvec;
    (void) subtree;
    Rprintf(is_placeholder(x) ? " placeholder\n" : " mapped\n");
    return TRUE;
}

/* Extract_subset methods, for indices from 1. R's default calls the Elt method for each element. */
#define SUBSET(name, type, ctype, na)                                                              \
    static SEXP name(SEXP x, SEXP index, SEXP call)                                                \
    {                                                                                              \
        (void) call;                                                                               \
        if (is_placeholder(x) || (TYPEOF(index) != INTSXP && TYPEOF(index) != REALSXP))            \
            return NULL;                                                                           \
        R_xlen_t count = XLENGTH(index), n = length(x);                                            \
        SEXP made = PROTECT(Rf_allocVector(type, count));                                          \
        ctype *to = plain_data(made);                                                              \
        const ctype *from = mapped_data(x);                                                        \
        if (TYPEOF(index) == INTSXP) {                                                             \
            const int *at = INTEGER(index);                                                        \
            for (R_xlen_t i = 0; i < count; i++)                                                   \
                to[i] = at[i] > 0 && at[i] <= n ? from[at[i] - 1] : na;                            \
        } else {                                                                                   \
            const double *at = REAL(index);                                                        \
            for (R_xlen_t i = 0; i < count; i++)                                                   \
                to[i] = at[i] >= 1 && at[i] < (double) n + 1 ? from[(R_xlen_t) at[i] - 1] : na;    \
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

/* Elt methods. R jumps if the vector has no data. */
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

/* Registers the classes. R calls this once, when the package is loaded. */
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
