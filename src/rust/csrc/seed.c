/* The state of R's random number generator, as R keeps it in the global environment. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <Rversion.h>
#include <string.h>

/* That which was last looked at. Kept, so that the same address means the same value: R makes a new
 * vector whenever it notes a state. */
static SEXP seen = NULL;

static void note(SEXP seed)
{
    if (!seen) {
        seen = Rf_list1(R_NilValue);
        R_PreserveObject(seen);
    }
    SETCAR(seen, seed);
}

static SEXP current(void)
{
#if R_VERSION >= R_Version(4, 5, 0)
    SEXP seed = R_getVarEx(R_SeedsSymbol, R_GlobalEnv, FALSE, R_NilValue);
#else
    SEXP seed = Rf_findVarInFrame(R_GlobalEnv, R_SeedsSymbol);
#endif

    return TYPEOF(seed) == INTSXP ? seed : R_NilValue;
}

/* Whether the state is another than when it was last looked at or put in place; then its integers,
 * which stay where they are until then again, and their number. */
int rustcluster_seed_changed(const int **values, int *count)
{
    SEXP seed = current();

    if (seen ? seed == CAR(seen) : seed == R_NilValue)
        return 0;
    note(seed);
    *count = seed == R_NilValue ? 0 : (int) XLENGTH(seed);
    *values = seed == R_NilValue ? NULL : INTEGER(seed);
    return 1;
}

static void put(SEXP seed)
{
    if (seed == R_NilValue)
        R_removeVarFromFrame(R_SeedsSymbol, R_GlobalEnv);
    else
        Rf_defineVar(R_SeedsSymbol, seed, R_GlobalEnv);
    note(seed);
}

/* This process's own state while that of another is in place; itself NULL if it is not. */
static SEXP own = NULL;

/* Puts a state of so many integers in place; none at all means that there is none. `guest`: until
 * rustcluster_own_seed() is called. */
void rustcluster_set_seed(const void *values, int count, int guest)
{
    SEXP seed = R_NilValue;

    if (count) {
        seed = Rf_allocVector(INTSXP, count);
        memcpy(INTEGER(seed), values, sizeof(int) * (size_t) count);
    }
    PROTECT(seed);
    if (guest && !own) {
        SEXP held = Rf_list1(current());
        R_PreserveObject(held);
        own = held;
    }
    put(seed);
    UNPROTECT(1);
}

/* Whether the state of another is in place. */
int rustcluster_is_reassigned(void)
{
    return own != NULL;
}

/* Puts this process's own state back in place. */
void rustcluster_own_seed(void)
{
    if (!own)
        return;
    put(CAR(own));
    R_ReleaseObject(own);
    own = NULL;
}
