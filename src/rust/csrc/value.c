/* Accessors of R objects for which extendr has no binding. R does not jump unless a comment says so. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <Rversion.h>
#include <limits.h>

/* Returns which attributes an object has: 0 for none, 1 for names only, 2 for others. */
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

/* Returns the names of a vector whose only attribute they are. */
SEXP rustcluster_names(void *value)
{
    return Rf_getAttrib((SEXP) value, R_NamesSymbol);
}

/* Returns the environment of a closure. */
SEXP rustcluster_closure_env(void *function)
{
#if R_VERSION >= R_Version(4, 5, 0)
    return R_ClosureEnv((SEXP) function);
#else
    return CLOENV((SEXP) function);
#endif
}

/* Returns whether two closures have identical (not only equal) formals, bodies and environments. */
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

/* Returns whether an object is a srcfile: the environment that has the source of functions. */
int rustcluster_is_source(void *value)
{
    return Rf_inherits((SEXP) value, "srcfile");
}

/* Returns the address of the parse data of a srcfile, or NULL if it has none. */
const void *rustcluster_parse_data(void *value)
{
#if R_VERSION >= R_Version(4, 5, 0)
    SEXP data = R_getVarEx(Rf_install("parseData"), (SEXP) value, FALSE, R_NilValue);
#else
    SEXP data = Rf_findVarInFrame((SEXP) value, Rf_install("parseData"));
#endif

    return TYPEOF(data) == INTSXP ? DATAPTR_OR_NULL(data) : NULL;
}

/* Returns element `at`, from 0, of a list or of a vector of strings, numbers or logical values. The result is not
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
        Rf_error("neither a list nor a vector of strings, numbers or logical values");
    }
}

/* Calls an R function with a number. The result is not protected. R may jump. */
SEXP rustcluster_call_with(void *function, double number)
{
    SEXP call = PROTECT(Rf_lang2((SEXP) function, R_NilValue));

    SETCADR(call, number <= INT_MAX ? Rf_ScalarInteger((int) number) : Rf_ScalarReal(number));
    SEXP value = Rf_eval(call, R_GlobalEnv);
    UNPROTECT(1);
    return value;
}

/* Returns whether parallel treats an object as an error. */
int rustcluster_is_error(void *value)
{
    return Rf_isObject((SEXP) value) && Rf_inherits((SEXP) value, "try-error");
}

/* Returns whether a string is marked as Latin-1. */
int rustcluster_is_latin1(void *string)
{
    return Rf_getCharCE((SEXP) string) == CE_LATIN1;
}
