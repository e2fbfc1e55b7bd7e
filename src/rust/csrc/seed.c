/* The state of R's random number generator (RNG): the variable .Random.seed in the global environment. "No state"
 * means that the variable does not exist. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <Rversion.h>
#include <string.h>

/* A preserved list whose element is the state that was last read or set. R makes a new vector whenever it stores a
 * state. As this list keeps the last one alive, an equal address means an equal state. */
static SEXP last_seen = NULL;

static void remember(SEXP seed)
{
    if (!last_seen) {
        last_seen = Rf_list1(R_NilValue);
        R_PreserveObject(last_seen);
    }
    SETCAR(last_seen, seed);
}

/* Returns the RNG state, or R_NilValue if there is none. The result is not protected. */
static SEXP current_state(void)
{
#if R_VERSION >= R_Version(4, 5, 0)
    SEXP seed = R_getVarEx(R_SeedsSymbol, R_GlobalEnv, FALSE, R_NilValue);
#else
    SEXP seed = Rf_findVarInFrame(R_GlobalEnv, R_SeedsSymbol);
#endif

    return TYPEOF(seed) == INTSXP ? seed : R_NilValue;
}

/* Returns whether the state has changed since it was last read or set. If so, stores its integers and their number
 * in `values` and `count`. The integers are valid until this function or rustcluster_set_seed() is called again.
 * R may jump. */
int rustcluster_seed_changed(const int **values, int *count)
{
    SEXP seed = current_state();

    if (last_seen ? seed == CAR(last_seen) : seed == R_NilValue)
        return 0;
    remember(seed);
    *count = seed == R_NilValue ? 0 : (int) XLENGTH(seed);
    *values = seed == R_NilValue ? NULL : INTEGER(seed);
    return 1;
}

/* Sets the state. `seed` must be protected. R may jump. */
static void set_state(SEXP seed)
{
    if (seed == R_NilValue)
        R_removeVarFromFrame(R_SeedsSymbol, R_GlobalEnv);
    else
        Rf_defineVar(R_SeedsSymbol, seed, R_GlobalEnv);
    remember(seed);
}

/* Calls RNGkind(), with the kinds of an earlier call or, to read them, with none. Returns the kinds before, as three
 * strings, unprotected. R may jump. */
static SEXP call_rngkind(SEXP kinds)
{
    SEXP call = PROTECT(Rf_lang1(Rf_install("RNGkind")));

    if (kinds != R_NilValue)
        for (R_xlen_t i = XLENGTH(kinds) - 1; i >= 0; i--)
            SETCDR(call, Rf_cons(Rf_ScalarString(STRING_ELT(kinds, i)), CDR(call)));
    /* R warns about some kinds. */
    call = PROTECT(Rf_lang2(Rf_install("suppressWarnings"), call));
    SEXP before = Rf_eval(call, R_BaseEnv);
    UNPROTECT(2);
    return before;
}

/* A preserved list of this worker's own state, while it uses that of another worker or of an element; NULL at other
 * times. The tag of the list is the kinds of generators if there is no state: R keeps them elsewhere then, and a state
 * that is set replaces them. */
static SEXP own = NULL;

/* Sets the state to `count` integers, or to no state if `count` is 0. `reassigned`: whether the state is that of
 * another worker, for a reassigned task; rustcluster_own_seed() then restores this worker's own. R may jump. */
void rustcluster_set_seed(const void *values, int count, int reassigned)
{
    SEXP seed = R_NilValue;

    if (count) {
        seed = Rf_allocVector(INTSXP, count);
        memcpy(INTEGER(seed), values, sizeof(int) * (size_t) count);
    }
    PROTECT(seed);
    if (reassigned && !own) {
        SEXP saved = PROTECT(Rf_list1(current_state()));
        if (CAR(saved) == R_NilValue)
            SET_TAG(saved, call_rngkind(R_NilValue));
        R_PreserveObject(saved);
        own = saved;
        UNPROTECT(1);
    }
    set_state(seed);
    UNPROTECT(1);
}

/* Returns whether the state is that of another worker. */
int rustcluster_is_reassigned(void)
{
    return own != NULL;
}

/* Restores this worker's own state, if the current one is that of another worker. R may jump. */
void rustcluster_own_seed(void)
{
    if (!own)
        return;
    if (TAG(own) != R_NilValue)
        call_rngkind(TAG(own));
    set_state(CAR(own));
    R_ReleaseObject(own);
    own = NULL;
}
