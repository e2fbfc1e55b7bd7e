/* What is looked at in R's objects through macros or functions that extendr does not have. None of
 * these jumps. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <Rversion.h>
#include <limits.h>

/* Of a vector. 0: no attributes; 1: names only; 2: others. */
int rustcluster_attributes(void *value)
{
    SEXP of = (SEXP) value;
#if R_VERSION >= R_Version(4, 6, 0)
    R_xlen_t count = R_getAttribCount(of);
    int named = count == 1 && R_hasAttrib(of, R_NamesSymbol);
#else
    SEXP all = ATTRIB(of);
    int count = all != R_NilValue;
    int named = count && TAG(all) == R_NamesSymbol && CDR(all) == R_NilValue;
#endif

    if (!count)
        return 0;
    return named ? 1 : 2;
}

/* Of a vector that has no attributes but names. */
SEXP rustcluster_names(void *value)
{
    return Rf_getAttrib((SEXP) value, R_NamesSymbol);
}

SEXP rustcluster_closure_env(void *function)
{
#if R_VERSION >= R_Version(4, 5, 0)
    return R_ClosureEnv((SEXP) function);
#else
    return CLOENV((SEXP) function);
#endif
}

/* Whether two closures are of the same code, in the same environment. */
int rustcluster_same_closure(void *a, void *b)
{
    SEXP x = (SEXP) a, y = (SEXP) b;
#if R_VERSION >= R_Version(4, 5, 0)
    int same = R_ClosureFormals(x) == R_ClosureFormals(y) && R_ClosureBody(x) == R_ClosureBody(y);
#else
    int same = FORMALS(x) == FORMALS(y) && BODY(x) == BODY(y);
#endif

    return same && rustcluster_closure_env(x) == rustcluster_closure_env(y);
}

/* Whether it is where the source of functions is kept. */
int rustcluster_is_source(void *value)
{
    return Rf_inherits((SEXP) value, "srcfile");
}

/* Where the data of such an environment's parse tree is, or NULL. */
const void *rustcluster_parse_data(void *value)
{
#if R_VERSION >= R_Version(4, 5, 0)
    SEXP data = R_getVarEx(Rf_install("parseData"), (SEXP) value, FALSE, R_NilValue);
#else
    SEXP data = Rf_findVarInFrame((SEXP) value, Rf_install("parseData"));
#endif

    return TYPEOF(data) == INTSXP ? DATAPTR_OR_NULL(data) : NULL;
}

/* An element of a list or of a plain vector of strings, numbers or logical values, from 0; not
 * protected. R may jump. */
SEXP rustcluster_element(void *vector, R_xlen_t at)
{
    SEXP from = (SEXP) vector;

    switch (TYPEOF(from)) {
    case VECSXP:
        return VECTOR_ELT(from, at);
    case STRSXP:
        return Rf_ScalarString(STRING_ELT(from, at));
    case INTSXP:
        return Rf_ScalarInteger(INTEGER_ELT(from, at));
    case LGLSXP:
        return Rf_ScalarLogical(LOGICAL_ELT(from, at));
    case REALSXP:
        return Rf_ScalarReal(REAL_ELT(from, at));
    default:
        Rf_error("not a vector of elements");
    }
}

/* The value of a function of a number, not protected. R may jump. */
SEXP rustcluster_call_with(void *function, double number)
{
    SEXP call = PROTECT(Rf_lang2((SEXP) function, R_NilValue));

    SETCADR(call, number <= INT_MAX ? Rf_ScalarInteger((int) number) : Rf_ScalarReal(number));
    SEXP value = Rf_eval(call, R_GlobalEnv);
    UNPROTECT(1);
    return value;
}

/* Whether it is what parallel takes for an error. */
int rustcluster_is_error(void *value)
{
    return Rf_isObject((SEXP) value) && Rf_inherits((SEXP) value, "try-error");
}
