/* What is looked at in R's objects through macros or functions that extendr does not have. None of
 * these jumps. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <Rversion.h>

/* 0: no attributes; 1: names only; 2: others. */
int rustcluster_attributes(void *value)
{
    SEXP all = ATTRIB((SEXP) value);

    if (all == R_NilValue)
        return 0;
    return TAG(all) == R_NamesSymbol && CDR(all) == R_NilValue ? 1 : 2;
}

/* Of a vector with names. */
SEXP rustcluster_names(void *value)
{
    return CAR(ATTRIB((SEXP) value));
}

SEXP rustcluster_closure_env(void *function)
{
#if R_VERSION >= R_Version(4, 5, 0)
    return R_ClosureEnv((SEXP) function);
#else
    return CLOENV((SEXP) function);
#endif
}

/* Whether it is where the source of functions is kept. */
int rustcluster_is_source(void *value)
{
    return Rf_inherits((SEXP) value, "srcfile");
}
