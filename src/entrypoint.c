/* Makes R load the routines of the Rust library, and takes up the jumps that it had to let lie. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <R_ext/Rdynload.h>

void R_init_rustcluster_extendr(DllInfo *dll);
void rustcluster_register_mapped(DllInfo *dll);

/* The jump that a call of ours returned as a token: R's own code is all that lies between here
 * and its target, so nothing of Rust's is skipped. */
SEXP rustcluster_continue_unwind(SEXP token)
{
    R_ContinueUnwind(token);
    return R_NilValue;
}

void R_init_rustcluster(DllInfo *dll)
{
    R_init_rustcluster_extendr(dll);
    rustcluster_register_mapped(dll);
    /* extendr registers its own routines only; the one above is found by name. */
    R_useDynamicSymbols(dll, TRUE);
    R_forceSymbols(dll, FALSE);
}
