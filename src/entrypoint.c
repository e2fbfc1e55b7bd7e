/* Registers the routines of the Rust library, and continues the R jumps that Rust code has stopped. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <R_ext/Rdynload.h>

void R_init_rustcluster_extendr(DllInfo *dll);
void rustcluster_register_mapped(DllInfo *dll);

/* Continues a jump. `token`: what a routine of the Rust library has returned instead of jumping. The jump skips
 * only frames of R from here on, and no Rust frames. */
SEXP rustcluster_continue_unwind(SEXP token)
{
    R_ContinueUnwind(token);
    return R_NilValue;
}

void R_init_rustcluster(DllInfo *dll)
{
    R_init_rustcluster_extendr(dll);
    rustcluster_register_mapped(dll);
    /* extendr registers only the routines of the Rust library. R finds the one above by its name. */
    R_useDynamicSymbols(dll, TRUE);
    R_forceSymbols(dll, FALSE);
}
